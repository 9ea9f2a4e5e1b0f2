"""The formats that are written: which naming scheme and which spelling of the factors each takes for a component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError, nearest
from .encode import AI_TOOLKIT, AI_TOOLKIT_KOHYA, DIFFUSERS, DIFFUSERS_ENCODER, DIFFUSERS_LOKR, KOHYA, ONETRAINER, Encoder

Table = Mapping[str, Encoder]


@dataclass(frozen=True)
class Style:
    """How one component is written.

    Attributes:
        scheme: row of `lycoris_diff.naming.SCHEMES`.
        table: algorithms it can say.
        prefix: takes the place of another beginning of the names, old and new.
        whole: scheme for fused weights whose parts have no adapters of their own (LoKr across their boundaries); "" when the
            readers know no such names.
    """

    scheme: str
    table: Table
    prefix: tuple[str, str] = ("", "")
    whole: str = ""


#: component, its family ("" when unknown) and the families of all components -> how it is written; None when the format has
#: no word for the component
StyleOf = Callable[[str, str, Mapping[str, str]], Style | None]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: as users type it.
        style: of a component.
        split: families -> beginning of the names under which its readers also take diffusers' parts of a fused weight.
        extras: tensors that are no adapter (bundled embeddings) may stay in the file.
        kohya_metadata: its readers look for kohya's training metadata and hashes.
    """

    name: str
    style: StyleOf
    split: Mapping[str, str] = field(default_factory=dict)
    extras: bool = True
    kohya_metadata: bool = True


def _one_scheme(scheme: str, table: Table, whole: str = "") -> StyleOf:
    return lambda component, family, families: Style(scheme, table, whole=whole)


def _lycoris(component: str, family: str, families: Mapping[str, str]) -> Style:
    """The wrapper's prefix says nothing about the component, so text encoders go by kohya's."""
    return Style("kohya" if component.startswith("text_encoder") else "lycoris", KOHYA)


def _onetrainer(component: str, family: str, families: Mapping[str, str]) -> Style:
    """Text encoders are counted in their order: Flux' T5 is the second, not the third as for sd-scripts."""
    second = component == "text_encoder_2" and family == "t5"
    return Style("onetrainer-legacy", ONETRAINER, ("lora_te3_", "lora_te2_") if second else ("", ""))


#: families whose loaders in diffusers take LoKr as well
_DIFFUSERS_LOKR = ("flux2", "z-image")


#: families whose loaders in diffusers take adapters of text encoders, of CLIP only; "" is a model nobody knows
_DIFFUSERS_ENCODERS = ("sd", "sdxl", "sd3", "flux", "")


def _diffusers(component: str, family: str, families: Mapping[str, str]) -> Style | None:
    if component.startswith("text_encoder"):
        taken = families.get("unet", families.get("transformer", "")) in _DIFFUSERS_ENCODERS and family in ("clip", "")
        return Style("diffusers", DIFFUSERS_ENCODER) if taken else None
    return Style("diffusers", {**DIFFUSERS, **DIFFUSERS_LOKR} if family in _DIFFUSERS_LOKR else DIFFUSERS)


#: families that ai-toolkit saves as kohya does, under diffusers' prefix, or under native names; all others have diffusers'
#: names below "diffusion_model."
_AI_TOOLKIT_KOHYA = ("sd", "sdxl")
_AI_TOOLKIT_TRANSFORMER = ("flux", "sd3")
_AI_TOOLKIT_NATIVE = ("flux2", "wan", "chroma", "lumina2", "hunyuan-video")


def _ai_toolkit(component: str, family: str, families: Mapping[str, str]) -> Style | None:
    if set(families.values()) & set(_AI_TOOLKIT_KOHYA):
        return Style("kohya", AI_TOOLKIT_KOHYA)
    if component != "transformer":
        return None
    if family in _AI_TOOLKIT_NATIVE:
        return Style("comfyui", AI_TOOLKIT)
    prefix = ("", "") if family in _AI_TOOLKIT_TRANSFORMER else ("transformer.", "diffusion_model.")
    return Style("diffusers", AI_TOOLKIT, prefix)


#: ComfyUI puts the changes of diffusers' q, k and v into the rows of its fused weights for these
_COMFYUI_SPLIT = dict.fromkeys(("flux", "flux2", "chroma", "sd3", "z-image", "lumina2"), "transformer.")

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("kohya", _one_scheme("kohya", KOHYA, "kohya-native")),
        Format("lycoris", _lycoris),
        Format("peft", _one_scheme("peft", {}), kohya_metadata=False),
        Format("diffusers", _diffusers, extras=False, kohya_metadata=False),
        Format("comfyui", _one_scheme("comfyui", KOHYA), _COMFYUI_SPLIT),
        Format("ai-toolkit", _ai_toolkit),
        Format("onetrainer", _onetrainer),
    )
}


def format_named(name: str) -> Format:
    """A row of the table.

    Raises:
        CheckpointError: there is no such format.
    """
    if name not in FORMATS:
        raise CheckpointError(f"there is no format {name!r}; formats are {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
    return FORMATS[name]
