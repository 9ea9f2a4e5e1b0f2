"""The factored form of an adapter: ``y += last(mid(first(x)))``, built from a handful of linear steps.

A step knows how to run, how to run backwards, and how to add its result to an existing tensor without a temporary. What
happens between the first and the last step works on small tensors and is left to autograd.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..functional.miss import shard_sum
from .geometry import Geometry, mix

#: tensors by name; under "scale" a number where it is known
Factors = Mapping[str, Tensor]
Build = Callable[[Factors], Tensor]


def times_scale(t: Tensor, scale: Tensor | float) -> Tensor:
    """``t * scale``, without an operation where the scale is known to be one."""
    return t if type(scale) is float and scale == 1.0 else t * scale


@dataclass(frozen=True)
class Factor:
    """A step's weight that is one factor seen in another shape, perhaps times the scale; its gradient needs no graph.

    Attributes:
        name: of the factor.
        scaled: times the scale.
        swapped: its first two axes change places.
        shape: of the weight after that; None makes it two-dimensional.
    """

    name: str
    scaled: bool = False
    swapped: bool = False
    shape: tuple[int, ...] | None = None

    def __call__(self, f: Factors) -> Tensor:
        """The weight."""
        t = times_scale(f[self.name], f["scale"]) if self.scaled else f[self.name]
        t = t.transpose(0, 1) if self.swapped else t
        return t.reshape(self.shape) if self.shape is not None else t.flatten(1) if t.dim() > 2 else t

    def pull(self, f: Factors, grad: Tensor) -> Tensor:
        """Gradient of the factor from that of the weight."""
        t = f[self.name]
        grad = grad.reshape(t.transpose(0, 1).shape).transpose(0, 1) if self.swapped else grad.reshape(t.shape)
        return times_scale(grad, f["scale"]) if self.scaled else grad


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
        """``y + apply(x)``, differentiable."""
        return y + self.apply(geo, x, w)

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
        return geo.pointwise(x, w, self.groups)

    def adjoint(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return geo.pointwise(grad, w.T, self.groups)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        return geo.pointwise_weight_grad(x, grad, w, self.groups)

    def plus(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> Tensor:
        one = self.groups == 1 and not geo.kernel
        return torch.addmm(y, x, w.T) if one else super().plus(geo, y, x, w)

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
        a, c = w.shape
        batch, size = x.shape[0], x.shape[1] // c * prod(x.shape[2:])
        grad, x = grad.reshape(batch, a, size), x.reshape(batch, c, size)
        if a * c > 2 * (a + c) * size:  # a matrix for every token would be larger than copies of both sides
            return torch.tensordot(grad, x, ([0, 2], [0, 2]))
        return torch.bmm(grad, x.mT).sum(0)

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        a, c = w.shape
        batch, size = x.shape[0], x.shape[1] // c * prod(x.shape[2:])
        y.view(batch, a, size).baddbmm_(w.expand(batch, a, c), x.reshape(batch, c, size))

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        self.add_(geo, gx, grad, w.T)


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


@dataclass(frozen=True)
class Pattern:
    """Fixed positions of a sparse ``(rows, columns)`` matrix, by rows and by columns (compressed rows, int32).

    Attributes:
        shape: of the matrix.
        by_row: row starts and column of every entry; entries are sorted by row.
        by_column: the same of the transpose.
        order: entry of the matrix for every entry of the transpose.
        entry: stored value for every entry of the matrix.
    """

    shape: tuple[int, int]
    by_row: tuple[Tensor, Tensor]
    by_column: tuple[Tensor, Tensor]
    order: Tensor
    entry: Tensor

    @classmethod
    def of(cls, flat: Tensor, rows: int, columns: int) -> Pattern:
        """Pattern of distinct flat positions in any order."""
        _announce_sparse()
        flat, entry = flat.sort()
        row, column = flat // columns, flat % columns
        order = (column * rows + row).argsort()
        by_row = _compressed(row, column, rows)
        return cls((rows, columns), by_row, _compressed(column[order], row[order], columns), order, entry)

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with the given stored values."""
        return torch.sparse_csr_tensor(*self.by_row, values[self.entry], self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        swapped = values[self.entry][self.order]
        return torch.sparse_csr_tensor(*self.by_column, swapped, self.shape[::-1], check_invariants=False)


def _wide(t: Tensor) -> Tensor:
    """The dtype that sparse kernels exist for: float32 instead of a half precision."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


@functools.cache
def _announce_sparse() -> None:
    """Let torch say once, unheard, that compressed sparse tensors are young; the tests cover what is used of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)


