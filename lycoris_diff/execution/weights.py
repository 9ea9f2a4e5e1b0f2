"""What the weights of steps are built of: formulas of factors, whose gradients are formulas too, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..functional import loha, lora

#: tensors by name; under "scale" a number where it is known
Factors = Mapping[str, Tensor]
Build = Callable[[Factors], Tensor]


def times_scale(t: Tensor, scale: Tensor | float) -> Tensor:
    """``t * scale``, without an operation where the scale is known to be one."""
    return t if type(scale) is float and scale == 1.0 else t * scale


@dataclass(frozen=True)
class Formula:
    """A step's weight, built of factors by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the factors."""
        raise NotImplementedError

    @property
    def is_view(self) -> bool:
        """Whether nothing of the weight's size is computed, but for a scale."""
        return False

    @property
    def rows(self) -> str | None:
        """Name of a factor whose rows scale the weight's; None if there is none."""
        return None

    def __call__(self, f: Factors) -> Tensor:
        """The weight."""
        raise NotImplementedError

    def pull(self, f: Factors, grad: Tensor, wanted: Container[str]) -> dict[str, Tensor]:
        """Gradients of the factors that are wanted, by name, from that of the weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Factor(Formula):
    """One factor seen in another shape, perhaps times the scale.

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

    @cached_property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def is_view(self) -> bool:
        return True

    @property
    def rows(self) -> str | None:
        return None if self.swapped else self.name

    def __call__(self, f: Factors) -> Tensor:
        t = f[self.name]
        if self.scaled:
            t = times_scale(t, f["scale"])
        if self.swapped:
            t = t.transpose(0, 1)
        return t.reshape(self.shape) if self.shape is not None else t.flatten(1) if t.dim() > 2 else t

    def pull(self, f: Factors, grad: Tensor, wanted: Container[str]) -> dict[str, Tensor]:
        if self.name not in wanted:
            return {}
        t = f[self.name]
        grad = grad.reshape(t.transpose(0, 1).shape).transpose(0, 1) if self.swapped else grad.reshape(t.shape)
        return {self.name: times_scale(grad, f["scale"]) if self.scaled else grad}


@dataclass(frozen=True)
class KhatriRao(Formula):
    """The Khatri-Rao product of two factors, ``w[i*s + j, n] = first[i, n] second[j, n]``, perhaps times the scale.

    Attributes:
        first, second: names of the factors.
        swapped: the weight is the transpose, ``(n, r*s)``.
        upright: the factors are stored transposed, ``(n, r)`` and ``(n, s)``.
        scaled: times the scale.
        shape: of the weight; None leaves it two-dimensional.
    """

    first: str
    second: str
    swapped: bool = False
    upright: bool = False
    scaled: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.first, self.second

    @property
    def rows(self) -> str | None:
        return self.first if self.swapped and self.upright else None

    def _flat(self, f: Factors) -> tuple[Tensor, Tensor]:
        """``(r, n)`` and ``(s, n)``."""
        first, second = times_scale(f[self.first], f["scale"]) if self.scaled else f[self.first], f[self.second]
        return (first.T, second.T) if self.upright else (first, second)

    def __call__(self, f: Factors) -> Tensor:
        w = loha.khatri_rao(*self._flat(f))
        w = w.T if self.swapped else w
        return w if self.shape is None else w.reshape(self.shape)

    def pull(self, f: Factors, grad: Tensor, wanted: Container[str]) -> dict[str, Tensor]:
        first, second = self._flat(f)
        n = first.shape[1]
        rows = grad.reshape(n, -1).T if self.swapped else grad.reshape(-1, n)
        by_name = {}
        if rows.is_contiguous():
            cube = rows.view(first.shape[0], second.shape[0], n)
            if self.first in wanted:
                by_name[self.first] = (cube * second).sum(1)
            if self.second in wanted:
                by_name[self.second] = (cube * first.unsqueeze(1)).sum(0)
        else:  # columns lie together: a small product for each
            cube = rows.T.reshape(n, first.shape[0], second.shape[0])
            if self.first in wanted:
                by_name[self.first] = torch.bmm(cube, second.T.unsqueeze(2)).squeeze(2).T
            if self.second in wanted:
                by_name[self.second] = torch.bmm(cube.mT, first.T.unsqueeze(2)).squeeze(2).T
        if self.scaled and self.first in by_name:
            by_name[self.first] = times_scale(by_name[self.first], f["scale"])
        return {name: g.T for name, g in by_name.items()} if self.upright else by_name


@dataclass(frozen=True)
class Cores(Formula):
    """Two Tucker cores combined to that of a Hadamard product, ``(p*u, q*v, *kernel)``.

    Attributes:
        first, second: names of the factors, ``(p, q, *kernel)`` and ``(u, v, *kernel)``, maybe with trailing axes of size one.
        kernel: kernel sizes.
    """

    first: str
    second: str
    kernel: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.first, self.second

    def _cores(self, f: Factors) -> tuple[Tensor, Tensor]:
        return lora.squeeze_core(f[self.first], self.kernel), lora.squeeze_core(f[self.second], self.kernel)

    def __call__(self, f: Factors) -> Tensor:
        return loha.combined_core(*self._cores(f))

    def pull(self, f: Factors, grad: Tensor, wanted: Container[str]) -> dict[str, Tensor]:
        first, second = self._cores(f)
        (p, q, *kernel), (u, v) = first.shape, second.shape[:2]
        product = grad.reshape(p, u, q, v, *kernel)
        by_name = {}
        if self.first in wanted:
            by_name[self.first] = (product * second[None, :, None]).sum((1, 3)).reshape(f[self.first].shape)
        if self.second in wanted:
            by_name[self.second] = (product * first[:, None, :, None]).sum((0, 2)).reshape(f[self.second].shape)
        return by_name
