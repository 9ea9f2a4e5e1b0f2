"""BOFT (arXiv 2311.06243) as LyCORIS has it: a butterfly of rotations, each stage mixing rows twice as far apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..execution.geometry import Geometry
from ..functional import oft
from .oft import DiagOFT, DiagOFTConfig, rescale_shape
from .registry import register


@dataclass(init=False)
class BOFTConfig(DiagOFTConfig):
    """Configuration of `BOFTModel`.

    Attributes:
        r: largest size of a block; sizes are even and go into the output channels a power of two times.
    """

    peft_name: ClassVar[str] = "LYCORIS_BOFT"  # PEFT's BOFT has other factors


@register
class BOFT(DiagOFT):
    """``oft_blocks (stages, n, b, b)`` with ``n * b = out``, and optionally ``rescale (out, 1, ...)``."""

    config_class = BOFTConfig

    @classmethod
    def shapes(cls, geometry: Geometry, config: Any) -> dict[str, tuple[int, ...]]:
        out = geometry.out
        sizes = [b for b in range(2, config.r + 1, 2) if out % b == 0 and (out // b).bit_count() == 1]
        if not sizes:
            raise ConfigError(
                f"BOFT: no even block size up to r={config.r} goes into {out} output channels a power of two times; "
                "choose a larger r or leave the layer out"
            )
        n = out // sizes[-1]
        shapes: dict[str, tuple[int, ...]] = {"oft_blocks": ((n - 1).bit_count() + 1, n, sizes[-1], sizes[-1])}
        return shapes | ({"rescale": rescale_shape(geometry)} if config.rescaled else {})

    @classmethod
    def _misfit(cls, out: int, stages: list[int], n: int, b: int) -> str:
        if len(stages) != 1 or not stages[0]:
            return "expected four axes"
        if n * b != out or b % 2:
            return f"{n} blocks of {b} rows, which must be an even number"
        return "" if n % 2 ** (stages[0] - 1) == 0 else f"{stages[0]} stages of {n} blocks"

    @property
    def around_cost(self) -> None:
        """Around a plain weight it would keep the outputs of every stage for backward."""
        return None

    def _turn(self, base: Tensor, rotation: Tensor) -> Tensor:
        return oft.butterfly(base, rotation)

    def _turn_outputs(self, y: Tensor, rotation: Tensor, strength: Tensor) -> Tensor:
        return (self._turn(y.T, rotation.to(y.dtype)).T.contiguous() - y) * strength.to(y.dtype)
