"""T-LoRA (arXiv 2507.05964) as LyCORIS has it: ``dW = s * (P diag(l) Q - P0 diag(l0) Q0)``, started from the weight's SVD.

Files hold P, l and Q only. What they started from is computed anew from the weight, so they belong to that very weight, and
files that started from a random matrix cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..execution.geometry import Geometry
from ..execution.weights import Factors
from ..functional import tlora
from .base import Adapter, Site
from .config import AlphaConfig
from .registry import register

#: factors count as begun from the weight when they lie in its singular vectors so many times more than by chance
_CHANCE = 4
Start = tuple[Tensor, Tensor, Tensor]


@dataclass(init=False)
class TLoraConfig(AlphaConfig):
    """Configuration of `TLoraModel`. The rank mask of a timestep belongs to the trainer; all ranks are in use here.

    Attributes:
        sig_type: singular values to start from: "principal", "last" or "middle".
    """

    sig_type: str = "principal"

    peft_name: ClassVar[str] = "TLORA"

    def check(self) -> None:
        super().check()
        if self.sig_type not in tlora.SHARES:
            raise ConfigError(
                f"TLoraConfig: sig_type is {self.sig_type!r}; expected one of {', '.join(map(repr, tlora.SHARES))} (what "
                "started from a random matrix cannot be recovered)"
            )
        if self.init_weights is not True:
            raise ConfigError("TLoraConfig: init_weights must be True; T-LoRA always starts from the weight")


@register
class TLora(Adapter):
    """``p_layer (out, r)``, ``lambda_layer (1, r)`` and ``q_layer (r, in)`` on linear layers and 1x1 convolutions."""

    config_class = TLoraConfig
    factor_names = ("p_layer", "lambda_layer", "q_layer")
    additive = False
    wide_factors = True  # two products of the weight's own size are subtracted
    _start: Start | None = None

    @classmethod
    def shapes(cls, geometry: Geometry, config: TLoraConfig) -> dict[str, tuple[int, ...]]:
        if geometry.has_kernel:
            raise ConfigError(f"T-LoRA knows linear layers and 1x1 convolutions; the layer's kernel is {geometry.kernel}")
        return {"p_layer": (geometry.out, config.r), "lambda_layer": (1, config.r), "q_layer": (config.r, geometry.inp)}

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kernel axes of size one, which LyCORIS writes for convolutions, are dropped."""
        return {k: v.flatten(1) if v.dim() > 2 else v for k, v in tensors.items()}

    def packed_gap(self) -> str:
        return "T-LoRA starts from the singular vectors of the weight, and rounding has moved them"

    def reset(self, site: Site) -> None:
        self._start = self._singular(site.weight())
        with torch.no_grad():
            for name, value in zip(self.factor_names, self._start):
                self.get_parameter(name).copy_(value)

    def settle(self, base: Callable[[], Tensor]) -> None:
        if self._start is None:
            self._start = self._found(base(), self.factors())

    def change(self, base: Tensor, f: Factors) -> Tensor:
        begun = self._found(base, f) if self._start is None else self._start
        p, values, q = (f[name].to(base.dtype) for name in self.factor_names)
        before = tlora.product(*(t.to(base.device, base.dtype) for t in begun))
        return (f["scale"] * (tlora.product(p, values, q) - before)).view(base.shape)

    @torch.no_grad()
    def _singular(self, base: Tensor) -> Start:
        flat = base.detach().flatten(1)
        config: TLoraConfig = self.config  # type: ignore[assignment]
        return tlora.start(flat.to(torch.promote_types(flat.dtype, torch.float32)), config.r, config.sig_type)

    @torch.no_grad()
    def _found(self, base: Tensor, f: Mapping[str, Tensor]) -> Start:
        """The start of factors that come from a file.

        Raises:
            CheckpointError: they do not seem to have begun from this weight.
        """
        begun = self._singular(base)
        related = f["q_layer"].is_meta or _related(f["q_layer"], begun[2]) or _related(f["p_layer"].mT, begun[0].mT)
        if not related:
            share: str = self.config.sig_type  # type: ignore[attr-defined]
            raise CheckpointError(
                f"these T-LoRA factors do not start from the {share} singular vectors of this weight: they started from a "
                "random matrix (not recoverable), from another share (sig_type), or from another base model"
            )
        return begun


def _related(rows: Tensor, start: Tensor) -> bool:
    """Whether rows lie in the span of the start's rows more than by chance, or chance is too likely to tell."""
    rows = rows.to(start.device, start.dtype)
    chance, total = start.shape[0] / start.shape[1], rows.square().sum()
    if _CHANCE * chance > 0.5 or total == 0:
        return True
    return bool((rows @ start.mT).square().sum() > _CHANCE * chance * total)
