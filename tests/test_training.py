"""DreamBooth training on the tiny pipeline: what is learned is what is saved and loaded, and failures leave no trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from lycoris_diff import AdapterError, AdapterModel, LoraConfig
from lycoris_diff.errors import ConfigError
from lycoris_diff.tiny import build_pipeline, draw_subject_images
from lycoris_diff.tiny.recipes import RECIPES, TEXT_LINEAR, find_recipe
from lycoris_diff.training import DreamBoothConfig, load_trained, train_dreambooth
from lycoris_diff.training.batches import held_out_batches, training_batches
from lycoris_diff.training.images import read_images
from lycoris_diff.training.latents import LatentCache, encode_latents
from lycoris_diff.training.losses import training_scheduler


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    draw_subject_images(folder, count=3)
    return folder


@pytest.fixture
def pipe():
    pipe = build_pipeline(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def config(pictures, tmp_path):
    """A short run with small LoRA adapters on both components."""
    adapters = {"unet": LoraConfig(r=2, target_modules=["to_q", "to_v"]), "text_encoder": LoraConfig(r=2)}
    adapters["text_encoder"].target_modules = TEXT_LINEAR
    return DreamBoothConfig(
        instance_data_dir=pictures,
        instance_prompt="a photo of a sks creature",
        output_dir=tmp_path / "adapter",
        adapters=adapters,
        resolution=64,
        train_batch_size=2,
        max_train_steps=2,
        learning_rate=1e-2,
        held_out_samples=4,
    )


def outputs(pipe):
    """The denoiser's answer to a fixed question that goes through both components."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = pipe.tokenizer("a photo of a sks creature", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(tokens)[0].expand(2, -1, -1)
        return pipe.unet(latents, torch.tensor([10, 700]), encoder_hidden_states=text).sample


