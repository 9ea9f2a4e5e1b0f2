"""Steps for narrow ranks on the tokens of linear layers, whose results have the rank's axis before the rows.

Matrix libraries for processors run at half their rate or less, on one thread, where a product has only a few columns; where it
has a few rows they do not. So inputs ``(tokens, channels)`` are seen as a batch of matrices: the slices of channels of every
token or, where there is one slice, as many blocks of tokens as there are threads. Steps hand on ``(batch, rank, rows)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry
from .products import NARROW, blocks, is_measured
from .program import Program
from .steps import Mix, Pointwise, Shards, Step, Window

#: fewest tokens in a block
ROWS = 32


def token_blocks(tokens: int) -> int:
    """How many blocks the tokens are treated in."""
    return blocks(tokens, ROWS)


def suits(x: Tensor, rank: int) -> bool:
    """Whether products of a tensor of that kind to so few columns are slow otherwise."""
    return rank < NARROW and is_measured(x)


def rank_first(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """A ``weight (rank, d)`` on each of ``groups`` slices of ``x (tokens, groups*d)``: ``(batch, rank, rows)``."""
    tokens = x.shape[0]
    batch = tokens if groups > 1 else token_blocks(tokens)
    rows = groups if groups > 1 else tokens // batch
    return torch.bmm(weight.expand(batch, *weight.shape), x.reshape(batch, rows, weight.shape[1]).mT)


def times_narrow(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x (rows, n)`` and a ``weight (rank, n)`` of any rank."""
    if not suits(x, weight.shape[0]):
        return x @ weight.T
    return rank_first(x, weight).mT.reshape(x.shape[0], weight.shape[0])


@dataclass(frozen=True)
class Down(Step):
    """`Pointwise` with ``weight (rank, d)`` on each of ``groups`` slices: ``(tokens, groups*d) -> (batch, rank, rows)``."""

    groups: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return rank_first(x, w, self.groups)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return torch.bmm(grad.mT, w.expand(grad.shape[0], *w.shape)).view(x.shape)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        batch, _, rows = grad.shape
        return torch.bmm(grad, x.reshape(batch, rows, w.shape[1])).sum(0)

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        batch, _, rows = grad.shape
        gx.view(batch, rows, w.shape[1]).baddbmm_(grad.mT, w.expand(batch, *w.shape))


@dataclass(frozen=True)
class Up(Step):
    """`Pointwise` with ``weight (b, rank)`` on every slice: ``(batch, rank, rows) -> (tokens, groups*b)``."""

    groups: int = 1

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        batch, _, rows = x.shape
        y = torch.bmm(x.mT, w.expand(batch, *w.shape).mT)
        return y.view(batch * rows // self.groups, self.groups * w.shape[0])

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        batch, _, rows = x.shape
        return torch.bmm(w.expand(batch, *w.shape).mT, grad.reshape(batch, rows, w.shape[0]).mT)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        batch, _, rows = x.shape
        return torch.bmm(x, grad.reshape(batch, rows, w.shape[0])).sum(0).T

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        batch, _, rows = x.shape
        y.view(batch, rows, w.shape[0]).baddbmm_(x.mT, w.expand(batch, *w.shape).mT)


@dataclass(frozen=True)
class Across(Step):
    """`Mix` with ``weight (a, c)`` across the slices: ``(tokens, rank, c) -> (tokens, rank, a)``, one product."""

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        return (x.flatten(0, 1) @ w.T).view(*x.shape[:2], w.shape[0])

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return (grad.flatten(0, 1) @ w).view(x.shape)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return grad.flatten(0, 1).T @ x.flatten(0, 1)


@dataclass(frozen=True)
class Sums(Shards):
    """`Shards` that hands on blocks of tokens."""

    def apply(self, geo: Geometry, x: Tensor, w: Any) -> Tensor:
        tokens, count = x.shape[0], token_blocks(x.shape[0])
        return super().apply(geo, x, w).view(count, tokens // count, self.r).mT

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return super().adjoint(geo, x, w, grad.mT.reshape(x.shape[0], self.r))

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        super().add_adjoint_(geo, gx, x, w, grad.mT.reshape(x.shape[0], self.r))


def narrowed(program: Program, geo: Geometry, x: Tensor) -> Program:
    """The same program by the steps of this file, where its rank is narrow and its slices are not; else as it is.

    Args:
        program: for a layer of that geometry.
        x: the layer's input.
    """
    first, mid, last = program.first, program.mid, program.last
    inner = last.inner if isinstance(last, Window) else last
    if geo.kernel or type(inner) is not Pointwise or type(first) not in (Pointwise, Shards) or type(mid) not in _MIDDLE:
        return program
    slices = getattr(first, "groups", 1), inner.groups
    rank = program.width // max(slices)
    # each slice is a matrix of its own, which has to be large enough
    if not suits(x, rank) or (slices != (1, 1) and min(slices) < 2 * rank):
        return program
    up: Step = Up(inner.weight, inner.groups)
    return replace(
        program,
        first=Sums(None, first.r) if isinstance(first, Shards) else Down(first.weight, first.groups),  # type: ignore[union-attr]
        mid=mid if mid is None else Across(mid.weight),  # type: ignore[union-attr]
        last=replace(last, inner=up) if isinstance(last, Window) else up,
    )


_MIDDLE = (type(None), Mix)
