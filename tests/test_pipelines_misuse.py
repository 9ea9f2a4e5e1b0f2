"""What looks like an ordinary call and cannot be meant so is refused, or does what it says, and nothing is left half done."""

from __future__ import annotations

import json

import pytest
import torch
from cases import ALGORITHMS
from more_adapters import EVERY, filled
from pipelinefiles import make_file
from safetensors.torch import load_file, save_file
from smallpipelines import latents, pipeline

from lycoris_diff import (
    AdapterError,
    CheckpointError,
    StableDiffusionLycorisPipeline,
    adapters_per_sample,
    convert_checkpoint,
    explain,
    fuse_adapters,
    inject_adapter,
    load_adapter,
    prepare_hotswap,
    save_adapter,
    set_adapters,
    unfuse_adapters,
)


def few(path):
    return path.startswith("mid_block") or "text_model" in path


@pytest.fixture
def files(tmp_path):
    base = pipeline("sd15")
    for seed, (name, algorithm) in enumerate({"a": "lora", "b": "lokr"}.items()):
        make_file(tmp_path / f"{name}.safetensors", base, algorithm, ("unet",), few, seed)
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def with_file(path, weight=1.0):
    pipe = pipeline("sd15", torch.float64)
    load_adapter(pipe, path, "x", weight)
    return pipe


def strengths(pipe):
    return {s.weight for modules in explain(pipe).components.values() for own in modules.values() for s in own}


# ------------------------------------------------------------------------------------------------------------ contents
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_contents_exchanged_while_fused(scale, files):
    pipe = pipeline("sd15", torch.float64)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    prepare_hotswap(pipe, list(files), "x")
    load_adapter(pipe, files[0], "x", hotswap=True)
    fuse_adapters(pipe, scale=scale)
    torch.testing.assert_close(latents(pipe), latents(with_file(files[0], scale)))
    load_adapter(pipe, files[1], "x", 0.3, hotswap=True)
    torch.testing.assert_close(latents(pipe), latents(with_file(files[1], 0.3)))
    unfuse_adapters(pipe)
    torch.testing.assert_close(latents(pipe), latents(with_file(files[1], 0.3)))
    after = {name.replace("base_layer.", ""): value for name, value in pipe.unet.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ------------------------------------------------------------------------------------------------------------- samples
TWO = "4 are to be drawn \\(2 prompts, 2 of each"


@pytest.mark.parametrize(("prompts", "each", "drawn"), [(["a", "b"], 2, TWO), (["a"], 1, "1 are"), ("a", 1, "1 are")])
def test_other_numbers_of_pictures(prompts, each, drawn, files):
    pipe = pipeline("sd15")
    cls = type(pipe)
    load_adapter(pipe, files[0], "x")
    with adapters_per_sample(pipe, ["x", None]), pytest.raises(AdapterError, match=f"for 2 pictures, and {drawn}"):
        pipe(prompts, num_inference_steps=1, num_images_per_prompt=each, output_type="latent", height=16, width=16)
    assert type(pipe) is cls


def test_entries_for_every_picture(files):
    """Two of each prompt: what is drawn with and without an adapter follows the pictures."""
    pipe = pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)
    load_adapter(pipe, files[0], "x")

    def draw():
        noise = [torch.Generator().manual_seed(i) for i in range(4)]
        call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "height": 16, "width": 16}
        return pipe(["a cat", "a dog"], generator=noise, output_type="latent", **call).images

    on = draw()
    set_adapters(pipe, [])
    off = draw()
    with adapters_per_sample(pipe, ["x", None, "x", "x"]):
        found = draw()
    torch.testing.assert_close(found, torch.stack([on[0], off[1], on[2], on[3]]), rtol=1e-3, atol=1e-3)


def test_the_name_of_the_base_model(files):
    pipe = pipeline("sd15")
    with pytest.raises(AdapterError, match="stands for the base model"):
        load_adapter(pipe, files[0], "__base__")


# -------------------------------------------------------------------------------------------------------------- scales
@pytest.mark.parametrize("scale", [1e20, float("nan"), float("inf"), 10**400, None, "1"])
def test_scales_that_are_none(scale, files):
    pipe = StableDiffusionLycorisPipeline(**pipeline("sd15").components, requires_safety_checker=False)
    load_adapter(pipe, files[0], "x")
    set_adapters(pipe, {"x": {"*": 1.0, "mid_block.resnets": 1e30}})
    before = strengths(pipe)
    assert 1e30 in before
    with pytest.raises(AdapterError, match="scale is"):
        fuse_adapters(pipe, scale=scale)
    assert strengths(pipe) == before
    with pytest.raises(AdapterError, match="scale is"):
        latents(pipe, cross_attention_kwargs={"scale": scale})
    assert strengths(pipe) == before