def picture(pipe):
    result = pipe("a sks creature", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return np.array(result.images[0])


def is_wrapped(module):
    return issubclass(type(module), AdapterModel)


class TestRun:
    @pytest.mark.parametrize("name", RECIPES)
    def test_reloaded_adapter_gives_the_same_outputs(self, name, pipe, config):
        recipe = find_recipe(name)
        untrained = outputs(pipe)
        config.adapters, config.learning_rate, config.max_train_steps = recipe.configs(), recipe.learning_rate, 3
        report = train_dreambooth(pipe, config)
        assert len(report.losses) == 3
        assert report.held_out_after < report.held_out_before and report.improved
        trained = outputs(pipe)
        assert not torch.allclose(trained, untrained)

        fresh = build_pipeline(0)
        assert load_trained(fresh, config.output_dir) == ["unet", "text_encoder"]
        torch.testing.assert_close(outputs(fresh), trained, rtol=1e-5, atol=1e-5)
        assert isinstance(fresh.unet, UNet2DConditionModel)
        assert not any(parameter.requires_grad for parameter in fresh.unet.parameters())
        for component, path in report.paths.items():
            assert report.parameters[component] > 0
            assert report.bytes[component] == (path / "adapter_model.safetensors").stat().st_size
            assert (path / "adapter_config.json").is_file()

    def test_pictures_and_saved_pipeline(self, pipe, config, tmp_path):
        pipe.save_pretrained(tmp_path / "base")
        untrained = picture(pipe)
        train_dreambooth(pipe, dataclasses.replace(config, learning_rate=0.1))
        trained = picture(pipe)
        assert not np.array_equal(trained, untrained)

        fresh = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
        fresh.set_progress_bar_config(disable=True)
        load_trained(fresh, config.output_dir)
        assert np.array_equal(picture(fresh), trained)

        pipe.save_pretrained(tmp_path / "with-adapters")
        again = StableDiffusionPipeline.from_pretrained(tmp_path / "with-adapters")
        again.set_progress_bar_config(disable=True)
        assert not is_wrapped(again.unet)
        assert np.array_equal(picture(again), untrained)

    def test_same_seed_same_run_and_global_state_stays(self, config):
        state = torch.random.get_rng_state()
        config.adapters["unet"].lora_dropout = 0.1
        first = train_dreambooth(build_pipeline(0), config)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.random.manual_seed(99)
        again = train_dreambooth(build_pipeline(0), config)
        other = train_dreambooth(build_pipeline(0), dataclasses.replace(config, seed=1))
        assert again.losses == first.losses != other.losses
        assert (again.held_out_before, again.held_out_after) == (first.held_out_before, first.held_out_after)

    @pytest.mark.parametrize("component", ["unet", "text_encoder"])
    def test_one_component(self, component, pipe, config):
        other = "text_encoder" if component == "unet" else "unet"
        config.adapters = {component: config.adapters[component]}
        base = getattr(pipe, other)
        report = train_dreambooth(pipe, config)
        assert getattr(pipe, other) is base
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert not {"_is_accelerate_prepared", "forward", "_original_forward"} & vars(base).keys()
        assert list(report.paths) == [component]
        fresh = build_pipeline(0)
        assert load_trained(fresh, config.output_dir) == [component]
        torch.testing.assert_close(outputs(fresh), outputs(pipe), rtol=1e-5, atol=1e-5)

    def test_gradient_accumulation(self, pipe, config):
        config.gradient_accumulation_steps = 3
        passes = []
        handle = pipe.unet.conv_in.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        steps = []
        report = train_dreambooth(pipe, config, on_step=steps.append)
        handle.remove()
        assert sum(passes) == 6
        assert [(step.step, step.total) for step in steps] == [(1, 2), (2, 2)]
        assert [step.loss for step in steps] == report.losses

    def test_learning_rates_are_per_component(self, pipe, config):
        config.text_encoder_learning_rate = 0.0
        train_dreambooth(pipe, config)
        moved = {c: self._lora_b(getattr(pipe, c)) for c in config.adapters}
        assert moved["unet"] > 0
        assert moved["text_encoder"] == 0

    @staticmethod
    def _lora_b(model):
        return max(value.abs().max().item() for name, value in model.named_parameters() if "lora_B" in name)

    def test_mixed_precision_keeps_adapters_in_float32(self, config):
        from accelerate.state import AcceleratorState

        pipe = build_pipeline(0)
        AcceleratorState._reset_state()
        try:
            report = train_dreambooth(pipe, dataclasses.replace(config, mixed_precision="bf16"))
        finally:
            AcceleratorState._reset_state()
        assert all(np.isfinite(report.losses))
        assert {p.dtype for p in pipe.unet.parameters() if p.requires_grad} == {torch.float32}
        assert outputs(pipe).dtype == torch.float32
        assert "_original_forward" not in vars(pipe.unet)

    def test_half_precision_base(self, pipe, config):
        pipe.to(torch.bfloat16)
        report = train_dreambooth(pipe, config)
        assert all(np.isfinite(report.losses))
        assert {p.dtype for p in pipe.unet.parameters() if p.requires_grad} == {torch.float32}

    def test_v_prediction(self, pipe, config):
        epsilon = train_dreambooth(pipe, config)
        velocity = build_pipeline(0)
        velocity.scheduler = DDIMScheduler.from_config(velocity.scheduler.config, prediction_type="v_prediction")
        report = train_dreambooth(velocity, config)
        assert report.held_out_before != epsilon.held_out_before
        assert report.improved

    def test_report_is_json(self, pipe, config):
        report = train_dreambooth(pipe, config)
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["losses"] == report.losses
        assert plain["paths"]["unet"] == str(Path(config.output_dir) / "unet")
        assert plain["improved"] is report.improved


class TestRefusals:
    def _assert_untouched(self, pipe, before):
        assert not is_wrapped(pipe.unet) and not is_wrapped(pipe.text_encoder)
        assert torch.equal(outputs(pipe), before)

    def test_empty_folder(self, pipe, config, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.txt").write_text("no picture")
        config.instance_data_dir = tmp_path / "empty"
        with pytest.raises(AdapterError, match=r"no pictures in .*empty"):
            train_dreambooth(pipe, config)
        assert not Path(config.output_dir).exists()

    def test_missing_folder(self, pipe, config, tmp_path):
        config.instance_data_dir = tmp_path / "absent"
        with pytest.raises(OSError, match="absent"):
            train_dreambooth(pipe, config)

    def test_bad_pictures_are_named(self, pipe, config, pictures, tmp_path):
        good = (pictures / "subject-1.png").read_bytes()
        (tmp_path / "good.png").write_bytes(good)
        (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
        (tmp_path / "text.jpg").write_text("not a picture")
        config.instance_data_dir = tmp_path
        before = outputs(pipe)
        with pytest.raises(AdapterError, match=r"2 of 3 pictures .*cut\.png \(.*text\.jpg \(") as caught:
            train_dreambooth(pipe, config)
        assert "good.png" not in str(caught.value)
        self._assert_untouched(pipe, before)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"adapters": {}}, "adapters is empty"),
            ({"adapters": {"vae": None}}, "'vae'"),
            ({"max_train_steps": 0}, "max_train_steps is 0"),
            ({"train_batch_size": 1.5}, r"train_batch_size is 1\.5"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
            ({"mixed_precision": "int8"}, "mixed_precision is 'int8'"),
        ],
    )
    def test_bad_setting(self, change, message, pipe, config):
        with pytest.raises(ConfigError, match=message):
            train_dreambooth(pipe, dataclasses.replace(config, **change))

    def test_resolution_that_does_not_divide(self, pipe, config):
        with pytest.raises(AdapterError, match="66 x 66 is not a multiple of 4"):
            train_dreambooth(pipe, dataclasses.replace(config, resolution=66))

    def test_nan_stops_and_restores(self, pipe, config):
        before = outputs(pipe)
        with pytest.raises(AdapterError, match=r"training loss of step \d+ is (nan|inf)"):
            train_dreambooth(pipe, dataclasses.replace(config, learning_rate=1e30, max_train_steps=5))
        self._assert_untouched(pipe, before)
        assert not (Path(config.output_dir) / "unet").exists()

    def test_nan_after_the_last_step_is_not_saved(self, pipe, config):
        with pytest.raises(AdapterError, match="held-out loss is"):
            train_dreambooth(pipe, dataclasses.replace(config, learning_rate=1e30, max_train_steps=1))
        assert not (Path(config.output_dir) / "unet").exists()

    def test_broken_base(self, pipe, config):
        with torch.no_grad():
            pipe.unet.conv_out.bias[0] = float("nan")
        with pytest.raises(AdapterError, match="held-out loss is nan"):
            train_dreambooth(pipe, config)

    def test_second_component_fails(self, pipe, config):
        before = outputs(pipe)
        config.adapters["text_encoder"].target_modules = ["to_q"]
        with pytest.raises(AdapterError, match="to_q"):
            train_dreambooth(pipe, config)
        self._assert_untouched(pipe, before)

    def test_callback_may_stop(self, pipe, config):
        def stop(step):
            raise KeyboardInterrupt

        before = outputs(pipe)
        with pytest.raises(KeyboardInterrupt):
            train_dreambooth(pipe, config, on_step=stop)
        self._assert_untouched(pipe, before)

    def test_prediction_type(self, pipe):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
        with pytest.raises(AdapterError, match="'sample'"):
            training_scheduler(scheduler)

    def test_nothing_to_load(self, pipe, tmp_path):
        with pytest.raises(AdapterError, match="no trained adapter in"):
            load_trained(pipe, tmp_path)

    def test_load_is_all_or_nothing(self, pipe, config):
        train_dreambooth(pipe, config)
        (Path(config.output_dir) / "text_encoder" / "adapter_config.json").unlink()
        fresh = build_pipeline(0)
        before = outputs(fresh)
        with pytest.raises((AdapterError, OSError)):
            load_trained(fresh, config.output_dir)
        self._assert_untouched(fresh, before)


