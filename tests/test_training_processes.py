"""Several processes train what one would with all of their pictures, and go on where they, or one, or others were."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trainingcases import ADAPTERS, adapters, draw, short_run, small_pipe

from lycoris_diff import LoraConfig, load_adapter
from lycoris_diff.errors import AdapterError, ConfigError
from lycoris_diff.training import train_dreambooth
from lycoris_diff.training.prepare import check_class_pictures
from lycoris_diff.training.processes import check_processes

HERE = Path(__file__).parent
NAMES = (*ADAPTERS, "norm")
SHARDED = ("lora", "dora", "shira")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
RUN = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
from test_training_processes import NAMES, SHARDED, every, formats_of, settings
from torch.distributed.tensor import DTensor
from trainingcases import short_run, small_pipe
from lycoris_diff.cli.train import is_main_process
from lycoris_diff.training import train_dreambooth

assert is_main_process() == (os.environ["RANK"] == "0")  # the command asks before it makes an Accelerator
folder, rank = Path({folder!r}), os.environ["RANK"]

def run(name, pictures="pictures", **changes):
    config = short_run(folder / pictures, folder / name, **changes | dict(train_batch_size=1))
    pipe = small_pipe()
    (folder / f"{{name}}-{{rank}}.json").write_text(json.dumps(train_dreambooth(pipe, config).to_dict()))
    return pipe

if "ACCELERATE_USE_FSDP" in os.environ:
    for name in SHARDED:
        pipe = run(f"{{name}}-sharded", "wide", **every(name, folder) | dict(formats=formats_of(name)))
        for model in (pipe.unet, pipe.text_encoder):
            for parameter in model.parameters():  # the base in halves, the adapter whole
                assert isinstance(parameter, DTensor) == (not parameter.requires_grad)
    sys.exit()

first = settings(folder) | dict(checkpoint_every=1, preview_prompts=["a"], preview_steps=1)
run("two", "wide", **first)
run("two", "wide", **first | dict(max_train_steps=3, resume="latest"))
run("one-then-two", "wide", **settings(folder) | dict(max_train_steps=3, resume="latest"))
for name in NAMES:
    run(name, "wide", **every(name, folder))
"""


def settings(folder):
    """Buckets and prior preservation; no momentum, and no dropout, which each process has of its own."""
    unet, encoder = LoraConfig(r=2, target_modules=["to_q", "conv1"]), LoraConfig(r=2, target_modules=["q_proj"])
    return {
        "adapters": {"unet": unet, "text_encoder": encoder},
        "optimizer": "torch.optim.SGD",
        "learning_rate": 1.0,
        "aspect_buckets": True,
        "bucket_step": 8,
        "class_prompt": "c",
        "class_data_dir": folder / "pictures",
        "num_class_images": 3,
        "cache_dir": folder / "cache",
    }


def every(name, folder):
    """The same for one algorithm."""
    configs = adapters(name)
    for config in configs.values():
        for dropout in ("lora_dropout", "rank_dropout", "module_dropout"):
            if hasattr(config, dropout):
                setattr(config, dropout, 0.0)
    few = {"learning_rate": 0.1, "max_train_steps": 2, "held_out_samples": 1, "formats": ("peft",)}
    return settings(folder) | few | {"adapters": configs}


def formats_of(name):
    """PEFT's directories, and the one file for all components, where kohya's readers have the algorithm."""
    return ("peft",) if name == "shira" else ("peft", "kohya")


