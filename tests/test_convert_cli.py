"""The commands `inspect` and `convert`: exit codes, what is printed where, JSON, pictures and folders."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from writingcases import community, pipeline_directory, worst

from lycoris_diff.checkpoints.convert import convert_checkpoint
from lycoris_diff.checkpoints.inspect import block_of, inspect_checkpoint
from lycoris_diff.checkpoints.norms import delta_norm
from lycoris_diff.checkpoints.read import read_checkpoint
from lycoris_diff.cli.convert import DTYPES, FORMATS
from lycoris_diff.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(pipeline_directory("sd15", tmp_path_factory.mktemp("base")))


@pytest.fixture
def lora(tmp_path):
    return community("sd15", "lora", metadata={"ss_output_name": "my lora"}).write(tmp_path / "lora")


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr()


class TestInspect:
    def test_json(self, lora, base, capsys):
        code, output = run(capsys, "inspect", lora, "--base-model", base, "--json")
        report = json.loads(output.out)
        assert code == 0
        assert report["algorithms"] == {"lora": 8}
        assert report["bytes"] == lora.stat().st_size and report["dialect"] == "kohya" and report["base_model"] == base
        assert report["modules"]["text_encoder"] == 2
        block = next(b for b in report["blocks"] if b["name"] == "down_blocks.1.resnets.0")
        assert (block["component"], block["modules"], block["ranks"], block["alphas"]) == ("unet", 1, [3], [2.0])
        assert block["alpha_sources"] == ["tensor"] and block["norm"] > 0
        assert report["metadata"]["ss_output_name"] == "my lora"

    def test_table(self, lora, base, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        code, output = run(capsys, "inspect", lora, "--base-model", base)
        assert code == 0
        for text in ("my lora", "kohya", "float32", "down_blocks.1.resnets.0", "lora", "tensor", "█", "text_encoder"):
            assert text in output.out

    def test_picture(self, lora, base, capsys, tmp_path):
        code, output = run(capsys, "inspect", lora, "--base-model", base, "--plot", tmp_path / "norms.png")
        assert code == 0 and "norms.png" in output.out
        picture = Image.open(tmp_path / "norms.png")
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(10**6)) > 50

    def test_norms_are_those_of_the_change(self, base, tmp_path):
        for algorithm in ("lora", "lora-tucker", "loha", "loha-cp", "lokr-full", "lokr-both", "lokr-tucker", "full", "shira"):
            file = community("sd15", algorithm)
            ckpt = read_checkpoint(file.write(tmp_path / algorithm), base)
            for component, modules in ckpt.components.items():
                for path, entries in modules.items():
                    want = float(file.expected[component][path][0].norm())
                    assert delta_norm(entries) == pytest.approx(want, rel=1e-5), (algorithm, path)

    def test_norm_of_many_ranks(self, tmp_path):
        torch.manual_seed(0)
        from lycoris_diff.checkpoints.checkpoint import Entry

        a1, b1, a2, b2 = torch.randn(70, 40), torch.randn(40, 60), torch.randn(70, 40), torch.randn(40, 60)
        tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        want = float((0.5 * (a1 @ b1) * (a2 @ b2)).norm())
        assert delta_norm(Entry("LOHA", tensors, 0.5, 40)) == pytest.approx(want, rel=1e-5)

    def test_what_cannot_be_used(self, base, tmp_path, capsys):
        file = community("sd15", "glora")
        file.tensors["lora_unet_no_such_module.lora_up.weight"] = torch.ones(4, 2)
        file.tensors["lora_unet_no_such_module.lora_down.weight"] = torch.ones(2, 4)
        file.tensors["something_else"] = torch.ones(2)
        code, output = run(capsys, "inspect", file.write(tmp_path / "file"), "--base-model", base)
        assert code == 0
        for text in ("depends on the base model's weights", "no such module (1)", "not understood (1)", "something_else"):
            assert text in output.out
        code, output = run(
            capsys, "inspect", tmp_path / "file.safetensors", "--base-model", base, "--plot", tmp_path / "no.png"
        )
        assert code == 1 and "no block has a norm" in output.err and not (tmp_path / "no.png").exists()

    def test_values_that_are_not_finite(self, base, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        file = community("sd15", "lokr-full-alpha-inf")
        name = next(k for k in file.tensors if k.endswith("lokr_w2"))
        file.tensors[name].flatten()[0] = float("nan")
        path = file.write(tmp_path / "file")
        code, output = run(capsys, "inspect", path, "--base-model", base, "--json")
        report = json.loads(output.out)
        assert code == 0 and any("1 modules hold NaN" in n for n in report["notes"])
        assert any(b["norm"] == "nan" for b in report["blocks"]) and any(b["alphas"] == ["inf"] for b in report["blocks"])
        code, output = run(capsys, "inspect", path, "--base-model", base, "--plot", tmp_path / "a.png")
        assert code == 0 and "nan" in output.out
        row = convert_checkpoint(path, tmp_path / "out.safetensors", "comfyui", base).files[0]
        assert any("NaN" in note for note in row.notes)

    def test_a_base_model_is_guessed(self, tmp_path):
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(640, 4)}
        save_file(tensors, tmp_path / "a.safetensors")
        report = inspect_checkpoint(tmp_path / "a.safetensors")
        assert report.base_model == "sd15" and report.blocks[0].alpha_sources == ["default"]

    def test_an_unknown_base_model(self, tmp_path, capsys):
        save_file({"lycoris_strange_thing.diff": torch.ones(3, 5)}, tmp_path / "a.safetensors")
        code, output = run(capsys, "inspect", tmp_path / "a.safetensors", "--json")
        report = json.loads(output.out)
        assert code == 0 and report["base_model"] == "" and report["algorithms"] == {"full": 1}
        assert any("not known" in note for note in report["notes"])

    @pytest.mark.parametrize(
        ("path", "block"),
        [
            ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.1"),
            ("mid_block.resnets.1.conv1", "mid_block.resnets.1"),
            ("up_blocks.2.upsamplers.0.conv", "up_blocks.2.upsamplers.0"),
            ("transformer_blocks.17.attn.to_q", "transformer_blocks.17"),
            ("text_model.encoder.layers.3.mlp.fc1", "text_model.encoder.layers.3"),
            ("conv_in", "conv_in"),
            ("double_blocks_3_img_attn_qkv", "double_blocks_3"),
        ],
    )
    def test_blocks(self, path, block):
        assert block_of(path) == block


class TestConvert:
    @pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers", "peft"])
    def test_a_file(self, format, lora, base, tmp_path, capsys):
        out = tmp_path / "out" if format == "peft" else tmp_path / "sub" / "out.safetensors"
        code, output = run(capsys, "convert", lora, out, "--format", format, "--base-model", base, "--json")
        report = json.loads(output.out)
        assert code == 0 and report["ok"] and report["format"] == format
        (row,) = report["files"]
        assert row["target"] == str(out) and row["error"] == "" and sum(row["modules"].values()) == 8 and row["bytes"] > 0
        assert row["algorithms"] == {"LORA": 8} and row["dialect"] == "kohya"
        assert worst(read_checkpoint(out, base), community("sd15", "lora"), "sd15") < 1e-6

    def test_dtype_and_table(self, lora, base, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "220")
        out = tmp_path / "out.safetensors"
        code, output = run(capsys, "convert", lora, out, "--format", "kohya", "--base-model", base, "--dtype", "bf16")
        assert code == 0 and "lora.safetensors" in output.out and "LORA 8" in output.out
        assert load_file(out)["lora_unet_time_embedding_linear_1.lora_up.weight"].dtype == torch.bfloat16

    def test_a_refusal(self, base, tmp_path, capsys):
        path = community("sd15", "loha").write(tmp_path / "loha")
        out = tmp_path / "out.safetensors"
        code, output = run(capsys, "convert", path, out, "--format", "diffusers", "--base-model", base, "--json")
        assert code == 1 and output.out == "" and not out.exists()
        assert output.err.strip().startswith("lycoris-diff convert: error:") and "LOHA" in output.err
        assert "Traceback" not in output.err

    def test_a_file_with_something_unknown(self, base, tmp_path, capsys):
        file = community("sd15", "lora")
        file.tensors["something_else"] = torch.ones(2)
        path, out = file.write(tmp_path / "in"), tmp_path / "out.safetensors"
        code, output = run(capsys, "convert", path, out, "--format", "comfyui", "--base-model", base)
        assert code == 1 and "something_else" in output.err and not out.exists()
        code, output = run(capsys, "convert", path, out, "--format", "comfyui", "--base-model", base, "--partial", "--json")
        (row,) = json.loads(output.out)["files"]
        assert code == 0 and any("something_else" in note for note in row["notes"]) and out.exists()

    def test_a_folder(self, base, tmp_path, capsys):
        folder = tmp_path / "all"
        (folder / "deep").mkdir(parents=True)
        good = {
            "a": community("sd15", "lora"),
            "deep/b": community("sd15", "lokr-w2"),
            "deep/c": community("sd15", "miss", "peft"),
        }
        for name, file in good.items():
            file.write(folder / name)
        (folder / "broken.safetensors").write_bytes(b"nothing")
        (folder / "readme.txt").write_text("hello")
        code, output = run(capsys, "convert", folder, tmp_path / "out", "--format", "comfyui", "--base-model", base, "--json")
        report = json.loads(output.out)
        assert code == 1 and not report["ok"]
        errors = {row["source"].rpartition("/")[2]: row["error"] for row in report["files"]}
        assert errors.pop("broken.safetensors") and set(errors.values()) == {""} and len(errors) == 3
        for name, file in good.items():
            assert worst(read_checkpoint(tmp_path / "out" / f"{name}.safetensors", base), file, "sd15") < 1e-6
        assert not (tmp_path / "out" / "broken.safetensors").exists()
        (folder / "broken.safetensors").unlink()
        code, output = run(capsys, "convert", folder, tmp_path / "peft", "--format", "peft", "--base-model", base)
        assert code == 0 and output.out.count("written to") == 3
        assert (tmp_path / "peft" / "deep" / "c" / "adapter_config.json").is_file()

    def test_a_folder_without_adapters(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        code, output = run(capsys, "convert", tmp_path / "empty", tmp_path / "out", "--format", "kohya")
        assert code == 1 and "holds no .safetensors file" in output.err

    def test_two_files_of_one_name(self, base, tmp_path):
        from lycoris_diff.errors import CheckpointError

        folder = tmp_path / "all"
        folder.mkdir()
        community("sd15", "lora").write(folder / "a")
        community("sd15", "miss", "peft").write(folder / "a")
        with pytest.raises(CheckpointError, match="rename one"):
            convert_checkpoint(folder, tmp_path / "out", "kohya", base)

    def test_into_a_directory(self, lora, base, tmp_path):
        (tmp_path / "there").mkdir()
        convert_checkpoint(lora, tmp_path / "there", "comfyui", base)
        assert (tmp_path / "there" / "lora.safetensors").is_file()

    def test_onto_itself(self, lora, base, capsys):
        code, output = run(capsys, "convert", lora, lora, "--format", "comfyui", "--base-model", base)
        assert code == 1 and "is the file that is read" in output.err
        code, _ = run(capsys, "convert", lora, lora, "--format", "comfyui", "--base-model", base, "--overwrite")
        assert code == 0 and any(k.startswith("diffusion_model.") for k in load_file(lora))


class TestExitCodes:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["inspect"],
            ["inspect", "a", "--plot", "a.jpg"],
            ["convert", "a", "b"],
            ["convert", "a", "b", "--format", "kohia"],
            ["convert", "a", "b", "--format", "kohya", "--dtype", "int8"],
        ],
    )
    def test_bad_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert f"usage: lycoris-diff {arguments[0]}" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [("inspect",), ("convert", "--format", "kohya")])
    def test_refusals(self, command, tmp_path, capsys):
        pickle = tmp_path / "a.pt"
        pickle.write_bytes(b"\x80\x02}q\x00.")
        for path, text in ((tmp_path / "missing.safetensors", "missing"), (pickle, "pickle")):
            out = [str(tmp_path / "out.safetensors")] if command[0] == "convert" else []
            code, output = run(capsys, command[0], path, *out, *command[1:])
            assert code == 1 and text in output.err and output.out == ""
            assert output.err.strip().count("\n") == 0, "one message"

    def test_an_unknown_base_model(self, lora, tmp_path, capsys):
        code, output = run(capsys, "convert", lora, tmp_path / "o.safetensors", "--format", "kohya", "--base-model", "sdxxl")
        assert code == 1 and "sdxl" in output.err

    @pytest.mark.parametrize("command", ["inspect", "convert"])
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        out = capsys.readouterr().out
        assert caught.value.code == 0 and "--base-model" in out and "--json" in out

    def test_formats_are_those_of_the_library(self):
        from lycoris_diff.checkpoints.formats import FORMATS as TABLE

        assert tuple(TABLE) == FORMATS
        assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES.values())


class TestFusedFormsOnly:
    """What cannot be taken apart for diffusers' q, k and v still goes from sd-scripts' names to ComfyUI's and back."""

    @pytest.mark.parametrize("algorithm", ["boft", "lora-dora-columns", "diag-oft"])
    def test_native_to_native(self, algorithm, tmp_path):
        base = str(pipeline_directory("flux", tmp_path))
        path = community("flux", algorithm).write(tmp_path / "in")
        convert_checkpoint(path, tmp_path / "comfyui.safetensors", "comfyui", base)
        convert_checkpoint(tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors", "kohya", base)
        before, after = load_file(path), load_file(tmp_path / "back.safetensors")
        assert "diffusion_model.double_blocks.0.img_attn.qkv.alpha" in load_file(tmp_path / "comfyui.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].reshape(after[k].shape), after[k]) for k in before)

    def test_refused_elsewhere(self, tmp_path, capsys):
        base = str(pipeline_directory("flux", tmp_path))
        path = community("flux", "boft").write(tmp_path / "in")
        code, output = run(capsys, "convert", path, tmp_path / "o.safetensors", "--format", "lycoris", "--base-model", base)
        assert code == 1 and "img_attn_qkv" in output.err and not (tmp_path / "o.safetensors").exists()
