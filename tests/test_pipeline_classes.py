"""The ready pipeline classes, by import and as custom pipelines of diffusers; and adapters saved from pipelines."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelinefiles import make_file, with_changes
from smallpipelines import SIDE, WORDS, denoiser, latents, pipeline
from test_pipelines import close

import lycoris_diff
from lycoris_diff import AdapterError, load_adapter, save_adapter, unload_adapters
from lycoris_diff.diffusion import checkpoint_of, pipelines

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "pipelines").glob("*.py"))
FAMILIES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd15", "Flux": "flux"}
CLASSES = sorted(name for name in vars(pipelines) if name.endswith("LycorisPipeline"))


def family_of(name: str) -> str:
    return next(family for start, family in FAMILIES.items() if name.startswith(start))


def picture(pipe, **call) -> torch.Tensor:
    """One call of any of the classes, with an image and a mask where it takes them."""
    known = inspect.signature(pipe.__call__).parameters
    image = Image.new("RGB", (SIDE, SIDE), "gray")
    given = {"image": image, "mask_image": Image.new("L", (SIDE, SIDE), 255), "height": SIDE, "width": SIDE}
    given = {**given, "max_sequence_length": WORDS, "strength": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    arguments = {k: v for k, v in (given | call).items() if k in known}
    return pipe("a cat", generator=generator, **arguments).images.float()


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_loads_adapters(name, tmp_path):
    cls = getattr(lycoris_diff, name)
    stock = next(c for c in cls.__mro__ if c.__module__.startswith("diffusers.pipelines"))
    base = pipeline(family_of(name))
    component = "unet" if hasattr(base, "unet") else "transformer"
    changes = make_file(tmp_path / "a.safetensors", base, "lokr", (component, "text_encoder"), scale=0.3)
    pipe = cls.from_pipe(copy.deepcopy(base))
    expected = stock.from_pipe(with_changes(base, (changes, 0.5)))
    for one in (pipe, expected):
        one.set_progress_bar_config(disable=True)
    plain = picture(pipe)
    report = pipe.load_lora_weights(tmp_path / "a.safetensors", weight=0.5)
    assert report.loaded
    found, wanted = picture(pipe), picture(expected)
    assert close(found, wanted, 1e-3) and not close(plain, wanted, 1e-2)
    scale = "cross_attention_kwargs" if component == "unet" else "joint_attention_kwargs"
    assert torch.equal(picture(pipe, **{scale: {"scale": 0.0}}), plain)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain)


def test_there_is_a_file_for_every_class():
    assert len(CLASSES) == len(FILES) == 12
    assert {line.split()[-1] for f in FILES for line in f.read_text().splitlines() if line.startswith("from ")} == set(CLASSES)
    with pytest.raises(AttributeError):
        lycoris_diff.NoSuchLycorisPipeline


@pytest.mark.parametrize("file", ["stable_diffusion.py", "stable_diffusion_img2img.py", "flux.py"])
def test_as_custom_pipeline(file, tmp_path, monkeypatch):
    """`DiffusionPipeline.from_pretrained` makes the class from the file."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    family = "flux" if file.startswith("flux") else "sd15"
    base = pipeline(family)
    base.save_pretrained(tmp_path / "base")
    arguments = {"safety_checker": None} if family == "sd15" else {}
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "base", custom_pipeline=str(ROOT / "pipelines" / file), trust_remote_code=True, **arguments
    )
    assert type(pipe).__name__ in CLASSES
    pipe.set_progress_bar_config(disable=True)
    component = "unet" if family == "sd15" else "transformer"
    changes = make_file(tmp_path / "a.safetensors", base, "lora", (component,), scale=0.3)
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    if "img2img" not in file:
        assert close(latents(pipe), latents(with_changes(base, (changes, 1.0))), 1e-3)
    assert pipe.get_list_adapters() == {component: ["a"]}


def test_pipelines_that_share_components_share_adapters(tmp_path):
    base = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", base, "lora", ("unet",))
    first = lycoris_diff.StableDiffusionLycorisPipeline.from_pipe(base)
    first.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    second = lycoris_diff.StableDiffusionImg2ImgLycorisPipeline.from_pipe(first)
    assert second.get_active_adapters() == ["a"]
    second.unload_lora_weights()
    assert first.get_active_adapters() == []


