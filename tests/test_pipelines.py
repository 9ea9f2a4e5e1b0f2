"""Adapter files on pipelines: the picture of changed weights, refusals that touch nothing, weights, fusing and unloading."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pipelinefiles import make_file, with_changes
from safetensors.torch import load_file, save_file
from smallpipelines import denoiser, latents, pipeline, weights_of

from lycoris_diff import AdapterError, CheckpointError
from lycoris_diff.diffusion import (
    LoadError,
    active_adapters,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    explain,
    fuse_adapters,
    fused_adapters,
    list_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)

COMPONENTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
STRENGTH = {"lora": 0.2, "lokr": 0.2, "loha": 1.0, "full": 0.2}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def untouched(pipe, before: dict, attributes: dict) -> None:
    """The pipeline is as if never touched: weights, names, modes, gradients, and the attributes of every module."""
    after = weights_of(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert fingerprint(pipe) == attributes


def fingerprint(pipe) -> dict:
    found = {"": [name for name in sorted(vars(pipe)) if "lora" in name or "adapter" in name or "lycoris" in name]}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{p}": (type(m), m.training, sorted(vars(m))) for p, m in part.named_modules()}
            found |= {f"{name}.{p}:grad": q.requires_grad for p, q in part.named_parameters()}
    return found


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha", "full"])
@pytest.mark.parametrize("family", list(COMPONENTS))
def test_picture_is_that_of_changed_weights(family, algorithm, tmp_path):
    pipe = pipeline(family)
    plain = latents(pipe)
    changes = make_file(tmp_path / "a.safetensors", pipe, algorithm, COMPONENTS[family], scale=STRENGTH[algorithm])
    expected = latents(with_changes(pipe, (changes, 0.7)))
    report = load_adapter(pipe, tmp_path / "a.safetensors", "style", weight=0.7)
    assert report.loaded and not report.problems
    assert report.components == {c: len(changes[c]) for c in COMPONENTS[family]}
    assert not close(plain, expected, 0.01), "the test's adapter does too little"
    assert close(latents(pipe), expected, 1e-3 if family == "sdxl" else 1e-4)


def test_report_says_what_was_found(tmp_path):
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet", "text_encoder"))
    report = load_adapter(pipe, tmp_path / "a.safetensors")
    for module in report.matched:
        delta = changes[module.component][module.path]
        assert module.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert (module.algorithm, module.rank, module.alpha, module.alpha_source) == ("LORA", 3, 2.0, "tensor")
        assert module.scale == pytest.approx(2 / 3)
    text = str(report)
    assert "unet: 272 modules (272 LORA)" in text or f"unet: {len(changes['unet'])} modules" in text
    assert "alpha from tensor" in text
    assert json.loads(json.dumps(report.to_dict()))["components"]["unet"] == len(changes["unet"])


def test_norm_of_a_lokr_ignores_its_alpha(tmp_path):
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lokr")
    report = load_adapter(pipe, tmp_path / "a.safetensors")
    assert all(m.scale == 1.0 and m.alpha_source == "ignored" for m in report.matched)
    assert all(m.norm == pytest.approx(float(changes["unet"][m.path].norm()), rel=1e-4) for m in report.matched)


# --- refusals ------------------------------------------------------------------------------------------------------------
def _rename(tensors, old, new):
    return {k.replace(old, new): v for k, v in tensors.items()}


def _first(tensors, end):
    return next(k for k in tensors if k.endswith(end))


def _cut(tensors):
    key = _first(tensors, "lora_up.weight")
    return {**tensors, key: tensors[key][:-1].clone()}


def _poison(tensors):
    key = _first(tensors, "lora_up.weight")
    return {**tensors, key: tensors[key] * float("nan")}


def _silence(tensors):
    return {k: v * 0 if "lora_te" in k and "lora_up" in k else v for k, v in tensors.items()}


BROKEN = {
    "renamed module": (
        lambda t: _rename(t, "down_blocks_1_attentions_0_proj_in", "down_blocks_1_attentions_0_prrj_in"),
        "prrj_in",
    ),
    "unknown tensor": (lambda t: {**t, "lora_unet_conv_in.mystery": torch.ones(3)}, "mystery"),
    "wrong shape": (_cut, "do not fit"),
    "not finite": (_poison, "NaN"),
    "no effect on a component": (_silence, "text_encoder"),
    "another pipeline's component": (lambda t: _rename(t, "lora_te1_", "lora_te3_"), "match no module"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_strict_loading_refuses_and_touches_nothing(case, tmp_path):
    spoil, word = BROKEN[case]
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet", "text_encoder"))
    save_file(spoil(load_file(tmp_path / "a.safetensors")), tmp_path / "b.safetensors")
    before, attributes = weights_of(pipe), fingerprint(pipe)
    with pytest.raises(LoadError) as caught:
        load_adapter(pipe, tmp_path / "b.safetensors", "style")
    untouched(pipe, before, attributes)
    assert word in str(caught.value)
    assert isinstance(caught.value, CheckpointError)
    assert not caught.value.report.loaded
    loose = load_adapter(pipe, tmp_path / "b.safetensors", "style", strict=False)
    assert loose.loaded and loose.problems == caught.value.report.problems
    assert list_adapters(pipe) == ["style"]


def test_every_single_lost_key_is_noticed(tmp_path):
    """Whatever tensor is misspelled, the refusal names it."""
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lokr", take=lambda p: "down_blocks.1.attentions.0" in p)
    tensors = load_file(tmp_path / "a.safetensors")
    for key in list(tensors)[::7]:
        wrong = key.replace("lora_unet_down", "lora_unet_dwon")
        save_file({wrong if k == key else k: v for k, v in tensors.items()}, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match="dwon"):
            load_adapter(pipe, tmp_path / "b.safetensors")


def test_a_file_for_another_base_model_is_recognised(tmp_path):
    pipe = pipeline("sd15")
    tensors = {}
    for stem, out, inp in [
        ("input_blocks_4_1_proj_in", 640, 640),
        ("middle_block_1_transformer_blocks_9_ff_net_2", 1280, 5120),
        ("input_blocks_4_1_transformer_blocks_1_attn2_to_k", 640, 2048),
    ]:
        tensors[f"lora_unet_{stem}.lora_up.weight"] = torch.ones(out, 2)
        tensors[f"lora_unet_{stem}.lora_down.weight"] = torch.ones(2, inp)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoadError, match=r"this looks like an SDXL file; the pipeline is SD1") as caught:
        load_adapter(pipe, tmp_path / "a.safetensors")
    assert caught.value.report.base_model == "sdxl"


def test_the_real_base_models_are_told_apart(tmp_path):
    """With the sizes of the real networks, the message says which they are."""
    from diffusers import UNet2DConditionModel

    from lycoris_diff.naming import BASES

    class Meta:
        def __init__(self, base):
            with torch.device("meta"):
                self.components = {"unet": UNet2DConditionModel(**BASES[base].components["unet"][1])}

    up, down = torch.ones(640, 2), torch.ones(2, 2048)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "xl.safetensors")
    for base, name in (("sd15", r"SD1\.5"), ("sd21", r"SD2\.1")):
        with pytest.raises(LoadError, match=rf"looks like an SDXL file; the pipeline is {name}"):
            load_adapter(Meta(base), tmp_path / "xl.safetensors")
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": torch.ones(2, 768)}, tmp_path / "sd.safetensors")
    with pytest.raises(LoadError, match=r"looks like an SD1\.5 file; the pipeline is SDXL") as caught:
        load_adapter(Meta("sdxl"), tmp_path / "sd.safetensors")
    assert caught.value.report.unmatched or caught.value.report.wrong_shape


def test_failure_while_attaching_leaves_nothing_behind(tmp_path, monkeypatch):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet", "text_encoder"))
    before, attributes = weights_of(pipe), fingerprint(pipe)
    from lycoris_diff.diffusion import loading

    real, calls = loading.attach, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, "attach", failing)
    with pytest.raises(MemoryError):
        load_adapter(pipe, tmp_path / "a.safetensors")
    untouched(pipe, before, attributes)
    monkeypatch.undo()
    # interrupted in the middle of one component
    from lycoris_diff import injection

    def interrupted(model, swaps):
        some = dict(list(swaps.items())[: len(swaps) // 2])
        replace(model, some)
        if some and len(swaps) > 2:
            monkeypatch.undo()
            raise KeyboardInterrupt

    replace = injection.replace_modules
    monkeypatch.setattr(injection, "replace_modules", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(pipe, tmp_path / "a.safetensors")
    untouched(pipe, before, attributes)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"adapter_name": "a.b"}, "name"),
        ({"components": ["unnet"]}, "unet"),
        ({"weight": float("nan")}, "finite"),
        ({"weight": {"unett": 1.0}}, "unett"),
        ({"weight": "strong"}, "finite"),
        ({"wieght": 0.5}, "weight"),
    ],
)
def test_bad_arguments(arguments, word, tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", take=lambda p: "attn1" in p)
    before, attributes = weights_of(pipe), fingerprint(pipe)
    with pytest.raises(AdapterError, match=word):
        load_adapter(pipe, tmp_path / "a.safetensors", **arguments)
    untouched(pipe, before, attributes)


def test_not_a_pipeline_and_no_such_file(tmp_path):
    with pytest.raises(AdapterError, match="pipeline"):
        load_adapter(torch.nn.Linear(2, 2), "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_adapter(pipeline("sd15"), tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="Hub"):
        load_adapter(pipeline("sd15"), "nobody/nothing-of-this-name")


# --- where files are -------------------------------------------------------------------------------------------------------
def test_directories_and_weight_names(tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora")
    assert load_adapter(pipe, tmp_path, "one").loaded
    make_file(tmp_path / "b.safetensors", pipeline("sd15"), "lokr")
    with pytest.raises(CheckpointError, match="weight_name"):
        load_adapter(pipe, tmp_path, "two")
    assert load_adapter(pipe, str(tmp_path), "two", weight_name="b.safetensors").algorithms.keys() == {"LOKR"}
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        load_adapter(pipe, tmp_path, "three", weight_name="c.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "old.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(pipe, tmp_path / "empty", "three")


def test_hub_repositories_from_the_cache(tmp_path):
    """A repository in the cache is found without a connection."""
    pipe = pipeline("sd15")
    folder = tmp_path / "models--someone--style"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    make_file(snapshot / "style.safetensors", pipe, "lora")
    report = load_adapter(pipe, "someone/style", cache_dir=tmp_path)
    assert report.loaded and report.source == "someone/style"


def test_hub_repositories_are_downloaded_in_part(tmp_path, monkeypatch):
    """Of a repository only what is read is brought to the cache."""
    import huggingface_hub

    pipe = pipeline("sd15")
    make_file(tmp_path / "style.safetensors", pipe, "lora")
    asked = []
    listing = ["README.md", "style.safetensors", "samples/a.png", "optimizer.safetensors"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, *args, **kwargs: listing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: asked.append(kwargs) or str(tmp_path))
    assert load_adapter(pipe, "someone/style", revision="v1").loaded
    assert asked == [{"allow_patterns": ["style.safetensors"], "revision": "v1"}]


def test_the_file_may_be_written_over(tmp_path):
    """Factors are in memory of their own; a trainer may truncate the file it came from."""
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lora", scale=0.3)
    expected = latents(with_changes(pipe, (changes, 1.0)))
    load_adapter(pipe, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert close(latents(pipe), expected)
    fuse_adapters(pipe)
    assert close(latents(pipe), expected)


def test_components_choose(tmp_path):
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet", "text_encoder"), scale=0.3)
    expected = latents(with_changes(pipe, ({"unet": changes["unet"]}, 1.0)))
    report = load_adapter(pipe, tmp_path / "a.safetensors", components=["unet"])
    assert report.skipped == {"text_encoder": len(changes["text_encoder"])}
    assert not report.problems
    assert close(latents(pipe), expected)


def test_harmless_extras_are_reported(tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora")
    extra = {"bundle_emb.cat.string_to_param.*": torch.ones(2, 8)}
    save_file({**load_file(tmp_path / "a.safetensors"), **extra}, tmp_path / "b.safetensors")
    report = load_adapter(pipe, tmp_path / "b.safetensors")
    assert report.extras == list(extra)
    assert "harmless" in str(report)


# --- several at once -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A pipeline with a LoRA, a LoKr and a LoHa, the same without, and the adapters' changes."""
    folder = tmp_path_factory.mktemp("files")
    pipe, base = pipeline("sd15"), pipeline("sd15")
    both = ("unet", "text_encoder")
    files = {"style": ("lora", both), "subject": ("lokr", both), "light": ("loha", ("unet",))}
    changes = {}
    for seed, (name, (algorithm, components)) in enumerate(files.items()):
        take = lambda path: not path.startswith(("up_blocks.2", "up_blocks.3", "down_blocks.2")) and "ff" not in path
        changes[name] = make_file(folder / f"{name}.safetensors", base, algorithm, components, take, seed, scale=0.2)
        load_adapter(pipe, folder / f"{name}.safetensors", name)
    return pipe, base, changes


