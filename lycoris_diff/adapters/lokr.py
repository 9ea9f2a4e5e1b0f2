"""LoKr (arXiv 2212.10650, 2309.14859): ``dW = s * (w1 (x) w2)``; halves full or low-rank, w2 optionally with a core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..execution.geometry import Geometry
from ..execution.products import mix
from ..execution.program import Program
from ..execution.steps import Conv, Mix, Pointwise, Step, window
from ..execution.weights import Factor, Factors
from ..functional import lokr, lora
from .base import Adapter, Initialiser, Site, fill, magnitude_shape
from .config import ScaledConfig
from .loha import core_shape, lycoris_gap
from .registry import register


@dataclass(init=False)
class LoKrConfig(ScaledConfig):
    """Configuration of `LoKrModel`; fields as in PEFT, plus ``full_matrix``, ``weight_decompose`` and ``dora_axis``.

    Attributes:
        decompose_both: give w1 a low-rank form as well, where that is smaller.
        decompose_factor: wanted size of w1 (see `lycoris_diff.functional.lokr.factorization`); -1 is near the square root.
        full_matrix: keep both halves full, whatever the rank.
        rows: the layer's weight is only ``(start, count)`` of the product's output rows: a share of a fused projection
            whose boundary cuts a block of w2. For adapters that come from files; a new one has no use for it.
        rows_pattern: module name, suffix or regular expression -> another ``rows``.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    full_matrix: bool = False
    rows: tuple[int, int] | None = None
    rows_pattern: dict[str, Any] = field(default_factory=dict)

    peft_name: ClassVar[str] = "LOKR"
    inits: ClassVar[tuple[str, ...]] = ("lycoris",)
    patterns: ClassVar[Mapping[str, str]] = {**ScaledConfig.patterns, "rows_pattern": "rows"}

    def __post_init__(self) -> None:
        self.rows = _pair(self.rows)  # JSON has no tuples
        self.rows_pattern = {k: _pair(v) for k, v in self.rows_pattern.items()}

    def check(self) -> None:
        super().check()
        if not isinstance(self.decompose_factor, int) or self.decompose_factor == 0 or self.decompose_factor < -1:
            raise ConfigError(f"LoKrConfig: decompose_factor is {self.decompose_factor!r}; expected -1 or a positive integer")
        if self.full_matrix:
            self._warn_without_effect("decompose_both", "with full_matrix=True")
        for where, rows in [("rows", self.rows), *((f"rows_pattern[{k!r}]", v) for k, v in self.rows_pattern.items())]:
            whole = isinstance(rows, tuple) and len(rows) == 2 and all(type(n) is int for n in rows)
            if rows is not None and not (whole and rows[0] >= 0 and rows[1] > 0):
                raise ConfigError(f"LoKrConfig: {where} is {rows!r}; expected (start, count), the output rows that are kept")


def _pair(rows: Any) -> Any:
    return tuple(rows) if isinstance(rows, list) else rows