# --- saving ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha", "full"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_saved_as_trained(family, algorithm, tmp_path):
    """The weight an adapter is used with is not written; what is written loads as the same adapter."""
    base = pipeline(family)
    component = "unet" if hasattr(base, "unet") else "transformer"
    changes = make_file(tmp_path / "a.safetensors", base, algorithm, (component, "text_encoder"), scale=0.3)
    pipe = copy.deepcopy(base)
    load_adapter(pipe, tmp_path / "a.safetensors", "a", weight=0.25)
    # kohya's Flux names are those of fused weights, which three LoKr of their own are not
    format = "lycoris" if (family, algorithm) == ("flux", "lokr") else "kohya"
    components = None if format == "kohya" else [component]
    if components:
        unload_adapters(pipe)
        load_adapter(pipe, tmp_path / "a.safetensors", "a", weight=0.25, components=components)
        changes = {component: changes[component]}
    save_adapter(pipe, tmp_path / "b.safetensors", "a", format=format, metadata={"note": "mine"})
    again = copy.deepcopy(base)
    report = load_adapter(again, tmp_path / "b.safetensors", "a")
    assert {m.path for m in report.matched if m.component == component} == set(changes[component])
    assert close(latents(again), latents(with_changes(base, (changes, 1.0))), 1e-3)


def test_saving_a_trained_adapter(tmp_path):
    """What was trained here, without a file of its own, is written from its live factors."""
    base = pipeline("sd15")
    pipe = copy.deepcopy(base)
    config = lycoris_diff.LoKrConfig(r=2, alpha=1, target_modules=["to_q", "to_v"], init_weights=False)
    lycoris_diff.inject_adapter(pipe.unet, config, "mine")
    pipe.unet.eval()
    expected = latents(pipe)
    save_adapter(pipe, tmp_path / "mine.safetensors", "mine")
    again = copy.deepcopy(base)
    report = load_adapter(again, tmp_path / "mine.safetensors")
    assert report.algorithms.keys() == {"LOKR"}
    assert close(latents(again), expected, 1e-4)
    with pytest.raises(AdapterError, match="mine"):
        save_adapter(pipe, tmp_path / "x.safetensors", "mein")
    with pytest.raises(AdapterError):
        save_adapter(pipe, tmp_path / "x.safetensors", "mine", format="unheard-of")
    assert not (tmp_path / "x.safetensors").exists()


def test_neutral_form_of_a_loaded_adapter(tmp_path):
    base = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", base, "lora", ("unet",), metadata={"ss_output_name": "cat"})
    load_adapter(base, tmp_path / "a.safetensors", "a")
    checkpoint = checkpoint_of(base, "a")
    assert checkpoint.metadata["ss_output_name"] == "cat"
    entry = next(iter(checkpoint.components["unet"].values()))[0]
    assert (entry.algorithm, entry.rank, entry.alpha) == ("LORA", 3, 2.0)
    unload_adapters(base)
    assert not [name for name in vars(denoiser(base)) if "lycoris" in name]


def test_mixin_saves(tmp_path):
    base = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", base, "lokr", ("unet",))
    pipe = lycoris_diff.StableDiffusionLycorisPipeline.from_pipe(base)
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    pipe.save_lora_weights(tmp_path / "out")
    pipe.load_lora_weights(tmp_path / "out", adapter_name="b")
    assert pipe.get_active_adapters() == ["a", "b"]
    with pytest.raises(AdapterError, match="which adapter"):
        pipe.save_lora_weights(tmp_path / "out")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_not_lost_in_silence(bias, tmp_path):
    pipe = pipeline("sd15")
    config = lycoris_diff.LoraConfig(r=2, target_modules=["to_out.0"], bias=bias)
    lycoris_diff.inject_adapter(pipe.unet, config, "mine")
    with pytest.raises(AdapterError, match=r"biases of the unet .*save_pretrained"):
        save_adapter(pipe, tmp_path / "mine.safetensors", "mine")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "fp16"])
def test_dtypes_that_hold_no_factors(dtype, tmp_path):
    pipe = pipeline("sd15")
    lycoris_diff.inject_adapter(pipe.unet, lycoris_diff.LoraConfig(r=2, target_modules=["to_q"]), "mine")
    with pytest.raises(AdapterError, match="dtype"):
        save_adapter(pipe, tmp_path / "mine.safetensors", "mine", dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_the_place_and_not_a_temporary_file_is_named(tmp_path):
    pipe = pipeline("sd15")
    lycoris_diff.inject_adapter(pipe.unet, lycoris_diff.LoraConfig(r=2, target_modules=["to_q"]), "mine")
    path = Path("/proc/mine.safetensors")  # where nobody may write
    if path.parent.is_dir():
        with pytest.raises(OSError, match=f"'{path}'"):
            save_adapter(pipe, path, "mine")
