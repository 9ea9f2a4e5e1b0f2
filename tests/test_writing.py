"""Every algorithm through every format and back: the change of the weights stays, or the format refuses before writing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from community_algorithms import ALGORITHMS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from writingcases import community, pipeline_directory, worst

from lycoris_diff import AdaptedLayer, MissConfig, ShiraConfig, get_peft_model, load_adapter, save_adapter
from lycoris_diff.checkpoints.build import config_of
from lycoris_diff.checkpoints.checkpoint import Checkpoint, Entry
from lycoris_diff.checkpoints.convert import convert_checkpoint
from lycoris_diff.checkpoints.read import read_checkpoint
from lycoris_diff.checkpoints.write import write_checkpoint
from lycoris_diff.errors import CheckpointError
from lycoris_diff.naming import known_base
from lycoris_diff.tiny import build_pipeline

FORMATS = ("kohya", "lycoris", "peft", "diffusers", "comfyui", "ai-toolkit", "onetrainer")
#: what each format has a place for, by the first word of the algorithm's name; the rest must be refused
KNOWN = {
    "kohya": {"lora", "dylora", "loha", "lokr", "glora", "ia3", "full", "norm", "diag", "boft", "kohya", "miss", "tlora"},
    "peft": {name.split("-")[0] for name in ALGORITHMS},
    "diffusers": {"lora", "dylora", "miss"},
    "ai-toolkit": {"lora", "dylora", "lokr", "full", "miss"},
    "onetrainer": {"lora", "dylora", "loha", "lokr", "miss", "peft"},
}
KNOWN["lycoris"] = KNOWN["comfyui"] = KNOWN["kohya"]
#: single exceptions: format -> algorithms
REFUSED = {
    "diffusers": {"lora-dora-columns"},
    "ai-toolkit": {"lora-dora-columns", "lora-dora-rows"},  # convolutions among the modules
}
_UNLIKE_LORA = {"miss-bat"}


def expressible(format: str, algorithm: str) -> bool:
    if format == "peft":
        return True
    return algorithm.split("-")[0] in KNOWN[format] and algorithm not in REFUSED.get(format, set()) | _UNLIKE_LORA


def name_for(folder, format: str, stem: str = "out"):
    return folder / stem if format == "peft" else folder / f"{stem}.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: str(pipeline_directory(family, folder))


#: spellings and variants that other rows cover; T-LoRA is tested below, since its factors must belong to a weight
COVERED = (
    *("kohya-oft", "lora-no-alpha", "dylora", "lokr-full-no-alpha", "lokr-full-rs", "lokr-full-alpha-nan", "boft-constraint"),
    *("boft-rescale", "diag-oft-no-alpha", "shira-float-indices", "glora-old", "miss-odd"),
)
SD15 = [name for name in ALGORITHMS if name not in COVERED and not name.startswith("tlora")]
FLUX = (
    *("lora", "lora-dora-rows", "loha", "lokr-full", "lokr-w2", "lokr-factor", "lokr-dora-rows", "glora", "ia3-in"),
    *("full-bias", "diag-oft", "peft-oft", "miss", "shira"),
)
OTHERS = [
    *(("sdxl", a) for a in ("lora", "lokr-both", "loha-cp")),
    *(("wan", a) for a in ("lora-tucker", "loha-cp", "lokr-full", "lokr-tucker", "glora", "ia3-in")),
    *(("zimage", "lokr-full"), ("flux2", "loha"), ("sd3", "lora")),
]
CASES = [("sd15", a) for a in SD15] + [("flux", a) for a in FLUX] + OTHERS


class TestRoundTrip:
    @pytest.mark.parametrize(("family", "algorithm"), CASES)
    def test_every_format(self, family, algorithm, bases, tmp_path):
        file = community(family, algorithm)
        assert file.modules
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases(family))
        assert not (ckpt.unknown or ckpt.unmatched or ckpt.wrong_shape)
        assert worst(ckpt, file, family) < 1e-6
        for format in FORMATS:
            path = name_for(tmp_path, format, f"out-{format}")
            known = expressible(format, algorithm) and not self._missing(format, family, ckpt)
            if not known:
                with pytest.raises(CheckpointError):
                    write_checkpoint(ckpt, path, format)
                assert not path.exists(), format
                continue
            report = write_checkpoint(ckpt, path, format)
            assert report.tensors and report.bytes and sum(report.algorithms.values()), format
            back = read_checkpoint(path, bases(family))
            assert not (back.unknown or back.unmatched or back.wrong_shape or back.conflicts), format
            assert worst(back, file, family) < 1e-6, format

    @staticmethod
    def _missing(format, family, ckpt):
        """What a family's way of writing has no place for."""
        entries = [e for m in ckpt.components.values() for listed in m.values() for e in listed]
        windows = any(e.options.get("rows") for e in entries)
        if windows and format in ("lycoris", "onetrainer", "diffusers", "ai-toolkit"):
            return True
        if format == "diffusers" and family in ("zimage", "flux2") and all(e.algorithm == "LOKR" for e in entries):
            return False
        if format == "ai-toolkit" and family not in ("sd15", "sdxl"):
            return any(c.startswith("text_encoder") for c in ckpt.components)
        return False

    def test_ai_toolkit_of_a_transformer_alone(self, bases, tmp_path):
        for algorithm in ("lora", "lora-dora-rows", "lokr-factor", "full"):
            file = community("flux", algorithm)
            file.expected.pop("text_encoder")
            ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("flux"))
            ckpt.components.pop("text_encoder")
            write_checkpoint(ckpt, tmp_path / "out.safetensors", "ai-toolkit")
            tensors = load_file(tmp_path / "out.safetensors")
            assert all(k.startswith("transformer.transformer_blocks.") or ".norm_out." in k or ".single_" in k for k in tensors)
            assert ("transformer.norm_out.linear.magnitude" in tensors) == (algorithm == "lora-dora-rows")
            assert worst(read_checkpoint(tmp_path / "out.safetensors", bases("flux")), file, "flux") < 1e-6

    def test_lokr_of_z_image_for_diffusers(self, bases, tmp_path):
        file = community("zimage", "lokr-both", "diffusion_model-diffusers")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("zimage"))
        write_checkpoint(ckpt, tmp_path / "out.safetensors", "diffusers")
        tensors = load_file(tmp_path / "out.safetensors")
        assert all(k.startswith("transformer.layers.") or ".noise_refiner." in k for k in tensors)
        assert not any(k.endswith("alpha") for k in tensors)
        assert worst(read_checkpoint(tmp_path / "out.safetensors", bases("zimage")), file, "zimage") < 1e-6

    def test_tlora(self, bases, tmp_path):
        """Factors that began at the weight's own singular vectors."""
        from writingcases import changes, parts_of

        path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        weight = parts_of("sd15")["unet"].get_submodule(path).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        p, q, values = u[:, :3] + 0.01, v[:3] - 0.02, s[:3] * 1.1
        expected = 0.5 * (p * values @ q - u[:, :3] * s[:3] @ v[:3])
        tensors = {"p_layer": p.contiguous(), "lambda_layer": values[None].contiguous(), "q_layer": q.contiguous()}
        entry = Entry("TLORA", tensors, 0.5, 3, 1.5, "tensor")
        ckpt = Checkpoint({"unet": {path: [entry]}}, bases("sd15"))
        for format in ("kohya", "comfyui", "lycoris", "peft"):
            out = name_for(tmp_path, format, format)
            write_checkpoint(ckpt, out, format)
            (found,) = changes(read_checkpoint(out, bases("sd15")), "sd15").values()
            assert torch.allclose(found[0], expected, atol=1e-6), format
        with pytest.raises(CheckpointError, match="TLORA"):
            write_checkpoint(ckpt, tmp_path / "no.safetensors", "diffusers")
        entry.options["sig_type"] = "last"
        with pytest.raises(CheckpointError, match="'last' singular vectors"):
            write_checkpoint(ckpt, tmp_path / "no.safetensors", "kohya")

    def test_dtypes(self, bases, tmp_path):
        """bf16 in, bf16 out: nothing is rounded twice, and alpha stays exact."""
        file = community("sd15", "loha", dtype=torch.bfloat16)
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        for format in ("kohya", "comfyui", "peft", "onetrainer"):
            path = name_for(tmp_path, format, format)
            write_checkpoint(ckpt, path, format)
            assert worst(read_checkpoint(path, bases("sd15")), file, "sd15") < 1e-6
        tensors = load_file(tmp_path / "kohya.safetensors")
        assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {torch.bfloat16}
        assert {t.dtype for k, t in tensors.items() if k.endswith("alpha")} == {torch.float32}
        write_checkpoint(ckpt, tmp_path / "half.safetensors", "kohya", dtype=torch.float16)
        half = load_file(tmp_path / "half.safetensors")
        assert {t.dtype for k, t in half.items() if not k.endswith("alpha")} == {torch.float16}

    def test_a_value_too_large_for_the_dtype(self, bases, tmp_path):
        tensors = {"diff": torch.full((8, 8), 1e6)}
        ckpt = Checkpoint({"unet": {"a.b": [Entry("FULL", tensors)]}}, dialect="lycoris")
        with pytest.raises(CheckpointError, match="too large for"):
            write_checkpoint(ckpt, tmp_path / "out.safetensors", "lycoris", dtype=torch.float16)
        assert not list(tmp_path.iterdir())

    def test_strength_of_zero(self, bases, tmp_path):
        """Kohya's readers take an alpha of zero for the rank."""
        file = community("sd15", "lora")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        for entries in ckpt.components["unet"].values():
            entries[0].scale = 0.0
        write_checkpoint(ckpt, tmp_path / "out.safetensors", "kohya")
        back = read_checkpoint(tmp_path / "out.safetensors", bases("sd15"))
        from writingcases import changes

        assert all(float(delta.norm()) == 0 for (c, _), (delta, _) in changes(back, "sd15").items() if c == "unet")

    def test_rank_stabilised_strength_counts_once(self):
        entry = Entry("LORA", {}, scale=0.75, rank=4, options={"use_rslora": True})
        assert config_of(entry).scaling() == 0.75


