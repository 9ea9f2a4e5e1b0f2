"""LoRA and LoCon (arXiv 2106.09685, 2309.14859): ``dW = s * B A``, for convolutions optionally with a Tucker core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..execution.geometry import Geometry
from ..execution.program import Program
from ..execution.steps import Conv, Pointwise
from ..execution.weights import Factor, Factors
from ..functional import lora
from .base import Adapter, Site, fill, magnitude_shape
from .config import ScaledConfig
from .registry import register

_A, _M, _B = "lora_A.weight", "lora_mid.weight", "lora_B.weight"


@dataclass(init=False)
class LoraConfig(ScaledConfig):
    """Configuration of `LoraModel`; fields as in PEFT, plus ``use_effective_conv2d`` (Tucker core, LyCORIS' LoCon).

    Attributes:
        lora_dropout: dropout on the adapter's input.
        use_rslora: scale by alpha / sqrt(r).
        fan_in_fan_out: accepted for PEFT's sake; the layer's own layout is known.
    """

    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"

    peft_name: ClassVar[str] = "LORA"
    inits: ClassVar[tuple[str, ...]] = ("gaussian", "lycoris")
    aliases: ClassVar[Mapping[str, str]] = {**ScaledConfig.aliases, "init_lora_weights": "init_weights"}
    unsupported: ClassVar[Mapping[str, Any]] = {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
        "runtime_config": {"ephemeral_gpu_offload": False},
    }

    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r

    def check(self) -> None:
        super().check()
        self._probability("lora_dropout")


@register
class Lora(Adapter):
    """Low-rank change: ``lora_A.weight (r, in, *k)``, ``lora_B.weight (out, r, 1...)``, optional core ``(r, r, *k)``."""

    config_class = LoraConfig
    factor_names = (_A, _M, _B)
    magnitude_name = "lora_magnitude_vector"
    small_row_statistics = True

    @classmethod
    def shapes(cls, geometry: Geometry, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        r, ones = config.r, (1,) * len(geometry.kernel)
        core = config.use_effective_conv2d and geometry.has_kernel
        shapes: dict[str, tuple[int, ...]] = {_A: (r, geometry.inp, *(ones if core else geometry.kernel))}
        if core:
            shapes[_M] = (r, r, *geometry.kernel)
        shapes[_B] = (geometry.out, r, *ones)
        if config.weight_decompose:
            shapes[cls.magnitude_name] = _magnitude_shape(geometry, config.dora_axis)
        return shapes

    @classmethod
    def owns(cls, name: str) -> bool:
        return super().owns(name) or name == f"{cls.magnitude_name}.weight"

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace(f"{cls.magnitude_name}.weight", cls.magnitude_name): v for k, v in tensors.items()}

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {_A: (0,), _M: (0, 1), _B: (1,)}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: LoraConfig) -> str | None:
        if config.use_effective_conv2d and geometry.has_kernel:
            return "PEFT's LoRA has no Tucker core"
        if config.weight_decompose and config.dora_axis == "in":
            return "PEFT's DoRA works on the output axis only"
        if geometry.groups > 1:
            return "PEFT's LoRA has other shapes on grouped convolutions"
        if geometry.edge_mode != "constant" or any(d != 1 for d in geometry.dilation):
            return "PEFT's LoRA drops padding_mode and dilation"
        return None

    def reset(self, site: Site) -> None:
        def kaiming(t: Tensor) -> None:
            nn.init.kaiming_uniform_(t, a=math.sqrt(5))

        def gaussian(t: Tensor) -> None:
            nn.init.normal_(t, std=1 / self.config.r)

        init = self.config.init_weights
        down = gaussian if init == "gaussian" else kaiming
        fill(self, {_A: down, _M: kaiming, _B: nn.init.zeros_ if init else kaiming})

    def delta(self, f: Factors) -> Tensor:
        return lora.delta(f[_B] * f["scale"], f[_A], f.get(_M), self.geometry.shape)

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        if _M in f:
            return super().add_delta(total, f)
        up, down = (f[_B].flatten(1) * f["scale"]).to(total.dtype), f[_A].flatten(1).to(total.dtype)
        return torch.addmm(total.flatten(1), up, down).view(total.shape)

    def program(self, f: Factors) -> Program | None:
        geo, r = self.geometry, f[_A].shape[0]  # of a slot, not the config's
        if geo.groups > 1:
            return None
        last = Pointwise(Factor(_B, scaled=True))
        taps = geo.columns // geo.inp
        if _M in f:
            core = Conv(Factor(_M, shape=tuple(f[_M].shape)))
            return Program(Pointwise(Factor(_A)), last, core, cost=r * (geo.inp + geo.out + r * taps), width=r)
        plain = Pointwise(Factor(_A)) if geo.is_pointwise else Conv(Factor(_A, shape=(r, *geo.shape[1:])))
        return Program(plain, last, cost=r * (geo.columns + geo.out), width=r)

    def product(self, f: Factors) -> tuple[Tensor, Tensor] | None:
        return None if _M in f else (f[_B].flatten(1) * f["scale"], f[_A].flatten(1))


def _magnitude_shape(geometry: Geometry, axis: str) -> tuple[int, ...]:
    """PEFT's layout for the output axis: ``(out,)`` for Linear, ``(1, out, 1, ...)`` for convolutions."""
    if axis == "out":
        return (1, geometry.out, *(1,) * len(geometry.kernel)) if geometry.kernel else (geometry.out,)
    return magnitude_shape(geometry, axis)
