"""The names that a module is written under, per naming scheme: the way back from diffusers' paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import CheckpointError
from .families import FAMILIES
from .index import NameIndex, Part, Parts, flatten
from .lookup import native_of, portable_path

_UNNUMBERED = ("unet", "transformer", "prior")
_KOHYA = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "prior": "lora_prior_unet_",
    "te": "lora_te_",
    "te1": "lora_te1_",
    "te2": "lora_te2_",
    "te3": "lora_te3_",
}
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
#: attributes of pipelines that adapter files exist for
COMPONENTS = (*_UNNUMBERED, "transformer_2", *_ENCODERS)
#: width of a CLIP encoder -> ComfyUI's name of it
_CLIP_NAMES = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
_T5_NAMES = {"t5": "t5xxl", "umt5": "umt5xxl"}


class Scheme(NamedTuple):
    """How one kind of file names modules.

    Attributes:
        flat: dots are written as underscores.
        names: "native" (the original code's), "diffusers" (with CLIP's ``text_model``), "kohya" (whichever of the two kohya's
            family of trainers writes for this model) or "installed" (exactly as the installed libraries name them).
        prefixes: component, or what it is to others (``te1``, ``clip_l``), -> beginning of its names.
        leaves: the parts of a fused weight are written one by one, numbered.
    """

    flat: bool
    names: str
    prefixes: Mapping[str, str]
    leaves: bool = False


SCHEMES: dict[str, Scheme] = {
    "kohya": Scheme(True, "kohya", _KOHYA),
    "kohya-native": Scheme(True, "native", _KOHYA),
    "kohya-diffusers": Scheme(True, "diffusers", _KOHYA),
    "lycoris": Scheme(True, "diffusers", dict.fromkeys(_UNNUMBERED, "lycoris_")),
    "onetrainer-legacy": Scheme(True, "diffusers", _KOHYA | {"transformer": "lora_transformer_"}),
    "comfyui": Scheme(
        False,
        "native",
        dict.fromkeys(_UNNUMBERED, "diffusion_model.")
        | {name: f"text_encoders.{name}.transformer." for name in (*_CLIP_NAMES.values(), *_T5_NAMES.values())},
    ),
    "diffusers": Scheme(False, "diffusers", {name: f"{name}." for name in COMPONENTS}),
    "omi": Scheme(
        False,
        "native",
        {name: f"{name}." for name in (*_UNNUMBERED, *_CLIP_NAMES.values())} | {"t5xxl": "t5."},
        leaves=True,
    ),
    "bare": Scheme(False, "native", dict.fromkeys(_UNNUMBERED, "")),
    "peft": Scheme(False, "installed", dict.fromkeys(COMPONENTS, "base_model.model.")),
}


def written_name(scheme: str, indexes: Mapping[str, NameIndex], component: str, path: str) -> tuple[str, Parts]:
    """The name a module's weight has in a file, without the factor's suffix.

    To write an adapter: call this for every path, gather the paths by name, and where a name has several parts fuse the
    entries of its parts in their order (a part without an adapter changes nothing); exchange the halves of parts that are
    ``swapped``.

    Args:
        scheme: row of `SCHEMES`.
        indexes: names of all components of the pipeline or base model; numbers of text encoders depend on which there are.
        component: key of ``indexes``.
        path: diffusers path of a module of this component.

    Returns:
        Name with its prefix, and the parts of the weight it names: one for a weight that is a single module, several in
        order of rows for a fused one.

    Raises:
        CheckpointError: the scheme has no name for this component.
    """
    row, index = SCHEMES[scheme], indexes[component]
    prefix = next((row.prefixes[role] for role in _roles(indexes, component) if role in row.prefixes), None)
    if prefix is None:
        raise CheckpointError(
            f"{scheme} files have no names for the component {component!r}; write it to a file of its own in another format, "
            "such as diffusers or peft"
        )
    name, parts = _name(row, index, path)
    return prefix + (flatten(name) if row.flat else name), parts


def _name(row: Scheme, index: NameIndex, path: str) -> tuple[str, Parts]:
    if row.names == "installed":
        return path, (Part(path),)
    native = row.names == "native" or (row.names == "kohya" and FAMILIES[index.family].kohya == "native")
    name, part = native_of(index, path) if native else (path, Part(path))
    if name == path:
        return portable_path(index, path), (part,)
    parts = index.native[name]
    if row.leaves and len(parts) > 1:
        return f"{name}.{parts.index(part)}", (Part(path, None, part.swapped),)
    return name, parts


def _roles(indexes: Mapping[str, NameIndex], component: str) -> tuple[str, ...]:
    """What a component is called: itself, kohya's number of a text encoder, ComfyUI's name of it."""
    index = indexes[component]
    if component not in _ENCODERS:
        return (component,)
    alone = component == "text_encoder" and sum(name in _ENCODERS for name in indexes) == 1
    # Flux' second encoder is a T5, which sd-scripts counts as the third
    number = 3 if index.family == "t5" else _ENCODERS.index(component) + 1
    return component, "te" if alone else f"te{number}", _comfyui_name(index, component)


def _comfyui_name(index: NameIndex, component: str) -> str:
    if index.family in _T5_NAMES:
        return _T5_NAMES[index.family]
    width = next((site.shape[0] for site in index.sites.values() if site.is_norm), 0)
    return _CLIP_NAMES.get(width, "clip_l" if component == "text_encoder" else "clip_g")
