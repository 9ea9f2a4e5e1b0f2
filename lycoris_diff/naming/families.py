"""Families of models: their native names as tables, and which family a model class belongs to.

A new family is a row in `FAMILIES`, made of blocks of names, and one in `CLASSES` for every model class it has. Names that
are the same in both schemes have no row. Rows are read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .index import Site
from .ldm import ldm_blocks
from .names_dit import LUMINA2, SD3, WAN, Z_IMAGE
from .names_encoders import OPEN_CLIP, TEXT_MODEL
from .names_flux import CHROMA_GUIDANCE, CUT_OFF, FLUX, FLUX2, HUNYUAN_COMFYUI, HUNYUAN_VIDEO, XLABS
from .names_more import AURA_FLOW, COSMOS, KREA2, LTX, QWEN_IMAGE_21, SANA
from .rows import Block


class Family(NamedTuple):
    """How one architecture is named outside diffusers.

    Attributes:
        native: rows of the names the original code uses, or a function that makes them from the model's modules.
        aliases: rows of further names that files use, never written.
        kohya: what kohya's family of trainers flattens: "native" or "diffusers" names.
    """

    native: tuple[Block, ...] | Callable[[Mapping[str, Site]], Iterable[Block]] = ()
    aliases: tuple[Block, ...] = ()
    kohya: str = "native"


FAMILIES: dict[str, Family] = {
    "sd": Family(ldm_blocks, kohya="diffusers"),
    "sdxl": Family(ldm_blocks),
    "sd3": Family(SD3),
    "flux": Family(FLUX, XLABS),
    "flux2": Family(FLUX2, CUT_OFF),
    "chroma": Family((*FLUX, CHROMA_GUIDANCE), XLABS),
    "hunyuan-video": Family(HUNYUAN_VIDEO, HUNYUAN_COMFYUI),
    "wan": Family(WAN),
    "z-image": Family(Z_IMAGE, kohya="diffusers"),
    "qwen-image": Family(QWEN_IMAGE_21, kohya="diffusers"),
    "lumina2": Family(LUMINA2),
    "ltx": Family(LTX),
    "aura-flow": Family(AURA_FLOW),
    "sana": Family(SANA),
    "krea2": Family(KREA2),
    "cosmos": Family(COSMOS),
    "clip": Family(aliases=(*TEXT_MODEL, *OPEN_CLIP), kohya="diffusers"),
    "t5": Family(kohya="diffusers"),
    "umt5": Family(kohya="diffusers"),
    "": Family(kohya="diffusers"),
}

#: (model class, module it must have, family); the first row that fits counts.
CLASSES: tuple[tuple[str, str, str], ...] = (
    ("UNet2DConditionModel", "add_embedding.linear_1", "sdxl"),
    ("UNet2DConditionModel", "", "sd"),
    ("SD3Transformer2DModel", "", "sd3"),
    ("FluxTransformer2DModel", "", "flux"),
    ("Flux2Transformer2DModel", "", "flux2"),
    ("ChromaTransformer2DModel", "", "chroma"),
    ("HunyuanVideoTransformer3DModel", "", "hunyuan-video"),
    ("HunyuanVideoFramepackTransformer3DModel", "", "hunyuan-video"),
    ("WanTransformer3DModel", "", "wan"),
    ("WanVACETransformer3DModel", "", "wan"),
    ("SkyReelsV2Transformer3DModel", "", "wan"),
    ("ChronoEditTransformer3DModel", "", "wan"),
    ("ZImageTransformer2DModel", "", "z-image"),
    ("QwenImageTransformer2DModel", "", "qwen-image"),
    ("QwenImage21Transformer2DModel", "", "qwen-image"),
    ("Lumina2Transformer2DModel", "", "lumina2"),
    ("LTXVideoTransformer3DModel", "", "ltx"),
    ("LTX2VideoTransformer3DModel", "", "ltx"),
    ("AuraFlowTransformer2DModel", "", "aura-flow"),
    ("SanaTransformer2DModel", "", "sana"),
    ("Krea2Transformer2DModel", "", "krea2"),
    ("CosmosTransformer3DModel", "", "cosmos"),
    ("CLIPTextModel", "", "clip"),
    ("CLIPTextModelWithProjection", "", "clip"),
    ("T5EncoderModel", "", "t5"),
    ("UMT5EncoderModel", "", "umt5"),
)
