"""Tables of names: counts of modules, and native names against diffusers' own converters and the original constructors."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from namecases import default_index, layers

from lycoris_diff import naming
from lycoris_diff.naming import index_model, known_base

UNETS = ("sd15", "sd21", "sdxl")


# --- what there is ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "linears", "convolutions", "norms"), [("sd15", 184, 98, 109), ("sd21", 216, 66, 109), ("sdxl", 743, 51, 256)]
)
def test_unet_counts(base: str, linears: int, convolutions: int, norms: int) -> None:
    index = known_base(base)["unet"]
    kinds = [site.kind for site in index.sites.values()]
    assert (kinds.count("Linear"), kinds.count("Conv2d")) == (linears, convolutions)
    assert len(index.sites) - linears - convolutions == norms
    assert len(index.native) == len(index.sites), "every module has an LDM name"


@pytest.mark.parametrize(
    ("cls", "count", "convolutions"),
    [
        ("FluxTransformer2DModel", 502, 0),
        ("Flux2Transformer2DModel", 203, 0),
        ("SD3Transformer2DModel", 257, 1),
        ("WanTransformer3DModel", 407, 1),
        ("HunyuanVideoTransformer3DModel", 548, 1),
        ("ZImageTransformer2DModel", 276, 0),
        ("QwenImageTransformer2DModel", 846, 0),
        ("Lumina2Transformer2DModel", 244, 0),
        ("ChromaTransformer2DModel", 433, 0),
        ("PixArtTransformer2DModel", 289, 1),
        ("SanaTransformer2DModel", 227, 61),
    ],
)
def test_transformer_counts(cls: str, count: int, convolutions: int) -> None:
    found = layers(default_index(cls))
    assert len(found) == count
    assert sum(site.kind != "Linear" for site in found.values()) == convolutions


@pytest.mark.parametrize(
    ("base", "component", "count"),
    [
        ("sd15", "text_encoder", 72),
        ("sd21", "text_encoder", 138),
        ("sdxl", "text_encoder", 72),
        ("sdxl", "text_encoder_2", 193),
        ("flux", "text_encoder_2", 168),
    ],
)
def test_text_encoder_counts(base: str, component: str, count: int) -> None:
    assert len(layers(known_base(base)[component])) == count


def test_fused_rows_of_lumina2_are_unequal() -> None:
    parts = known_base("lumina2")["transformer"].native["layers.0.attention.qkv"]
    assert [part.rows for part in parts] == [(0, 2304), (2304, 3072), (3072, 3840)]


# --- native names against diffusers' converters ------------------------------------------------------------------------------
def numbered_weights(index: naming.NameIndex) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A number for every row of every weight and bias: under diffusers' names, and as the native names say they are stored."""
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    count = 0
    for path, site in index.sites.items():
        for parameter in ("weight", "bias") if site.bias else ("weight",):
            ours[f"{path}.{parameter}"] = torch.arange(count, count + site.shape[0])
            count += site.shape[0]
    for name, parts in naming.native_names(index).items():
        for parameter in ("weight", "bias") if index.sites[parts[0].path].bias else ("weight",):
            stored = [ours[f"{part.path}.{parameter}"] for part in parts]
            halves = [torch.cat(t.chunk(2)[::-1]) if part.swapped else t for part, t in zip(parts, stored)]
            scale = index.sites[parts[0].path].kind == "RMSNorm" and index.family in ("flux", "flux2", "chroma", "krea2")
            theirs[f"{name}.{'scale' if scale else parameter}"] = torch.cat(halves)
            for part in parts:
                start, stop = part.rows or (0, len(theirs[f"{name}.{'scale' if scale else parameter}"]))
                assert stop - start == index.sites[part.path].shape[0]
    return ours, theirs


def also_needed(family: str, count: int) -> list[str]:
    """Parameters that no module has and converters ask for."""
    return {
        "sd3": ["pos_embed"],
        "aura-flow": ["register_tokens", "positional_encoding"],
        "sana": ["pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table"]
        + [f"blocks.{i}.scale_shift_table" for i in range(count)],
    }.get(family, [])


CONVERTERS = [
    ("SD3Transformer2DModel", {}, "convert_sd3_transformer_checkpoint_to_diffusers"),
    (
        "SD3Transformer2DModel",
        {"num_layers": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    ("FluxTransformer2DModel", {}, "convert_flux_transformer_checkpoint_to_diffusers"),
    ("FluxTransformer2DModel", {"guidance_embeds": True}, "convert_flux_transformer_checkpoint_to_diffusers"),
    ("Flux2Transformer2DModel", {}, "convert_flux2_transformer_checkpoint_to_diffusers"),
    ("ChromaTransformer2DModel", {}, "convert_chroma_transformer_checkpoint_to_diffusers"),
    ("HunyuanVideoTransformer3DModel", {}, "convert_hunyuan_video_transformer_to_diffusers"),
    ("WanTransformer3DModel", {}, "convert_wan_transformer_to_diffusers"),
    ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}, "convert_wan_transformer_to_diffusers"),
    ("WanVACETransformer3DModel", {}, "convert_wan_transformer_to_diffusers"),
    ("ZImageTransformer2DModel", {}, "convert_z_image_transformer_checkpoint_to_diffusers"),
    ("Lumina2Transformer2DModel", {}, "convert_lumina2_to_diffusers"),
    ("LTXVideoTransformer3DModel", {}, "convert_ltx_transformer_checkpoint_to_diffusers"),
    ("LTX2VideoTransformer3DModel", {}, "convert_ltx2_transformer_to_diffusers"),
    ("AuraFlowTransformer2DModel", {}, "convert_auraflow_transformer_checkpoint_to_diffusers"),
    ("SanaTransformer2DModel", {}, "convert_sana_transformer_to_diffusers"),
    ("CosmosTransformer3DModel", {}, "convert_cosmos_transformer_checkpoint_to_diffusers"),
    ("Krea2Transformer2DModel", {}, "convert_krea2_transformer_checkpoint_to_diffusers"),
    ("QwenImage21Transformer2DModel", {}, "convert_qwen_image21_transformer_checkpoint_to_diffusers"),
]


