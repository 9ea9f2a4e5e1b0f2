"""The command: what it writes, what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from lycoris_diff.cli.demo import ADAPTERS
from lycoris_diff.cli.main import build_parser, main
from lycoris_diff.errors import AdapterError
from lycoris_diff.tiny import demo
from lycoris_diff.tiny.measure import Rate
from lycoris_diff.tiny.recipes import RECIPES
from lycoris_diff.training import TrainReport


def fake_report(folder, after=0.7, others=14):
    training = TrainReport([1.0], 1.0, 0.75, 0.1, {"unet": 12345}, {"unet": 2048}, {"unet": folder / "unet"}, 5)
    outcome = demo.Outcome(0.01, after, 0.98, 0.87, Rate(14, 16), Rate(others, 16), 6.5, 0.02)
    return demo.DemoReport("lokr", "LoKr", "a prompt", training, outcome, {"loss": folder / "loss.png"})


class TestDemo:
    def test_json(self, tmp_path, capsys, monkeypatch):
        for name, value in (("SAMPLING_STEPS", 1), ("CLASS_PICTURES", 3), ("OTHERS", 2)):
            monkeypatch.setattr(demo, name, value)
        code = main(["demo", "--adapter", "lora", "--steps", "2", "--out", str(tmp_path), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == 1 and report["succeeded"] is False  # two steps teach nothing
        assert report["adapter"] == "lora"
        assert len(report["training"]["losses"]) == 2
        assert (report["training"]["images"], report["training"]["class_images"]) == (5, 3)
        assert report["outcome"]["subject_drawn"] > 0.9 and report["outcome"]["others"] == 6
        assert (tmp_path / "subject" / "subject-5.txt").read_text() == "a sks creature on a black background\n"
        assert (tmp_path / "class" / "class-03.txt").read_text().startswith("a")
        assert (tmp_path / "adapter" / "text_encoder" / "adapter_model.safetensors").is_file()
        for name in ("pictures", "loss"):
            assert Image.open(report["files"][name]).width > 500

    def test_table(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: fake_report(tmp_path))
        assert main(["demo", "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        for text in ("LoKr", "unet", "12,345", "1.0000", "0.7500", "-25%", "0.10 s", str(tmp_path / "loss.png")):
            assert text in out
        for text in ("a prompt", "0.98", "0.87", "0.01", "0.70", "14 of 16", "6.5", "learned", "kept"):
            assert text in out

    @pytest.mark.parametrize(
        ("numbers", "complaint"),
        [({"after": 0.3}, "was not learned"), ({"others": 9}, "lost too much")],
        ids=["not learned", "not kept"],
    )
    def test_what_was_measured_decides(self, numbers, complaint, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: fake_report(tmp_path, **numbers))
        assert main(["demo", "--json"]) == 1
        output = capsys.readouterr()
        assert complaint in output.err
        report = json.loads(output.out)
        assert report["succeeded"] is False
        assert report["outcome"]["learned"] is ("after" not in numbers)
        assert report["outcome"]["kept"] is ("others" not in numbers)

    def test_defaults_are_the_same(self):
        args = build_parser().parse_args(["demo"])
        assert args.steps == demo.TRAIN_STEPS

    def test_adapters_are_those_with_a_recipe(self):
        assert set(ADAPTERS) == set(RECIPES)

    def test_unknown_recipe(self, tmp_path):
        with pytest.raises(AdapterError, match="'vera'"):
            demo.run_demo("vera", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestExitCodes:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["unknown"],
            ["demo", "--adapter", "vera"],
            ["demo", "--steps", "0"],
            ["demo", "--steps", "many"],
            ["demo", "--seed", "-1"],
            ["demo", "--seed", str(2**32)],
            ["demo", "--unknown"],
        ],
    )
    def test_bad_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: lycoris-diff" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
    def test_help(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out = capsys.readouterr().out
        assert caught.value.code == 0
        assert "demo" in out
        if arguments[0] == "demo":
            assert all(option in out for option in ("--adapter", "--out", "--steps", "--seed", "--json"))

    def test_output_is_a_file(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert main(["demo", "--out", str(tmp_path / "file"), "--json"]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("lycoris-diff demo: error:")

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [(AdapterError("no"), 1, "error: no"), (KeyboardInterrupt(), 130, "interrupted")],
    )
    def test_refusal_and_interrupt(self, error, code, text, capsys, monkeypatch):
        def refuse(*args, **kwargs):
            raise error

        monkeypatch.setattr(demo, "run_demo", refuse)
        assert main(["demo"]) == code
        assert text in capsys.readouterr().err

    def test_module_is_the_command(self):
        command = [sys.executable, "-m", "lycoris_diff", "demo", "--steps", "0"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2
        assert "usage: lycoris-diff demo" in result.stderr