@pytest.fixture
def mixed(built):
    """A copy of the pipeline for every test."""
    pipe, base, changes = built
    return copy.deepcopy(pipe), base, changes


def test_mixing(mixed):
    pipe, base, changes = mixed
    assert list_adapters(pipe) == active_adapters(pipe) == ["style", "subject", "light"]
    assert close(latents(pipe), latents(with_changes(base, *((c, 1.0) for c in changes.values()))))
    set_adapters(pipe, {"light": -0.5, "style": 0.8})
    assert sorted(active_adapters(pipe)) == ["light", "style"]
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], 0.8), (changes["light"], -0.5))))
    set_adapters(pipe, ["subject"])
    assert close(latents(pipe), latents(with_changes(base, (changes["subject"], 1.0))))


def test_all_zero_and_all_off_equal_the_base_exactly(mixed):
    pipe, base, _ = mixed
    plain = latents(base)
    set_adapters(pipe, dict.fromkeys(["style", "subject", "light"], 0.0))
    assert torch.equal(latents(pipe), plain)
    set_adapters(pipe, {})
    assert torch.equal(latents(pipe), plain)
    set_adapters(pipe, {"style": 1.0})
    disable_adapters(pipe)
    assert torch.equal(latents(pipe), plain)
    enable_adapters(pipe)
    assert not torch.equal(latents(pipe), plain)


