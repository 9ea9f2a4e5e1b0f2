"""`lycoris-diff train` and scripts/train_dreambooth.py: what they ask for, print and return."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lycoris_diff import AdapterError, LoKrConfig, tiny, training
from lycoris_diff.cli import train as command
from lycoris_diff.cli import train_tables as tables
from lycoris_diff.cli.main import main
from lycoris_diff.tiny import build_pipeline, draw_subject_images
from lycoris_diff.training import TrainReport, TrainStep
from lycoris_diff.training.data.pictures import Skipped
from lycoris_diff.training.filesize import FileSize
from lycoris_diff.training.plan import Memory, PlanRow, TrainPlan
from lycoris_diff.training.plan import Setting as PlanSetting
from lycoris_diff.training.report import SkippedStep
from lycoris_diff.training.settings_help import list_adapter_fields, list_settings
from lycoris_diff.training.sizing import Alternative, SizeChoice

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_dreambooth.py"
MIB = 2**20


def the_script():
    spec = importlib.util.spec_from_file_location("train_dreambooth_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags of a run of two steps on the tiny pipeline with random weights."""
    monkeypatch.setattr(tiny, "load_pipeline", lambda: build_pipeline(0))
    draw_subject_images(tmp_path / "pictures", count=2)
    places = ["--instance_data_dir", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "out")]
    prompt = ["--instance_prompt", "a sks creature", "--resolution", "64", "--held_out_samples", "2"]
    return ["--model", "tiny", *places, *prompt, "--max_train_steps", "2", "--adapter", "lokr", "--target_modules", "[to_q]"]


SIZE = SizeChoice({"unet": LoKrConfig(r=3)}, {"unet": ("r", 3)}, "rank", 4_900, 20_000, (Alternative(4, 6_500, 26_000),))


def fake_report(folder: Path, **values) -> TrainReport:
    out = folder / "out"
    found = {
        "losses": [1.0, 0.5],
        "held_out_before": 1.0,
        "held_out_after": 0.75,
        "seconds_per_step": 0.25,
        "parameters": {"unet": 4_900},
        "bytes": {"kohya": 3 * MIB},
        "paths": {"kohya": out / "out.safetensors", "card": out / "README.md"},
        "images": 2,
    }
    return TrainReport(**found | values)


def fake_plan(**values) -> TrainPlan:
    memory = Memory(7 * MIB, 2 * MIB, 2 * MIB, 4 * MIB, 0, 10 * MIB, 60 * MIB)
    found = {
        "settings": (PlanSetting("unet", "LOKR", "rank", 3, False),),
        "rows": (PlanRow("unet", "attention", 64, 4_000, 16_000), PlanRow("unet", "mlp", 16, 900, 3_600)),
        "parameters": 4_900,
        "files": (
            FileSize("kohya", "", "out.safetensors", 160, 20_123),
            FileSize("peft", "unet", "adapter_config.json", 0, 99),
        ),
        "memory": memory,
        "steps": 2,
        "samples": 8,
        "rounds": 4.0,
        "seconds": 125.0,
        "size": SIZE,
        "warnings": ("learning rate 1 is high",),
    }
    return TrainPlan(**found | values)


class TestWhatIsCalled:
    def test_train(self, flags, tmp_path, capsys, monkeypatch):
        seen = {}

        def fake(pipe, config, on_step, on_stage, base):
            seen.update(pipe=pipe, config=config, base=base)
            on_stage("latents", 1, 2)
            on_stage("latents", 2, 2)
            on_step(TrainStep(1, 2, 0.5))
            on_step(TrainStep(2, 2, 0.25))
            return fake_report(tmp_path)

        monkeypatch.setattr(training, "train_dreambooth", fake)
        assert main(["train", *flags, "--json", "--r", "2"]) == 0
        output = json.loads(capsys.readouterr().out)
        assert output["report"]["losses"] == [1.0, 0.5] and output["settings"]["model"] == "tiny"
        assert seen["config"].adapters == {"unet": LoKrConfig(r=2, target_modules=["to_q"])}
        assert output["settings"]["adapters"] == {"unet": {"type": "lokr", "r": 2, "target_modules": ["to_q"]}}
        assert seen["base"] == {"model": "tiny", "dtype": "auto", "revision": None, "variant": None}
        assert type(seen["pipe"]).__name__ == "StableDiffusionPipeline"

    def test_dry_run(self, flags, capsys, monkeypatch):
        monkeypatch.setattr(training, "train_dreambooth", lambda *_: pytest.fail("it was trained"))
        monkeypatch.setattr(training, "plan_dreambooth", lambda pipe, config, **_: fake_plan(steps=config.max_train_steps))
        assert main(["train", *flags, "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["plan"]["steps"] == 2

    def test_a_file_and_flags(self, flags, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(training, "plan_dreambooth", lambda pipe, config, **_: fake_plan(steps=config.max_train_steps))
        written = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2])}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(written | {"target_modules": ["to_q"]}))
        for arguments in (
            ["run.yaml", "--dry-run"],
            ["--dry-run", "run.yaml"],
            ["--max-train-steps=7", "--dry_run", "run.yaml"],
        ):
            monkeypatch.chdir(tmp_path)
            assert main(["train", *arguments, "--json"]) == 0
            steps = 7 if "7" in arguments[0] else 2
            assert json.loads(capsys.readouterr().out)["plan"]["steps"] == steps

    def test_the_model_is_loaded_as_asked(self, flags, monkeypatch):
        asked = []
        monkeypatch.setattr(command, "load_pipeline", lambda *arguments: asked.append(arguments))
        monkeypatch.setattr(training, "plan_dreambooth", lambda pipe, config, **_: fake_plan())
        model = ["--model", "owner/name", "--dtype", "float16", "--revision", "v1", "--variant", "fp16"]
        assert main(["train", *flags[2:], *model, "--unet.r", "2", "--dry-run", "--json"]) == 0
        assert asked == [("owner/name", "float16", "v1", "fp16")]

    def test_a_revision_reaches_diffusers(self, monkeypatch):
        from diffusers import DiffusionPipeline

        from lycoris_diff.cli.pipelines import load_pipeline

        asked = []
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda model, **given: asked.append((model, given)))
        load_pipeline("owner/name", "auto")
        load_pipeline("owner/name", "auto", "v1", "fp16")
        assert asked == [("owner/name", {}), ("owner/name", {"revision": "v1", "variant": "fp16"})]


