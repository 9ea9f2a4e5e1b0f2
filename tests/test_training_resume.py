"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainingcases import ADAPTERS, assert_equal, draw, short_run, small_pipe, trained

from lycoris_diff.errors import AdapterError
from lycoris_diff.tiny import draw_subject_images, load_pipeline
from lycoris_diff.tiny.demo import demo_config
from lycoris_diff.tiny.recipes import find_recipe
from lycoris_diff.training import train_dreambooth

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


class Stop(Exception):
    pass


def stop_after(step):
    def on_step(report):
        if report.step == step:
            raise Stop

    return on_step


#: what else a run's state has: averages, schedules, several passes a step, class pictures, other optimizers
QUICK = ("lora", "lokr", "dora", "shira", "oft")
VARIANTS = {
    "ema": {"ema_decay": 0.9},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "train_batch_size": 1},
    "chance": {"random_flip": True, "caption_dropout": 0.5, "noise_offset": 0.1},
    "previews": {"preview_prompts": ["a"], "preview_every": 1, "preview_steps": 1},
    "adafactor": {"optimizer": "adafactor", "optimizer_args": {"relative_step": False, "scale_parameter": False}},
}


class TestBitForBit:
    def check(self, name, pictures, tmp_path, **changes):
        whole = small_pipe()
        report = train_dreambooth(whole, short_run(pictures, tmp_path / "whole", name, max_train_steps=4, **changes))
        changes |= {"max_train_steps": 4, "checkpoint_every": 2}
        with pytest.raises(Stop):  # as if killed in the third step: nothing is saved after the checkpoint of the second
            train_dreambooth(small_pipe(), short_run(pictures, tmp_path / "cut", name, **changes), stop_after(3))
        again = small_pipe()
        torch.manual_seed(99)
        rest = train_dreambooth(again, short_run(pictures, tmp_path / "cut", name, resume="latest", **changes))
        assert rest.resumed_from == 2 and len(rest.losses) == 4
        assert rest.losses == report.losses
        assert (rest.held_out_before, rest.held_out_after) == (report.held_out_before, report.held_out_after)
        assert_equal(trained(again), trained(whole))
        for file in ("unet/adapter_model.safetensors", "text_encoder/adapter_model.safetensors"):
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()

    @pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ADAPTERS])
    def test_every_adapter(self, name, pictures, tmp_path):
        self.check(name, pictures, tmp_path)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_every_state(self, name, pictures, tmp_path):
        self.check("lora", pictures, tmp_path, **VARIANTS[name])

    @pytest.mark.parametrize(
        ("module", "settings"),
        [
            ("prodigyopt", {"optimizer": "prodigy", "learning_rate": 1.0}),
            ("schedulefree", {"optimizer": "schedulefree", "preview_prompts": ["a"], "preview_every": 1, "preview_steps": 1}),
        ],
    )
    def test_other_optimizers(self, module, settings, pictures, tmp_path):
        pytest.importorskip(module)
        self.check("lora", pictures, tmp_path, **settings)

    def test_class_pictures(self, pictures, tmp_path):
        folder = draw(tmp_path / "class", 2)
        self.check("lokr", pictures, tmp_path, class_data_dir=folder, class_prompt="a", num_class_images=2)


@pytest.mark.slow
def test_two_threads_add_up_in_one_order(tmp_path):
    """On models that are large enough for operations to be split, a run gives the same bits again."""
    pictures = tmp_path / "pictures"
    draw_subject_images(pictures, 3, name="a")
    threads, losses, weights = torch.get_num_threads(), [], []
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            pipe = load_pipeline()
            config = demo_config(find_recipe("lora"), pictures, pictures, tmp_path / name, steps=6, seed=0)
            losses.append(train_dreambooth(pipe, replace(config, held_out_samples=4)).losses)
            weights.append(trained(pipe))
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1] and not torch.are_deterministic_algorithms_enabled()
    assert_equal(*weights)


RUN = """
import os, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from trainingcases import short_run, small_pipe
from lycoris_diff.training import train_dreambooth

torch.set_num_threads({threads})  # another number adds up in another order

def on_step(step):
    print("step", step.step, flush=True)
    if step.step == {last}:
        {act}

config = short_run(Path({pictures!r}), Path({output!r}), "loha", max_train_steps=6, checkpoint_every=2)
train_dreambooth(small_pipe(), config, on_step)
"""