class TestFused:
    def test_flux_names_are_native(self, bases, tmp_path):
        """q, k and v of a diffusers file come together under the name that sd-scripts gives the fused weight."""
        file = community("flux", "lora", "lycoris")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("flux"))
        write_checkpoint(ckpt, tmp_path / "out.safetensors", "kohya")
        tensors = load_file(tmp_path / "out.safetensors")
        assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in tensors
        assert "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight" in tensors
        assert not any("transformer_blocks" in k for k in tensors)
        assert worst(read_checkpoint(tmp_path / "out.safetensors", bases("flux")), file, "flux") < 1e-6

    def test_parts_that_no_fused_adapter_can_hold(self, bases, tmp_path):
        """Apart for ComfyUI, which takes diffusers' names of them as well; refused for kohya."""
        file = community("flux", "lokr-w2", "lycoris", limit=None)
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("flux"))
        first = ckpt.components["transformer"]["transformer_blocks.0.attn.to_k"][0]
        other = {k: v + 0.1 for k, v in first.tensors.items()}
        ckpt.components["transformer"]["transformer_blocks.0.attn.to_q"] = [Entry("LOKR", other, first.scale, first.rank)]
        with pytest.raises(CheckpointError, match="img_attn_qkv"):
            write_checkpoint(ckpt, tmp_path / "out.safetensors", "kohya")
        report = write_checkpoint(ckpt, tmp_path / "out.safetensors", "comfyui")
        assert any("diffusers' names" in note for note in report.notes)
        back = read_checkpoint(tmp_path / "out.safetensors", bases("flux"))
        entries = back.components["transformer"]["transformer_blocks.0.attn.to_q"]
        assert torch.allclose(entries[0].tensors["lokr_w1"], other["lokr_w1"])

    def test_numbers_of_text_encoders(self, bases, tmp_path):
        entry = Entry("LORA", {"lora_A.weight": torch.ones(1, 24), "lora_B.weight": torch.ones(24, 1)}, 1.0, 1)
        ckpt = Checkpoint({"text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": [entry]}}, bases("flux"))
        for format, prefix in (("kohya", "lora_te3_"), ("onetrainer", "lora_te2_"), ("comfyui", "text_encoders.t5xxl.")):
            write_checkpoint(ckpt, tmp_path / f"{format}.safetensors", format)
            assert all(k.startswith(prefix) for k in load_file(tmp_path / f"{format}.safetensors"))


