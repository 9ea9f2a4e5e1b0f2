"""Runs of every family: every adapter comes back from its files, interrupted runs, plans of full-size models, commands."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import smallpipelines
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from familycases import KINDS, SIDE, family, picture, pipeline, short_run, trained
from PIL import Image
from torch import nn
from trainingcases import ADAPTERS, assert_equal, draw

from lycoris_diff import LoraConfig, load_adapter, save_adapter
from lycoris_diff.bookkeeping import adapted_layers
from lycoris_diff.cli.main import main
from lycoris_diff.diffusion.components import models_of
from lycoris_diff.files import save_adapter_directory
from lycoris_diff.naming.bases import BASES, _empty_model
from lycoris_diff.targets import find_targets
from lycoris_diff.training import DreamBoothConfig, load_trained, plan_dreambooth, train_dreambooth
from lycoris_diff.training.filesize import blank_adapters
from lycoris_diff.training.plan import plan_training
from lycoris_diff.training.settings import read_settings

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent / "scripts"
#: of the whole matrix, these run every time; the others with -m slow
QUICK = {("sdxl", "lora"), ("sd3", "miss"), ("sd3-t5", "lora"), ("flux", "lokr")}
#: what a kohya file says in other words; pictures differ by rounding then
REWRITTEN = {"miss"}
#: algorithms that kohya's format has no place for, whatever the model
NO_KOHYA = {"miss-bat", "shira", "oft"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


class TestRuns:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
            for kind in KINDS
            for name in (*ADAPTERS, "norm")
            if name != "norm" or kind == "sdxl"
        ],
    )
    def test_every_adapter_comes_back(self, kind, name, pictures, tmp_path):
        """Two steps beside the class on all parts; both forms of the files draw the same picture in a fresh pipeline."""
        pipe = pipeline(kind)
        untrained = picture(pipe)
        config = short_run(pipe, pictures, tmp_path / "out", name)
        report = train_dreambooth(pipe, config)
        after = picture(pipe)
        assert np.abs(after - untrained).max() > 1e-3
        assert report.class_images == 3 and set(report.parameters) == set(config.adapters)
        by_directories = pipeline(kind)
        assert set(load_trained(by_directories, tmp_path / "out")) == set(config.adapters)
        np.testing.assert_allclose(picture(by_directories), after, atol=1e-6, rtol=0)
        assert ("kohya" in report.paths) == (name not in NO_KOHYA)
        if "kohya" in report.paths:
            by_file = pipeline(kind)
            loaded = load_adapter(by_file, report.paths["kohya"])
            assert not loaded.problems and {found.component for found in loaded.matched} == set(config.adapters)
            np.testing.assert_allclose(picture(by_file), after, atol=1e-5 if name in REWRITTEN else 1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("kind", "name"),
        [pytest.param("sdxl", "lokr", marks=pytest.mark.slow), ("sd3-t5", "lora"), ("flux", "loha")],
    )
    def test_an_interrupted_run_ends_with_the_same_bits(self, kind, name, pictures, tmp_path):
        """With an average, captions left out, pictures mirrored, activations recomputed; a preview is what people draw."""
        changes = {"preview_prompts": ["a"], "preview_steps": 1, "preview_guidance": 3.0, "train_batch_size": 1}
        changes |= {"class_prompt": None, "class_data_dir": None}
        changes |= {"ema_decay": 0.9, "caption_dropout": 0.5, "random_flip": True, "gradient_checkpointing": True}
        whole, again = pipeline(kind), pipeline(kind)
        report = train_dreambooth(whole, short_run(whole, pictures, tmp_path / "whole", name, **changes))
        changes["checkpoint_every"] = 1

        def stop(step):
            if step.step == 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train_dreambooth(again, short_run(again, pictures, tmp_path / "cut", name, **changes), stop)
        again = pipeline(kind)
        torch.manual_seed(99)
        rest = train_dreambooth(again, short_run(again, pictures, tmp_path / "cut", name, resume="latest", **changes))
        assert rest.resumed_from == 1 and rest.losses == report.losses
        assert (rest.held_out_before, rest.held_out_after) == (report.held_out_before, report.held_out_after)
        assert_equal(trained(again), trained(whole))
        shown = np.asarray(Image.open(report.previews[-1]))
        fresh = pipeline(kind)
        load_trained(fresh, tmp_path / "cut")
        drawn = picture(fresh, "a", num_inference_steps=1)
        assert np.array_equal(shown, (drawn * 255).round().astype("uint8"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_text_encoder_learns(self, kind, pictures, tmp_path):
        pipe = pipeline(kind)
        config = short_run(pipe, pictures, tmp_path / "out", max_train_steps=1)
        config.adapters = {name: adapter for name, adapter in config.adapters.items() if name.startswith("text_encoder")}
        train_dreambooth(pipe, config)
        moved = {name.split(".adapters.")[0] for name, value in trained(pipe).items() if "lora_B" in name and value.abs().sum()}
        still = {name.split(".adapters.")[0] for name in trained(pipe)} - moved
        assert {name.split(".")[0] for name in moved} == set(config.adapters)
        assert all(kind == "sdxl" and name.startswith("text_encoder.") and "layers.1." in name for name in still), still

    @pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
    def test_class_pictures_are_drawn(self, kind, pictures, tmp_path):
        pipe = pipeline(kind)
        call = type(pipe).__call__
        config = short_run(pipe, pictures, tmp_path / "out", class_data_dir=None, num_class_images=1, max_train_steps=1)
        config.adapters = {family(pipe).denoiser: config.adapters[family(pipe).denoiser]}
        sizes = []

        class Quick(type(pipe)):
            def __call__(self, *args, **given):
                sizes.append((given["width"], given["height"]))
                return call(self, *args, **given, num_inference_steps=1)

        pipe.__class__ = Quick
        report = train_dreambooth(pipe, config)
        assert (report.generated, report.class_images) == (1, 1) and sizes == [(SIDE, SIDE)]
        assert Image.open(tmp_path / "out" / "class" / "class-00000.png").size == (SIDE, SIDE)

    @pytest.mark.parametrize("kind", ["sd3", "flux"])
    def test_adapters_that_fused_weights_have_no_place_for(self, kind, pictures, tmp_path):
        """q, k and v are one weight in kohya's names: LoKr on them goes to PEFT's directories, and to ComfyUI's file."""
        pipe = pipeline(kind)
        lokr = {"transformer": ADAPTERS["lokr"](["to_q", "to_k"])}
        report = train_dreambooth(pipe, short_run(pipe, pictures, tmp_path / "out", adapters=lokr))
        assert "kohya" not in report.paths and any("qkv" in note for note in report.warnings)
        assert report.paths["transformer"].is_dir()
        save_adapter(pipe, tmp_path / "comfyui.safetensors", "default", "comfyui")
        fresh = pipeline(kind)
        assert not load_adapter(fresh, tmp_path / "comfyui.safetensors").problems
        np.testing.assert_allclose(picture(fresh), picture(pipe), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("kind", [pytest.param("sdxl", marks=pytest.mark.slow), "flux"])
    def test_half_precision(self, kind, pictures, tmp_path):
        from accelerate.state import AcceleratorState

        pipe = pipeline(kind).to(torch.bfloat16)
        AcceleratorState._reset_state()
        try:
            report = train_dreambooth(pipe, short_run(pipe, pictures, tmp_path, mixed_precision="bf16"))
        finally:
            AcceleratorState._reset_state()
        assert all(np.isfinite(report.losses))
        assert {value.dtype for value in trained(pipe).values()} == {torch.float32}

    def test_diffusers_reads_what_the_card_says_it_reads(self, pictures, tmp_path):
        pipe = pipeline("sdxl")
        config = short_run(
            pipe, pictures, tmp_path / "out", adapters={"unet": LoraConfig(r=2, target_modules=["to_q", "to_v"])}
        )
        report = train_dreambooth(pipe, config)
        assert "load_lora_weights" in (tmp_path / "out" / "README.md").read_text()
        fresh = pipeline("sdxl")
        fresh.load_lora_weights(report.paths["kohya"].parent, weight_name=report.paths["kohya"].name)
        assert np.abs(picture(pipe) - picture(pipeline("sdxl"))).max() > 1e-3
        np.testing.assert_allclose(picture(fresh), picture(pipe), atol=1e-5, rtol=0)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="torch has no gloo launcher there")
    def test_two_processes_with_layers_that_nothing_reads(self, tmp_path):
        """The last layer of XL's first text encoder has no gradient, which processes must not wait for."""
        folder, script = draw(tmp_path / "pictures"), tmp_path / "run.py"
        script.write_text(TWO.format(here=str(HERE), root=str(HERE.parent), pictures=str(folder), output=str(tmp_path / "two")))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        losses = json.loads((tmp_path / "two" / "losses.json").read_text())
        pipe = pipeline("sdxl")
        alone = train_dreambooth(pipe, short_run(pipe, folder, tmp_path / "one", **two_settings(pipe), train_batch_size=2))
        assert losses == pytest.approx(alone.losses, rel=1e-5)


