"""The sparse step: a matrix with fixed positions on the tokens of a linear layer, and its gradient at those positions."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry
from .steps import Step


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

    pattern: Pattern

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        y.add_((self.pattern.matrix(_wide(w)) @ _wide(x).T.contiguous()).T.contiguous())

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        gx.add_((self.pattern.transposed(_wide(w)) @ _wide(grad).T.contiguous()).T.contiguous())

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        empty = self.pattern.matrix(_wide(torch.zeros_like(w)))
        sampled = torch.sparse.sampled_addmm(empty, _wide(grad).T.contiguous(), _wide(x).T.contiguous().T, beta=0.0)
        return torch.empty_like(w).index_copy_(0, self.pattern.entry, sampled.values().to(w.dtype))
