"""The handful of linear steps that factored forms are put together from.

A step knows how to run, how to run backwards, and how to add its result to an existing tensor without a temporary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..functional.miss import shard_sum
from .geometry import Geometry
from .products import DEVICE, MANY, NARROW, copies_are_smaller, given_up, mix, plus_on_every, times
from .weights import Build


@dataclass(frozen=True)
class Step:
    """A linear map of the channels with a weight built from the factors.

    ``w`` is that weight, a tensor, or None for maps without one.
    """

    weight: Build | None

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        """The map itself."""
        raise NotImplementedError

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        """Gradient with respect to the input ``x`` (read for its shape only)."""
        raise NotImplementedError

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        """Gradient with respect to the weight."""
        raise NotImplementedError

    def plus(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> Tensor:
        """``y + apply(x)``, differentiable, in the memory of ``y``, which is contiguous and nothing else needs."""
        return y.add_(self.apply(geo, x, w))

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        """``y += apply(x)``."""
        y.add_(self.apply(geo, x, w))

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        """``gx += adjoint(grad)``."""
        gx.add_(self.adjoint(geo, x, w, grad))


@dataclass(frozen=True)
class Pointwise(Step):
    """``weight (p, d)`` on each of ``groups`` slices of the channels."""

    groups: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return geo.pointwise(x, w, self.groups) if geo.kernel or self.groups > 1 else times(x, w)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return geo.pointwise(grad, w.T, self.groups)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return geo.pointwise_weight_grad(x, grad, w, self.groups)

    def plus(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> Tensor:
        b, q = w.shape
        if geo.kernel:
            batch, size = y.shape[0] * self.groups, prod(y.shape[2:])
            return given_up(plus_on_every(given_up(y, (batch, b, size)), w, x.reshape(batch, q, size)), y.shape)
        x = x if self.groups == 1 else x.reshape(-1, q)
        # as a copy, its gradient is a product with few rows, not with few columns
        copied = q < NARROW and x.shape[0] >= MANY and x.device.type == DEVICE
        up = w.T.contiguous() if copied else w.T
        return y.addmm_(x, up) if self.groups == 1 else given_up(given_up(y, (-1, b)).addmm_(x, up), y.shape)

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        geo.accumulate_(y, x, w, self.groups)

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        geo.accumulate_(gx, grad, w.T, self.groups)


@dataclass(frozen=True)
class Conv(Step):
    """The host's own operation with ``weight (p, d, *kernel)`` on each of ``groups`` slices of the channels."""

    groups: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return geo.unfold(geo.apply(geo.fold(x, self.groups), w, groups=1), self.groups)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        gx, _ = geo.gradients(geo.fold(grad, self.groups), geo.fold(x, self.groups), w, True, False, groups=1)
        assert gx is not None
        return gx.reshape(x.shape)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        _, gw = geo.gradients(geo.fold(grad, self.groups), geo.fold(x, self.groups), w, False, True, groups=1)
        assert gw is not None
        return gw


@dataclass(frozen=True)
class Mix(Step):
    """``weight (a, c)`` across c slices of the channels."""

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return mix(x, w)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return mix(grad, w.T)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        a, c, batch, size = _slices(x, w)
        grad, x = grad.reshape(batch, a, size), x.reshape(batch, c, size)
        if copies_are_smaller(a, c, size):
            return torch.tensordot(grad, x, ([0, 2], [0, 2]))
        return torch.bmm(grad, x.mT).sum(0)

    def plus(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> Tensor:
        a, c, batch, size = _slices(x, w)
        return given_up(plus_on_every(given_up(y, (batch, a, size)), w, x.reshape(batch, c, size)), y.shape)

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        a, c, batch, size = _slices(x, w)
        y.view(batch, a, size).baddbmm_(w.expand(batch, a, c), x.reshape(batch, c, size))

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        self.add_(geo, gx, grad, w.T)


def _slices(x: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    """Slices out and in, how many inputs, and the numbers in a slice."""
    a, c = w.shape
    return a, c, x.shape[0], x.shape[1] // c * prod(x.shape[2:])


@dataclass(frozen=True)
class Shards(Step):
    """Sum of the channels i = j mod r, for j < r."""

    r: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return shard_sum(x, self.r)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return torch.cat([grad] * -(-x.shape[1] // self.r), dim=1)[:, : x.shape[1]]

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        # a matrix product with ones and zeros is faster than adding a broadcast tensor whose rows are r numbers long
        geo.accumulate_(gx, grad, _membership(x.shape[1], self.r, gx.dtype, gx.device))


@functools.lru_cache(maxsize=64)
def _membership(channels: int, r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``M[i, j] = 1 where i = j mod r``, ``(channels, r)``."""
    return torch.eye(r, dtype=dtype, device=device).repeat(-(-channels // r), 1)[:channels]


@dataclass(frozen=True)
class Tile(Step):
    """Repeat the channels ``count`` times."""

    count: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return torch.cat([x] * self.count, dim=1)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return grad.unflatten(1, (self.count, -1)).sum(1)

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        y.unflatten(1, (self.count, -1)).add_(x.unsqueeze(1))


@dataclass(frozen=True)
class Window(Step):
    """Some consecutive channels of what another step puts out; see `window`.

    Attributes:
        inner: the other step; its weight is this step's.
        start, count: the channels that are kept.
        total: channels that ``inner`` puts out.
    """

    inner: Step = Step(None)
    start: int = 0
    count: int = 0
    total: int = 0

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return self.inner.apply(geo, x, w).narrow(1, self.start, self.count)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return self.inner.adjoint(geo, x, w, self._widened(grad))

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return self.inner.weight_grad(geo, x, w, self._widened(grad))

    def _widened(self, grad: Tensor) -> Tensor:
        edges = (self.start, self.total - self.start - self.count)
        return torch.nn.functional.pad(grad, (*(0, 0) * (grad.dim() - 2), *edges))


def window(step: Step, rows: tuple[int, int] | None, total: int) -> Step:
    """``step``, or only ``rows = (start, count)`` of the ``total`` channels it puts out."""
    return step if rows is None else Window(step.weight, step, *rows, total)
