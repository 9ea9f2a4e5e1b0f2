"""DreamBooth training: what is learned is what is saved and loaded, and failures leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from trainingcases import ADAPTERS, assert_equal, draw, outputs, short_run, small_pipe, trained

from lycoris_diff import AdapterError, AdapterModel, LoraConfig, NormConfig
from lycoris_diff.errors import ConfigError
from lycoris_diff.training import load_trained, plan_dreambooth, train_dreambooth
from lycoris_diff.training.loop import MOST_SKIPPED, Loop


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def pipe():
    return small_pipe()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "adapter"


def picture(pipe):
    result = pipe("a", height=16, width=16, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return np.array(result.images[0])


def is_wrapped(module):
    return issubclass(type(module), AdapterModel)


class TestRun:
    @pytest.mark.parametrize("name", ADAPTERS)
    def test_reloaded_adapter_gives_the_same_outputs(self, name, pipe, pictures, out):
        untrained = outputs(pipe)
        report = train_dreambooth(pipe, short_run(pictures, out, name))
        assert len(report.losses) == 2
        after = outputs(pipe)
        assert not torch.allclose(after, untrained, atol=1e-6)
        fresh = small_pipe()
        assert set(load_trained(fresh, out)) == {"unet", "text_encoder"}
        torch.testing.assert_close(outputs(fresh), after, rtol=1e-5, atol=1e-5)
        assert isinstance(fresh.unet, UNet2DConditionModel)
        assert not any(parameter.requires_grad for parameter in fresh.unet.parameters())
        for component in ("unet", "text_encoder"):
            path = report.paths[component]
            assert report.parameters[component] > 0
            assert report.bytes[component] == (path / "adapter_model.safetensors").stat().st_size

    def test_norms(self, pipe, pictures, out):
        config = short_run(pictures, out, adapters={"unet": NormConfig(target_modules=["norm1"])})
        train_dreambooth(pipe, config)
        fresh = small_pipe()
        load_trained(fresh, out)
        torch.testing.assert_close(outputs(fresh), outputs(pipe), rtol=1e-5, atol=1e-5)

    def test_pictures_and_saved_pipeline(self, pipe, pictures, out, tmp_path):
        pipe.save_pretrained(tmp_path / "base")
        untrained = picture(pipe)
        train_dreambooth(pipe, short_run(pictures, out, learning_rate=0.1))
        after = picture(pipe)
        assert not np.array_equal(after, untrained)
        fresh = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
        fresh.set_progress_bar_config(disable=True)
        load_trained(fresh, out)
        assert np.array_equal(picture(fresh), after)

    def test_same_seed_same_run_and_global_state_stays(self, pictures, tmp_path):
        state = torch.random.get_rng_state()
        first, again = small_pipe(), small_pipe()
        report = train_dreambooth(first, short_run(pictures, tmp_path / "1"))
        assert torch.equal(state, torch.random.get_rng_state())
        torch.random.manual_seed(99)
        repeated = train_dreambooth(again, short_run(pictures, tmp_path / "2"))
        other = train_dreambooth(small_pipe(), short_run(pictures, tmp_path / "3", seed=1))
        assert repeated.losses == report.losses != other.losses
        assert (repeated.held_out_before, repeated.held_out_after) == (report.held_out_before, report.held_out_after)
        assert_equal(trained(first), trained(again))

    @pytest.mark.parametrize("component", ["unet", "text_encoder"])
    def test_one_component(self, component, pipe, pictures, out):
        other = "text_encoder" if component == "unet" else "unet"
        config = short_run(pictures, out)
        config.adapters = {component: config.adapters[component]}
        base = getattr(pipe, other)
        report = train_dreambooth(pipe, config)
        assert getattr(pipe, other) is base
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert not {"_is_accelerate_prepared", "forward", "_original_forward"} & vars(base).keys()
        assert {"unet", "text_encoder"} & report.paths.keys() == {component}
        fresh = small_pipe()
        assert load_trained(fresh, out) == [component]
        torch.testing.assert_close(outputs(fresh), outputs(pipe), rtol=1e-5, atol=1e-5)

    def test_accumulation_is_the_mean_gradient(self, pictures, tmp_path):
        """Two passes of one picture and one of two give one gradient: of no momentum yet, the same step of SGD."""
        steps = {"optimizer": "torch.optim.SGD", "max_train_steps": 1, "max_grad_norm": 0, "learning_rate": 1.0}
        adapters = {"unet": LoraConfig(r=2, target_modules=["to_q", "to_v"])}
        one, two = small_pipe(), small_pipe()
        train_dreambooth(one, short_run(pictures, tmp_path / "1", adapters=adapters, **steps))
        accumulated = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
        seen = []
        two.unet.conv_in.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        train_dreambooth(two, short_run(pictures, tmp_path / "2", adapters=adapters, **steps | accumulated))
        assert sum(seen) == 2
        for name, value in trained(one).items():
            torch.testing.assert_close(trained(two)[name], value, rtol=1e-4, atol=1e-7)

    def test_on_step(self, pipe, pictures, out):
        steps = []
        report = train_dreambooth(pipe, short_run(pictures, out), on_step=steps.append)
        assert [(step.step, step.total) for step in steps] == [(1, 2), (2, 2)]
        assert [step.loss for step in steps] == report.losses

    def test_learning_rates_are_per_component(self, pipe, pictures, out):
        train_dreambooth(pipe, short_run(pictures, out, learning_rates={"text_encoder": 0.0}))
        moved = {c: max(v.abs().max() for n, v in trained(pipe).items() if c in n and "lora_B" in n) for c in ("unet", "text_")}
        assert moved["unet"] > 0 == moved["text_"]

    def test_gradients_are_clipped(self, pictures, tmp_path):
        steps = {"optimizer": "torch.optim.SGD", "max_train_steps": 1, "learning_rate": 1.0}
        pipe, free = small_pipe(), small_pipe()
        train_dreambooth(pipe, short_run(pictures, tmp_path / "1", max_grad_norm=1e-3, **steps))
        train_dreambooth(free, short_run(pictures, tmp_path / "2", max_grad_norm=0, **steps))
        assert _moved(pipe) == pytest.approx(1e-3, rel=1e-3) and _moved(free) > 2e-3

    def test_average_is_saved(self, pictures, tmp_path):
        """With a decay of 0 the average is the last weights; with a large one it stays near the first."""
        last, none, slow = small_pipe(), small_pipe(), small_pipe()
        train_dreambooth(none, short_run(pictures, tmp_path / "1"))
        train_dreambooth(last, short_run(pictures, tmp_path / "2", ema_decay=0.0))
        report = train_dreambooth(slow, short_run(pictures, tmp_path / "3", ema_decay=0.999))
        for name, value in trained(none).items():  # diffusers adds the whole difference: equal to the last bit or two
            torch.testing.assert_close(trained(last)[name], value, rtol=1e-6, atol=1e-8)
        assert 0 < _b(slow) < _b(none)
        fresh = small_pipe()
        load_trained(fresh, tmp_path / "3")
        torch.testing.assert_close(outputs(fresh), outputs(slow), rtol=1e-5, atol=1e-5)
        assert report.held_out_after != report.held_out_before

    def test_class_pictures_are_generated_once(self, pipe, pictures, out):
        changes = {"class_prompt": "c", "num_class_images": 2, "sample_batch_size": 2}
        first = train_dreambooth(pipe, short_run(pictures, out, **changes))
        again = train_dreambooth(small_pipe(), short_run(pictures, out, **changes))
        assert (first.class_images, first.generated, again.class_images, again.generated) == (2, 2, 2, 0)
        assert first.losses == again.losses

    def test_target_size(self, pipe, pictures, out):
        report = train_dreambooth(pipe, short_run(pictures, out, target_params=9000))
        assert report.size is not None and report.size.parameters == sum(report.parameters.values())
        nearest = [abs(other.parameters - 9000) for other in report.size.alternatives]
        assert abs(report.size.parameters - 9000) <= min(nearest)
        json.dumps(report.to_dict())

    def test_tensorboard_is_the_default_tracker(self, pipe, pictures, out):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        report = train_dreambooth(pipe, short_run(pictures, out, trackers=None, learning_rates={"text_encoder": 5e-3}))
        events = EventAccumulator(str(out / "logs" / "lycoris_diff")).Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(report.losses, rel=1e-6)
        assert [event.value for event in events.Scalars("lr/text_encoder")] == pytest.approx([5e-3, 5e-3])

    def test_report_is_json(self, pipe, pictures, out):
        report = train_dreambooth(pipe, short_run(pictures, out))
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["losses"] == report.losses
        assert plain["paths"]["unet"] == str(out / "unet")
        assert plain["improved"] is report.improved


class TestPrecision:
    def test_mixed_precision_keeps_adapters_in_float32(self, pipe, pictures, out):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
        try:
            report = train_dreambooth(pipe, short_run(pictures, out, mixed_precision="bf16"))
        finally:
            AcceleratorState._reset_state()
        assert all(np.isfinite(report.losses))
        assert {p.dtype for p in pipe.unet.parameters() if p.requires_grad} == {torch.float32}
        assert outputs(pipe).dtype == torch.float32
        assert "_original_forward" not in vars(pipe.unet)

    def test_half_precision_base(self, pipe, pictures, out):
        pipe.to(torch.bfloat16)
        report = train_dreambooth(pipe, short_run(pictures, out))
        assert all(np.isfinite(report.losses))
        assert {p.dtype for p in pipe.unet.parameters() if p.requires_grad} == {torch.float32}

    def test_gradient_checkpointing_changes_nothing_but_memory(self, pictures, tmp_path):
        adapters = {"unet": LoraConfig(r=2, target_modules=["to_q", "conv1"]), "text_encoder": LoraConfig(r=2)}
        adapters["text_encoder"].target_modules = ["q_proj"]
        plain, thrifty = small_pipe(), small_pipe()
        first = train_dreambooth(plain, short_run(pictures, tmp_path / "1", adapters=adapters))
        second = train_dreambooth(thrifty, short_run(pictures, tmp_path / "2", adapters=adapters, gradient_checkpointing=True))
        assert first.losses == pytest.approx(second.losses, rel=1e-5)
        for name, value in trained(plain).items():  # recomputed in another order: float32 rounding through two steps of AdamW
            torch.testing.assert_close(trained(thrifty)[name], value, rtol=1e-3, atol=1e-5)
        assert not thrifty.unet.is_gradient_checkpointing

    def test_a_frozen_denoiser_is_recomputed_too(self, pipe, pictures, out):
        """What the text encoder learns from passes through all of it."""
        seen = []
        encoder = {"text_encoder": LoraConfig(r=2, target_modules=["q_proj"])}
        config = short_run(pictures, out, adapters=encoder, gradient_checkpointing=True)
        train_dreambooth(pipe, config, lambda step: seen.append(pipe.unet.is_gradient_checkpointing))
        assert seen and all(seen) and not pipe.unet.is_gradient_checkpointing

    @pytest.mark.slow
    def test_compiled_run_learns_the_same(self, pictures, tmp_path):
        """Fused kernels add up in another order: equal to float32 rounding of a few steps, not to the bit."""
        eager, compiled = small_pipe(), small_pipe()
        for name, part, on in (("eager", eager, False), ("compiled", compiled, True)):
            train_dreambooth(part, short_run(pictures, tmp_path / name, "lokr", compile=on, learning_rate=1e-3))
        torch.testing.assert_close(outputs(compiled), outputs(eager), rtol=1e-3, atol=1e-4)
        assert not torch.equal(outputs(eager), outputs(small_pipe()))
        fresh = small_pipe()
        load_trained(fresh, tmp_path / "compiled")
        torch.testing.assert_close(outputs(fresh), outputs(compiled), rtol=1e-5, atol=1e-5)
        assert isinstance(fresh.unet, UNet2DConditionModel)

    def test_v_prediction(self, pipe, pictures, tmp_path):
        epsilon = train_dreambooth(pipe, short_run(pictures, tmp_path / "1"))
        velocity = small_pipe()
        velocity.scheduler = DDIMScheduler.from_config(velocity.scheduler.config, prediction_type="v_prediction")
        report = train_dreambooth(velocity, short_run(pictures, tmp_path / "2"))
        assert report.held_out_before != epsilon.held_out_before


def _b(pipe):
    return max(value.abs().max().item() for name, value in trained(pipe).items() if "lora_B" in name)


def _moved(pipe):
    """How far SGD moved the factors that start at zero; the others' gradient is zero in the first step."""
    return torch.cat([value.flatten() for name, value in trained(pipe).items() if "lora_B" in name]).norm().item()