def run_script(pictures, output, last, act):
    values = {"here": str(HERE), "pictures": str(pictures), "output": str(output), "threads": torch.get_num_threads()}
    source = textwrap.dedent(RUN).format(**values, last=last, act=act)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, check=False)


class TestKilled:
    @pytest.fixture(scope="class")
    def whole(self, pictures, tmp_path_factory):
        pipe = small_pipe()
        train_dreambooth(pipe, short_run(pictures, tmp_path_factory.mktemp("whole"), "loha", max_train_steps=6))
        return trained(pipe)

    def finish(self, pictures, output):
        pipe = small_pipe()
        config = short_run(pictures, output, "loha", max_train_steps=6, checkpoint_every=2, resume="latest")
        return train_dreambooth(pipe, config), trained(pipe)

    def test_kill_9(self, whole, pictures, tmp_path):
        done = run_script(pictures, tmp_path, 5, "os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "unet").exists()
        report, weights = self.finish(pictures, tmp_path)
        assert report.resumed_from == 4
        assert_equal(weights, whole)

    @pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
    def test_interrupted(self, number, whole, pictures, tmp_path):
        done = run_script(pictures, tmp_path, 3, f"os.kill(os.getpid(), signal.{number})")
        assert done.returncode != 0
        assert "stopped after step 3 of 6" in done.stderr and "checkpoint-000003" in done.stderr
        report, weights = self.finish(pictures, tmp_path)
        assert report.resumed_from == 3
        assert_equal(weights, whole)


class TestRefusals:
    @pytest.fixture
    def run(self, pictures, tmp_path):
        config = short_run(pictures, tmp_path / "run", checkpoint_every=1)
        train_dreambooth(small_pipe(), config)
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"learning_rate": 1e-3}, "learning_rate"),
            ({"name": "lokr"}, "adapters"),
            ({"train_batch_size": 1}, "train_batch_size"),
        ],
    )
    def test_other_settings(self, changes, message, run, pictures):
        adapter = changes.pop("name", "lora")
        pipe = small_pipe()
        with pytest.raises(AdapterError, match=message):
            train_dreambooth(pipe, short_run(pictures, run, adapter, max_train_steps=3, resume="latest", **changes))
        assert type(pipe.unet).__name__ == "UNet2DConditionModel"

    def test_other_pictures(self, run, tmp_path):
        other = draw(tmp_path / "other", 2)
        with pytest.raises(AdapterError, match=r"data|pictures"):
            train_dreambooth(small_pipe(), short_run(other, run, max_train_steps=3, resume="latest"))

    def test_other_base(self, run, pictures):
        pipe = small_pipe()
        with torch.no_grad():
            pipe.vae.encoder.conv_in.weight[0, 0, 0, 0] += 0.1
        with pytest.raises(AdapterError, match=r"of another run.*\n *base:"):
            train_dreambooth(pipe, short_run(pictures, run, max_train_steps=3, resume="latest"))

    def test_checkpoint_after_the_last_step(self, run, pictures):
        with pytest.raises(AdapterError, match="is of step 2, max_train_steps is 1"):
            train_dreambooth(small_pipe(), short_run(pictures, run, max_train_steps=1, resume="latest"))

    def test_previews_before_the_interruption_are_on_the_card(self, pictures, tmp_path):
        drawn = {"preview_prompts": ["a"], "preview_every": 1, "preview_steps": 1}
        train_dreambooth(small_pipe(), short_run(pictures, tmp_path / "run", checkpoint_every=1, **drawn))
        config = short_run(pictures, tmp_path / "run", max_train_steps=3, resume="latest", **drawn)
        report = train_dreambooth(small_pipe(), config)
        names = [f"step-{step:06d}-00.png" for step in (1, 2, 3)]
        assert [path.name for path in report.previews] == names
        assert all(name in (tmp_path / "run" / "README.md").read_text() for name in names)

    def test_nothing_there(self, pictures, tmp_path):
        with pytest.raises(AdapterError, match="nothing to resume"):
            train_dreambooth(small_pipe(), short_run(pictures, tmp_path, resume="latest"))

    def test_more_steps_may_follow(self, run, pictures, tmp_path):
        longer = small_pipe()
        train_dreambooth(longer, short_run(pictures, run, max_train_steps=4, resume="latest"))
        whole = small_pipe()
        train_dreambooth(whole, short_run(pictures, tmp_path / "whole", max_train_steps=4))
        assert_equal(trained(longer), trained(whole))
