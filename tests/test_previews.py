"""Previews: what inference draws from the saved file, and nothing of the training changed by them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from training_outputs import config_for, facts_for, fresh_pipeline, trained_pipeline

from lycoris_diff import AdapterError, LoraConfig, load_adapter
from lycoris_diff.training.outputs import save_outputs
from lycoris_diff.training.previews import draw_previews, parse_preview_name, preview_name


@pytest.fixture
def config(tmp_path):
    return config_for(tmp_path / "run", preview_steps=1)


def drawn(paths) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in paths]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def modes(pipe) -> list[bool]:
    parts = [pipe.unet, pipe.text_encoder, pipe.vae]
    return [module.training for part in parts for module in part.modules()]


@pytest.mark.parametrize("name", ["lora", "lokr", "dora", "shira"])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_equals_inference_from_the_saved_file(name, guidance, tmp_path):
    config = config_for(tmp_path / "run", name, preview_steps=2, preview_guidance=guidance)
    pipe = trained_pipeline(config)
    pipe.unet.train()
    pictures = drawn(draw_previews(pipe, config, config.output / "previews", 100))
    written = save_outputs(pipe, config, facts_for(config))
    fresh = fresh_pipeline()
    load_adapter(fresh, written.get("kohya", config.output))
    options = {} if guidance is None else {"guidance_scale": guidance}
    for prompt, picture in zip(config.preview_prompts, pictures, strict=True):
        generator = torch.Generator().manual_seed(config.preview_seed)
        image = fresh(prompt, num_inference_steps=2, height=64, width=64, generator=generator, **options).images[0]
        assert np.array_equal(np.array(image), picture)
    base = fresh_pipeline()
    assert not equal(drawn(draw_previews(base, config, tmp_path / "base", 0)), pictures)


def test_names_and_metadata(config, tmp_path):
    paths = draw_previews(trained_pipeline(config), config, tmp_path / "a" / "previews", 100)
    assert [path.name for path in paths] == ["step-000100-00.png", "step-000100-01.png"]
    assert sorted(paths[0].parent.iterdir()) == paths
    assert Image.open(paths[0]).text["parameters"] == "a red circle\nSteps: 1, Seed: 7"
    assert parse_preview_name(preview_name(1_234_567, 3)) == (1_234_567, 3)
    assert parse_preview_name("step-000100.png") is None
    config.preview_prompts = ()
    assert draw_previews(trained_pipeline(config), config, tmp_path / "none", 1) == []
    assert not (tmp_path / "none").exists()


def test_training_is_as_it_was(config, tmp_path):
    """Random states, modes, scheduler, progress bar, recomputation and gradients; once more when drawing fails."""
    pipe = trained_pipeline(config)
    pipe.unet.train()
    pipe.unet.get_base_model().mid_block.eval()  # a mode of its own comes back as well
    pipe.unet.enable_gradient_checkpointing()
    pipe.scheduler.set_timesteps(7)
    pipe.set_progress_bar_config(desc="mine")
    pipe.unet.requires_grad_(True)
    for parameter in pipe.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    scheduler, steps, mode = pipe.scheduler, pipe.scheduler.timesteps.clone(), modes(pipe)
    attributes = {name: set(vars(getattr(pipe, name))) for name in ("unet", "text_encoder", "vae")}
    assert True in mode and False in mode

    def check():
        assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), state[2], strict=True))
        assert pipe.scheduler is scheduler and torch.equal(scheduler.timesteps, steps) and modes(pipe) == mode
        assert pipe._progress_bar_config == {"desc": "mine"} and pipe.unet.is_gradient_checkpointing
        assert all(p.requires_grad and bool((p.grad == 1).all()) for p in pipe.unet.parameters())
        assert torch.is_grad_enabled()
        assert {name: set(vars(getattr(pipe, name))) for name in attributes} == attributes

    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    noisy = pipe.vae.decode

    def decode(*args, **kwargs):
        torch.rand(3), random.random(), np.random.rand()
        assert not torch.is_grad_enabled()
        return noisy(*args, **kwargs)

    pipe.vae.decode = decode
    attributes["vae"].add("decode")
    draw_previews(pipe, config, tmp_path, 1)
    check()

    def fail(*args, **kwargs):
        torch.rand(3)
        raise RuntimeError("out of memory")

    pipe.vae.decode = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        draw_previews(pipe, config, tmp_path / "failed", 2)
    check()
    assert not list((tmp_path / "failed").iterdir())


def test_previews_do_not_change_what_is_learned(config, tmp_path):
    """Steps with dropout, with and without previews between them, end in the same bits."""
    config.adapters = {"unet": LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.5)}

    def learned(folder):
        pipe = trained_pipeline(config)
        trained = [p for p in pipe.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        torch.manual_seed(0)
        pipe.unet.train()
        for step in range(2):
            out = pipe.unet(
                torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 4, pipe.text_encoder.config.hidden_size)
            ).sample
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if folder:
                draw_previews(pipe, config, folder, step)
        return torch.cat([p.detach().flatten() for p in trained])

    assert torch.equal(learned(None), learned(tmp_path))


def test_without_autocast_and_compile(config, tmp_path):
    """accelerate's mixed precision and torch.compile are training's; pictures are those of plain inference."""
    pipe = trained_pipeline(config)
    plain = drawn(draw_previews(pipe, config, tmp_path / "plain", 1))
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        accelerator.prepare_model(pipe.unet)
    finally:
        AcceleratorState._reset_state(True)
    pipe.unet.get_base_model()._compiled_call_impl = _never
    forward = vars(pipe.unet)["forward"]
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(drawn(draw_previews(pipe, config, tmp_path / "prepared", 1)), plain)
    assert vars(pipe.unet)["forward"] is forward
    assert pipe.unet.get_base_model()._compiled_call_impl is _never


def _never(*_, **__):
    raise AssertionError("the compiled model was called")


def test_a_picture_is_whole_or_absent(config, tmp_path, monkeypatch):
    def half(self, file, *_, **__):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        draw_previews(trained_pipeline(config), config, tmp_path / "previews", 1)
    assert not list((tmp_path / "previews").iterdir())


def test_parts_elsewhere_come_and_go_back(config, tmp_path, monkeypatch):
    """The encoder and the decoder put away after caching are on the denoiser's device while it draws, and only then."""
    from lycoris_diff.training import previews

    pipe = trained_pipeline(config)
    moves = []
    away, here = torch.device("meta"), torch.device("cpu")
    monkeypatch.setattr(previews, "_device_of", lambda part: away if part is pipe.vae else here)
    monkeypatch.setattr(pipe.vae, "to", lambda device: moves.append(device))
    draw_previews(pipe, config, tmp_path, 1)
    assert moves == [here, away]


def test_pipeline_without_denoiser(config, tmp_path):
    pipe = trained_pipeline(config)
    pipe.unet = None
    with pytest.raises(AdapterError, match="no unet or transformer"):
        draw_previews(pipe, config, tmp_path, 1)