class TestTables:
    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")

    def test_report(self, flags, tmp_path, capsys, monkeypatch):
        values = {
            "skipped_pictures": (Skipped("broken.png", "is [truncated]"),),
            "skipped_steps": (SkippedStep(2, "the loss is nan"),),
            "class_images": 5,
            "generated": 3,
            "resumed_from": 1,
            "previews": [tmp_path / "out" / "previews" / "step-000002-00.png"],
            "size": SIZE,
            "uploaded": "https://hub/owner/name",
            "warnings": ["learning rate 1 is high"],
        }
        monkeypatch.setattr(training, "train_dreambooth", lambda *_: fake_report(tmp_path, **values))
        assert main(["train", *flags]) == 0
        out = capsys.readouterr().out
        for text in (
            *("lokr, 4,900 parameters", "rank 3: 4,900 parameters, 20,000 bytes; rank 4 has 6,500 (26,000 bytes)"),
            *("2, 5 of the class (3 generated)", "from step 1 on", "0.250 s", "1.0000 before, 0.7500 after  (-25.0%)"),
            *("out.safetensors (3.0 MiB)", "README.md", "1 in ", "https://hub/owner/name", "broken.png: is [truncated]"),
            *("2: the loss is nan", "learning rate 1 is high"),
        ):
            assert text in out

    def test_plan(self, flags, capsys, monkeypatch):
        monkeypatch.setattr(training, "plan_dreambooth", lambda *_, **__: fake_plan())
        assert main(["train", *flags, "--dry-run"]) == 0
        out = capsys.readouterr().out
        for text in (
            *("attention", "4,000", "15.6 KiB", "mlp", "900", "80", "4,900", "lokr, rank 3", "rank 3: 4,900 parameters"),
            *("20,123 bytes (19.7 KiB), kohya", "25.0 MiB: weights 7.0 MiB", "activations 10.0 MiB"),
            "torch.optim.AdamW(), learning rate unet 0.0001",
            *(
                "60.0 MiB at most",
                "2: 8 pictures, every picture 4.0 times",
                "2 min 5 s, 62.500 s a step",
                "learning rate 1 is high",
            ),
        ):
            assert text in out
        assert "adapter_config.json" not in out

    def test_a_plan_with_less_known(self, flags, capsys, monkeypatch):
        memory = Memory(7 * MIB, 2 * MIB, 2 * MIB, None, MIB, None, None)
        less = {"memory": memory, "rounds": None, "seconds": None, "size": None, "warnings": ()}
        monkeypatch.setattr(training, "plan_dreambooth", lambda *_, **__: fake_plan(**less))
        assert main(["train", *flags, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "without optimizer and activations: weights 7.0 MiB" in out and "average 1.0 MiB" in out
        for text in ("at most", "every picture", "a step", "Warnings", "asked for"):
            assert text not in out

    @pytest.mark.parametrize(
        "size, text", [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**40, "5,120.0 GiB")]
    )
    def test_sizes(self, size, text):
        assert tables.size_text(size) == text

    @pytest.mark.parametrize("time, text", [(1.26, "1.3 s"), (59.4, "59 s"), (60, "1 min 0 s"), (7800, "2 h 10 min")])
    def test_times(self, time, text):
        assert tables.time_text(time) == text


@pytest.fixture(params=["command", "script"])
def start(request):
    """Both ways in: a function from arguments to the exit code."""
    return (lambda arguments: main(["train", *arguments])) if request.param == "command" else the_script().main


class TestExitCodes:
    @pytest.mark.parametrize(
        "wrong, text",
        [
            (["--resolution", "many"], "'many'"),
            (["--lerning_rate", "1"], "learning_rate"),
            (["--seed"], "no value"),
            (["-r", "4"], "'-r'"),
            (["a.yaml", "b.yaml"], "'b.yaml'"),
            (["--unet.rnak", "4"], "'rnak'"),
        ],
    )
    def test_bad_usage(self, start, flags, wrong, text, capsys):
        with pytest.raises(SystemExit) as caught:
            start([*wrong[:2], *flags] if "yaml" in text else [*flags, *wrong])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("usage: ") and text in error

    @pytest.mark.parametrize(
        "wrong, text",
        [(["--repeats", "0"], "repeats is 0"), (["--r", "0"], "r is 0"), (["--dtype", "int8"], "float16")],
    )
    def test_refused(self, start, flags, wrong, text, capsys):
        assert start([*flags, *wrong]) == 1
        output = capsys.readouterr()
        assert output.out == "" and "error: " in output.err and text in output.err

    def test_missing(self, start, flags, tmp_path, capsys):
        assert start([str(tmp_path / "none.yaml"), *flags]) == 1
        assert "none.yaml" in capsys.readouterr().err
        assert start(["--model", str(tmp_path / "none"), *flags[2:]]) == 1
        assert "none" in capsys.readouterr().err
        assert start([]) == 1
        assert "model is missing; give --model" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [(AdapterError("no"), 1, "error: no"), (KeyboardInterrupt("checkpoint-000002 was written"), 130, "checkpoint-000002")],
    )
    def test_refusal_and_interrupt(self, flags, error, code, text, capsys, monkeypatch):
        def refuse(*_):
            raise error

        monkeypatch.setattr(training, "train_dreambooth", refuse)
        assert main(["train", *flags]) == code
        script = the_script()  # which takes the functions when it is loaded
        assert script.main(flags) == code
        assert capsys.readouterr().err.count(text) == 2

    def test_help(self, start, capsys):
        for arguments in (["--help"], ["run.yaml", "-h"]):
            with pytest.raises(SystemExit) as caught:
                start(arguments)
            assert caught.value.code == 0
            out = " ".join(capsys.readouterr().out.split())
            for setting in (*list_settings(), *list_adapter_fields()):
                assert f"--{setting.name} " in out
                assert "".join(setting.help.split())[:40] in out.replace(" ", "")
            assert "--dry-run" in out and "--json" in out

    def test_the_command_lists_it(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "train adapters on pictures of a subject" in capsys.readouterr().out


class TestProgress:
    def test_bar(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_INTERACTIVE", "1")
        with command.shown_progress() as (on_stage, on_step):
            on_stage("loading the pipeline", 0, 0)
            on_stage("latents", 3, 4)
            on_step(TrainStep(501, 1000, 1.0))
            on_step(TrainStep(502, 1000, 0.5))
        assert "502/1000" in capsys.readouterr().err


class TestWithTheLoop:
    def test_train_load_and_repeat(self, flags, tmp_path, capsys):
        """The settings that a run writes come to the same adapter again, also with the script."""
        assert main(["train", *flags, "--learning_rate", "1e-2", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        assert len(report["losses"]) == 2 and report["images"] == 2
        written = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
        assert written["model"] == "tiny" and written["learning_rate"] == 1e-2
        again = ["--output_dir", str(tmp_path / "again"), "--name", "out"]
        assert the_script().main([str(tmp_path / "out" / "settings.yaml"), *again]) == 0
        assert "trained on tiny" in capsys.readouterr().out
        first, second = (load_file(tmp_path / folder / "out.safetensors") for folder in ("out", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert any(value.abs().max() > 0 for name, value in first.items() if "lokr_w2" in name)

    def test_interrupted_and_resumed(self, flags, tmp_path, capsys, monkeypatch):
        """Ctrl-C during the first step: a checkpoint, exit code 130, and --resume goes on from there."""

        @contextmanager
        def interrupting():
            yield lambda name, done, total: None, lambda step: os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as context:
            context.setattr(command, "shown_progress", interrupting)
            assert main(["train", *flags]) == 130
        error = capsys.readouterr().err
        assert "interrupted" in error and "checkpoint-000001" in error
        assert main(["train", *flags, "--resume", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        assert report["resumed_from"] == 1 and len(report["losses"]) == 2

    def test_dry_run_writes_nothing(self, flags, tmp_path, capsys):
        before = sorted(tmp_path.rglob("*"))
        for wanted in ([], ["--json"]):
            assert main(["train", *flags, "--adapter", "lora", "--target_params", "4000", "--dry-run", *wanted]) == 0
        plan = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["plan"]
        assert 3_000 < plan["parameters"] < 5_000 and plan["seconds"] > 0
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_size_that_was_chosen_is_in_the_report(self, flags, capsys):
        assert main(["train", *flags, "--adapter", "lora", "--target_params", "4000", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        assert report["size"]["parameters"] == report["parameters"]["unet"]

    def test_no_pictures(self, flags, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert main(["train", *flags, "--instance_data_dir", str(tmp_path / "empty")]) == 1
        assert "empty" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
