"""Names of modules: both directions of every scheme, spellings, prefixes, and guessing the base model."""

from __future__ import annotations

import json

import pytest
from namecases import layers
from torch import nn

from lycoris_diff import naming
from lycoris_diff.errors import CheckpointError
from lycoris_diff.naming import Part, Site, families, find, flatten, index_model, known_base
from lycoris_diff.naming.rows import Block


# --- both directions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", naming.KNOWN_BASES)
def test_every_module_is_reached_under_every_name_and_no_two_flatten_alike(base: str) -> None:
    for index in known_base(base).values():
        assert len({flatten(path) for path in index.sites}) == len(index.sites)
        for path in index.sites:
            assert find(index, path) == find(index, flatten(path), True) == (Part(path),)
        for names in (index.native, index.aliases):
            for name, parts in names.items():
                assert find(index, name) == find(index, flatten(name), True) == parts, name
        held = [part.path for parts in naming.native_names(index).values() for part in parts]
        assert sorted(held) == sorted(index.sites)


@pytest.mark.parametrize("scheme", naming.SCHEMES)
@pytest.mark.parametrize(
    "base", ["sd15", "sd21", "sdxl", "sd3", "sd35-medium", "flux", "flux2", "wan", "z-image", "lumina2", "hunyuan-video"]
)
def test_what_is_written_is_read(base: str, scheme: str) -> None:
    indexes = known_base(base)
    stems: dict[str, tuple[str, tuple[Part, ...]]] = {}
    for component, index in indexes.items():
        for path in index.sites:
            try:
                stem, parts = naming.written_name(scheme, indexes, component, path)
            except CheckpointError as error:
                assert f"{component!r}" in str(error)
                break
            components, name, flat = naming.split_prefix(stem)
            assert not components or component in components
            assert find(index, name, flat) == parts
            assert path in [part.path for part in parts]
            if components:
                assert stems.setdefault(stem, (component, parts)) == (component, parts), "one name, one weight"