# --------------------------------------------------------------------------------------------------------------- files
def adapted(tmp_path, make, format, components=("unet",), family="sd15", targets=("to_q",)):
    pipe = pipeline(family)
    for component in components:
        config = make()
        config.target_modules = list(targets)
        inject_adapter(getattr(pipe, component), config, "a")
        filled(getattr(pipe, component), 0.2)
    path = tmp_path / ("out" if format == "peft" else "out.safetensors")
    save_adapter(pipe, path, "a", format=format)
    return pipe, path


@pytest.mark.parametrize("fields", [{"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 9}])
def test_onetrainer_knows_one_series(fields, tmp_path):
    make = lambda: EVERY["more-oft"]().for_layer(**fields)
    with pytest.raises(CheckpointError, match="series of five terms"):
        adapted(tmp_path, make, "onetrainer")
    adapted(tmp_path, make, "peft")


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [
        (1e4, torch.float8_e4m3fn, "too large for torch.float8_e4m3fn"),
        (1e6, torch.float8_e5m2, "too large for torch.float8_e5m2"),
        (1e6, torch.float16, "too large for torch.float16"),
        (1e-7, torch.float8_e4m3fn, "all of them zero in torch.float8_e4m3fn"),
        (1e-9, torch.float16, "all of them zero in torch.float16"),
    ],
)
def test_values_that_a_dtype_has_not(factor, dtype, message, files, tmp_path):
    tensors = {name: value * factor if "lora_up" in name else value for name, value in load_file(files[0]).items()}
    save_file(tensors, tmp_path / "scaled.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "scaled.safetensors", tmp_path / "out.safetensors", format="kohya", dtype=dtype)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected a dict"),
        ({"(": 8}, "no regular expression"),
        ({"([a-z_0-9.]+)+!": 8}, "can take for ever"),
        ({"((a|b)c)*!": 8}, "can take for ever"),
        ({r"(\w+\.){2,}x": 8}, "can take for ever"),
    ],
)
def test_patterns_of_strangers(value, message, tmp_path):
    _, path = adapted(tmp_path, ALGORITHMS["lora"], "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": value}))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(pipeline("sd15"), path)


@pytest.mark.parametrize(
    "pattern", [r"(down|mid|up)_blocks?\..*to_q", r"[(+*]?to_q", r"\(?to_q", r".*attentions\.(\d+)\..*to_q"]
)
def test_patterns_of_friends(pattern, tmp_path):
    _, path = adapted(tmp_path, ALGORITHMS["lora"], "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {pattern: 2 * config["lora_alpha"]}}))
    pipe, plain = pipeline("sd15"), pipeline("sd15")
    load_adapter(pipe, path, "a", 0.5)
    (path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(plain, path, "a")
    torch.testing.assert_close(latents(pipe), latents(plain))


def test_the_second_text_encoder_alone(tmp_path):
    """It stays the second one, also where both have the same sizes."""
    _, path = adapted(tmp_path, ALGORITHMS["lora"], "peft", ("text_encoder_2",), "sdxl", ("q_proj",))
    assert (path / "text_encoder_2" / "adapter_config.json").is_file()
    assert load_adapter(pipeline("sdxl"), path).components.keys() == {"text_encoder_2"}


def test_two_names_with_other_factors_are_told(files, tmp_path):
    """One is used, as of identical ones; the report says that the other was not the same."""
    pipe = pipeline("sd15")
    load_adapter(pipe, files[0], "x")
    save_adapter(pipe, tmp_path / "c.safetensors", "x", format="comfyui")
    one, other = load_file(files[0]), load_file(tmp_path / "c.safetensors")
    for factor, told in ((1.0, False), (-2.0, True)):
        changed = {name: value * factor if "down" in name else value for name, value in other.items()}
        save_file({**one, **changed}, tmp_path / "both.safetensors")
        notes = " ".join(load_adapter(pipeline("sd15"), tmp_path / "both.safetensors").notes)
        assert "under two names" in notes and ("other factors" in notes) is told