class TestNotFinite:
    def assert_untouched(self, pipe, before):
        assert not is_wrapped(pipe.unet) and not is_wrapped(pipe.text_encoder)
        assert torch.equal(outputs(pipe), before)

    def test_loss_stops_and_restores(self, pipe, pictures, out):
        before = outputs(pipe)
        with pytest.raises(AdapterError, match=r"step \d+: the training loss is (nan|inf).*Lower the learning rate"):
            train_dreambooth(pipe, short_run(pictures, out, learning_rate=1e30, max_train_steps=5))
        self.assert_untouched(pipe, before)
        assert not (out / "unet").exists() and not list(out.glob("*.safetensors"))

    def test_module_is_named(self, pipe, pictures, out, monkeypatch):
        poison(monkeypatch, pipe, {2})
        with pytest.raises(AdapterError, match=r"step 2: the training loss is nan; it begins in unet\.mid_block\..*conv2"):
            train_dreambooth(pipe, short_run(pictures, out))

    def test_gradient_is_named(self, pipe, pictures, out, monkeypatch):
        """A NaN gradient of one parameter must not be spread to all by clipping before it is named."""
        made = Loop.__init__

        def spoil(self, *args):
            made(self, *args)
            bad = next(p for n, p in self.adapted["unet"].named_parameters() if p.requires_grad and "mid_block" in n)
            bad.register_hook(lambda gradient: gradient * float("nan"))

        monkeypatch.setattr(Loop, "__init__", spoil)
        with pytest.raises(AdapterError, match=r"step 1: the gradient is nan, of unet\.mid_block[^,]*\. Lower"):
            train_dreambooth(pipe, short_run(pictures, out))

    def test_bad_pass_of_several_is_named(self, pipe, pictures, out, monkeypatch):
        """The pass in which it began is looked at, not the last one."""
        drawn = []
        loss = Loop.loss

        def spoiled(self, batch):
            drawn.append(batch)
            if batch is drawn[0]:
                batch.latents.fill_(float("nan"))
            return loss(self, batch)

        monkeypatch.setattr(Loop, "loss", spoiled)
        with pytest.raises(AdapterError, match="training loss is nan; it begins in input of unet"):
            train_dreambooth(pipe, short_run(pictures, out, gradient_accumulation_steps=2))

    def test_steps_that_float16_skips_are_told(self, pipe, pictures, out, monkeypatch):
        from accelerate.optimizer import AcceleratedOptimizer

        overflows = iter([True, False, False])
        monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: next(overflows)))
        report = train_dreambooth(pipe, short_run(pictures, out, max_train_steps=3))
        assert [step.step for step in report.skipped_steps] == [1] and "float16" in report.skipped_steps[0].reason
        monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
        with pytest.raises(AdapterError, match=f"last {MOST_SKIPPED} steps were skipped"):
            train_dreambooth(small_pipe(), short_run(pictures, out, max_train_steps=20))

    def test_step_is_skipped(self, pipe, pictures, out, monkeypatch):
        poison(monkeypatch, pipe, {2})
        report = train_dreambooth(pipe, short_run(pictures, out, max_train_steps=3, on_nonfinite="skip"))
        assert [step.step for step in report.skipped_steps] == [2] and "mid_block" in report.skipped_steps[0].reason
        assert len(report.losses) == 2 and all(np.isfinite(report.losses))
        assert all(value.isfinite().all() for value in trained(pipe).values())

    def test_skipped_step_changes_nothing(self, pictures, tmp_path, monkeypatch):
        pipe, short = small_pipe(), small_pipe()
        train_dreambooth(short, short_run(pictures, tmp_path / "1", max_train_steps=1))
        poison(monkeypatch, pipe, {2})
        train_dreambooth(pipe, short_run(pictures, tmp_path / "2", on_nonfinite="skip"))
        assert_equal(trained(pipe), trained(short))

    def test_too_many_skipped_steps_stop(self, pipe, pictures, out, monkeypatch):
        poison(monkeypatch, pipe, set(range(1, 99)))
        with pytest.raises(AdapterError, match=f"last {MOST_SKIPPED} steps were skipped"):
            train_dreambooth(pipe, short_run(pictures, out, max_train_steps=20, on_nonfinite="skip"))

    def test_after_the_last_step_nothing_is_saved(self, pipe, pictures, out):
        with pytest.raises(AdapterError, match="held-out loss is"):
            train_dreambooth(pipe, short_run(pictures, out, learning_rate=1e30, max_train_steps=1))
        assert not (out / "unet").exists()

    def test_broken_base(self, pipe, pictures, out):
        with torch.no_grad():
            pipe.unet.conv_out.bias[0] = float("nan")
        with pytest.raises(AdapterError, match=r"held-out loss is nan.*conv_out"):
            train_dreambooth(pipe, short_run(pictures, out))


