"""Base models by name: their components' configurations, and indexes made from them without weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, nearest
from ..files import read_json
from .build import index_model
from .index import NameIndex

Spec = tuple[str, dict[str, Any]]
_DENOISERS = ("unet", "transformer", "prior")

# Only what differs from the defaults of the classes.
_UNET_BLOCKS: dict[str, Any] = {"attention_head_dim": 8, "layers_per_block": 2}
_SD15_UNET: Spec = ("UNet2DConditionModel", _UNET_BLOCKS | {"cross_attention_dim": 768})
_SD21_UNET: Spec = (
    "UNet2DConditionModel",
    _UNET_BLOCKS | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
)
_SDXL_UNET: Spec = (
    "UNet2DConditionModel",
    {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)


def _clip(width: int, layers: int, heads: int, projection: int = 0) -> Spec:
    cls = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    fields = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return cls, fields | ({"projection_dim": projection} if projection else {})


_T5_XXL_FIELDS: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_T5_XXL: Spec = ("T5EncoderModel", _T5_XXL_FIELDS | {"feed_forward_proj": "gated-gelu"})
_UMT5_XXL: Spec = ("UMT5EncoderModel", _T5_XXL_FIELDS | {"feed_forward_proj": "gated-gelu", "vocab_size": 256384})
_CLIP_L = _clip(768, 12, 12)
_SD3_ENCODERS = {
    "text_encoder": _clip(768, 12, 12, 768),
    "text_encoder_2": _clip(1280, 32, 20, 1280),
    "text_encoder_3": _T5_XXL,
}


def _sd3(layers: int, **fields: Any) -> Spec:
    width = 64 * fields.get("num_attention_heads", 24)
    shape = {"num_layers": layers, "num_attention_heads": 24, "caption_projection_dim": width}
    return "SD3Transformer2DModel", shape | fields


def _wan(heads: int, layers: int, ffn: int, **fields: Any) -> Spec:
    return "WanTransformer3DModel", {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn} | fields


def _flux2(heads: int, layers: int, single: int, context: int) -> Spec:
    fields = {"num_attention_heads": heads, "num_layers": layers, "num_single_layers": single, "joint_attention_dim": context}
    return "Flux2Transformer2DModel", fields | {"guidance_embeds": False}


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        components: attribute of the pipeline -> class and configuration. Language models that serve as text encoders are
            left out: no adapter format for them is known.
        versions: beginnings of ``ss_base_model_version`` and ``modelspec.architecture`` that mean it, in lower case.
        blocks: beginnings of flattened module names that its denoiser and no other kind of denoiser may have.
    """

    components: Mapping[str, Spec]
    versions: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


_UNET = ("down_blocks_", "up_blocks_", "mid_block_", "input_blocks_", "output_blocks_", "middle_block_")
_MMDIT = ("transformer_blocks_",)
_FLUX = (*_MMDIT, "single_transformer_blocks_", "double_blocks_", "single_blocks_")
_WAN = ("blocks_", "vace_blocks_")
_LUMINA = ("layers_", "noise_refiner_", "context_refiner_")

BASES: dict[str, Base] = {
    "sd15": Base({"unet": _SD15_UNET, "text_encoder": _CLIP_L}, ("sd_v1", "sd_1.5", "stable-diffusion-v1"), _UNET),
    "sd21": Base({"unet": _SD21_UNET, "text_encoder": _clip(1024, 23, 16)}, ("sd_v2", "sd_2", "stable-diffusion-v2"), _UNET),
    "sdxl": Base(
        {"unet": _SDXL_UNET, "text_encoder": _CLIP_L, "text_encoder_2": _clip(1280, 32, 20, 1280)},
        ("sdxl", "stable-diffusion-xl"),
        _UNET,
    ),
    "sd3": Base(
        {"transformer": _sd3(24, pos_embed_max_size=192)} | _SD3_ENCODERS,
        ("sd3", "stable-diffusion-v3", "stable-diffusion-3"),
        (*_MMDIT, "joint_blocks_"),
    ),
    "sd35-medium": Base(
        {"transformer": _sd3(24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))}
        | _SD3_ENCODERS,
        ("sd3.5-m", "stable-diffusion-3.5-medium", "stable-diffusion-v3.5"),
        (*_MMDIT, "joint_blocks_"),
    ),
    "sd35-large": Base(
        {"transformer": _sd3(38, num_attention_heads=38, pos_embed_max_size=192, qk_norm="rms_norm")} | _SD3_ENCODERS,
        ("sd3.5-l", "stable-diffusion-3.5-large", "stable-diffusion-v3.5"),
        (*_MMDIT, "joint_blocks_"),
    ),
    "flux": Base(
        {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
        },
        ("flux",),
        _FLUX,
    ),
    "chroma": Base({"transformer": ("ChromaTransformer2DModel", {}), "text_encoder": _T5_XXL}, ("chroma",), _FLUX),
    "flux2": Base({"transformer": ("Flux2Transformer2DModel", {})}, ("flux2", "flux_2", "flux.2", "flux-2"), _FLUX),
    "flux2-klein-4b": Base({"transformer": _flux2(24, 5, 20, 7680)}, (), _FLUX),
    "flux2-klein-9b": Base({"transformer": _flux2(32, 8, 24, 12288)}, (), _FLUX),
    "hunyuan-video": Base(
        {"transformer": ("HunyuanVideoTransformer3DModel", {}), "text_encoder_2": _CLIP_L}, ("hunyuan", "hv"), _FLUX
    ),
    "wan": Base(
        {"transformer": _wan(40, 40, 13824), "transformer_2": _wan(40, 40, 13824), "text_encoder": _UMT5_XXL}, ("wan",), _WAN
    ),
    "wan-1.3b": Base({"transformer": _wan(12, 30, 8960), "text_encoder": _UMT5_XXL}, (), _WAN),
    "wan-5b": Base({"transformer": _wan(24, 30, 14336, in_channels=48, out_channels=48), "text_encoder": _UMT5_XXL}, (), _WAN),
    "wan-i2v": Base(
        {"transformer": _wan(40, 40, 13824, in_channels=36, image_dim=1280, added_kv_proj_dim=5120), "text_encoder": _UMT5_XXL},
        (),
        _WAN,
    ),
    "z-image": Base({"transformer": ("ZImageTransformer2DModel", {})}, ("z-image", "z_image", "zimage"), _LUMINA),
    "qwen-image": Base({"transformer": ("QwenImageTransformer2DModel", {})}, ("qwen",), _MMDIT),
    "ltx": Base({"transformer": ("LTXVideoTransformer3DModel", {}), "text_encoder": _T5_XXL}, ("ltx",), _MMDIT),
    "sana": Base({"transformer": ("SanaTransformer2DModel", {})}, ("sana",), (*_MMDIT, "blocks_")),
    "aura-flow": Base(
        {"transformer": ("AuraFlowTransformer2DModel", {})},
        ("auraflow", "aura-flow"),
        ("joint_transformer_blocks_", "single_transformer_blocks_", "double_layers_", "single_layers_"),
    ),
    "lumina2": Base({"transformer": ("Lumina2Transformer2DModel", {})}, ("lumina",), _LUMINA),
}
KNOWN_BASES: tuple[str, ...] = tuple(BASES)
ALIASES = {"sd1": "sd15", "sd2": "sd21", "sd3-medium": "sd3", "sd35": "sd35-large", "flux1": "flux", "wan-14b": "wan"}


