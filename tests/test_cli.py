"""The command: what it writes, what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from lycoris_diff.cli.demo import ADAPTERS
from lycoris_diff.cli.main import main
from lycoris_diff.errors import AdapterError
from lycoris_diff.tiny import demo
from lycoris_diff.tiny.recipes import RECIPES
from lycoris_diff.training import TrainReport


def fake_report(folder, after):
    training = TrainReport([1.0], 1.0, after, 0.1, {"unet": 10}, {"unet": 2048}, {"unet": folder / "unet"}, 5)
    return demo.DemoReport("lokr", "LoKr", "a prompt", training, {"loss": folder / "loss.png"})


class TestDemo:
    def test_json(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
        code = main(["demo", "--adapter", "lora", "--steps", "6", "--out", str(tmp_path), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == 0
        assert report["adapter"] == "lora"
        assert len(report["training"]["losses"]) == 6
        assert report["training"]["held_out_after"] < report["training"]["held_out_before"]
        assert sorted(path.name for path in (tmp_path / "subject").iterdir())[-1] == "subject-5.png"
        assert (tmp_path / "adapter" / "text_encoder" / "adapter_model.safetensors").is_file()
        for name in ("pictures", "loss"):
            assert Image.open(report["files"][name]).width > 500

    def test_table(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: fake_report(tmp_path, after=0.75))
        assert main(["demo", "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        for text in ("LoKr", "unet", "2 KiB", "1.0000", "0.7500", "-25%", "0.100 s", str(tmp_path / "loss.png")):
            assert text in out

    def test_loss_that_did_not_fall(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: fake_report(tmp_path, after=1.0))
        assert main(["demo", "--json"]) == 1
        output = capsys.readouterr()
        assert "did not fall" in output.err
        assert json.loads(output.out)["training"]["improved"] is False

    def test_adapters_are_those_with_a_recipe(self):
        assert set(ADAPTERS) == set(RECIPES)

    def test_unknown_recipe(self, tmp_path):
        with pytest.raises(AdapterError, match="'oft'"):
            demo.run_demo("oft", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestExitCodes:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["unknown"],
            ["demo", "--adapter", "oft"],
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
