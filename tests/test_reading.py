"""Reading files: what LyCORIS writes, against LyCORIS' forward; every spelling of the factors; who wrote it."""

from __future__ import annotations

import pytest
import torch
from readcases import INPUTS, apply, changed, lycoris_file, pair

from lycoris_diff.checkpoints.parse import raw_from_tensors, read_raw
from lycoris_diff.checkpoints.suffixes import SUFFIXES, split_key

# --- what LyCORIS writes
#: LyCORIS computes inverses and singular vectors in float32
SINGLE = {"dtype": torch.float32}
WRITTEN = {
    "lora": ("lora", {}),
    "lora tucker": ("lora", {"use_tucker": True}),
    "lora dora rows": ("lora", {"dora_wd": True}),
    "lora dora columns": ("lora", {"dora_wd": True, "wd_on_output": False}),
    "lora rs": ("lora", {"rs_lora": True}),
    "lora scalar": ("lora", {"use_scalar": True}),
    "dylora": ("dylora", {"block_size": 1}),
    "loha": ("loha", {}),
    "loha tucker": ("loha", {"use_tucker": True}),
    "loha dora rows": ("loha", {"dora_wd": True}),
    "loha dora columns": ("loha", {"dora_wd": True, "wd_on_output": False}),
    "lokr both full": ("lokr", {"full_matrix": True}),
    "lokr low": ("lokr", {"dim": 1, "alpha": 0.5}),
    "lokr both low": ("lokr", {"dim": 1, "alpha": 0.5, "decompose_both": True}),
    "lokr tucker": ("lokr", {"dim": 1, "alpha": 0.5, "use_tucker": True}),
    "lokr factor": ("lokr", {"dim": 1, "alpha": 3, "factor": 2}),
    "lokr unbalanced": ("lokr", {"dim": 1, "alpha": 0.5, "factor": 2, "unbalanced_factorization": True}),
    "lokr dora rows": ("lokr", {"dim": 1, "dora_wd": True}),
    "lokr dora columns": ("lokr", {"dim": 1, "dora_wd": True, "wd_on_output": False}),
    "lokr full dora": ("lokr", {"full_matrix": True, "dora_wd": True}),
    "glora": ("glora", {}),
    "ia3 out": ("ia3", {}),
    "ia3 in": ("ia3", {"train_on_input": True}),
    "full": ("full", {}),
    "diag-oft": ("diag-oft", SINGLE),
    "diag-oft limited": ("diag-oft", {"constraint": 0.001, "rescaled": True, **SINGLE}),
    "boft": ("boft", {"dim": 8, **SINGLE}),
    "boft limited": ("boft", {"dim": 8, "constraint": 0.001, "rescaled": True, **SINGLE}),
    "tlora": ("tlora", {"linear_only": True, **SINGLE}),
}


@pytest.mark.parametrize("case", list(WRITTEN))
def test_files_of_lycoris_do_what_its_forward_does(case, tmp_path, monkeypatch):
    monkeypatch.setattr("random.randint", lambda low, high: high)  # DyLoRA's forward draws a rank: all of it
    algo, options = WRITTEN[case]
    path = tmp_path / "file.safetensors"
    base, model = lycoris_file(path, algo, **options)
    raw = read_raw(path)
    assert raw.unknown == {} and raw.dialect == "lycoris" and raw.metadata["by"] == "test"
    found = {module.name: module.entries for module in raw.modules}
    assert set(found) == {name for name, _ in model.named_children()}
    for name, entries in found.items():
        layer = getattr(base, name)
        x = torch.randn(INPUTS[name], dtype=torch.float64)
        with torch.no_grad():
            want = getattr(model, name)(x.to(options.get("dtype", x.dtype))).double()
            weight, bias = changed(entries, layer.weight, layer.bias)
            got = apply(layer, x, weight, bias)
            moved = (want - layer(x)).norm()
        assert moved > 1e-3 * want.norm()
        assert (got - want).norm() < (1e-4 if "dtype" in options else 1e-9) * moved, name


@pytest.mark.parametrize("algo", ["lora", "lokr", "loha"])
def test_lycoris_in_sd_scripts(algo, tmp_path):
    """Through the entry that sd-scripts uses: a UNet and a text encoder, every name with its component."""
    from lycoris.kohya import create_network
    from smallmodels import clip, unet

    text, denoiser = clip(), unet()
    network = create_network(1.0, 2, 1.0, None, text, denoiser, algo=algo, preset="attn-mlp")
    network.apply_to(text, denoiser, True, True)
    network.save_weights(str(tmp_path / "file.safetensors"), torch.float16, {"ss_network_module": "lycoris.kohya"})
    raw = read_raw(tmp_path / "file.safetensors")
    assert raw.unknown == {} and (raw.dialect, raw.trainer) == ("kohya", "sd-scripts with LyCORIS")
    assert len(raw.modules) == len(network.unet_loras) + len(network.text_encoder_loras)
    parts = {module.components for module in raw.modules}
    assert parts == {("unet", "transformer"), ("text_encoder",)}
    flat = {path.replace(".", "_") for path, _ in [*denoiser.named_modules(), *text.named_modules()]}
    assert all(module.flat and module.name in flat for module in raw.modules)


