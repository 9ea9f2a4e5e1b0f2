"""Normalisation layers as hosts: the weight is one factor a channel, ``y = norm(x) * weight + bias``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import Geometry

#: further classes with one stored weight a channel, by the library and name; their own forward is run
_RMS_NORMS = (("diffusers", "RMSNorm"), ("transformers", "RMSNorm"), ("transformers", "T5LayerNorm"))


@dataclass(frozen=True)
class NormGeometry(Geometry):
    """Shape of a normalisation layer's weight, ``(out,)``; ``inp`` is 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out,)


def norm_geometry_of(layer: nn.Module) -> NormGeometry | None:
    """Geometry of LayerNorm, GroupNorm or an RMSNorm with one weight a channel, None for everything else."""
    weight: Any = layer._parameters.get("weight")
    if weight is None or weight.dim() != 1:  # without a weight there is nothing to change
        return None
    known = isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or any(
        cls.__module__.startswith(f"{library}.") and cls.__name__.endswith(name)
        for cls in type(layer).__mro__
        for library, name in _RMS_NORMS
    )
    return NormGeometry(weight.shape[0], 1, has_bias=getattr(layer, "bias", None) is not None) if known else None


def run_with(layer: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The forward of the layer's class with other parameters; a forward that was patched over it is passed by."""
    if "forward" in layer.__dict__:
        bare = copy.copy(layer)
        bare.__dict__.pop("forward")
        bare.__dict__["_parameters"] = {**layer._parameters, **tensors}
        return bare(*args, **kwargs)
    return torch.func.functional_call(layer, tensors, args, kwargs)
