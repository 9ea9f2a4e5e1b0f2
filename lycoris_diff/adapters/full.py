"""Full finetuning kept as a difference: ``W' = W + diff``, ``b' = b + diff_b``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..execution.geometry import Geometry
from ..execution.weights import Factors
from .base import Adapter, Site, fill
from .config import AdapterConfig
from .registry import register
from .storage import expect_shapes


@dataclass(init=False)
class FullConfig(AdapterConfig):
    """Configuration of `FullModel`; ``r`` has no meaning here.

    Attributes:
        train_weight: adapt the weight.
        train_bias: adapt the bias of layers that have one.
    """

    train_weight: bool = True
    train_bias: bool = True

    peft_name: ClassVar[str] = "FULL"

    def check(self) -> None:
        super().check()
        if not (self.train_weight or self.train_bias):
            raise ConfigError("FullConfig: train_weight and train_bias are both False; one of them must be True")


@register
class Full(Adapter):
    """``diff`` of the weight's canonical shape and ``diff_b (out,)``; either may be absent, and the host may lack a bias."""

    config_class = FullConfig
    factor_names = ("diff", "diff_b")
    bias_name = "diff_b"

    @property
    def changes_weight(self) -> bool:
        return "diff" in self.factor_shapes

    @classmethod
    def shapes(cls, geometry: Geometry, config: FullConfig) -> dict[str, tuple[int, ...]]:
        wanted = {"diff": config.train_weight, "diff_b": config.train_bias and geometry.has_bias}
        shapes = {k: v for k, v in _shapes(geometry).items() if wanted[k]}
        if not shapes:
            raise ConfigError("Full: train_weight is False and the layer has no bias; leave the layer out of target_modules")
        return shapes

    @classmethod
    def fits(cls, geometry: Geometry, config: FullConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if not shapes:
            raise CheckpointError("neither 'diff' nor 'diff_b' is there")
        expect_shapes({k: v for k, v in _shapes(geometry).items() if k in shapes}, shapes)

    def reset(self, site: Site) -> None:
        start = nn.init.zeros_ if self.config.init_weights else partial(nn.init.normal_, std=0.02)
        fill(self, dict.fromkeys(self.factor_names, start))

    def delta(self, f: Factors) -> Tensor:
        if "diff" not in f:
            return f["diff_b"].new_zeros(self.geometry.shape)
        return f["diff"] * f["scale"]

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        return super().add_delta(total, f) if "diff" in f else total


def _shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    return {"diff": geometry.shape, "diff_b": (geometry.out,)}
