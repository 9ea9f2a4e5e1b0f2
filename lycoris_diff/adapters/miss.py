"""MiSS (arXiv 2409.15371): shards of one trainable block, shared along the input axis of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..execution.geometry import Geometry
from ..execution.program import Program
from ..execution.steps import Conv, Pointwise, Shards, Step, Tile
from ..execution.weights import Factor, Factors
from ..functional import miss
from .base import Adapter, Site, fill
from .config import AdapterConfig
from .registry import register


@dataclass(init=False)
class MissConfig(AdapterConfig):
    """Configuration of `MissModel`; fields as in PEFT.

    Attributes:
        r: shards are r input channels wide.
        mini_r: width of the block along the output channels in mode "mini"; divides them.
        miss_dropout: dropout on the adapter's input, in every mode.
        init_weights: True (balance), False (balance, random start), "mini", or "bat" (nonlinear in the base weight).
        bias: "none", "all" or "MiSS_only".
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    bias: str = "none"

    peft_name: ClassVar[str] = "MISS"
    inits: ClassVar[tuple[str, ...]] = ("bat", "mini")
    unsupported: ClassVar[Mapping[str, Any]] = {}

    def check(self) -> None:
        super().check()
        self._probability("miss_dropout")
        self._positive("mini_r")
        if self.init_weights != "mini":
            self._warn_without_effect("mini_r", 'outside init_weights="mini"')


@register
class Miss(Adapter):
    """Block ``miss_block``: ``(r, out, *k)`` in balance, ``(r, mini_r, *k)`` in "mini", ``(out / r, r, r)`` in "bat".

    On convolutions the shards run along the input channels of a group and the kernel is kept; "bat" works on the weight
    flattened to ``(out, in*K)``.
    """

    config_class = MissConfig
    factor_names = ("miss_block",)

    def __init__(self, geometry: Geometry, config: MissConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(geometry, config, shapes)
        self.depends_on_weight = config.init_weights == "bat"

    @classmethod
    def shapes(cls, geometry: Geometry, config: MissConfig) -> dict[str, tuple[int, ...]]:
        r = config.r
        if r > geometry.inp:
            raise ConfigError(f"MiSS: r={r} is larger than the layer's {geometry.inp} input channels; choose a smaller r")
        if config.init_weights == "bat":
            if geometry.out % r or geometry.columns % r:
                raise ConfigError(
                    f'MiSS "bat": r={r} must divide both sides of the weight, ({geometry.out}, {geometry.columns})'
                )
            return {"miss_block": (geometry.out // r, r, r)}
        if config.init_weights == "mini":
            if geometry.out % config.mini_r:
                raise ConfigError(f'MiSS "mini": mini_r={config.mini_r} must divide the {geometry.out} output channels')
            return {"miss_block": (r, config.mini_r, *geometry.kernel)}
        return {"miss_block": (r, geometry.out, *geometry.kernel)}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: MissConfig) -> str | None:
        return "PEFT's MiSS knows Linear only" if geometry.kernel or geometry.transposed else None

    def reset(self, site: Site) -> None:
        def random(t: Tensor) -> None:
            nn.init.kaiming_uniform_(t, a=math.sqrt(5))

        fill(self, {"miss_block": nn.init.zeros_ if self.config.init_weights else random})

    def delta(self, f: Factors) -> Tensor:
        return miss.tile(f["miss_block"] * f["scale"], self.geometry.out, self.geometry.inp)

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        return miss.add_tiled(total, (f["miss_block"] * f["scale"]).to(total.dtype))

    def change(self, base: Tensor, f: Factors) -> Tensor:
        return miss.bat(base.flatten(1), f["miss_block"].to(base.dtype)).view(base.shape)

    def packed_gap(self) -> str:
        # W[a, b] @ B[a]: another map of the input for every block of rows
        gap = 'MiSS "bat" multiplies every block of the weight by a matrix of its own'
        return gap if self.depends_on_weight else ""

    def program(self, f: Factors) -> Program | None:
        geo = self.geometry
        if self.depends_on_weight or geo.groups > 1:
            return None
        r, s = f["miss_block"].shape[:2]
        cost = r * s * (geo.columns // geo.inp) + geo.inp

        # the weight of a layer from shards to block columns
        block = Factor("miss_block", scaled=True, swapped=True, shape=None if geo.is_pointwise else (s, r, *geo.kernel))
        wide: Step = Pointwise(block) if geo.is_pointwise else Conv(block)
        if s == geo.out:
            return Program(Shards(None, r), wide, cost=cost, width=r)
        return Program(Shards(None, r), Tile(None, geo.out // s), wide, cost=cost, width=max(r, s))