def weights(folder):
    return {
        f"{path.parent.name}.{name}": value
        for path in sorted(folder.glob("*/adapter_model.safetensors"))
        for name, value in load_file(path).items()
        if value.is_floating_point()  # not SHiRA's positions
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote; a run of one was there before, which they went on from."""
    folder = tmp_path_factory.mktemp("processes")
    draw(folder / "pictures")
    draw(folder / "wide", 4, ((16, 16), (32, 8)))
    first = short_run(folder / "wide", folder / "one-then-two", checkpoint_every=2, **settings(folder))
    train_dreambooth(small_pipe(), first)
    launch(folder)
    return folder


def launch(folder, **variables):
    """Run the script in two processes, with the environment variables that `accelerate launch` sets."""
    script = folder / "run.py"
    script.write_text(RUN.format(here=str(HERE), root=str(HERE.parent), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(folder):
    """Losses of the same in one process, three steps and four."""
    return {
        steps: train_dreambooth(
            small_pipe(), short_run(folder / "wide", folder / f"alone-{steps}", max_train_steps=steps, **settings(folder))
        ).losses
        for steps in (3, 4)
    }


def reports(folder, name):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in "01"]


def assert_same(together, single):
    assert together.keys() == single.keys() and single
    for name, value in single.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torch has no gloo launcher there")


@pytest.mark.parametrize("name", ["two", "one-then-two"])
def test_two_processes_train_what_one_does(name, folder, alone):
    main, other = reports(folder, name)
    assert main["losses"] == other["losses"] and main["resumed_from"] == other["resumed_from"] == 2
    assert main["paths"] and not other["paths"]
    assert main["losses"] == pytest.approx(alone[3], rel=1e-5)
    assert_same(weights(folder / name), weights(folder / "alone-3"))


def test_one_process_goes_on_from_two(folder, alone):
    shutil.copytree(folder / "two", folder / "two-then-one")
    config = short_run(folder / "wide", folder / "two-then-one", max_train_steps=4, resume="latest", **settings(folder))
    with pytest.warns(UserWarning, match="the checkpoint is of 2 processes, here are 1: .* dropout will not be"):
        report = train_dreambooth(small_pipe(), config)
    assert report.resumed_from == 3 and report.losses == pytest.approx(alone[4], rel=1e-5)
    assert_same(weights(folder / "two-then-one"), weights(folder / "alone-4"))


def test_another_number_of_pictures_is_refused(folder):
    changes = settings(folder) | {"train_batch_size": 1, "max_train_steps": 4, "resume": "latest"}
    with pytest.raises(AdapterError, match="train_batch_size x processes: 2 then, 1 now"):
        train_dreambooth(small_pipe(), short_run(folder / "wide", folder / "two", **changes))


@pytest.fixture(scope="module")
def single(folder):
    """One process' training of an algorithm with all pictures, as often as asked for: its report, and how far weights went."""
    done = {}

    def run(name):
        if name not in done:
            settings = every(name, folder)
            report = train_dreambooth(small_pipe(), short_run(folder / "wide", folder / f"{name}-alone", **settings))
            still = settings | {"learning_rate": 1e-12, "max_train_steps": 1}
            train_dreambooth(small_pipe(), short_run(folder / "wide", folder / f"{name}-start", **still))
            after, start = weights(folder / f"{name}-alone"), weights(folder / f"{name}-start")
            done[name] = report, after, {key: (value - start[key]).norm() for key, value in after.items()}
        return done[name]

    return run


def assert_trained_alike(folder, name, single):
    """To the float32 error of a sum over two processes, and the rounding of two updates to each of the two weights."""
    main, other = reports(folder, name)
    report, after, steps = single
    assert main["losses"] == other["losses"] == pytest.approx(report.losses, rel=1e-5)
    together = weights(folder / name)
    assert together.keys() == after.keys() and max(steps.values()) > 1e-3
    eps = torch.finfo(torch.float32).eps
    # some gradients are zero but for rounding, which differs between processors: attention to a single position has no slope
    noise = eps * max(steps.values())
    for key, value in after.items():
        rounding = 4 * eps * value.norm()
        assert (together[key] - value).norm() <= 1e-4 * steps[key] + rounding + noise, key


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_with_buckets_and_prior_preservation(name, folder, single):
    assert_trained_alike(folder, name, single(name))


@pytest.fixture(scope="module")
def sharded(folder):
    launch(folder, **FSDP)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_base(name, folder, sharded, single):
    """The same weights, and one file of all components for kohya's readers, whose tensors are whole."""
    assert_trained_alike(folder, f"{name}-sharded", single(name))
    if "kohya" in formats_of(name):
        report = load_adapter(small_pipe(), reports(folder, f"{name}-sharded")[0]["paths"]["kohya"])
        assert report.loaded and {module.component for module in report.matched} == {"unet", "text_encoder"}


class TestRefusals:
    def accelerator(self, kind="MULTI_CPU", processes=2):
        return SimpleNamespace(num_processes=processes, distributed_type=SimpleNamespace(value=kind), state=SimpleNamespace())

    def test_what_is_fine(self):
        check_processes(self.accelerator(), ["a"])
        check_processes(self.accelerator("NO", 1), ["a"])

    def test_deepspeed(self):
        with pytest.raises(ConfigError, match=r"asks for DEEPSPEED; .* fsdp_version 2"):
            check_processes(self.accelerator("DEEPSPEED"), [])

    @pytest.mark.parametrize(
        ("variables", "previews", "message"),
        [
            ({"FSDP_VERSION": "1"}, [], "FSDP of fsdp_version 1"),
            ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true"}, [], "set it to false"),
            ({}, ["a"], "preview_prompts"),
        ],
    )
    def test_sharding(self, variables, previews, message, monkeypatch):
        for name, value in {**FSDP, **variables}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=message):
            check_processes(self.accelerator(), previews)

    def test_class_pictures_are_not_drawn_by_parts(self, tmp_path, monkeypatch):
        draw(tmp_path / "class", 2)
        config = short_run(tmp_path, tmp_path / "out", class_prompt="c", class_data_dir=tmp_path / "class", num_class_images=3)
        check_class_pictures(config, self.accelerator())
        for name, value in FSDP.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="has 2 of 3 pictures of the class"):
            check_class_pictures(config, self.accelerator())
        check_class_pictures(replace(config, num_class_images=2), self.accelerator())

    def test_processes_that_do_not_know_of_each_other(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=r"2 processes were launched, .* --cpu"):
            check_processes(self.accelerator("NO", 1), [])