# --- spellings
#: keys of up and down, and the module's name, components and the dialect they must be read as
SPELLINGS = {
    "kohya": ("lora_unet_mid_block_a.lora_up.weight", "lora_unet_mid_block_a.lora_down.weight", "mid_block_a", "kohya"),
    "kohya te": ("lora_te1_text_model_a.lora_up.weight", "lora_te1_text_model_a.lora_down.weight", "text_model_a", "kohya"),
    "kohya ldm": (
        "lora_unet_input_blocks_4_1_a.lora_up.weight", "lora_unet_input_blocks_4_1_a.lora_down.weight",
        "input_blocks_4_1_a", "kohya-ldm",
    ),
    "wan fun": ("lora_unet__blocks_0_a.lora_up.weight", "lora_unet__blocks_0_a.lora_down.weight", "blocks_0_a", "wan-fun"),
    "lycoris": ("lycoris_mid_block_a.lora_up.weight", "lycoris_mid_block_a.lora_down.weight", "mid_block_a", "lycoris"),
    "onetrainer": (
        "lora_transformer_blocks_0_a.lora_up.weight", "lora_transformer_blocks_0_a.lora_down.weight",
        "blocks_0_a", "onetrainer-legacy",
    ),
    "native": ("diffusion_model.double_blocks.0.a.lora_B.weight", "diffusion_model.double_blocks.0.a.lora_A.weight",
               "double_blocks.0.a", "comfyui"),
    "native kohya": ("diffusion_model.blocks.0.a.lora_up.weight", "diffusion_model.blocks.0.a.lora_down.weight",
                     "blocks.0.a", "comfyui"),
    "diffusers": ("unet.mid_block.a.lora_B.weight", "unet.mid_block.a.lora_A.weight", "mid_block.a", "diffusers"),
    "diffusers linear": ("unet.mid_block.a.lora.up.weight", "unet.mid_block.a.lora.down.weight", "mid_block.a", "diffusers"),
    "transformer": ("transformer.blocks.0.a.lora_B.weight", "transformer.blocks.0.a.lora_A.weight", "blocks.0.a", "diffusers"),
    "old processors": (
        "unet.mid_block.attn1.processor.to_q_lora.up.weight", "unet.mid_block.attn1.processor.to_q_lora.down.weight",
        "mid_block.attn1.processor.to_q", "processors",
    ),
    "bare processors": (
        "mid_block.attn1.processor.add_k_proj_lora.up.weight", "mid_block.attn1.processor.add_k_proj_lora.down.weight",
        "mid_block.attn1.processor.add_k_proj", "processors",
    ),
    "old text encoder": (
        "text_encoder.text_model.q_proj.lora_linear_layer.up.weight",
        "text_encoder.text_model.q_proj.lora_linear_layer.down.weight", "text_model.q_proj", "diffusers",
    ),
    "xlabs": (
        "double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1.down.weight",
        "double_blocks.0.processor.qkv_lora1", "xlabs",
    ),
    "peft": ("base_model.model.mid.a.lora_B.weight", "base_model.model.mid.a.lora_A.weight", "mid.a", "peft"),
    "peft inside": ("unet.base_model.model.mid.a.lora_B.weight", "unet.base_model.model.mid.a.lora_A.weight", "mid.a", None),
    "adapter's name": ("base_model.model.a.lora_B.default.weight", "base_model.model.a.lora_A.default.weight", "a", "peft"),
    "no weight": ("blocks.0.a.lora_B", "blocks.0.a.lora_A", "blocks.0.a", "bare"),
    "name, no weight": ("blocks.0.a.lora_B.my_style", "blocks.0.a.lora_A.my_style", "blocks.0.a", "bare"),
    "bare": ("transformer_blocks.0.a.lora_B.weight", "transformer_blocks.0.a.lora_A.weight", "transformer_blocks.0.a", "bare"),
    "omi": ("transformer.double_blocks.0.img_attn.qkv.1.lora_up.weight",
            "transformer.double_blocks.0.img_attn.qkv.1.lora_down.weight", "double_blocks.0.img_attn.qkv.1", "omi"),
    "omi te": ("clip_l.transformer.text_model.a.lora_up.weight", "clip_l.transformer.text_model.a.lora_down.weight",
               "text_model.a", "omi"),
    "a module called lora": ("unet.a_lora.lora_B.weight", "unet.a_lora.lora_A.weight", "a_lora", "diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SPELLINGS))
def test_every_spelling_of_lora_is_the_same_adapter(case):
    up, down, name, dialect = SPELLINGS[case]
    b, a = pair()
    raw = raw_from_tensors({up: b, down: a})
    (module,) = raw.modules
    (entry,) = module.entries
    assert module.name == name and module.flat == up.startswith(("lora_", "lycoris_"))
    assert dialect in (None, raw.dialect)
    assert (entry.algorithm, entry.rank, entry.scale) == ("LORA", 3, 1.0)
    assert torch.equal(entry.tensors["lora_B.weight"], b) and torch.equal(entry.tensors["lora_A.weight"], a)
    assert set(module.keys) == {up, down} and raw.unknown == {}


@pytest.mark.parametrize(
    "stem, components",
    [
        ("lora_unet_a", ("unet", "transformer")),
        ("lora_te_a", ("text_encoder",)),
        ("lora_te2_a", ("text_encoder_2",)),
        ("lora_te3_a", ("text_encoder_3", "text_encoder_2")),
        ("lycoris_a", ()),
        ("transformer_2.a", ("transformer_2",)),
        ("base_model.model.a", ()),
        ("text_encoder.base_model.model.a", ("text_encoder",)),
        ("lora_prior_unet_a", ("prior", "prior_prior")),
        ("a.b", ()),
    ],
)
def test_prefixes_say_the_component(stem, components):
    b, a = pair()
    (module,) = raw_from_tensors({f"{stem}.lora_up.weight": b, f"{stem}.lora_down.weight": a}).modules
    assert module.components == components


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if SUFFIXES[s].spelling != "xlabs"])
@pytest.mark.parametrize("stem", ["lora_unet_a_b_0_c", "diffusion_model.a.b.0.c", "base_model.model.a-b.2.lora"])
def test_the_longest_suffix_is_taken(suffix, stem):
    split = split_key(stem + suffix)
    assert (split.stem, split.suffix) == (stem, suffix)