def _compressed(major: Tensor, minor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    starts = torch.searchsorted(major, torch.arange(count + 1, device=major.device))
    return starts.to(torch.int32), minor.to(torch.int32)


@dataclass(frozen=True)
class Sparse(Step):
    """A sparse matrix ``(out, in)`` on the tokens of a linear layer; the weight is the vector of its values.

    Works on transposed copies, where every entry meets contiguous rows: a hundredth of the arithmetic of the dense gradient.
    """

    pattern: Pattern | None = None

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        y.add_((self.pattern.matrix(_wide(w)) @ _wide(x).T.contiguous()).T.contiguous())  # type: ignore[union-attr]

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        gx.add_((self.pattern.transposed(_wide(w)) @ _wide(grad).T.contiguous()).T.contiguous())  # type: ignore[union-attr]

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        pattern = self.pattern
        assert pattern is not None
        empty = pattern.matrix(_wide(torch.zeros_like(w)))
        sampled = torch.sparse.sampled_addmm(empty, _wide(grad).T.contiguous(), _wide(x).T.contiguous().T, beta=0.0)
        return torch.empty_like(w).index_copy_(0, pattern.entry, sampled.values().to(w.dtype))


@dataclass(slots=True)
class Program:
    """``last(mid(first(x)))``. Scale belongs to the weight of the last step or to ``mid``.

    Attributes:
        first: step on the layer's input; None for nothing (then there is no ``mid`` either).
        last: step that ends in the layer's output channels.
        mid: a step in between, or anything differentiable, ``(geometry, z, factors) -> h``; None for nothing.
        cost: multiply-adds of one evaluation, per token (for the cost model).
        width: channels of the largest intermediate result, per token.
        sampled_cost: multiply-adds per token of the last step's weight gradient, for programs that are one sparse step.
        eager_only: the steps run in place only; `run` does not exist (compiled and transformed code changes the weight).
    """

    first: Step | None
    last: Step
    mid: Step | Callable[[Geometry, Tensor, Factors], Tensor] | None = None
    cost: int = 0
    width: int = 0
    sampled_cost: int | None = None
    eager_only: bool = False

    def run(self, geo: Geometry, x: Tensor, f: Factors) -> Tensor:
        """The adapter's output in plain differentiable operations."""
        return self.last.apply(geo, self._between(geo, self.start(geo, x, f), f), _built(self.last, f))

    def plus(self, geo: Geometry, y: Tensor, x: Tensor, f: Factors) -> Tensor:
        """``y`` and the adapter's output, in plain differentiable operations."""
        return self.last.plus(geo, y, self._between(geo, self.start(geo, x, f), f), _built(self.last, f))

    def start(self, geo: Geometry, x: Tensor, f: Factors) -> Tensor:
        """Output of the first step."""
        return x if self.first is None else self.first.apply(geo, x, _built(self.first, f))

    def finish_(self, geo: Geometry, y: Tensor, z: Tensor, f: Factors) -> None:
        """``y += last(mid(z))`` in place; no graph is recorded."""
        self.last.add_(geo, y, self._between(geo, z, f), _built(self.last, f))

    def _between(self, geo: Geometry, z: Tensor, f: Factors) -> Tensor:
        if isinstance(self.mid, Step):
            return self.mid.apply(geo, z, _built(self.mid, f))
        return z if self.mid is None else self.mid(geo, z, f)

    @property
    def direct(self) -> bool:
        """Whether every weight is a `Factor` or missing, so that `backward_direct` applies."""
        steps = [step for step in (self.first, self.mid, self.last) if step is not None]
        return all([isinstance(s, Step) and (s.weight is None or isinstance(s.weight, Factor)) for s in steps])

    def backward_direct(
        self, geo: Geometry, x: Tensor, z: Tensor | None, f: Factors, wanted: Container[str], grad: Tensor, of_input: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """As `backward`, for programs that are `direct`; without a graph.

        Args:
            wanted: names of the factors whose gradients are wanted.

        Returns:
            Gradients by name in the dtype of the operation, and what `push_` takes.
        """
        found: dict[str, Tensor] = {}

        def learn(step: Any, x: Tensor, w: Tensor | None, grad: Tensor) -> None:
            if trains(step):
                found[step.weight.name] = step.weight.pull(f, step.weight_grad(geo, x, w, grad))

        def trains(step: Step | None) -> bool:
            return step is not None and step.weight is not None and step.weight.name in wanted  # type: ignore[attr-defined]

        if self.first is None:
            learn(self.last, x, _built(self.last, f), grad)
            return found, grad
        z = self.start(geo, x, f) if z is None else z
        mid: Any = self.mid
        wm, wl = None if mid is None else _built(mid, f), _built(self.last, f)
        h = z if mid is None else mid.apply(geo, z, wm)
        learn(self.last, h, wl, grad)
        if not (of_input or trains(self.first) or trains(mid)):
            return found, None
        gz = self.last.adjoint(geo, h, wl, grad)
        if mid is not None:
            learn(mid, z, wm, gz)
            gz = mid.adjoint(geo, z, wm, gz)
        learn(self.first, x, _built(self.first, f), gz)
        return found, gz

    def backward(
        self, geo: Geometry, x: Tensor, z: Tensor | None, f: Factors, leaves: list[Tensor], grad: Tensor, of_input: bool
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the leaves; everything small is computed anew.

        Args:
            x: the layer's canonical input.
            z: output of the first step where it was kept, None to compute it anew.
            f: factors, a differentiable function of the leaves.
            leaves: tensors whose gradients are wanted.
            grad: gradient of the output.
            of_input: `push_` will be called.

        Returns:
            One gradient (or None) a leaf, and what `push_` takes.
        """
        if self.first is None:
            return sampled_gradients(self.last, geo, x, f, leaves, grad), grad
        with torch.enable_grad():
            wf, wl = _built(self.first, f), _built(self.last, f)
        z = self.start(geo, x, f).detach() if z is None else z
        h = z
        if self.mid is not None:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                h = self._between(geo, z, f)
        hd, wld = h.detach(), _detached(wl)
        train_first, train_last = wf is not None and wf.requires_grad, wl is not None and wl.requires_grad
        # what autograd has to pull back to the leaves, in as few calls as there can be
        pulled = [wl] if wl is not None and train_last else []
        grads: list[Tensor] = [self.last.weight_grad(geo, hd, wld, grad)] if train_last else []
        total: list[Tensor | None] = [None] * len(leaves)
        gz = None
        if of_input or train_first or h.requires_grad:
            gz = self.last.adjoint(geo, hd, wld, grad)
            if self.mid is not None:
                back = torch.autograd.grad(
                    [h, *pulled], [z, *leaves], [gz, *grads], allow_unused=True, retain_graph=train_first
                )
                gz, total = back[0], list(back[1:])
                pulled, grads = [], []
            if wf is not None and wf.requires_grad:
                pulled.append(wf)
                grads.append(self.first.weight_grad(geo, x, wf.detach(), gz))
        if pulled:
            total = add_gradients(total, torch.autograd.grad(pulled, leaves, grads, allow_unused=True))
        return total, gz

    def push_(self, geo: Geometry, gx: Tensor, x: Tensor, f: Factors, gz: Tensor | None) -> None:
        """Add the gradient of the input, from what `backward` returned, to ``gx`` in place."""
        assert gz is not None
        step = self.last if self.first is None else self.first
        step.add_adjoint_(geo, gx, x, _detached(_built(step, f)), gz)


def sampled_gradients(
    step: Step, geo: Geometry, x: Tensor, f: Factors, leaves: list[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the leaves behind one step's weight."""
    with torch.enable_grad():
        weight = _built(step, f)
    if weight is None or not weight.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(weight, leaves, step.weight_grad(geo, x, weight.detach(), grad), allow_unused=True))


def _built(step: Step, f: Factors) -> Tensor | None:
    return None if step.weight is None else step.weight(f)


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def add_gradients(total: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums, None standing for nothing."""
    return [a if b is None else b if a is None else a + b for a, b in zip(total, more)]