SPECS = {
    "components": ({"unet": 1.0, "text_encoder": 0.5}, lambda c, p: {"unet": 1.0, "text_encoder": 0.5}[c]),
    "one component": ({"unet": 0.5}, lambda c, p: 0.5 if c == "unet" else 0.0),
    "pattern": ({"*": 1.0, "attn2": 0.25}, lambda c, p: 0.25 if ".attn2." in p else 1.0),
    "path": ({"down_blocks.1": 0.5}, lambda c, p: 0.5 if p.startswith("down_blocks.1.") else 0.0),
    "regular expression": ({"attn[12]\\.to_[kv]": 2.0}, lambda c, p: 2.0 if p.endswith(("to_k", "to_v")) else 0.0),
    "nested": (
        {"unet": {"up_blocks.1": {"attn1": 0.5}}},
        lambda c, p: 0.5 if p.startswith("up_blocks.1.") and ".attn1." in p else 0.0,
    ),
    "diffusers' blocks": (
        {"unet": {"down": {"block_1": [0.25, 0.75]}, "mid": 1.0}},
        lambda c, p: 1.0 if p.startswith("mid_block") else 0.0 if not p.startswith("down_blocks.1.") else
        0.25 if p.startswith(("down_blocks.1.attentions.0", "down_blocks.1.resnets.0")) else 0.75,
    ),
    "last key counts": ({"attn1": 0.1, "*": 1.0}, lambda c, p: 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SPECS))