class TestPeftDirectories:
    def test_one_component_is_one_directory(self, bases, tmp_path):
        file = community("sd15", "lora", "lycoris")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        write_checkpoint(ckpt, tmp_path / "one", "peft")
        assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == 3 and config["lora_alpha"] == pytest.approx(2.0)

    def test_several_components(self, bases, tmp_path):
        file = community("sd15", "lokr-full")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        write_checkpoint(ckpt, tmp_path / "two", "peft")
        assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["text_encoder", "unet"]

    def test_ranks_that_differ(self, bases, tmp_path):
        file = community("sd15", "lora", "lycoris")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        wide = community("sd15", "dylora", "lycoris")
        other = read_checkpoint(wide.write(tmp_path / "wide"), bases("sd15"))
        moved = list(ckpt.components["unet"])[::3]
        for path in moved:
            ckpt.components["unet"][path] = other.components["unet"][path]
            file.expected["unet"][path] = wide.expected["unet"][path]
        report = write_checkpoint(ckpt, tmp_path / "out", "peft")
        assert not any("PEFT itself" in note for note in report.notes)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert len(config["rank_pattern"]) == 1 and len(config["alpha_pattern"]) == 1
        assert worst(read_checkpoint(tmp_path / "out", bases("sd15")), file, "sd15") < 1e-6

    def test_several_algorithms(self, bases, tmp_path):
        """No PEFT type has them; one of this library's does."""
        files = [community("sd15", a, "lycoris") for a in ("lora", "norm")]
        whole = files[0].merged(files[1])
        ckpt = read_checkpoint(whole.write(tmp_path / "in"), bases("sd15"))
        report = write_checkpoint(ckpt, tmp_path / "out", "peft")
        assert any("PEFT itself cannot read unet" in note for note in report.notes)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["peft_type"].startswith("LYCORIS_DIFF_")
        assert worst(read_checkpoint(tmp_path / "out", bases("sd15")), whole, "sd15") < 1e-6

    def test_a_name_that_ends_like_another(self, bases, tmp_path):
        """PEFT would take "proj_out" for the end of every block's proj_out as well."""
        entry = Entry("LORA", {"lora_A.weight": torch.ones(1, 48), "lora_B.weight": torch.ones(16, 1)}, 1.0, 1)
        ckpt = Checkpoint({"transformer": {"proj_out": [entry]}}, bases("flux"))
        write_checkpoint(ckpt, tmp_path / "out", "peft")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["target_modules"] == "proj_out"

    def test_a_directory_of_another_adapter(self, bases, tmp_path):
        """Its parts would be read together with the new ones."""
        ckpt = read_checkpoint(community("sd15", "lora").write(tmp_path / "in"), bases("sd15"))
        write_checkpoint(ckpt, tmp_path / "out", "peft")
        write_checkpoint(ckpt, tmp_path / "out", "peft")
        ckpt.components.pop("text_encoder")
        with pytest.raises(CheckpointError, match="text_encoder/adapter_config"):
            write_checkpoint(ckpt, tmp_path / "out", "peft")

    def test_empty_components_are_left_out(self, bases, tmp_path):
        ckpt = read_checkpoint(community("sd15", "lora").write(tmp_path / "in"), bases("sd15"))
        ckpt.components["text_encoder"] = {}
        ckpt.components["unet"]["conv_in"] = []
        write_checkpoint(ckpt, tmp_path / "out", "peft")
        assert (tmp_path / "out" / "adapter_config.json").is_file() and not (tmp_path / "out" / "text_encoder").exists()


