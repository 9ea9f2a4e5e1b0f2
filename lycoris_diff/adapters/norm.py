"""Normalisation layers: ``weight' = weight + w_norm``, ``bias' = bias + b_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..errors import CheckpointError
from ..execution.geometry import Geometry
from ..execution.norms import NormGeometry, norm_geometry_of
from ..execution.weights import Factors
from .base import Adapter, Site, fill
from .config import AdapterConfig
from .registry import register
from .storage import expect_shapes


@dataclass(init=False)
class NormConfig(AdapterConfig):
    """Configuration of `NormModel`; ``r`` has no meaning. Without ``target_modules`` every norm with a weight is adapted."""

    peft_name: ClassVar[str] = "NORM"


@register
class Norm(Adapter):
    """``w_norm (dim,)`` and, where the norm has a bias, ``b_norm (dim,)``, on LayerNorm, GroupNorm and RMSNorm."""

    config_class = NormConfig
    factor_names = ("w_norm", "b_norm")
    bias_name = "b_norm"
    default_targets = "all"

    @classmethod
    def host(cls, layer: nn.Module) -> Geometry | None:
        return norm_geometry_of(layer)

    @classmethod
    def shapes(cls, geometry: Geometry, config: NormConfig) -> dict[str, tuple[int, ...]]:
        return {name: (geometry.out,) for name in cls.factor_names if name == "w_norm" or geometry.has_bias}

    @classmethod
    def fits(cls, geometry: Geometry, config: NormConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if not isinstance(geometry, NormGeometry):
            raise CheckpointError("'w_norm' belongs to a normalisation layer, not to one that mixes channels")
        if "b_norm" in shapes and not geometry.has_bias:
            raise CheckpointError("tensor 'b_norm' changes a bias, and the normalisation layer has none")
        expect_shapes({k: v for k, v in cls.shapes(geometry, config).items() if k in shapes or k == "w_norm"}, shapes)

    def reset(self, site: Site) -> None:
        start = nn.init.zeros_ if self.config.init_weights else partial(nn.init.normal_, std=0.02)
        fill(self, dict.fromkeys(self.factor_names, start))

    def delta(self, f: Factors) -> Tensor:
        return f["w_norm"] * f["scale"]