def test_weights_by_component_block_and_pattern(case, mixed):
    pipe, base, changes = mixed
    spec, expected = SPECS[case]
    set_adapters(pipe, {"style": spec})
    for component, modules in explain(pipe).components.items():
        for path, found in modules.items():
            own = next((s for s in found if s.adapter == "style"), None)
            if own is not None:
                assert own.weight == expected(component, path), path
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], expected))))


@pytest.mark.parametrize(
    "weights, word",
    [
        ({"stile": 1.0}, "style"),
        ({"style": {"unett": 1.0}}, "unet"),
        ({"style": {"text_encoder_2": 1.0}}, "text_encoder"),
        ({"style": {"unet": {"down_blocks.9": 1.0}}}, "down_blocks"),
        ({"style": {"unet": {"down": {"block_7": 1.0}}}}, "7"),
        ({"style": {"unet": "all"}}, "finite"),
        ({"style": {"unet": {"(": 1.0}}}, "pattern"),
        ({"style": float("inf")}, "finite"),
        ({"style": True}, "finite"),
        ({"style": {"unet": [1.0]}}, "block"),
        ({"light": {"text_encoder": 1.0}}, "text_encoder"),
    ],
)
def test_unknown_names_raise_and_change_nothing(weights, word, mixed):
    pipe, _, _ = mixed
    before = explain(pipe)
    with pytest.raises(AdapterError, match=word):
        set_adapters(pipe, {"subject": 0.3, **weights})
    assert explain(pipe) == before