def test_dots_left_in_flat_names_are_one_module():
    """OneTrainer's old files flatten ``.alpha`` wholly and the factors all but two segments."""
    torch.manual_seed(0)
    stem = "lora_unet_down_blocks_0_attn1"
    shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{stem}_to_out.0.{k}": torch.randn(s) for k, s in shapes.items()}
    raw = raw_from_tensors(tensors | {f"{stem}_to_out_0.alpha": torch.tensor(1.0)})
    (module,) = raw.modules
    assert (module.name, module.flat, raw.dialect) == ("down_blocks_0_attn1_to_out_0", True, "onetrainer-legacy")
    assert module.entries[0].scale == 0.5 and raw.trainer == "OneTrainer"


TRAINERS = {
    "lycoris_diff": ({"lycoris_diff.settings": "{}", "ss_network_module": "lycoris.kohya"}, "lora_unet_a"),
    "sd-scripts": ({"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}, "lora_unet_a"),
    "sd-scripts with LyCORIS": ({"ss_network_module": "lycoris.kohya"}, "lora_unet_a"),
    "musubi-tuner": ({"ss_network_module": "networks.lora_wan", "ss_base_model_version": "wan2.1"}, "lora_unet_a"),
    "OneTrainer": ({"ot_branch": "master"}, "transformer.a"),
    "ai-toolkit": ({"software": '{"name": "ai-toolkit"}'}, "transformer.a"),
    "SimpleTuner": ({"lycoris_config": "{}"}, "lycoris_a"),
    "diffusers": ({"lora_adapter_metadata": "{}"}, "unet.a"),
    "LyCORIS": ({}, "lycoris_a"),
    "": ({}, "unet.a"),
}


@pytest.mark.parametrize("trainer", list(TRAINERS))
def test_the_trainer_is_told_by_metadata_and_names(trainer):
    metadata, stem = TRAINERS[trainer]
    b, a = pair()
    raw = raw_from_tensors({f"{stem}.lora_up.weight": b, f"{stem}.lora_down.weight": a}, metadata)
    assert raw.trainer == trainer
    expected = {"OneTrainer": "onetrainer", "ai-toolkit": "ai-toolkit", "SimpleTuner": "simpletuner"}
    assert raw.dialect == expected.get(trainer, raw.dialect)
