"""Making a NameIndex from a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..execution.geometry import geometry_of
from .families import CLASSES, FAMILIES
from .index import NameIndex, Part, Parts, Site
from .rows import expand

_CONVOLUTIONS = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}
# Layers with adapters, ours and PEFT's, keep what they replace in a child of one of these names; so does torch.compile.
_BASES = ("base_layer", "original_module", "_orig_mod")


def index_model(model: nn.Module, component: str) -> NameIndex:
    """Names of all modules of a model that can carry an adapter.

    Args:
        model: a diffusers or transformers model, with or without adapters, on any device including meta.
        component: attribute of the pipeline it is ("unet", "text_encoder_2" ...).

    Returns:
        Index under the names of the model without adapters.
    """
    unwrap = getattr(model, "get_base_model", None)
    base = _base(unwrap() if callable(unwrap) else model)
    sites = {path: site for path, module in _walk(base, "") if (site := _site(module)) is not None}
    family = _family(base, sites)
    rows = FAMILIES[family]
    native = expand(rows.native(sites) if callable(rows.native) else rows.native, sites)
    native = {name: parts for name, parts in native.items() if parts != (Part(name),)}
    aliases = _habits(sites, native) | expand(rows.aliases, sites)
    return NameIndex(component, family, sites, native, aliases)


def _habits(sites: Mapping[str, Site], native: Mapping[str, Parts]) -> dict[str, Parts]:
    """Spellings that any family may have."""
    found: dict[str, Parts] = {}
    for path in sites:
        if path.endswith(".to_out.0"):
            found[path.removesuffix(".0")] = (Part(path),)
    for name, parts in native.items():
        if name.endswith(".to_out.0"):
            found[name.removesuffix(".0")] = parts
        if len(parts) > 1:  # a fused weight trained as its leaves
            found |= {f"{name}.{k}": (Part(part.path),) for k, part in enumerate(parts)}
    return found


def _family(model: nn.Module, sites: Mapping[str, Site]) -> str:
    names = {c.__name__ for c in type(model).__mro__}
    fits = (family for cls, needs, family in CLASSES if cls in names and (not needs or needs in sites))
    return next(fits, "")


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(_base(child), f"{path}.{name}" if path else name)


def _base(module: nn.Module) -> nn.Module:
    while True:
        inner = next((m for name in _BASES if (m := module._modules.get(name)) is not None), None)
        if inner is None:
            return module
        module = inner


def _site(module: nn.Module) -> Site | None:
    geometry = geometry_of(module)
    bias = getattr(module, "bias", None) is not None
    if geometry is not None:
        return Site(_CONVOLUTIONS.get(len(geometry.kernel), "Linear"), geometry.shape, bias)
    kind = _norm_kind(module)
    weight: Any = module._parameters.get("weight")
    if not kind or weight is None or weight.dim() != 1:
        return None
    return Site(kind, tuple(weight.shape), bias)


def _norm_kind(module: nn.Module) -> str:
    for cls, kind in ((nn.LayerNorm, "LayerNorm"), (nn.GroupNorm, "GroupNorm")):
        if isinstance(module, cls):
            return kind
    name = type(module).__name__
    return "RMSNorm" if "RMSNorm" in name or name.endswith("LayerNorm") else ""