@register
class LoKr(Adapter):
    """Kronecker product of ``w1 (a, c)`` and ``w2 (b, d, *k)`` with ``a*b = out`` and ``c*d = in / groups``.

    With ``config.rows = (start, count)`` the weight is that window of the product's ``a*b`` rows, and ``count = out``.

    Factors: ``lokr_w1`` or ``lokr_w1_a (a, r)``, ``lokr_w1_b (r, c)``; ``lokr_w2`` or ``lokr_w2_a (b, r)``,
    ``lokr_w2_b (r, d*K)``, or with a core ``lokr_t2 (r, r, *k)``, ``lokr_w2_a (r, b)``, ``lokr_w2_b (r, d)``. The sizes are
    read from the factors, so files follow any factorization.
    """

    config_class = LoKrConfig
    factor_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    magnitude_name = "dora_scale"

    @classmethod
    def shapes(cls, geometry: Geometry, config: LoKrConfig) -> dict[str, tuple[int, ...]]:
        if config.rows is not None:
            raise ConfigError(
                f"LoKr: rows={config.rows!r} describes factors of a file; a new adapter has no window, leave it out"
            )
        r = config.r
        a, b = lokr.factorization(geometry.out, config.decompose_factor)
        c, d = lokr.factorization(geometry.inp, config.decompose_factor)
        taps = geometry.columns // geometry.inp
        shapes: dict[str, tuple[int, ...]] = {}
        if config.decompose_both and not config.full_matrix and r < max(a, c) / 2:
            shapes |= {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        else:
            shapes["lokr_w1"] = (a, c)
        if config.full_matrix or r >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *geometry.kernel)
        elif config.use_effective_conv2d and geometry.has_kernel:
            shapes |= {"lokr_t2": core_shape(geometry, r), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * taps)}
        if config.weight_decompose:
            shapes[cls.magnitude_name] = magnitude_shape(geometry, config.dora_axis)
        return shapes

    @classmethod
    def fits(cls, geometry: Geometry, config: LoKrConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        (a, c), (b, d, *kernel) = _halves_shapes(geometry, shapes)
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in shapes and shapes[name][0] != config.r:
                raise CheckpointError(f"{name!r} has rank {shapes[name][0]}, the config says r={config.r}")
        if config.rows is not None:
            start, count = config.rows
            if start + count > a * b or count != geometry.out:
                raise CheckpointError(
                    f"rows {start} to {start + count} of a Kronecker product with {a} * {b} rows do not make up the layer's "
                    f"{geometry.out} output channels"
                )
        if (config.rows is None and a * b != geometry.out) or c * d != geometry.inp or tuple(kernel) != geometry.kernel:
            raise CheckpointError(
                f"the Kronecker product of ({a}, {c}) and {(b, d, *kernel)} has shape {(a * b, c * d, *kernel)}, "
                f"the layer's weight has {geometry.shape}"
            )

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        second = (0,) if "lokr_t2" in shapes else (1,)
        own = {"lokr_w1_a": (1,), "lokr_w1_b": (0,), "lokr_w2_a": second, "lokr_w2_b": (0,)}
        return own | {"lokr_t2": (0, 1)}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: LoKrConfig) -> str | None:
        if config.rows is not None:
            return "PEFT has no LoKr on a window of the product's rows"
        if config.full_matrix:
            return "PEFT derives the shapes from r and has no full_matrix"
        if len(geometry.kernel) == 1 and not cls.shapes(geometry, config).keys() >= {"lokr_w2_a"}:
            return "PEFT's Kronecker product is wrong for a full second factor on Conv1d"
        if len(geometry.kernel) == 1 and "lokr_t2" in cls.shapes(geometry, config):
            return "PEFT's effective-conv LoKr fails on Conv1d"
        return lycoris_gap(geometry, config)

    def reset(self, site: Site) -> None:
        kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
        table: dict[str, Initialiser] = dict.fromkeys(self.factor_names, kaiming)
        init = self.config.init_weights
        if init == "lycoris":
            table |= {"lokr_w2": nn.init.zeros_, "lokr_w2_b": nn.init.zeros_}
        elif init:
            table |= {"lokr_w1": nn.init.zeros_, "lokr_w1_a": nn.init.zeros_}
        fill(self, table)

    @staticmethod
    def _w1(f: Factors) -> Tensor:
        """First half with the scale, ``(a, c)``."""
        return f["lokr_w1"] * f["scale"] if "lokr_w1" in f else (f["lokr_w1_a"] * f["scale"]) @ f["lokr_w1_b"]

    def _w2(self, f: Factors) -> Tensor:
        """Second half, ``(b, d, *k)``."""
        if "lokr_w2" in f:
            return f["lokr_w2"]
        if "lokr_t2" in f:
            return lora.tucker(lora.squeeze_core(f["lokr_t2"], self.geometry.kernel), f["lokr_w2_a"].mT, f["lokr_w2_b"])
        w2 = f["lokr_w2_a"] @ f["lokr_w2_b"]
        return w2.view(w2.shape[0], -1, *self.geometry.kernel)

    def delta(self, f: Factors) -> Tensor:
        product = lokr.kronecker(self._w1(f), self._w2(f))
        return (product if self._rows is None else product.narrow(0, *self._rows)).reshape(self.geometry.shape)

    @property
    def _rows(self) -> tuple[int, int] | None:
        return self.config.rows  # type: ignore[attr-defined]

    def _window(self, last: Step, total: int) -> Step:
        """The last step, which puts out ``total`` channels, or the window of it that is the layer's."""
        return window(last, self._rows, total)

    def program(self, f: Factors) -> Program | None:
        geo = self.geometry
        if geo.groups > 1:
            return None
        (a, c), (b, d, *_) = _halves_shapes(geo, {k: tuple(v.shape) for k, v in f.items() if k in self.factor_names})
        taps = geo.columns // geo.inp
        if "lokr_w2" in f:
            return self._full_program(f, a, b, c, d, taps)
        r = f["lokr_w2_b"].shape[0]
        if "lokr_t2" in f:
            first = Pointwise(Factor("lokr_w2_b"), groups=c)
            last = self._window(Pointwise(Factor("lokr_w2_a", swapped=True), groups=a), a * b)
            cost = c * d * r + c * r * r * taps + a * c * r + a * b * r
            return Program(first, last, partial(self._core_then_mix, c), cost=cost, width=max(a, c) * r)
        down = Factor("lokr_w2_b", shape=(r, d, *geo.kernel))
        plain = Pointwise(Factor("lokr_w2_b"), groups=c) if geo.is_pointwise else Conv(down, groups=c)
        last = self._window(Pointwise(Factor("lokr_w2_a"), groups=a), a * b)
        # slices of a few dozen channels run at about half the rate of wide matrix products
        cost = 2 * (c * d * taps * r + a * c * r + a * b * r)
        return Program(plain, last, self._mixing(f), cost=cost, width=max(a, c) * r)

    def _mixing(self, f: Factors) -> Mix:
        return Mix(Factor("lokr_w1", scaled=True) if "lokr_w1" in f else self._w1)

    def _full_program(self, f: Factors, a: int, b: int, c: int, d: int, taps: int) -> Program:
        """w2 full: one operation on every slice, and a mixing of the slices before or after it, whichever is cheaper."""
        geo = self.geometry
        flat, mixing = Factor("lokr_w2"), self._mixing(f)
        before = a * c * d + a * b * d * taps
        after = c * b * d * taps + a * c * b
        mixed = self._window(mixing, a * b)
        if geo.is_pointwise:
            if before <= after:
                return Program(mixing, self._window(Pointwise(flat, groups=a), a * b), cost=before, width=a * d)
            return Program(Pointwise(flat, groups=c), mixed, cost=after, width=c * b)
        return Program(Conv(Factor("lokr_w2", shape=(b, d, *geo.kernel)), groups=c), mixed, cost=after, width=c * b)

    def _core_then_mix(self, c: int, geo: Geometry, z: Tensor, f: Factors) -> Tensor:
        core = lora.squeeze_core(f["lokr_t2"], geo.kernel).transpose(0, 1).contiguous().transpose(0, 1)
        return mix(geo.unfold(geo.apply(geo.fold(z, c), core, groups=1), c), self._w1(f))

    def row_statistics(self, base: Tensor, f: Factors) -> tuple[Tensor, Tensor] | None:
        w1, w2 = self._w1(f).to(base.dtype), self._w2(f).flatten(1).to(base.dtype)
        (a, c), (b, columns) = w1.shape, w2.shape
        squares = ((w1 * w1).sum(1)[:, None] * (w2 * w2).sum(1)).flatten()
        taps = self.geometry.columns // self.geometry.inp
        # sum over c of w1[a, c] * base[(a b), (c d k)] first: a small matrix product for every row block
        flat = base.flatten(1)
        start, count = self._rows or (0, a * b)
        if self._rows is not None:
            flat = F.pad(flat, (0, 0, start, a * b - start - count))
        rows = flat.reshape(a, b, c, (columns // taps) * taps)
        mixed = (rows * w1[:, None, :, None]).sum(2)
        inner = (mixed * w2).sum(-1).flatten()
        return inner[start : start + count], squares[start : start + count]


def _halves_shapes(geometry: Geometry, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """``(a, c)`` and ``(b, d, *k)`` from the factors' shapes.

    Raises:
        CheckpointError: a factor is missing, or the halves' inner sizes differ.
    """

    def need(name: str, axes: int) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"tensor {name!r} is missing; found {sorted(shapes)}")
        if len(shapes[name]) != axes:
            raise CheckpointError(f"tensor {name!r} has shape {tuple(shapes[name])}, expected {axes} axes")
        return tuple(shapes[name])

    def inner(left: str, right: str, a: int, b: int) -> None:
        if a != b:
            raise CheckpointError(f"{left!r} and {right!r} have different ranks {a} and {b}")

    for name in shapes:
        if name not in LoKr.factor_names and name != LoKr.magnitude_name:
            raise CheckpointError(f"tensor {name!r} is not part of a LoKr adapter")
    if "lokr_w1" in shapes:
        a, c = need("lokr_w1", 2)
    else:
        (a, r1), (r1b, c) = need("lokr_w1_a", 2), need("lokr_w1_b", 2)
        inner("lokr_w1_a", "lokr_w1_b", r1, r1b)
    axes, taps = len(geometry.kernel), geometry.columns // geometry.inp
    if "lokr_w2" in shapes:
        b, d, *kernel = need("lokr_w2", 2 + axes)
        return (a, c), (b, d, *kernel)
    if "lokr_t2" in shapes:
        core = need("lokr_t2", len(core_shape(geometry, 1)))
        (ra, b), (rb, d) = need("lokr_w2_a", 2), need("lokr_w2_b", 2)
        inner("lokr_t2", "lokr_w2_a", core[0], ra)
        inner("lokr_t2", "lokr_w2_b", core[1], rb)
        return (a, c), (b, d, *core[2 : 2 + axes])
    (b, ra), (rb, columns) = need("lokr_w2_a", 2), need("lokr_w2_b", 2)
    inner("lokr_w2_a", "lokr_w2_b", ra, rb)
    if columns % taps:
        raise CheckpointError(f"'lokr_w2_b' has {columns} columns, not a multiple of the kernel's {taps} taps")
    return (a, c), (b, columns // taps, *geometry.kernel)