def test_explain_lists_every_module(mixed):
    pipe, _, changes = mixed
    set_adapters(pipe, {"style": 0.5, "light": {"unet": 2.0}})
    text = str(explain(pipe))
    for component in ("unet", "text_encoder"):
        for path in changes["style"][component]:
            assert f"{component}.{path}: " in text
    line = next(line for line in text.splitlines() if line.startswith("unet.down_blocks.0.attentions.0.proj_in:"))
    assert "style 0.333333" in line and "light 1 " in line and "subject 0 (LOKR, off" in line
    assert explain(pipeline("sd15")).components == {}


def test_taken_names(mixed, tmp_path):
    pipe, _, _ = mixed
    make_file(tmp_path / "x.safetensors", pipeline("sd15"), "lora", ("text_encoder",))
    with pytest.raises(AdapterError, match="light"):
        load_adapter(pipe, tmp_path / "x.safetensors", "light")


def test_delete_and_unload(mixed):
    pipe, base, changes = mixed
    delete_adapter(pipe, "subject")
    assert list_adapters(pipe) == ["style", "light"]
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], 1.0), (changes["light"], 1.0))))
    with pytest.raises(AdapterError, match="subject"):
        delete_adapter(pipe, "subject")
    fuse_adapters(pipe)
    unload_adapters(pipe)
    untouched(pipe, weights_of(base), fingerprint(base))
    unload_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))


def test_deleting_one_by_one_leaves_nothing(mixed):
    pipe, base, _ = mixed
    for name in list_adapters(pipe):
        delete_adapter(pipe, name)
    untouched(pipe, weights_of(base), fingerprint(base))


# --- fusing ----------------------------------------------------------------------------------------------------------------
def test_fuse_and_unfuse_bit_for_bit(mixed):
    pipe, base, changes = mixed
    set_adapters(pipe, {"style": 0.5, "light": 1.0})
    beside = latents(pipe)
    original = weights_of(base)
    assert fuse_adapters(pipe) == ["style", "light"]
    assert close(latents(pipe), beside) and close(
        latents(pipe), latents(with_changes(base, (changes["style"], 0.5), (changes["light"], 1.0)))
    )
    set_adapters(pipe, {"style": 1.0})
    assert fused_adapters(pipe) == ["style"]
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], 1.0))))
    fuse_adapters(pipe, "subject")
    assert fused_adapters(pipe) == ["style", "subject"]
    unfuse_adapters(pipe)
    assert fused_adapters(pipe) == []
    found = {k.replace(".base_layer", ""): v for k, v in weights_of(pipe).items() if ".adapters." not in k}
    assert all(torch.equal(found[k], v) for k, v in original.items())
    delete_adapter(pipe, "subject")


def test_fusing_with_a_factor_is_forgotten_by_unfusing(mixed):
    pipe, base, changes = mixed
    set_adapters(pipe, {"style": 0.8})
    before = explain(pipe)
    fuse_adapters(pipe, scale=0.5, components=["unet"])
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], lambda c, p: 0.4 if c == "unet" else 0.8))))
    unfuse_adapters(pipe)
    assert explain(pipe) == before
    fuse_adapters(pipe, scale=0.5)
    with torch.no_grad():
        pipe.unet.conv_in.adapter("subject").lokr_w1.fill_(float("nan"))
    with pytest.raises(AdapterError, match="finite"):
        fuse_adapters(pipe, "subject", scale=0.1)
    assert fused_adapters(pipe) == ["style"]
    set_adapters(pipe, {"style": 1.0})
    assert close(latents(pipe), latents(with_changes(base, (changes["style"], 1.0))))
    unfuse_adapters(pipe)
    assert {s.weight for c in explain(pipe).components.values() for m in c.values() for s in m if s.adapter == "style"} == {1.0}