def known_base(name: str) -> dict[str, NameIndex]:
    """Names of a base model's components, without its weights.

    Args:
        name: row of `BASES` or `ALIASES`, or a directory with a pipeline (``model_index.json`` and the components'
            configurations are read, nothing else).

    Returns:
        ``{"unet": NameIndex, "text_encoder": NameIndex}``: denoisers and text encoders. Rows of the tables are made once.

    Raises:
        CheckpointError: neither a known name nor a pipeline's directory, or a configuration that no installed class takes.
    """
    row = ALIASES.get(name, name)
    if row in BASES:
        return {component: _index(row, component) for component in BASES[row].components}
    directory = Path(name)
    if not (directory / "model_index.json").is_file():
        raise CheckpointError(
            f"base model {name!r} is neither known nor a directory with a pipeline's model_index.json; "
            f"known: {', '.join(BASES)}.{nearest(name, [*BASES, *ALIASES])}"
        )
    return _index_directory(directory)


def base_component(name: str, component: str) -> NameIndex | None:
    """One component of a row of `BASES`, None when the base model has none of this name."""
    return _index(name, component) if component in BASES[name].components else None


@lru_cache(maxsize=64)
def _index(base: str, component: str) -> NameIndex:
    cls, fields = BASES[base].components[component]
    return index_model(_empty_model(cls, fields), component)


@lru_cache(maxsize=64)
def _index_config(cls: str, component: str, text: str) -> NameIndex:
    return index_model(_empty_model(cls, json.loads(text)), component)


def _index_directory(directory: Path) -> dict[str, NameIndex]:
    listed = read_json(directory / "model_index.json")
    found = {}
    for component, row in listed.items():
        library, cls = row if isinstance(row, list) and len(row) == 2 else ("", "")
        if library not in ("diffusers", "transformers") or not component.startswith((*_DENOISERS, "text_encoder")):
            continue
        config = read_json(directory / component / "config.json")
        try:
            found[component] = _index_config(str(cls), component, json.dumps(config, sort_keys=True))
        except CheckpointError:  # an encoder that nothing here can build carries no adapter that could be placed
            if component.startswith(_DENOISERS):
                raise
    if not found:
        raise CheckpointError(
            f"{directory / 'model_index.json'} lists no denoiser or text encoder of diffusers or transformers"
        )
    return found


def _empty_model(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers or transformers on the meta device.

    Raises:
        CheckpointError: no installed model class has this name, or it does not take these fields.
    """
    import diffusers
    import transformers

    cls: Any = next((c for c in (getattr(lib, name, None) for lib in (diffusers, transformers)) if isinstance(c, type)), None)
    if cls is None or not issubclass(cls, nn.Module):
        raise CheckpointError(f"{name!r} is no model class of the installed diffusers and transformers; install newer ones")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about what classes of diffusers use inside
            if hasattr(cls, "from_config"):
                return cls.from_config(dict(fields))
            return cls(cls.config_class.from_dict(dict(fields)))
    except Exception as error:  # configurations come from files, and classes differ in what they raise
        raise CheckpointError(f"{name} cannot be built from its configuration: {error}; correct the configuration") from error
