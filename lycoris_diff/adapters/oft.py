"""OFT (arXiv 2306.07280, 2311.06243): LyCORIS' rotates blocks of output rows, PEFT's blocks of input columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..execution.around import Around, Host, pointwise_input
from ..execution.geometry import Geometry
from ..execution.weights import Factors
from ..functional import oft
from ..functional.lokr import factorization
from .base import Adapter, Site, fill
from .config import AdapterConfig
from .registry import register


@dataclass(init=False)
class DiagOFTConfig(AdapterConfig):
    """Configuration of `DiagOFTModel`.

    Attributes:
        r: wanted size of a block; the largest fitting one near it is taken.
        constraint: limit on the norm of the skew-symmetric blocks of a layer, over its output channels; 0 for none. It is what
            community files keep as ``alpha``.
        rescaled: train a factor for every output row as well.
        module_dropout: probability of skipping the adapter for a call.
    """

    constraint: float = 0.0
    rescaled: bool = False
    module_dropout: float = 0.0

    peft_name: ClassVar[str] = "DIAG_OFT"

    def check(self) -> None:
        super().check()
        self._probability("module_dropout")
        value = self.constraint
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"{type(self).__name__}: constraint is {value!r}; expected a finite number, 0 or above")


@register
class DiagOFT(Adapter):
    """``oft_blocks (n, b, b)`` with ``n * b = out``, and optionally ``rescale (out, 1, ...)``.

    ``W' = rescale * R^T W`` in blocks of rows, R being Cayley's rotation of ``B - B^T``.
    """

    config_class: ClassVar[type[AdapterConfig]] = DiagOFTConfig
    factor_names = ("oft_blocks", "rescale")
    additive = False

    @classmethod
    def shapes(cls, geometry: Geometry, config: Any) -> dict[str, tuple[int, ...]]:
        size = factorization(geometry.out, config.r)[0]
        if size == 1 and not config.rescaled:
            raise ConfigError(f"OFT: {geometry.out} output channels and r={config.r} give blocks of size 1, which cannot turn")
        shapes: dict[str, tuple[int, ...]] = {"oft_blocks": (geometry.out // size, size, size)}
        return shapes | ({"rescale": rescale_shape(geometry)} if config.rescaled else {})

    @classmethod
    def fits(cls, geometry: Geometry, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        check_names(cls, shapes)
        *stages, n, b, last = (1,) * (3 - len(shapes["oft_blocks"])) + tuple(shapes["oft_blocks"])
        problem = cls._misfit(geometry.out, stages, n, b)
        if problem or b != last:
            raise CheckpointError(
                f"'oft_blocks' of shape {tuple(shapes['oft_blocks'])} does not rotate {geometry.out} output channels"
                f"{problem and ': '}{problem}"
            )
        if shapes.get("rescale", rescale_shape(geometry)) != rescale_shape(geometry):
            raise CheckpointError(f"'rescale' has shape {shapes['rescale']}, expected {rescale_shape(geometry)}")

    @classmethod
    def _misfit(cls, out: int, stages: list[int], n: int, b: int) -> str:
        """What is wrong with the blocks' numbers, nothing if they fit."""
        return "expected three axes" if stages else "" if n * b == out else f"{n} blocks of {b} rows"

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``rescale`` in any shape with one value a row."""
        out = dict(tensors)
        if "rescale" in out and out["rescale"].numel() == geometry.out:
            out["rescale"] = out["rescale"].reshape(rescale_shape(geometry))
        return out

    def reset(self, site: Site) -> None:
        blocks = nn.init.zeros_ if self.config.init_weights else partial(nn.init.normal_, std=0.1)
        fill(self, {"oft_blocks": blocks, "rescale": nn.init.ones_})

    def change(self, base: Tensor, f: Factors) -> Tensor:
        turned = self._turn(base, self._rotation(f, base.dtype))
        if "rescale" in f:
            turned = turned * f["rescale"].to(base.dtype)
        return turned - base

    def _rotation(self, f: Factors, dtype: torch.dtype) -> Tensor:
        limit = self.config.constraint * self.geometry.out  # type: ignore[attr-defined]
        return oft.cayley(oft.skew(f["oft_blocks"].to(dtype), limit))

    @property
    def around_cost(self) -> int | None:
        if self.geometry.groups > 1:  # a block of rows may see the inputs of two groups
            return None
        *stages, _, size, _ = self.factor_shapes["oft_blocks"]
        return prod(stages) * self.geometry.out * size

    def packed_gap(self) -> str:
        return ""

    def packed_form(self, f: Factors, host: Host) -> Around:
        blocks, strength = f["oft_blocks"], f["strength"]
        rotation = self._rotation(f, torch.promote_types(blocks.dtype, torch.float32))

        def turned(y: Tensor) -> Tensor:
            last = y.movedim(1, -1)
            flat = last.flatten(0, -2)
            change = self._turn_outputs(flat, rotation, strength)
            if "rescale" in f:
                rescale = f["rescale"].flatten()
                change = change * rescale.to(y.dtype) + flat * ((rescale - 1) * strength).to(y.dtype)
            return change.view(last.shape).movedim(-1, 1)

        return Around(after=turned)

    def _turn_outputs(self, y: Tensor, rotation: Tensor, strength: Tensor) -> Tensor:
        """What turning adds to outputs ``(n, out)`` at a strength."""
        return oft.rotate_columns(y, oft.back_less_identity(rotation, strength).to(y.dtype))

    def _turn(self, base: Tensor, rotation: Tensor) -> Tensor:
        return oft.rotate_rows(base, rotation)


@dataclass(init=False)
class OFTConfig(AdapterConfig):
    """Configuration of `OFTModel`; fields as in PEFT, plus ``scaled``. COFT is not supported.

    Attributes:
        r: number of blocks; 0 leaves it to ``oft_block_size``.
        oft_block_size: wanted size of a block; the nearest one that fits the layer is taken. Unused when ``r`` is set.
        block_share: one block for all.
        use_cayley_neumann: a short series instead of the exact rotation.
        num_cayley_neumann_terms: its length.
        scaled: the entries are divided by ``2 sqrt(b - 1)`` for blocks of size b (OneTrainer).
        module_dropout: probability of skipping the adapter for a call.
        bias: "none", "all" or "oft_only".
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    scaled: bool = False
    bias: str = "none"

    peft_name: ClassVar[str] = "OFT"
    unsupported: ClassVar[Mapping[str, Any]] = {"coft": False, "eps": 6e-5, "fan_in_fan_out": False}

    def check(self) -> None:
        super().check()
        self._probability("module_dropout")
        self._positive("num_cayley_neumann_terms")
        if self.r == 0:
            self._positive("oft_block_size")
        elif self.oft_block_size not in (0, type(self).oft_block_size):
            raise ConfigError(
                f"OFTConfig: r={self.r} and oft_block_size={self.oft_block_size} are both set; set one of them to 0"
            )

    def _positive(self, name: str) -> None:
        if name != "r" or self.r != 0:
            super()._positive(name)

    def to_dict(self) -> dict[str, Any]:
        # PEFT reads the series as something else when the version is missing
        return super().to_dict() | {"peft_version": self.peft_version or "0.18.0"}