def test_disabling_while_fused(mixed):
    pipe, base, _ = mixed
    fuse_adapters(pipe)
    with_adapters = latents(pipe)
    disable_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))
    enable_adapters(pipe)
    assert torch.equal(latents(pipe), with_adapters)
    assert fused_adapters(pipe)


def test_unsafe_result_is_refused(tmp_path):
    pipe = pipeline("sd15", torch.float16)
    make_file(tmp_path / "a.safetensors", pipe, "lora", scale=60000.0, dtype=torch.float32)
    report = load_adapter(pipe, tmp_path / "a.safetensors", strict=False)
    assert report.non_finite or report.loaded
    unload_adapters(pipe)
    make_file(tmp_path / "b.safetensors", pipe, "full", scale=60000.0, dtype=torch.float32, take=lambda p: "attn1.to_q" in p)
    load_adapter(pipe, tmp_path / "b.safetensors", weight=8.0)
    before = weights_of(pipe)
    with pytest.raises(AdapterError, match="finite"):
        fuse_adapters(pipe)
    assert fused_adapters(pipe) == []
    assert all(torch.equal(v, before[k]) for k, v in weights_of(pipe).items())


def test_values_beyond_half_precision_are_named(tmp_path):
    pipe = pipeline("sd15", torch.float16)
    make_file(tmp_path / "a.safetensors", pipe, "lora", scale=1e6, dtype=torch.float32, take=lambda p: "attn1.to_q" in p)
    with pytest.raises(LoadError, match="float16"):
        load_adapter(pipe, tmp_path / "a.safetensors")