class TestData:
    def test_pictures_become_squares(self, tmp_path):
        wide = Image.new("RGB", (40, 20), "black")
        wide.paste("white", (10, 0, 30, 20))
        wide.save(tmp_path / "1.png")
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "2.png")
        Image.new("L", (30, 60), 0).save(tmp_path / "3.PNG")
        images = read_images(tmp_path, 16)
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
        assert images[0].min() > 0.9  # the black sides are cut off
        assert images[1].min() == 1  # transparent is white
        assert images[2].max() == -1

    def test_turned_picture(self, tmp_path):
        picture = Image.new("RGB", (16, 16), "black")
        picture.paste("white", (0, 0, 16, 8))
        exif = picture.getexif()
        exif[0x0112] = 3  # upside down
        picture.save(tmp_path / "turned.png", exif=exif)
        image = read_images(tmp_path, 16)[0]
        assert image[:, :8].max() == -1 and image[:, 8:].min() == 1

    def test_latents(self, pipe, pictures):
        images = read_images(pictures, 64)
        cache = encode_latents(pipe.vae, images)
        with torch.no_grad():
            expected = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(cache.mean, expected, rtol=1e-4, atol=1e-4)
        assert len(cache) == 3 and 0.5 < cache.mean.std() < 2

    def test_training_batches_show_every_picture(self):
        cache = LatentCache(torch.arange(5.0).view(5, 1, 1, 1), torch.zeros(5, 1, 1, 1))
        stream = training_batches(cache, 10, 3, torch.Generator().manual_seed(0))
        shown = torch.cat([next(stream).latents.flatten() for _ in range(5)]).view(3, 5)
        assert all(sorted(epoch.tolist()) == [0, 1, 2, 3, 4] for epoch in shown)
        assert next(training_batches(cache, 10, 12, torch.Generator())).latents.shape == (12, 1, 1, 1)

    def test_held_out_batches_are_fixed_and_spread(self):
        cache = LatentCache(torch.randn(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
        first = held_out_batches(cache, 1000, 5, 2, seed=1)
        torch.randn(3)
        again = held_out_batches(cache, 1000, 5, 2, seed=1)
        assert [len(batch.latents) for batch in first] == [2, 2, 1]
        assert torch.cat([batch.timesteps for batch in first]).tolist() == [100, 300, 500, 700, 900]
        assert all(torch.equal(a.noise, b.noise) for a, b in zip(first, again))