@pytest.mark.parametrize(("cls", "config", "converter"), CONVERTERS, ids=[f"{c[0]}-{len(c[1])}" for c in CONVERTERS])
def test_rows_and_halves_are_those_of_diffusers_own_conversion(cls: str, config: dict[str, object], converter: str) -> None:
    if not hasattr(diffusers, cls) or not hasattr(single_file_utils, converter):
        pytest.skip("not in the installed diffusers")
    index = default_index(cls, **config)
    ours, theirs = numbered_weights(index)
    extra = {name: torch.zeros(2, 2) for name in also_needed(index.family, 20)}
    converted = getattr(single_file_utils, converter)(theirs | extra)
    wrong = [key for key, value in ours.items() if not torch.equal(converted.get(key, torch.empty(0)), value)]
    assert not wrong


@pytest.mark.parametrize("base", UNETS)
def test_ldm_names_are_those_of_diffusers_own_conversion(base: str) -> None:
    index = known_base(base)["unet"]
    ours, theirs = numbered_weights(index)
    config = naming.BASES[base].components["unet"][1]
    defaults = {k: v.default for k, v in inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters.items()}
    checkpoint = {f"model.diffusion_model.{name}": value for name, value in theirs.items()}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, defaults | dict(config))
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[key], value) for key, value in ours.items())


def original_unet_names(
    widths: tuple[int, ...], attention: tuple[int, ...], depths: tuple[int, ...], resnets: int = 2, label: bool = False
) -> set[str]:
    """Linears and convolutions of the original UNet, counted off the way its constructor builds it.

    ``attention``: downsampling factors with attention; ``depths``: transformer blocks on each level.
    """
    names = {"input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2"} | (
        {"label_emb.0.0", "label_emb.0.2"} if label else set()
    )

    def resnet(block: str, changes_width: bool) -> None:
        names.update(f"{block}.{name}" for name in ("in_layers.2", "emb_layers.1", "out_layers.3"))
        names.update([f"{block}.skip_connection"] if changes_width else [])

    def transformer(block: str, depth: int) -> None:
        names.update((f"{block}.proj_in", f"{block}.proj_out"))
        for i in range(depth):
            inner = f"{block}.transformer_blocks.{i}"
            names.update(f"{inner}.{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0"))
            names.update((f"{inner}.ff.net.0.proj", f"{inner}.ff.net.2"))

    number, width, factor, skips = 1, widths[0], 1, [widths[0]]
    for level, wanted in enumerate(widths):
        for _ in range(resnets):
            resnet(f"input_blocks.{number}.0", width != wanted)
            width = wanted
            if factor in attention:
                transformer(f"input_blocks.{number}.1", depths[level])
            skips.append(width)
            number += 1
        if level + 1 < len(widths):
            names.add(f"input_blocks.{number}.0.op")
            skips.append(width)
            number, factor = number + 1, 2 * factor
    resnet("middle_block.0", False)
    transformer("middle_block.1", depths[-1])
    resnet("middle_block.2", False)
    number = 0
    for level, wanted in reversed(list(enumerate(widths))):
        for k in range(resnets + 1):
            resnet(f"output_blocks.{number}.0", width + skips.pop() != wanted)
            width = wanted
            if factor in attention:
                transformer(f"output_blocks.{number}.1", depths[level])
            if level and k == resnets:
                names.add(f"output_blocks.{number}.{2 if factor in attention else 1}.conv")
                factor //= 2
            number += 1
    return names


def test_ldm_names_are_those_the_original_constructor_gives() -> None:
    sdxl = known_base("sdxl")["unet"]
    expected = original_unet_names((320, 640, 1280), (2, 4), (1, 2, 10), label=True)
    assert len(expected) == 794
    assert {naming.native_of(sdxl, path)[0] for path in layers(sdxl)} == expected
    sd15 = known_base("sd15")["unet"]
    expected = original_unet_names((320, 640, 1280, 1280), (1, 2, 4), (1, 1, 1, 1))
    assert {naming.native_of(sd15, path)[0] for path in layers(sd15)} == expected


def test_ldm_names_of_an_unusual_unet_come_from_its_own_structure() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
        )
    index = index_model(unet, "unet")
    assert {naming.native_of(index, p)[0] for p in layers(index)} == original_unet_names((32, 64), (1,), (1, 1), resnets=1)
