"""`lycoris-diff generate` and `lycoris-diff merge` on the built-in pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from pipelinefiles import make_file, with_changes
from safetensors.torch import load_file, save_file
from smallpipelines import pipeline

from lycoris_diff.cli import main
from lycoris_diff.cli.pipelines import AdapterArgument, adapter_argument
from lycoris_diff.tiny import load_pipeline

TAKE = lambda path: "attn" in path or path.startswith("encoder.")


@pytest.fixture
def file(tmp_path):
    changes = make_file(tmp_path / "style.v1.safetensors", load_pipeline(), "lokr", ("unet", "text_encoder"), TAKE, scale=0.3)
    return tmp_path / "style.v1.safetensors", changes


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    "text, source, weight",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("C:\\a.safetensors", "C:\\a.safetensors", 1.0),
        ("a:unet=1,text_encoder=.5", "a", {"unet": 1.0, "text_encoder": 0.5}),
        ("owner/name:2", "owner/name", 2.0),
    ],
)
def test_adapter_argument(text, source, weight):
    assert adapter_argument(text) == AdapterArgument(source, weight)


def test_adapter_argument_of_a_path_that_exists(tmp_path):
    (tmp_path / "run_12:30").mkdir()
    assert adapter_argument(f"{tmp_path}/run_12:30") == AdapterArgument(f"{tmp_path}/run_12:30", 1.0)
    assert adapter_argument(f"{tmp_path}/run_12:30:0.5") == AdapterArgument(f"{tmp_path}/run_12:30", 0.5)


@pytest.mark.parametrize("stem", ["train", "half", "__base__"])
def test_files_called_like_something_else(stem, file, tmp_path, capsys):
    path = file[0].rename(tmp_path / f"{stem}.safetensors")
    common = ["generate", "--model", "tiny", "--prompt", "a cat", "--steps", "1", "--device", "cpu", "--json"]
    assert main([*common, "--adapter", str(path), "--out", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["adapter_name"] == f"{stem}_"


def test_generate_refuses_sizes(tmp_path, capsys):
    pipeline("sd15").save_pretrained(tmp_path / "model")
    common = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a cat", "--steps", "1", "--width", "15"]
    assert main([*common, "--out", str(tmp_path / "a.png")]) == 1
    assert "--width and --height go together" in capsys.readouterr().err
    assert main([*common, "--height", "16", "--out", str(tmp_path / "a.png")]) == 1
    assert "StableDiffusionPipeline refuses:" in capsys.readouterr().err


def test_generate(file, tmp_path, capsys):
    path, changes = file
    out = tmp_path / "a.png"
    common = ["generate", "--model", "tiny", "--prompt", "a cat", "--steps", "2", "--device", "cpu"]
    assert main([*common, "--adapter", f"{path}:0.5", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == [str(out)]
    assert report["adapters"][0]["algorithms"] == {"LOKR": sum(len(c) for c in changes.values())}
    assert report["adapters"][0]["adapter_name"] == "style_v1"
    pipe = with_changes(load_pipeline(), (changes, 0.5))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(picture(out) - np.asarray(expected).astype(int)).max() <= 1
    arguments = ["--adapter", f"{path}:unet=0.5,text_encoder=0.5", "--fuse", "--count", "2", "--seed", "0"]
    assert main([*common, *arguments, "--out", str(tmp_path / "b.png")]) == 0
    assert str(tmp_path / "b-1.png") in capsys.readouterr().out
    assert picture(tmp_path / "b-0.png").shape == picture(out).shape


def test_generate_refuses(file, tmp_path, capsys):
    path, _ = file
    common = ["generate", "--model", "tiny", "--prompt", "x", "--steps", "1"]
    tensors = load_file(path)
    save_file({k.replace("attn2", "attn3"): v for k, v in tensors.items()}, tmp_path / "broken.safetensors")
    cases = [
        (["--adapter", str(tmp_path / "broken.safetensors"), "--out", str(tmp_path / "c.png")], "attn3"),
        (["--adapter", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "c.png")], "no such file"),
        (["--adapter", f"{path}:unett=1", "--out", str(tmp_path / "c.png")], "unett"),
        (["--out", str(tmp_path / "nowhere" / "c.png")], "directory"),
    ]
    for arguments, word in cases:
        assert main([*common, *arguments]) == 1
        error = capsys.readouterr().err
        assert word in error and "Traceback" not in error
    assert not (tmp_path / "c.png").exists()
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", "tiny"])
    assert caught.value.code == 2


def test_merge(file, tmp_path, capsys):
    path, changes = file
    out = tmp_path / "merged"
    assert main(["merge", "--model", "tiny", "--adapter", f"{path}:0.7", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modules"] == sum(len(c) for c in changes.values())
    merged = StableDiffusionPipeline.from_pretrained(out)
    expected = with_changes(load_pipeline(), (changes, 0.7))
    for name in ("unet", "text_encoder"):
        found = getattr(merged, name).state_dict()
        for key, value in getattr(expected, name).state_dict().items():
            assert torch.allclose(found[key], value, atol=1e-6), key
    assert main(["merge", "--model", "tiny", "--adapter", str(path), "--out", str(out)]) == 1
    assert "empty" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "style.v1.safetensors"]


def test_help_is_complete(capsys):
    for command in ("generate", "merge"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "--adapter FILE[:WEIGHT]" in text and "--json" in text and "--out" in text


def test_bad_usage_is_found_before_anything_is_made(tmp_path, capsys):
    common = ["generate", "--model", "tiny", "--prompt", "x", "--steps", "1"]
    for arguments, word in (
        (["--out", str(tmp_path / "cat")], ".png"),
        (["--out", str(tmp_path / "cat.xyz")], ".png"),
        (["--out", str(tmp_path / "c.png"), "--guidance", "nan"], "finite"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*common, *arguments])
        assert caught.value.code == 2 and word in capsys.readouterr().err
    (tmp_path / "d.png").mkdir()
    assert main([*common, "--out", str(tmp_path / "d.png")]) == 1
    assert "directory" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "c.png"), "--offload", "sequential", "--device", "cpu"]) == 1
    assert "leave it out" in capsys.readouterr().err


def test_models_that_are_none(tmp_path, capsys):
    for name in ("nowhere", "broken"):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42"}')
        out = str(tmp_path / "c.png")
        assert main(["generate", "--model", str(tmp_path / name), "--prompt", "x", "--out", out]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error and "Traceback" not in error


def test_a_weight_beyond_all_numbers(file, tmp_path, capsys):
    path, _ = file
    assert main(["merge", "--model", "tiny", "--adapter", f"{path}:1e300", "--out", str(tmp_path / "m")]) == 1
    assert "finite" in capsys.readouterr().err and not (tmp_path / "m").exists()