class TestMetadata:
    def test_what_a_file_said_stays(self, bases, tmp_path):
        said = {"ss_tag_frequency": '{"a": 1}', "my_key": "mine", "ss_network_dim": "3", "modelspec.architecture": "x-v1/lora",
                "sshs_model_hash": "0xold", "lora_adapter_metadata": '{"unet.r": 4}'}  # fmt: skip
        file = community("sd15", "lokr-w2", metadata=said)
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        write_checkpoint(ckpt, tmp_path / "out.safetensors", "comfyui", metadata={"more": "this"})
        with safe_open(tmp_path / "out.safetensors", "pt") as opened:
            found = opened.metadata()
        assert found["my_key"] == "mine" and found["more"] == "this" and found["ss_tag_frequency"] == '{"a": 1}'
        assert found["modelspec.architecture"] == "x-v1/lokr" and bases("sd15") not in str(found)
        assert found["sshs_model_hash"] != "0xold" and "lora_adapter_metadata" not in found

    @pytest.mark.parametrize(
        ("algorithm", "word", "module"),
        [("lora", "lora", "networks.lora"), ("loha", "loha", "lycoris.kohya"), ("boft", "boft", "lycoris.kohya")],
    )
    def test_what_a_file_did_not_say(self, algorithm, word, module, bases, tmp_path):
        file = community("sd15", algorithm)
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        indexes = known_base(ckpt.base_model)
        write_checkpoint(ckpt, tmp_path / "name.safetensors", "kohya", base_model="sd15", indexes=indexes)
        with safe_open(tmp_path / "name.safetensors", "pt") as opened:
            found = opened.metadata()
        assert found["modelspec.architecture"] == f"stable-diffusion-v1/{word}" and found["modelspec.title"] == "name"
        assert found["ss_network_module"] == module and json.loads(found["ss_network_args"])["algo"] == word
        assert found["ss_base_model_version"] == "sd_v1" and found["ss_v2"] == "False"

    def test_hashes_are_those_of_the_file(self, bases, tmp_path):
        import hashlib

        file = community("sd15", "full")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        write_checkpoint(ckpt, tmp_path / "out.safetensors", "kohya")
        raw = (tmp_path / "out.safetensors").read_bytes()
        with safe_open(tmp_path / "out.safetensors", "pt") as opened:
            found = opened.metadata()
        body = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
        assert found["sshs_model_hash"] == body and found["modelspec.hash_sha256"] == f"0x{body}"
        save_file(
            load_file(tmp_path / "out.safetensors"), tmp_path / "ss", {k: v for k, v in found.items() if k.startswith("ss_")}
        )
        piece = (tmp_path / "ss").read_bytes()[0x100000:0x110000]
        assert found["sshs_legacy_hash"] == hashlib.sha256(piece).hexdigest()[:8]

    def test_only_text(self, tmp_path):
        ckpt = Checkpoint({"unet": {"a.b": [Entry("FULL", {"diff": torch.ones(2, 2)})]}}, dialect="lycoris")
        with pytest.raises(CheckpointError, match="'steps' is 3"):
            write_checkpoint(ckpt, tmp_path / "out.safetensors", "lycoris", metadata={"steps": 3})

    def test_extras(self, bases, tmp_path):
        file = community("sd15", "lora")
        file.tensors["bundle_emb.cat.clip_l"] = torch.ones(1, 16)
        path = file.write(tmp_path / "in")
        ckpt = read_checkpoint(path, bases("sd15"))
        for format in ("kohya", "peft", "onetrainer"):
            out = name_for(tmp_path, format, format)
            write_checkpoint(ckpt, out, format)
            assert set(read_checkpoint(out, bases("sd15")).extras) == {"bundle_emb.cat.clip_l"}, format
        with pytest.raises(CheckpointError, match=r"bundle_emb\.cat\.clip_l"):
            write_checkpoint(ckpt, tmp_path / "no.safetensors", "diffusers")
        ckpt.extras = {"text_model.embeddings.position_ids": torch.arange(4)}
        assert any("left out" in n for n in write_checkpoint(ckpt, tmp_path / "yes.safetensors", "diffusers").notes)


