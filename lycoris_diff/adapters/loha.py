"""LoHa (arXiv 2108.06098, 2309.14859): ``dW = s * (A1 B1) * (A2 B2)``, for convolutions optionally with Tucker cores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..execution.geometry import Geometry
from ..execution.program import Program
from ..execution.steps import Conv, Pointwise
from ..execution.weights import Cores, Factors, KhatriRao
from ..functional import loha, lora
from .base import Adapter, Initialiser, Site, fill, magnitude_shape
from .config import ScaledConfig
from .registry import register


@dataclass(init=False)
class LoHaConfig(ScaledConfig):
    """Configuration of `LoHaModel`; fields as in PEFT, plus ``rank_dropout_scale``, ``weight_decompose`` and ``dora_axis``."""

    peft_name: ClassVar[str] = "LOHA"
    inits: ClassVar[tuple[str, ...]] = ("lycoris",)


@register
class LoHa(Adapter):
    """Hadamard product of two low-rank matrices.

    Factors ``hada_w{1,2}_a (out, r)`` and ``hada_w{1,2}_b (r, in*K)``; with cores ``hada_t{1,2} (r, r, *k)`` they are
    ``(r, out)`` and ``(r, in)``. Conv1d cores carry a trailing axis of size one, as in PEFT.
    """

    config_class = LoHaConfig
    factor_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    magnitude_name = "dora_scale"

    @classmethod
    def shapes(cls, geometry: Geometry, config: LoHaConfig) -> dict[str, tuple[int, ...]]:
        r = config.r
        core = config.use_effective_conv2d and geometry.has_kernel
        shapes: dict[str, tuple[int, ...]] = {}
        for half in "12":
            if core:
                shapes[f"hada_t{half}"] = core_shape(geometry, r)
            shapes[f"hada_w{half}_a"] = (r, geometry.out) if core else (geometry.out, r)
            shapes[f"hada_w{half}_b"] = (r, geometry.inp if core else geometry.columns)
        if config.weight_decompose:
            shapes[cls.magnitude_name] = magnitude_shape(geometry, config.dora_axis)
        return shapes

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        first = (0,) if "hada_t1" in shapes else (1,)
        own = {"hada_w1_a": first, "hada_w2_a": first, "hada_w1_b": (0,), "hada_w2_b": (0,)}
        return own | {"hada_t1": (0, 1), "hada_t2": (0, 1)}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: LoHaConfig) -> str | None:
        return lycoris_gap(geometry, config)

    def reset(self, site: Site) -> None:
        kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
        table: dict[str, Initialiser] = dict.fromkeys(self.factor_names, kaiming)
        init = self.config.init_weights
        if init == "lycoris":
            wide, narrow = partial(nn.init.normal_, std=1.0), partial(nn.init.normal_, std=0.1)
            table |= {"hada_w1_a": narrow, "hada_w1_b": wide, "hada_w2_a": nn.init.zeros_, "hada_w2_b": wide}
            table |= {"hada_t1": narrow, "hada_t2": narrow}
        elif init:
            table["hada_w2_b"] = nn.init.zeros_
        fill(self, table)

    def delta(self, f: Factors) -> Tensor:
        first, second = self._halves(f)
        return (first * second).reshape(self.geometry.shape)

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        first, second = (h.reshape(total.shape).to(total.dtype) for h in self._halves(f))
        return torch.addcmul(total, first, second)

    def _halves(self, f: Factors) -> tuple[Tensor, Tensor]:
        core1, core2 = self._cores(f)
        first = loha.halves(f["hada_w1_a"] * f["scale"], f["hada_w1_b"], core1)
        return first, loha.halves(f["hada_w2_a"], f["hada_w2_b"], core2)

    def _cores(self, f: Factors) -> tuple[Tensor | None, Tensor | None]:
        if "hada_t1" not in f:
            return None, None
        kernel = self.geometry.kernel
        return lora.squeeze_core(f["hada_t1"], kernel), lora.squeeze_core(f["hada_t2"], kernel)

    def program(self, f: Factors) -> Program | None:
        geo = self.geometry
        if geo.groups > 1:
            return None
        rank = f["hada_w1_b"].shape[0] * f["hada_w2_b"].shape[0]  # that of a slot is not the config's
        taps = geo.columns // geo.inp
        if "hada_t1" in f:
            core, last = Conv(Cores("hada_t1", "hada_t2", geo.kernel)), Pointwise(replace(_UP, upright=False))
            return Program(Pointwise(_DOWN), last, core, cost=rank * (geo.inp + geo.out + rank * taps), width=rank)
        plain = Pointwise(_DOWN) if geo.is_pointwise else Conv(replace(_DOWN, shape=(-1, *geo.shape[1:])))
        return Program(plain, Pointwise(_UP), cost=rank * (geo.columns + geo.out), width=rank)

    def product(self, f: Factors) -> tuple[Tensor, Tensor] | None:
        return None if "hada_t1" in f else (_UP(f), _DOWN(f))


#: factors of the product of rank r*r, ``(out, r*r)`` with the scale and ``(r*r, in*K)``
_UP = KhatriRao("hada_w1_a", "hada_w2_a", swapped=True, upright=True, scaled=True)
_DOWN = KhatriRao("hada_w1_b", "hada_w2_b")


def lycoris_gap(geometry: Geometry, config: ScaledConfig) -> str | None:
    """What PEFT's LoHa and LoKr have in common not to know."""
    if config.weight_decompose:
        return "PEFT has no weight decomposition for LoHa and LoKr"
    if geometry.transposed or len(geometry.kernel) > 2:
        return "PEFT's LoHa and LoKr know Linear, Conv1d and Conv2d only"
    if geometry.edge_mode != "constant":
        return "PEFT's LoHa and LoKr ignore padding_mode"
    return None


def core_shape(geometry: Geometry, r: int) -> tuple[int, ...]:
    """Shape of a Tucker core in PEFT's files: Conv1d cores have a trailing axis of size one."""
    return (r, r, *geometry.kernel, *([1] if len(geometry.kernel) == 1 else []))