def two_settings(pipe):
    """No momentum and no dropout."""
    encoders = {name: LoraConfig(r=2, target_modules=["q_proj"]) for name in ("text_encoder", "text_encoder_2")}
    return {"adapters": encoders, "optimizer": "torch.optim.SGD", "learning_rate": 1.0, "max_train_steps": 3}


TWO = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
from familycases import pipeline, short_run
from test_training_families_runs import two_settings
from lycoris_diff.training import train_dreambooth

pipe = pipeline("sdxl")
config = short_run(pipe, Path({pictures!r}), Path({output!r}), **two_settings(pipe), train_batch_size=1)
report = train_dreambooth(pipe, config)
if os.environ["RANK"] == "0":
    Path({output!r}, "losses.json").write_text(json.dumps(report.losses))
"""


# --- before a run -------------------------------------------------------------------------------------------------------------
def full_size(name):
    """A pipeline with the real models, without their values."""
    kinds = {"sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
    found = {component: _empty_model(*spec) for component, spec in BASES[name].components.items()}
    with torch.device("meta"):
        found["vae"] = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            latent_channels=4 if name == "sdxl" else 16,
            layers_per_block=2,
        )
    small = pipeline(name)
    for encoder in [n for n in found if n.startswith("text_encoder")]:
        found[encoder.replace("text_encoder", "tokenizer")] = small.tokenizer
    return kinds[name](**found, scheduler=small.scheduler)


#: values of the denoiser, and how many layers LoRA goes on by component
FULL = {
    "sdxl": (2_567_463_684, {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}),
    "sd3": (2_028_328_000, {"transformer": 191, "text_encoder": 48, "text_encoder_2": 128}),
    "flux": (11_901_408_320, {"transformer": 266, "text_encoder": 48}),
}


@pytest.mark.parametrize("name", FULL)
def test_the_plan_of_full_size_models(name, pictures, tmp_path):
    weights, modules = FULL[name]
    pipe = full_size(name)
    chosen = {component: LoraConfig(r=4, target_modules="attention") for component in modules}
    config = DreamBoothConfig(pictures, tmp_path / "out", "a", adapters=chosen, resolution=1024)
    plan = plan_training(pipe, config, metadata={"note": "x"})
    assert {(row.component, row.role): row.modules for row in plan.rows} == {(c, "attention"): n for c, n in modules.items()}
    # by hand: r values for every row and column of the weights
    layers = [target.layer for part, adapter in chosen.items() for target in find_targets(getattr(pipe, part), adapter)]
    assert plan.parameters == sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert sum(row.bytes for row in plan.rows) == 4 * plan.parameters
    assert sum(p.numel() for p in smallpipelines.denoiser(pipe).parameters()) == weights
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert plan.memory.weights == sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))
    assert plan.memory.gradients == 4 * plan.parameters
    assert plan.memory.adapters == 4 * (plan.parameters + len(layers))  # and a strength for every layer
    assert plan.memory.optimizer == pytest.approx(8 * plan.parameters, rel=1e-2)  # and a step count for every tensor
    if name == "flux":
        whole = plan_dreambooth(pipe, config)  # by the public call: nothing can be measured, all else is told
        assert (whole.rows, whole.memory, whole.seconds) == (plan.rows, plan.memory, None)
    assert all(parameter.is_meta for model in models for parameter in model.parameters())
    # the files themselves: factors with values on bases without
    blank = blank_adapters(models_of(pipe), chosen)
    generator = torch.Generator().manual_seed(0)
    for model in blank.values():
        for _, layer in adapted_layers(model):
            for parameter in layer.adapter("default").to_empty(device="cpu").parameters():
                nn.init.normal_(parameter, generator=generator)
    path = tmp_path / "out.safetensors"
    save_adapter(SimpleNamespace(components=blank), path, "default", "kohya", metadata={"note": "x"})
    for component in chosen:
        save_adapter_directory(blank[component], "default", tmp_path / component)
    for file in plan.files:
        assert (tmp_path / file.component / file.name).stat().st_size == file.bytes, file


def test_a_wanted_size_on_a_transformer(pictures, tmp_path):
    pipe = pipeline("flux")
    config = short_run(pipe, pictures, tmp_path / "out", "loha", target_size="60KB")
    config.adapters = {"transformer": config.adapters["transformer"]}
    plan = plan_dreambooth(pipe, config, measure_steps=1)
    kohya = next(file for file in plan.files if file.format == "kohya")
    assert abs(kohya.bytes - 60_000) <= min(abs(other.bytes - 60_000) for other in plan.size.alternatives)
    assert plan.seconds > 0 and plan.memory.activations > 0 and not (tmp_path / "out").exists()


class TestCommands:
    @pytest.fixture(scope="class")
    def models(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("models")
        for kind in ("sdxl", "sd3", "flux"):
            pipeline(kind).save_pretrained(folder / kind)
        return folder

    def flags(self, model, pictures, output):
        places = ["--model", model, "--instance_data_dir", pictures, "--output_dir", output, "--instance_prompt", "a b"]
        rest = ["--adapter", "loha", "--r", "2", "--resolution", SIDE, "--max_train_steps", "1", "--held_out_samples", "1"]
        return [str(value) for value in (*places, *rest, "--trackers", "[]")]

    def test_the_short_form_means_the_transformer(self, models, pictures, tmp_path):
        flags = self.flags(models / "flux", pictures, tmp_path / "out")
        assert list(read_settings(None, flags).config.adapters) == ["transformer"]
        every = read_settings(None, [*flags, "--train_text_encoder", "--text_encoder_2.r", "4"]).config.adapters
        assert {name: (adapter.peft_name, adapter.r) for name, adapter in every.items()} == {
            "transformer": ("LOHA", 2),
            "text_encoder": ("LOHA", 2),
            "text_encoder_2": ("LOHA", 4),
        }

    def test_the_command_plans_a_transformer(self, models, pictures, tmp_path, capsys):
        assert main(["train", *self.flags(models / "sd3", pictures, tmp_path / "out"), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        assert {row["component"] for row in plan["rows"]} == {"transformer"} and plan["seconds"] > 0

    def script(self, name, arguments, monkeypatch):
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return left.value.code

    @pytest.mark.parametrize(("kind", "other"), [("sdxl", "flux"), ("sd3", "sdxl"), ("flux", "sd3")])
    def test_a_script_trains_its_family_alone(self, kind, other, models, pictures, tmp_path, monkeypatch, capsys):
        name = f"train_dreambooth_{kind}.py"
        assert self.script(name, self.flags(models / other, pictures, tmp_path / "out"), monkeypatch) == 1
        said = capsys.readouterr().err
        assert f"{name}: error: " in said and "use train_dreambooth.py" in said
        assert f"is a model of {KINDS[other].title}, and this script trains {KINDS[kind].title};" in said
        assert not (tmp_path / "out").exists()
        assert self.script(name, [*self.flags(models / kind, pictures, tmp_path / "out"), "--json"], monkeypatch) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        assert len(report["losses"]) == 1
        fresh = pipeline(kind)
        load_adapter(fresh, report["paths"]["kohya"])
        card = (tmp_path / "out" / "README.md").read_text()
        assert "DiffusionPipeline.from_pretrained" in card and "load_adapter(pipe" in card