class TestRefusals:
    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(CheckpointError, match="no adapter"):
            write_checkpoint(Checkpoint({"unet": {}}), tmp_path / "out.safetensors")
        assert not list(tmp_path.iterdir())

    def test_unknown_format(self, tmp_path):
        with pytest.raises(CheckpointError, match="Did you mean 'kohya'"):
            write_checkpoint(Checkpoint({}), tmp_path / "out.safetensors", "kohia")

    @pytest.mark.parametrize(("format", "name"), [("kohya", "out"), ("kohya", "out.pt"), ("peft", "out.safetensors")])
    def test_names(self, format, name, bases, tmp_path):
        ckpt = Checkpoint({"unet": {"time_embedding.linear_1": [Entry("FULL", {"diff": torch.ones(32, 8)})]}}, bases("sd15"))
        with pytest.raises(CheckpointError, match="name"):
            write_checkpoint(ckpt, tmp_path / name, format)

    def test_an_unknown_base_model(self, tmp_path):
        """Names of the format must follow from the paths."""
        entries = [Entry("LORA", {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}, 1.0, 2)]
        ckpt = Checkpoint({"transformer": {"blocks.0.attention.q": entries}}, dialect="diffusers")
        for format in ("kohya", "comfyui"):
            with pytest.raises(CheckpointError, match="base_model"):
                write_checkpoint(ckpt, tmp_path / "out.safetensors", format)
        for format in ("lycoris", "diffusers", "onetrainer", "peft"):
            write_checkpoint(ckpt, name_for(tmp_path, format, format), format)
        assert set(load_file(tmp_path / "diffusers.safetensors")) == {
            "transformer.blocks.0.attention.q.lora_A.weight",
            "transformer.blocks.0.attention.q.lora_B.weight",
        }
        flat = Checkpoint({"transformer": {"blocks_0_attention_q": entries}}, dialect="lycoris")
        with pytest.raises(CheckpointError, match="base_model"):
            write_checkpoint(flat, tmp_path / "no.safetensors", "diffusers")

    def test_the_same_format_needs_no_base_model(self, tmp_path):
        """Another dtype of a file whose model nobody knows."""
        tensors = {"lora_unet_strange_blocks_0_q.lora_down.weight": torch.ones(2, 8), "bundle_emb.x.y": torch.ones(3)}
        tensors["lora_unet_strange_blocks_0_q.lora_up.weight"] = torch.ones(8, 2)
        save_file(tensors, tmp_path / "in.safetensors", {"a": "b"})
        row = convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya", dtype=torch.float16).files[
            0
        ]
        assert row.base_model == ""
        found = load_file(tmp_path / "out.safetensors")
        assert found.keys() == {*tensors, "lora_unet_strange_blocks_0_q.alpha"}
        assert found["lora_unet_strange_blocks_0_q.lora_up.weight"].dtype == torch.float16

    def test_a_module_of_another_base_model(self, bases, tmp_path):
        ckpt = Checkpoint({"unet": {"no.such.module": [Entry("FULL", {"diff": torch.ones(4, 4)})]}}, bases("sd15"))
        with pytest.raises(CheckpointError, match=r"no\.such\.module"):
            write_checkpoint(ckpt, tmp_path / "out.safetensors")
        with pytest.raises(CheckpointError, match="no component 'transformer'"):
            write_checkpoint(Checkpoint({"transformer": ckpt.components["unet"]}, bases("sd15")), tmp_path / "out.safetensors")

    def test_many_refusals_are_counted(self, bases, tmp_path):
        file = community("sd15", "loha")
        ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
        with pytest.raises(CheckpointError, match=r"and 7 more modules: .*LOHA has no place"):
            write_checkpoint(ckpt, tmp_path / "out.safetensors", "diffusers")

    def test_converting_a_file_onto_itself(self, bases, tmp_path):
        path = community("sd15", "lora").write(tmp_path / "in")
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match="is the file that is read"):
            convert_checkpoint(path, path, "comfyui", bases("sd15"))
        assert path.read_bytes() == before
        convert_checkpoint(path, path, "comfyui", bases("sd15"), overwrite=True)
        assert any(k.startswith("diffusion_model.") for k in load_file(path))