@pytest.mark.parametrize(
    ("scheme", "base", "component", "path", "stem"),
    [
        ("kohya", "sd15", "unet", "conv_in", "lora_unet_conv_in"),
        ("kohya", "sd15", "text_encoder", "encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("kohya-native", "sd15", "unet", "conv_in", "lora_unet_input_blocks_0_0"),
        ("kohya", "sdxl", "unet", "down_blocks.1.resnets.0.conv1", "lora_unet_input_blocks_4_0_in_layers_2"),
        ("kohya-diffusers", "sdxl", "unet", "down_blocks.1.resnets.0.conv1", "lora_unet_down_blocks_1_resnets_0_conv1"),
        ("kohya", "sdxl", "text_encoder", "encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("kohya", "sdxl", "text_encoder_2", "text_projection", "lora_te2_text_projection"),
        (
            "kohya",
            "hunyuan-video",
            "text_encoder_2",
            "encoder.layers.0.mlp.fc1",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        ),
        ("kohya", "sd3", "transformer", "transformer_blocks.0.attn.to_k", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ("kohya", "flux", "transformer", "transformer_blocks.3.attn.to_k", "lora_unet_double_blocks_3_img_attn_qkv"),
        ("kohya", "z-image", "transformer", "layers.0.attention.to_q", "lora_unet_layers_0_attention_to_q"),
        ("comfyui", "z-image", "transformer", "layers.0.attention.to_q", "diffusion_model.layers.0.attention.qkv"),
        ("comfyui", "wan", "transformer", "blocks.0.attn2.add_k_proj", "diffusion_model.blocks.0.cross_attn.k_img"),
        ("omi", "flux", "transformer", "single_transformer_blocks.7.proj_mlp", "transformer.single_blocks.7.linear1.3"),
        (
            "lycoris",
            "flux",
            "transformer",
            "single_transformer_blocks.0.proj_mlp",
            "lycoris_single_transformer_blocks_0_proj_mlp",
        ),
        ("onetrainer-legacy", "flux", "transformer", "x_embedder", "lora_transformer_x_embedder"),
        ("diffusers", "sd15", "text_encoder", "encoder.layers.1.mlp.fc2", "text_encoder.text_model.encoder.layers.1.mlp.fc2"),
        ("peft", "sd15", "text_encoder", "encoder.layers.1.mlp.fc2", "base_model.model.encoder.layers.1.mlp.fc2"),
    ],
)
def test_written_names(scheme: str, base: str, component: str, path: str, stem: str) -> None:
    indexes = known_base(base)
    if path not in indexes[component].sites:  # Wan without image conditions, or a CLIP below text_model in transformers 4
        indexes = known_base("wan-i2v") if base == "wan" else indexes
        path = path if path in indexes[component].sites else f"text_model.{path}"
    assert naming.written_name(scheme, indexes, component, path)[0] == stem


def test_t5_of_flux_is_written_as_the_third_encoder_and_read_as_second_and_third() -> None:
    indexes = known_base("flux")
    path = "encoder.block.0.layer.0.SelfAttention.q"
    stem, _ = naming.written_name("kohya", indexes, "text_encoder_2", path)
    assert stem == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    for number in (2, 3):
        components, name, flat = naming.split_prefix(stem.replace("te3", f"te{number}"))
        assert find(indexes[next(c for c in components if c in indexes)], name, flat) == (Part(path),)


def test_a_component_a_scheme_has_no_name_for_is_refused() -> None:
    with pytest.raises(CheckpointError, match="kohya files have no names for the component 'transformer_2'"):
        naming.written_name("kohya", known_base("wan"), "transformer_2", "blocks.0.attn1.to_q")


# --- spellings --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "component", "name", "path"),
    [
        ("sd15", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out", "to_out.0"),
        ("sd15", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q", "to_q"),
        ("sd15", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out", "to_out.0"),
        ("sd15", "unet", "mid_block_attentions_0_transformer_blocks_0_attn1.to_k", "to_k"),
        ("sdxl", "unet", "middle_block.1.transformer_blocks.9.attn2.to_out", "to_out.0"),
        ("sd21", "text_encoder", "model_transformer_resblocks_3_mlp_c_fc", "encoder.layers.3.mlp.fc1"),
        ("sdxl", "text_encoder_2", "transformer.resblocks.3.ln_2", "encoder.layers.3.layer_norm2"),
        ("flux", "transformer", "double_blocks.0.img_attn.qkv.1", "attn.to_k"),
        ("flux", "transformer", "single_blocks.0.linear1.3", "proj_mlp"),
        ("flux", "transformer", "double_blocks.4.processor.proj_lora2", "attn.to_add_out"),
        ("flux2", "transformer", "sformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("hunyuan-video", "transformer", "double_blocks.0.img_mlp.0", "ff.net.0.proj"),
        ("hunyuan-video", "transformer", "double_blocks.0.img_mlp.fc1", "ff.net.0.proj"),
        ("hunyuan-video", "transformer", "single_blocks.0.modulation.lin", "norm.linear"),
        ("z-image", "transformer", "layers.0.attention.out", "attention.to_out.0"),
        ("z-image", "transformer", "layers.0.attention.to_out", "attention.to_out.0"),
    ],
)
def test_spellings_of_one_module(base: str, component: str, name: str, path: str) -> None:
    index = known_base(base)[component]
    parts = find(index, name) or ()
    assert len(parts) == 1
    assert parts[0].path.endswith(path)
    assert find(index, flatten(name), True) == parts


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn_qkv", "double_blocks_0_img_attn_qkv"]
)
def test_hunyuan_video_has_two_native_spellings(name: str) -> None:
    parts = find(known_base("hunyuan-video")["transformer"], name) or ()
    assert [part.rows for part in parts] == [(0, 3072), (3072, 6144), (6144, 9216)]


@pytest.mark.parametrize("projected", [False, True])
def test_text_encoders_with_and_without_text_model(projected: bool) -> None:
    index = known_base("sdxl")["text_encoder_2" if projected else "text_encoder"]
    for path in index.sites:
        bare = path.removeprefix("text_model.")
        assert find(index, bare) == find(index, flatten(bare), True) == (Part(path),)
        if bare.startswith(("encoder.", "final_layer_norm")):
            assert find(index, f"text_model.{bare}") == (Part(path),)
            assert naming.portable_path(index, path) == f"text_model.{bare}"
        else:
            assert naming.portable_path(index, path) == path == "text_projection"


def test_only_shift_and_scale_are_exchanged() -> None:
    index = known_base("sd3")["transformer"]
    swapped = {part.path for parts in index.native.values() for part in parts if part.swapped}
    assert swapped == {"norm_out.linear", "transformer_blocks.23.norm1_context.linear"}


@pytest.mark.parametrize(
    ("stem", "component", "name", "flat"),
    [
        ("lora_unet_conv_in", "unet", "conv_in", True),
        ("lora_unet__blocks_0_ffn_0", "transformer", "blocks_0_ffn_0", True),
        ("oft_unet_conv_in", "unet", "conv_in", True),
        ("lora_te_encoder", "text_encoder", "encoder", True),
        ("lora_te2_encoder", "text_encoder_2", "encoder", True),
        ("lora_te3_encoder", "text_encoder_3", "encoder", True),
        ("lycoris_conv_in", None, "conv_in", True),
        ("lora_transformer_proj_out", "transformer", "proj_out", True),
        ("lora_prior_unet_conv", "prior", "conv", True),
        ("diffusion_model.img_in", "unet", "img_in", False),
        ("unet.conv_in", "unet", "conv_in", False),
        ("unet.base_model.model.conv_in", "unet", "conv_in", False),
        ("transformer.proj_out", "transformer", "proj_out", False),
        ("transformer_2.proj_out", "transformer_2", "proj_out", False),
        ("text_encoder_2.text_projection", "text_encoder_2", "text_projection", False),
        ("text_encoders.clip_l.transformer.text_model.x", "text_encoder", "text_model.x", False),
        ("clip_g.text_model.x", "text_encoder_2", "text_model.x", False),
        ("t5.encoder.x", "text_encoder_3", "encoder.x", False),
        ("base_model.model.conv_in", None, "conv_in", False),
        ("transformer_blocks.0.attn.to_q", None, "transformer_blocks.0.attn.to_q", False),
        ("transformer_blocks_0_attn_to_q", None, "transformer_blocks_0_attn_to_q", True),
    ],
)
def test_prefixes(stem: str, component: str | None, name: str, flat: bool) -> None:
    components, rest, underscores = naming.split_prefix(stem)
    assert (components[0] if components else None, rest, underscores) == (component, name, flat)


def test_a_prefix_nobody_knows_is_found_when_nine_of_ten_names_have_it() -> None:
    index = known_base("sd15")["unet"]
    names = [f"my_style_{flatten(path)}" for path in layers(index)]
    assert naming.unknown_prefix(index, names) == "my_style_"
    assert naming.unknown_prefix(index, names + ["nonsense_1"] * (len(names) // 10)) == "my_style_"
    assert naming.unknown_prefix(index, names + ["nonsense_1"] * (len(names) // 5)) == ""
    assert naming.unknown_prefix(index, []) == ""


@pytest.mark.parametrize(
    ("name", "flat", "nearest"),
    [
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_w",
            False,
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.",
        ),
        ("down_blocks_0_attentions_7_proj_in", True, "down_blocks_0_attentions_1_proj_in"),
        ("text_model_encoder_layers_40_mlp_fc1", True, ""),
        ("x" * 100_000, False, ""),
    ],
)
def test_nearest_name(name: str, flat: bool, nearest: str) -> None:
    found = naming.nearest_name(known_base("sd15")["unet"], name, flat)
    assert found.startswith(nearest) and bool(found) == bool(nearest)


# --- models and base models -------------------------------------------------------------------------------------------------
def test_adapters_do_not_change_the_names() -> None:
    import peft
    from smallmodels import unet

    from lycoris_diff import LoKrConfig, get_peft_model

    bare = index_model(unet(), "unet")
    ours = get_peft_model(unet(), LoKrConfig(r=2, target_modules=["to_q", "conv1"]))
    assert index_model(ours, "unet") == bare
    theirs = unet()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", "conv1"]), theirs)
    assert index_model(theirs, "unet") == bare


def test_an_unknown_class_goes_by_its_own_names() -> None:
    index = index_model(
        nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv1d(3, 4, 3, bias=False), nn.Embedding(2, 2)), "x"
    )
    assert index.family == ""
    assert index.sites == {
        "0": Site("Linear", (3, 2), True),
        "1": Site("LayerNorm", (3,), True),
        "2": Site("Conv1d", (4, 3, 3)),
    }


def test_a_new_family_is_rows_in_two_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.mod = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 4)

    rows = Block("old", "", {"qv": "q v", "adaln": "~mod"})
    monkeypatch.setitem(families.FAMILIES, "toy", families.Family((rows,)))
    monkeypatch.setattr("lycoris_diff.naming.build.CLASSES", (("Toy", "", "toy"),))
    index = index_model(Toy(), "transformer")
    assert find(index, "old_qv", True) == (Part("q", (0, 4)), Part("v", (4, 6)))
    assert find(index, "old.qv.1") == (Part("v"),)
    assert find(index, "old.adaln") == (Part("mod", None, True),)


def test_known_bases_are_remembered_and_have_other_names() -> None:
    assert known_base("sd1")["unet"] is known_base("sd15")["unet"]
    with pytest.raises(CheckpointError, match=r"'sdxx' is neither known nor a directory.*Did you mean 'sdxl'"):
        known_base("sdxx")


def test_a_pipeline_directory_is_read_without_weights(tmp_path) -> None:
    config = {"_class_name": "UNet2DConditionModel", **naming.BASES["sd15"].components["unet"][1]}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    listed = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    indexes = known_base(str(tmp_path))
    assert indexes.keys() == {"unet"}
    assert indexes["unet"] == known_base("sd15")["unet"]
    (tmp_path / "unet" / "config.json").write_text('{"layers_per_block": "many"}')
    with pytest.raises(CheckpointError, match="UNet2DConditionModel cannot be built from its configuration"):
        known_base(str(tmp_path))
