"""The factored form of an adapter, ``y += last(mid(first(x)))``: how its steps run one after the other, and backwards.

What happens between the first and the last step works on small tensors; where it is no step, it is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry
from .steps import Step
from .weights import Factors, Formula


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
        """``y`` and the adapter's output, in plain differentiable operations, in the memory of ``y``, to be given up."""
        # as `run`, but small layers come here in every call: no functions on the way that only look something up
        first, mid, last = self.first, self.mid, self.last
        h = x if first is None else first.apply(geo, x, None if first.weight is None else first.weight(f))
        if isinstance(mid, Step):
            h = mid.apply(geo, h, None if mid.weight is None else mid.weight(f))
        elif mid is not None:
            h = mid(geo, h, f)
        w = None if last.weight is None else last.weight(f)
        return last.plus(geo, y, h, w) if y.is_contiguous() else y + last.apply(geo, h, w)

    def start(self, geo: Geometry, x: Tensor, f: Factors) -> Tensor:
        """Output of the first step."""
        return x if self.first is None else self.first.apply(geo, x, _built(self.first, f))

    def finish_(self, geo: Geometry, y: Tensor, z: Tensor, f: Factors) -> Tensor:
        """``y += last(mid(z))`` in place, and what the last step ran on; no graph is recorded."""
        h = self._between(geo, z, f)
        self.last.add_(geo, y, h, _built(self.last, f))
        return h

    def _between(self, geo: Geometry, z: Tensor, f: Factors) -> Tensor:
        if isinstance(self.mid, Step):
            return self.mid.apply(geo, z, _built(self.mid, f))
        return z if self.mid is None else self.mid(geo, z, f)

    @property
    def foldable(self) -> bool:
        """Whether its products may cost less through the changed weight. Sums of channels (MiSS) and sparse steps do not."""
        return self.first is not None and self.first.weight is not None

    @property
    def direct(self) -> bool:
        """Whether every weight is a `Formula` or missing, so that `backward_direct` applies."""
        return all([isinstance(step, Step) and is_direct(step) for step in self._steps])

    @property
    def is_view(self) -> bool:
        """Whether, moreover, no weight is computed."""
        return self.direct and all([step.weight is None or step.weight.is_view for step in self._steps])

    @property
    def _steps(self) -> list[Any]:
        return [step for step in (self.first, self.mid, self.last) if step is not None]

    def backward_direct(
        self,
        geo: Geometry,
        x: Tensor,
        z: Tensor | None,
        f: Factors,
        wanted: Set[str],
        grad: Tensor,
        of_input: bool,
        h: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """As `backward`, for programs that are `direct`; without a graph.

        Args:
            h: what the last step ran on where it was kept.
            wanted: names of the factors whose gradients are wanted.

        Returns:
            Gradients by name in the dtype of the operation, and what `push_` takes.
        """
        first, last = self.first, self.last
        mid: Any = self.mid
        wl = None if last.weight is None else last.weight(f)
        if first is None:
            return learned(last, geo, x, wl, f, wanted, grad), grad
        w = None if first.weight is None else first.weight(f)
        z = first.apply(geo, x, w) if z is None else z
        wm = None if mid is None or mid.weight is None else mid.weight(f)
        if h is None:
            h = z if mid is None else mid.apply(geo, z, wm)
        found = learned(last, geo, h, wl, f, wanted, grad)
        if not (of_input or trains(first, wanted) or (mid is not None and trains(mid, wanted))):
            return found, None
        gz = last.adjoint(geo, h, wl, grad)
        if mid is not None:
            found |= learned(mid, geo, z, wm, f, wanted, gz)
            gz = mid.adjoint(geo, z, wm, gz)
        found |= learned(first, geo, x, w, f, wanted, gz)
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


def is_direct(step: Step) -> bool:
    """Whether the gradient of its weight leads to factors by formula, or there is none."""
    return step.weight is None or isinstance(step.weight, Formula)


def trains(step: Step | None, wanted: Set[str]) -> bool:
    """Whether the gradient of a factor behind a direct step's weight is wanted."""
    return step is not None and isinstance(step.weight, Formula) and not wanted.isdisjoint(step.weight.names)


def learned(step: Any, geo: Geometry, x: Tensor, w: Any, f: Factors, wanted: Set[str], grad: Tensor) -> dict[str, Tensor]:
    """Gradients of the factors behind a direct step's weight ``w``, by their names; nothing if none is wanted."""
    if not isinstance(step.weight, Formula) or wanted.isdisjoint(step.weight.names):
        return {}
    return step.weight.pull(f, step.weight_grad(geo, x, w, grad), wanted)


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