def test_merge_for_good(mixed):
    pipe, base, changes = mixed
    set_adapters(pipe, {"style": 0.5, "subject": {"unet": 1.0}})
    fuse_adapters(pipe, "style")
    steps = []
    count = merge_adapters(pipe, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (count, count)
    expected = with_changes(base, (changes["style"], 0.5), ({"unet": changes["subject"]["unet"]}, 1.0))
    found = weights_of(pipe)
    assert all(close(found[key].float(), value.float(), 1e-6) for key, value in weights_of(expected).items())
    assert close(latents(pipe), latents(expected))
    assert fingerprint(pipe) == fingerprint(base)


# --- changes that are no sum -----------------------------------------------------------------------------------------------
def test_dora_is_taken_against_the_unmodified_weight(tmp_path):
    """Strength m means W + m (W_adapted - W), also beside another adapter and while that is fused."""
    base = pipeline("sd15")
    take = lambda path: ".attn1.to_q" in path or ".resnets.0.conv1" in path
    deltas = make_file(tmp_path / "a.safetensors", base, "lora", take=take, scale=0.5)["unet"]
    other = make_file(tmp_path / "b.safetensors", base, "lokr", take=take, seed=1, scale=0.3)
    tensors, changes = load_file(tmp_path / "a.safetensors"), {}
    for path, delta in deltas.items():
        weight = base.unet.get_submodule(path).weight.detach().double()
        ones = [1] * (weight.dim() - 1)
        magnitude = torch.rand(weight.shape[0], dtype=torch.float64).add(0.5).float()
        norms = (weight + delta).flatten(1).norm(dim=1).view(-1, *ones)
        changes[path] = (weight + delta) / norms * magnitude.double().view(-1, *ones) - weight
        tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = magnitude.view(-1, *ones)
    save_file(tensors, tmp_path / "dora.safetensors")
    dora = {"unet": changes}
    pipe = copy.deepcopy(base)
    report = load_adapter(pipe, tmp_path / "dora.safetensors", "dora", weight=0.6)
    for module in report.matched:
        assert module.norm == pytest.approx(float(changes[module.path].norm()), rel=1e-3)
    assert close(latents(pipe), latents(with_changes(base, (dora, 0.6))))
    load_adapter(pipe, tmp_path / "b.safetensors", "other")
    both = latents(with_changes(base, (dora, 0.6), (other, 1.0)))
    assert close(latents(pipe), both)
    fuse_adapters(pipe, "other")
    assert close(latents(pipe), both)
    fuse_adapters(pipe, "dora")
    assert close(latents(pipe), both)
    set_adapters(pipe, {"dora": 0.0, "other": 0.0})
    assert torch.equal(latents(pipe), latents(base))


def test_norms_and_biases(tmp_path):
    base = pipeline("sd15")
    changed, tensors = copy.deepcopy(base), {}
    with torch.no_grad():
        for path, module in base.unet.named_modules():
            twin, stem = changed.unet.get_submodule(path), f"lora_unet_{path.replace('.', '_')}"
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                for name, suffix in (("weight", "w_norm"), ("bias", "b_norm")):
                    tensors[f"{stem}.{suffix}"] = torch.randn_like(getattr(module, name)) * 0.3
                    getattr(twin, name).add_(0.5 * tensors[f"{stem}.{suffix}"])
            elif path.endswith(".conv1"):
                tensors[f"{stem}.diff"] = torch.randn_like(module.weight) * 0.1
                tensors[f"{stem}.diff_b"] = torch.randn_like(module.bias) * 0.3
                twin.weight.add_(0.5 * tensors[f"{stem}.diff"])
                twin.bias.add_(0.5 * tensors[f"{stem}.diff_b"])
    save_file(tensors, tmp_path / "a.safetensors")
    pipe = copy.deepcopy(base)
    before, attributes = weights_of(pipe), fingerprint(pipe)
    report = load_adapter(pipe, tmp_path / "a.safetensors", weight=0.5)
    assert report.algorithms.keys() == {"NORM", "FULL"} and all(m.norm for m in report.matched)
    expected = latents(changed)
    assert close(latents(pipe), expected) and not close(latents(base), expected, 0.01)
    fuse_adapters(pipe)
    assert close(latents(pipe), expected)
    unfuse_adapters(pipe)
    set_adapters(pipe, {"default": 0.0})
    assert torch.equal(latents(pipe), latents(base))
    set_adapters(pipe, {"default": 0.5})
    merged = copy.deepcopy(pipe)
    unload_adapters(pipe)
    untouched(pipe, before, attributes)
    merge_adapters(merged)
    assert close(latents(merged), expected)


# --- precision -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(dtype, tmp_path):
    pipe = pipeline("sd15", dtype)
    changes = make_file(tmp_path / "a.safetensors", pipe, "lokr", ("unet", "text_encoder"), scale=0.2, dtype=torch.float32)
    load_adapter(pipe, tmp_path / "a.safetensors")
    unet = denoiser(pipe)
    assert {p.dtype for n, p in unet.named_parameters() if ".adapters." in n} == {dtype}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    changed = with_changes(pipeline("sd15"), (changes, 1.0))
    expected = latents(changed, latents=noise)
    rounding = (latents(changed.to(dtype), latents=noise.to(dtype)) - expected).norm()
    assert (latents(pipe, latents=noise.to(dtype)) - expected).norm() < 2 * rounding
    fuse_adapters(pipe)
    assert (latents(pipe, latents=noise.to(dtype)) - expected).norm() < 2 * rounding


def test_what_is_loaded_while_disabled_stays_off(tmp_path):
    pipe = pipeline("sd15")
    before = latents(pipe)
    path = tmp_path / "a.safetensors"
    make_file(path, pipe)
    load_adapter(pipe, path, "a")
    disable_adapters(pipe)
    load_adapter(pipe, path, "b")
    assert torch.equal(latents(pipe), before)
    enable_adapters(pipe)
    assert active_adapters(pipe) == ["a", "b"] and not torch.equal(latents(pipe), before)


# --- what users do that nobody planned -------------------------------------------------------------------------------------
def test_deleting_activates_nothing_else(mixed, tmp_path, monkeypatch):
    pipe, base, _ = mixed
    set_adapters(pipe, {"style": 1.0})
    delete_adapter(pipe, "style")
    assert active_adapters(pipe) == [] and torch.equal(latents(pipe), latents(base))
    delete_adapter(pipe, "subject")
    assert active_adapters(pipe) == []
    # nor does a load that fails half-way
    from lycoris_diff.diffusion import loading

    def interrupted(*_):
        raise KeyboardInterrupt

    make_file(tmp_path / "x.safetensors", base, "lora", take=lambda p: "attn1" in p)
    monkeypatch.setattr(loading, "remember", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(pipe, tmp_path / "x.safetensors", "x")
    assert list_adapters(pipe) == ["light"] and active_adapters(pipe) == []


def test_changes_while_disabled_wait(mixed):
    pipe, base, changes = mixed
    off = latents(base)
    set_adapters(pipe, {"style": 1.0})
    disable_adapters(pipe)
    fuse_adapters(pipe)
    assert torch.equal(latents(pipe), off)
    enable_adapters(pipe)
    assert fused_adapters(pipe) == ["style"]
    disable_adapters(pipe)
    set_adapters(pipe, {"light": 1.0})
    assert torch.equal(latents(pipe), off)
    enable_adapters(pipe)
    assert fused_adapters(pipe) == [] and close(latents(pipe), latents(with_changes(base, (changes["light"], 1.0))))
    fuse_adapters(pipe)
    disable_adapters(pipe)
    unfuse_adapters(pipe)
    enable_adapters(pipe)
    assert fused_adapters(pipe) == []
    fuse_adapters(pipe)
    disable_adapters(pipe)
    delete_adapter(pipe, "light")
    enable_adapters(pipe)
    unload_adapters(pipe)
    untouched(pipe, weights_of(base), fingerprint(base))


def test_fused_projections_are_not_bypassed_in_silence(tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", take=lambda p: p.endswith("attn1.to_q"))
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(LoadError, match="unfuse_qkv_projections"):
        load_adapter(pipe, tmp_path / "a.safetensors")
    pipe.unfuse_qkv_projections(vae=False)
    base = latents(pipe)
    load_adapter(pipe, tmp_path / "a.safetensors")
    assert not close(latents(pipe), base)
    with pytest.raises(AdapterError, match="merge_adapters"):
        pipe.fuse_qkv_projections(vae=False)
    unload_adapters(pipe)
    pipe.fuse_qkv_projections(vae=False)


@pytest.mark.parametrize(
    "source, word",
    [
        (None, "None"),
        (5, "source is 5"),
        ("", "source is ''"),
        ({"unet": {}}, "dict of torch tensors"),
        ({1: torch.zeros(2)}, "dict of torch tensors"),
        ({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, device="meta")}, "meta"),
        ({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_sources_of_another_kind(source, word):
    with pytest.raises(CheckpointError, match=word):
        load_adapter(pipeline("sd15"), source)


def test_refusal_says_what_was_left_out(tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", take=lambda p: p.endswith("attn1.to_q"))
    with pytest.raises(LoadError, match=r"left out on request: 16 modules of unet"):
        load_adapter(pipe, tmp_path / "a.safetensors", components=["text_encoder"])


def test_numbers_as_weights(mixed):
    import numpy as np

    pipe, _, _ = mixed
    set_adapters(pipe, {"style": np.float32(0.5)})
    before = explain(pipe)
    with pytest.raises(AdapterError, match="finite"):
        set_adapters(pipe, {"style": 1e300})
    assert explain(pipe) == before


def test_weights_that_name_nothing_and_other_base_models_are_refused(tmp_path):
    pipe = pipeline("sd15")
    path = tmp_path / "a.safetensors"
    make_file(path, pipe)
    load_adapter(pipe, path, "a", weight=0.5)
    for weights in ({}, 10**400, 1e39):
        with pytest.raises(AdapterError, match="weight"):
            set_adapters(pipe, {"a": weights})
    assert {s.weight for found in explain(pipe).components["unet"].values() for s in found} == {0.5}
    with pytest.raises(AdapterError, match="sd99"):
        save_adapter(pipe, tmp_path / "b.safetensors", "a", base_model="sd99")
    assert not (tmp_path / "b.safetensors").exists()