@register
class OFT(Adapter):
    """``oft_R.weight (n, b (b - 1) / 2)`` with ``n * b = in * K``, or n = 1 for a shared block: ``W' = W R^T`` in blocks.

    The entries are those above the diagonal of the skew-symmetric blocks. Convolutions rotate the flattened weight, as PEFT
    merges them.
    """

    config_class = OFTConfig
    factor_names = ("oft_R.weight",)
    additive = False

    @classmethod
    def shapes(cls, geometry: Geometry, config: OFTConfig) -> dict[str, tuple[int, ...]]:
        columns = geometry.columns
        divisors = [d for d in range(1, columns + 1) if columns % d == 0]
        wanted = config.r or config.oft_block_size
        near = min(divisors, key=lambda d: (abs(d - wanted), d)) if wanted < columns else columns
        n, b = (near, columns // near) if config.r else (columns // near, near)
        if b == 1:
            raise ConfigError(
                f"OFT: {columns} input columns and r={config.r}, oft_block_size={config.oft_block_size} give blocks of size 1, "
                "which cannot turn; choose larger blocks"
            )
        return {cls.factor_names[0]: (1 if config.block_share else n, b * (b - 1) // 2)}

    @classmethod
    def fits(cls, geometry: Geometry, config: OFTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        check_names(cls, shapes)
        shape = tuple(shapes[cls.factor_names[0]])
        n, b = (shape[0], oft.triangle_size(shape[1])) if len(shape) == 2 else (0, 0)
        if b < 2 or (n * b != geometry.columns and (n != 1 or geometry.columns % b)):
            raise CheckpointError(f"'oft_R.weight' of shape {shape} does not rotate {geometry.columns} input columns")

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: OFTConfig) -> str | None:
        if config.scaled:
            return "PEFT's OFT does not scale its entries"
        if geometry.kernel and not (len(geometry.kernel) == 2 and geometry.is_pointwise):
            return "PEFT's OFT on convolutions other than 1x1 Conv2d gives other outputs before merging than after"
        try:
            cls.shapes(geometry, config)
        except ConfigError as error:
            return str(error)
        return None

    def reset(self, site: Site) -> None:
        start = nn.init.zeros_ if self.config.init_weights else partial(nn.init.normal_, std=0.1)
        fill(self, {self.factor_names[0]: start})

    def change(self, base: Tensor, f: Factors) -> Tensor:
        rotation = self._rotation(f, base.dtype)
        return oft.rotate_columns(base.flatten(1), rotation).view(base.shape) - base

    @property
    def around_cost(self) -> int | None:
        size = oft.triangle_size(self.factor_shapes[self.factor_names[0]][1])
        return self.geometry.inp * size if pointwise_input(self.geometry) else None

    def packed_gap(self) -> str:
        return "" if pointwise_input(self.geometry) else "PEFT's OFT turns the taps of a kernel with the channels"

    def packed_form(self, f: Factors, host: Host) -> Around | None:
        if not pointwise_input(self.geometry):
            return None
        rotation = self._rotation(f, torch.promote_types(f[self.factor_names[0]].dtype, torch.float32))

        def times(x: Tensor, matrices: Tensor) -> Tensor:
            if x.dim() == 2:
                return oft.rotate_columns(x, matrices.to(x.dtype))
            last = x.movedim(1, -1)
            return oft.rotate_columns(last.flatten(0, -2), matrices.to(x.dtype)).view(last.shape).movedim(-1, 1)

        def before(x: Tensor) -> Tensor:
            return times(x, oft.back_less_identity(rotation, f["strength"]))

        def moved(x: Tensor) -> Tensor:
            if x.dtype.itemsize < 4:  # what is added would be rounded as parts of one
                return x + before(x)
            if self.at_full_strength(f):
                return times(x, rotation.mT)
            less = oft.back_less_identity(rotation, f["strength"])
            return times(x, less + torch.eye(less.shape[-1], dtype=less.dtype, device=less.device))

        return Around(before=before, moved=moved)

    def _rotation(self, f: Factors, dtype: torch.dtype) -> Tensor:
        config: OFTConfig = self.config  # type: ignore[assignment]
        entries = f[self.factor_names[0]].to(dtype)
        size = oft.triangle_size(entries.shape[1])
        if config.scaled:
            entries = entries / (2 * math.sqrt(size - 1))
        q = oft.skew_from_triangle(entries, size)
        # PEFT's exact rotation turns the other way than its series
        return oft.neumann(q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else oft.cayley(-q)


def check_names(cls: type[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse foreign tensors, and a missing first factor.

    Raises:
        CheckpointError: naming the tensor.
    """
    first = cls.factor_names[0]
    if first not in shapes:
        raise CheckpointError(f"tensor {first!r} is missing; found {sorted(shapes)}")
    for name in shapes:
        if name not in cls.factor_names:
            raise CheckpointError(f"tensor {name!r} is not part of this adapter; expected {sorted(cls.factor_names)}")


def rescale_shape(geometry: Geometry) -> tuple[int, ...]:
    """One factor a row, ``(out, 1, ...)``."""
    return (geometry.out, 1, *(1,) * len(geometry.kernel))