def poison(monkeypatch, pipe, steps):
    """Make a convolution give NaN in the training passes of some steps."""
    loops = []
    made = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, *args: (made(self, *args), loops.append(self))[0])

    def spoil(module, args, output):
        busy = loops and loops[0].models["unet"].training
        return output * float("nan") if busy and loops[0].step + 1 in steps else None

    pipe.unet.mid_block.resnets[0].conv2.register_forward_hook(spoil)


class TestRefusals:
    def test_empty_folder(self, pipe, out, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.md").write_text("no picture")
        with pytest.raises(AdapterError, match=r"empty"):
            train_dreambooth(pipe, short_run(tmp_path / "empty", out))
        assert not out.exists()

    def test_missing_folder(self, pipe, out, tmp_path):
        with pytest.raises(OSError, match="absent"):
            train_dreambooth(pipe, short_run(tmp_path / "absent", out))

    def test_bad_pictures_are_skipped_by_name(self, pipe, out, pictures, tmp_path):
        folder = draw(tmp_path / "some", 2)
        good = (pictures / "0.png").read_bytes()
        (folder / "cut.png").write_bytes(good[: len(good) // 2])
        report = train_dreambooth(pipe, short_run(folder, out))
        assert report.images == 2
        assert [skipped.name for skipped in report.skipped_pictures] == ["cut.png"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"adapters": {}}, "adapters is empty"),
            ({"adapters": {"vae": LoraConfig()}}, "'vae'"),
            ({"adapters": {"unet": None}}, "expected an adapter config"),
            ({"max_train_steps": 0}, "max_train_steps is 0"),
            ({"train_batch_size": 1.5}, r"train_batch_size is 1\.5"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"learning_rates": {"unte": 1.0}}, "'unte'"),
            ({"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
            ({"mixed_precision": "int8"}, "mixed_precision is 'int8'"),
            ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
            ({"caption_dropout": 2}, "caption_dropout is 2"),
            ({"formats": ["webp"]}, "formats is"),
            ({"resolution": 17}, "resolution is 17; this model needs multiples of 2"),
            ({"trackers": ["abacus"]}, "'abacus'"),
            ({"target_params": 1000, "target_size": "1MB"}, "target_params and target_size"),
            ({"preview_prompts": "a prompt"}, "expected a list"),
        ],
    )
    def test_bad_setting(self, change, message, pipe, pictures, out):
        with pytest.raises(ConfigError, match=message):
            train_dreambooth(pipe, short_run(pictures, out, **change))
        assert not is_wrapped(pipe.unet)

    def test_second_component_fails(self, pipe, pictures, out):
        config = short_run(pictures, out)
        config.adapters["text_encoder"].target_modules = ["to_q"]
        before = outputs(pipe)
        with pytest.raises(AdapterError, match="to_q"):
            train_dreambooth(pipe, config)
        assert not is_wrapped(pipe.unet) and torch.equal(outputs(pipe), before)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"optimizer": "adamv"}, "optimizer is 'adamv'"),
            ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'"),
            ({"adapters": {"unet": LoraConfig(target_modules=["to_x"])}}, "to_x"),
            ({"formats": ["kohya"], "adapters": ADAPTERS["shira"](["to_q"])}, "cannot say"),
            ({"resume": "latest"}, "nothing to resume"),
            ({"save_dtype": "float8"}, "save_dtype is 'float8'"),
        ],
    )
    def test_refused_before_class_pictures_are_drawn(self, change, message, pipe, pictures, out, monkeypatch):
        monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("a picture was drawn"))
        if "formats" in change:
            change = change | {"adapters": {"unet": change["adapters"]}}
        with pytest.raises(AdapterError, match=message):
            train_dreambooth(pipe, short_run(pictures, out, class_prompt="c", **change))
        assert not out.exists()

    def test_trackers_are_closed_on_an_error(self, pipe, pictures, out, monkeypatch):
        pytest.importorskip("tensorboard")
        from accelerate.tracking import TensorBoardTracker

        closed = []
        monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: closed.append(self))

        def stop(step):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            train_dreambooth(pipe, short_run(pictures, out, trackers=["tensorboard"]), on_step=stop)
        assert len(closed) == 1

    def test_callback_may_stop(self, pipe, pictures, out):
        def stop(step):
            raise ZeroDivisionError

        before = outputs(pipe)
        with pytest.raises(ZeroDivisionError):
            train_dreambooth(pipe, short_run(pictures, out), on_step=stop)
        assert not is_wrapped(pipe.unet) and torch.equal(outputs(pipe), before)

    def test_pipeline_of_another_kind(self, pictures, out):
        import smallpipelines

        refiner = smallpipelines.sdxl()
        refiner.text_encoder = None
        with pytest.raises(AdapterError, match=r"StableDiffusionXLPipeline with .* cannot be trained; expected .*, Flux\.1"):
            train_dreambooth(refiner, short_run(pictures, out))

    def test_nothing_to_load(self, pipe, tmp_path):
        with pytest.raises(AdapterError, match="no trained adapter in"):
            load_trained(pipe, tmp_path)

    def test_load_is_all_or_nothing(self, pipe, pictures, out):
        train_dreambooth(pipe, short_run(pictures, out))
        (out / "text_encoder" / "adapter_model.safetensors").unlink()
        fresh = small_pipe()
        before = outputs(fresh)
        with pytest.raises((AdapterError, OSError)):
            load_trained(fresh, out)
        assert not is_wrapped(fresh.unet) and torch.equal(outputs(fresh), before)


class TestPlan:
    def test_notes_on_the_files_are_told_before_training(self, pipe, pictures, out):
        plan = plan_dreambooth(pipe, short_run(pictures, out, "shira"), measure_steps=0)
        notes = [line for line in plan.warnings if "only PEFT directories are written" in line]
        assert len(notes) == 1 and plan.rounds == pytest.approx(4 / 3)
        report = train_dreambooth(pipe, short_run(pictures, out, "shira"))
        assert notes[0] in report.warnings

    def test_plan_is_what_is_then_made(self, pipe, pictures, out):
        config = short_run(pictures, out, "lokr", class_prompt="c", num_class_images=2)
        before = outputs(pipe)
        plan = plan_dreambooth(pipe, config, measure_steps=1)
        assert not out.exists() and torch.equal(outputs(pipe), before) and not is_wrapped(pipe.unet)
        assert plan.seconds is not None and plan.seconds > 0 and plan.memory.activations
        report = train_dreambooth(pipe, config)
        assert plan.parameters == sum(report.parameters.values())
        for file in plan.files:
            made = Path(config.output_dir) / file.component / file.name
            assert made.stat().st_size == file.bytes, file
