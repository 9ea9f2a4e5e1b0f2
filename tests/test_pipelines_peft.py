"""PEFT's LoRA, as diffusers loads it, and our adapters on the same pipeline, in either order; and diffusers' method names."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from pipelinefiles import make_file, with_changes
from safetensors.torch import load_file
from smallpipelines import latents, pipeline, same_weights, weights_of
from test_pipelines import close, fingerprint, untouched

from lycoris_diff import AdapterError
from lycoris_diff.diffusion import (
    delete_adapter,
    explain,
    fuse_adapters,
    list_adapters,
    load_adapter,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)

pytest.importorskip("peft")

SOME = lambda path: "down_blocks.1.attentions" in path or "mid_block.attentions" in path or path.startswith("encoder.")
BOTH = ("unet", "text_encoder")


@pytest.fixture
def files(tmp_path):
    """A LoKr of ours and a kohya LoRA that diffusers reads, on overlapping modules, with their changes."""
    base = pipeline("sd15")
    ours = make_file(tmp_path / "ours.safetensors", base, "lokr", BOTH, SOME, seed=1, scale=0.2)
    theirs = make_file(
        tmp_path / "theirs.safetensors", base, "lora", BOTH, lambda p: SOME(p) and ".norm" not in p, seed=2, scale=0.2
    )
    return base, tmp_path / "ours.safetensors", ours, tmp_path / "theirs.safetensors", theirs


def load_theirs(pipe, path):
    pipe.load_lora_weights(path, adapter_name="theirs")


def with_both(order: str, base, own, foreign):
    pipe = copy.deepcopy(base)
    if order == "PEFT first":
        load_theirs(pipe, foreign)
        load_adapter(pipe, own, "ours")
    else:
        load_adapter(pipe, own, "ours")
        load_theirs(pipe, foreign)
    return pipe


@pytest.mark.parametrize("order", ["PEFT first", "ours first"])
def test_both_orders(order, files):
    base, own, ours, foreign, theirs = files
    pipe = with_both(order, base, own, foreign)
    assert list_adapters(pipe) == ["ours"]
    assert pipe.get_list_adapters() == {"unet": ["theirs"], "text_encoder": ["theirs"]}
    both = latents(with_changes(base, (ours, 1.0), (theirs, 1.0)))
    assert close(latents(pipe), both)
    assert {p for c in explain(pipe).components.values() for p in c} == {p for c in ours.values() for p in c}
    # every system's own switches
    set_adapters(pipe, {"ours": 0.5})
    pipe.set_adapters(["theirs"], [0.25])
    assert close(latents(pipe), latents(with_changes(base, (ours, 0.5), (theirs, 0.25))))
    pipe.disable_lora()
    assert close(latents(pipe), latents(with_changes(base, (ours, 0.5))))
    pipe.enable_lora()


@pytest.mark.parametrize("first_out", ["PEFT", "ours"])
@pytest.mark.parametrize("order", ["PEFT first", "ours first"])
def test_unloading_in_any_order_leaves_nothing(order, first_out, files):
    base, own, ours, foreign, theirs = files
    pipe = with_both(order, base, own, foreign)
    if first_out == "PEFT":
        pipe.unload_lora_weights()
        assert close(latents(pipe), latents(with_changes(base, (ours, 1.0))))
        unload_adapters(pipe)
    else:
        unload_adapters(pipe)
        assert close(latents(pipe), latents(with_changes(base, (theirs, 1.0))))
        pipe.unload_lora_weights()
    assert same_weights(pipe, base)
    assert not [name for name in vars(pipe.unet) if "lycoris" in name or name in ("load_lora_adapter", "unload_lora")]
    assert not [name for name in vars(pipe) if "lora_weights" in name]


def test_ours_alone_leaves_peft_as_it_was(files):
    base, own, _, foreign, _ = files
    pipe = copy.deepcopy(base)
    load_theirs(pipe, foreign)
    before, attributes = weights_of(pipe), fingerprint(pipe)
    load_adapter(pipe, own, "ours")
    fuse_adapters(pipe)
    unload_adapters(pipe)
    untouched(pipe, before, attributes)


def test_fusing_both(files):
    base, own, ours, foreign, theirs = files
    pipe = copy.deepcopy(base)
    load_adapter(pipe, own, "ours")
    load_theirs(pipe, foreign)
    both = latents(with_changes(base, (ours, 1.0), (theirs, 1.0)))
    fuse_adapters(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert close(latents(pipe), both)
    unfuse_adapters(pipe)
    assert close(latents(pipe), both)
    fuse_adapters(pipe)
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert close(latents(pipe), both)
    delete_adapter(pipe, "ours")
    assert close(latents(pipe), latents(with_changes(base, (theirs, 1.0))))


def test_deleting_pefts_adapter_keeps_ours(files):
    base, own, ours, foreign, _ = files
    pipe = copy.deepcopy(base)
    load_adapter(pipe, own, "ours")
    load_theirs(pipe, foreign)
    pipe.delete_adapters("theirs")
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0))))


def test_a_copy_of_the_pipeline_is_on_its_own(files):
    base, own, ours, foreign, theirs = files
    pipe = copy.deepcopy(base)
    load_adapter(pipe, own, "ours")
    twin = copy.deepcopy(pipe)
    unload_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))
    load_theirs(twin, foreign)
    assert close(latents(twin), latents(with_changes(base, (ours, 1.0), (theirs, 1.0))))
    twin.unload_lora_weights()
    unload_adapters(twin)
    assert torch.equal(latents(twin), latents(base))


def test_a_failing_peft_load_keeps_ours(files, tmp_path):
    base, own, ours, _, _ = files
    pipe = copy.deepcopy(base)
    load_adapter(pipe, own, "ours")
    with pytest.raises(Exception):  # noqa: B017
        pipe.load_lora_weights(tmp_path / "missing.safetensors")
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0))))


# --- diffusers' method names -----------------------------------------------------------------------------------------------
@pytest.fixture
def dropin(files):
    from lycoris_diff.diffusion.pipelines import StableDiffusionLycorisPipeline

    base = files[0]
    pipe = StableDiffusionLycorisPipeline(**base.components, requires_safety_checker=False)
    pipe = copy.deepcopy(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_drop_in_methods(dropin, files, tmp_path):
    base, own, ours, foreign, theirs = files
    pipe = dropin
    assert pipe.load_lora_weights(own).adapter_name == "default_0"
    pipe.load_lora_weights(str(foreign.parent), weight_name=foreign.name, adapter_name="theirs", low_cpu_mem_usage=True)
    assert pipe.get_active_adapters() == ["default_0", "theirs"]
    assert pipe.get_list_adapters() == {c: ["default_0", "theirs"] for c in BOTH}
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0), (theirs, 1.0))))
    pipe.set_adapters("theirs", 0.5)
    assert close(latents(pipe), latents(with_changes(base, (theirs, 0.5))))
    pipe.set_adapters(["theirs", "default_0"], [{"unet": {"mid": 0.0}}, 0.3])
    expected = with_changes(base, (ours, 0.3), (theirs, lambda c, p: 0.0 if p.startswith("mid_block") else 1.0))
    assert close(latents(pipe), latents(expected))
    pipe.disable_lora()
    assert torch.equal(latents(pipe), latents(base))
    pipe.enable_lora()
    pipe.set_adapters(["theirs"])
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"theirs"}
    assert close(latents(pipe), latents(with_changes(base, (theirs, 0.5))))
    pipe.unfuse_lora()
    assert close(latents(pipe), latents(with_changes(base, (theirs, 1.0))))
    pipe.delete_adapters("theirs")
    assert pipe.get_list_adapters() == {c: ["default_0"] for c in BOTH}
    pipe.unload_lora_weights()
    assert same_weights(pipe, base)
    assert pipe.get_active_adapters() == [] and pipe.get_list_adapters() == {}


def test_tensors_in_a_dict(dropin, files):
    base, own, ours, _, _ = files
    pipe = dropin
    tensors = load_file(own)
    report = pipe.load_lora_weights(tensors, adapter_name="a")
    assert report.source == f"a dict of {len(tensors)} tensors"
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0))))


def test_scale_of_a_call(dropin, files):
    base, own, ours, _, _ = files
    pipe = dropin
    pipe.load_lora_weights(own, adapter_name="a", weight=0.8)
    expected = latents(with_changes(base, (ours, 0.4)))
    assert close(latents(pipe, cross_attention_kwargs={"scale": 0.5}), expected)
    assert close(latents(pipe), latents(with_changes(base, (ours, 0.8))))
    assert list(inspect.signature(type(pipe).__call__).parameters)[:2] == ["self", "prompt"]


def test_drop_in_refusals(dropin, files):
    pipe, own = dropin, files[1]
    with pytest.raises(AdapterError, match="no adapter that can be read"):
        pipe.load_lora_weights({"a": torch.ones(1)})
    with pytest.raises(AdapterError, match="prepare_hotswap"):
        pipe.load_lora_weights(own, hotswap=True)
    pipe.load_lora_weights(own, adapter_name="a")
    for call in (
        lambda: pipe.set_adapters("b"),
        lambda: pipe.delete_adapters("b"),
        lambda: pipe.set_adapters(["a"], [1.0, 2.0]),
    ):
        with pytest.raises(AdapterError):
            call()


def test_peft_beside_the_drop_in_class(dropin, files):
    """diffusers' own loader stays within reach, and the methods serve both systems."""
    from diffusers import StableDiffusionPipeline

    base, own, ours, foreign, theirs = files
    pipe = dropin
    pipe.load_lora_weights(own, adapter_name="ours")
    StableDiffusionPipeline.load_lora_weights(pipe, foreign, adapter_name="theirs")
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0), (theirs, 1.0))))
    assert sorted(pipe.get_active_adapters()) == ["ours", "theirs"]
    pipe.set_adapters(["ours", "theirs"], [0.5, 0.25])
    assert close(latents(pipe), latents(with_changes(base, (ours, 0.5), (theirs, 0.25))))
    pipe.disable_lora()
    assert torch.equal(latents(pipe), latents(base))
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert same_weights(pipe, base)


def test_saved_pipelines_are_the_stock_ones(dropin, files, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    base, own, _, _, _ = files
    dropin.load_lora_weights(own)
    dropin.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(again) is StableDiffusionPipeline
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(again), latents(base), rtol=1e-5, atol=1e-5)  # memory may be aligned otherwise


def test_names_that_peft_has(files):
    from lycoris_diff import StableDiffusionLycorisPipeline

    base, own, _, foreign, _ = files
    pipe = copy.deepcopy(base)
    pipe.load_lora_weights(foreign)
    with pytest.raises(AdapterError, match="PEFT has an adapter 'default_0'"):
        load_adapter(pipe, own, "default_0")
    dropin = StableDiffusionLycorisPipeline(**pipe.components, requires_safety_checker=False)
    assert dropin.load_lora_weights(own).adapter_name == "default_1"


def test_names_that_ours_have(files):
    base, own, ours, foreign, _ = files
    pipe = copy.deepcopy(base)
    load_adapter(pipe, own, "style")
    with pytest.raises(AdapterError, match="'style' is taken"):
        pipe.load_lora_weights(foreign, adapter_name="style")
    assert pipe.get_list_adapters() == {}
    assert close(latents(pipe), latents(with_changes(base, (ours, 1.0))))