class TestAtomic:
    def test_a_kill_leaves_the_old_file_or_the_new_one(self, bases, tmp_path):
        """The process is killed at a random moment of endless saving, several times."""
        path = community("sd15", "full").write(tmp_path / "in")
        script = textwrap.dedent(
            """
            import sys
            from lycoris_diff.checkpoints.read import read_checkpoint
            from lycoris_diff.checkpoints.write import write_checkpoint
            ckpt = read_checkpoint(sys.argv[1], sys.argv[2])
            print("ready", flush=True)
            number = 0
            while True:
                number += 1
                write_checkpoint(ckpt, sys.argv[3], "kohya", metadata={"number": str(number)})
            """
        )
        out = tmp_path / "folder" / "out.safetensors"
        command = [sys.executable, "-c", script, str(path), bases("sd15"), str(out)]
        whole = None
        for wait in (0.05, 0.2):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            try:
                process.wait(timeout=wait + (0.3 if whole is None else 0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            if out.exists():
                tensors = load_file(out)
                whole = whole or {k: v.shape for k, v in tensors.items()}
                assert {k: v.shape for k, v in tensors.items()} == whole
        assert whole

    def test_a_failure_while_writing(self, bases, tmp_path, monkeypatch):
        import lycoris_diff.checkpoints.write as module

        ckpt = read_checkpoint(community("sd15", "lora").write(tmp_path / "in"), bases("sd15"))
        for format in ("kohya", "peft"):
            out = name_for(tmp_path / format, format)
            write_checkpoint(ckpt, out, format)
            before = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()}

            def fail(tensors, path, metadata=None):
                with open(path, "wb") as file:
                    file.write(b"half")
                raise OSError("no space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(module, "save_file", fail)
                with pytest.raises(OSError, match="no space"):
                    write_checkpoint(ckpt, out, format)
            assert {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("algorithm", ["miss", "shira"])
def test_a_weighted_sum_of_what_has_no_alpha(algorithm, tmp_path):
    """Its weights go into the factors."""
    config = {"miss": MissConfig, "shira": ShiraConfig}[algorithm]
    pipe, other = build_pipeline(), build_pipeline()
    model = get_peft_model(pipe.unet, config(r=2, target_modules="attention"), "a")
    model.add_adapter("b", config(r=4, target_modules="attention"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if algorithm in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.add_weighted_adapter(["a", "b"], [0.5, -0.3], "sum")
    save_adapter(pipe, tmp_path / "sum", "sum", format="peft")
    load_adapter(other, tmp_path / "sum", "sum")
    want, got = ({n: m for n, m in p.unet.named_modules() if isinstance(m, AdaptedLayer)} for p in (pipe, other))
    assert want and want.keys() == got.keys()
    for name, layer in want.items():
        torch.testing.assert_close(got[name].get_delta_weight("sum"), layer.get_delta_weight("sum"), rtol=1e-6, atol=1e-7)
