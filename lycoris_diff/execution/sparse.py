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
        flat: positions in the flattened matrix, in the order of the stored values.
        distinct: no position occurs twice; files may hold such.
    """

    shape: tuple[int, int]
    by_row: tuple[Tensor, Tensor]
    by_column: tuple[Tensor, Tensor]
    order: Tensor
    entry: Tensor
    flat: Tensor
    distinct: bool

    @classmethod
    def of(cls, flat: Tensor, rows: int, columns: int) -> Pattern:
        """Pattern of flat positions in any order."""
        _announce_sparse()
        ordered, entry = flat.sort()
        row, column = ordered // columns, ordered % columns
        order = (column * rows + row).argsort()
        by_row = _compressed(row, column, rows)
        by_column = _compressed(column[order], row[order], columns)
        return cls((rows, columns), by_row, by_column, order, entry, flat, not bool((ordered.diff() == 0).any()))

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with the given stored values."""
        return self.in_order(values[self.entry])

    def in_order(self, values: Tensor) -> Tensor:
        """The matrix with values that are sorted by row."""
        return torch.sparse_csr_tensor(*self.by_row, values, self.shape, check_invariants=False)

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


#: tokens that a processor transposes at once: more would leave its cache between being copied and being read
BLOCK = 256


def _blocks(t: Tensor) -> tuple[Tensor, ...]:
    return t.split(BLOCK) if t.device.type == "cpu" else (t,)


def _turned(t: Tensor) -> Tensor:
    """Copy of the transpose. As a batch of one: torch transposes plain matrices on one thread."""
    return t.unsqueeze(0).mT.contiguous()[0]


def _turned_blocks(t: Tensor) -> list[Tensor]:
    """Copies of the transposes of blocks of tokens, for a processor's caches and threads."""
    tokens = t.shape[0]
    if t.device.type != "cpu" or t.numel() == 0:
        return [_turned(t)]
    count = max(2 if tokens >= BLOCK // 2 else 1, -(-tokens // BLOCK))
    size = -(-tokens // count)
    rest = tokens % size
    return [*_shuffled(t[: tokens - rest], size), *(_shuffled(t[-rest:], rest) if rest else ())]


def _shuffled(t: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Transposes of blocks of so many rows, three times as fast as strided copies.

    To shuffle channels is to transpose them as ``(groups, channels of a group)``, and where they lie together torch has a
    kernel that does it for one position after the other, here one block.
    """
    channels = t.shape[1]
    positions = t.reshape(-1, 1, 1, rows * channels).permute(0, 3, 1, 2)
    return torch.channel_shuffle(positions, rows).view(-1, channels, rows).unbind()


@dataclass(frozen=True)
class Sparse(Step):
    """A sparse matrix ``(out, in)`` on the tokens of a linear layer; the weight is the vector of its values.

    Works on transposed copies, where every entry meets contiguous rows: a hundredth of the arithmetic of the dense gradient.
    """

    pattern: Pattern

    def add_(self, geo: Geometry, y: Tensor, x: Tensor, w: Any) -> None:
        _add_product_(y, self.pattern.matrix(_wide(w)), x)

    def add_adjoint_(self, geo: Geometry, gx: Tensor, x: Tensor, w: Any, grad: Tensor) -> None:
        _add_product_(gx, self.pattern.transposed(_wide(w)), grad)

    def weight_grad(self, geo: Geometry, x: Tensor, w: Any, grad: Tensor) -> Tensor:
        sampled = self.pattern.in_order(torch.zeros_like(_wide(w)))
        for rows, columns in zip(_turned_blocks(_wide(grad)), _turned_blocks(_wide(x))):
            torch.sparse.sampled_addmm(sampled, rows, columns.T, out=sampled)
        return torch.empty_like(w).index_copy_(0, self.pattern.entry, sampled.values().to(w.dtype))


def _add_product_(y: Tensor, matrix: Tensor, x: Tensor) -> None:
    """``y += matrix x`` for every token."""
    for out, inp in zip(_blocks(y), _blocks(x)):
        out.add_(_turned(matrix @ _turned(_wide(inp))))
