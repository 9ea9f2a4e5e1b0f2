"""The sparse step: a matrix with fixed positions on the tokens of a linear layer, and its gradient at those positions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
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
        distinct: no position is known to occur twice; files may hold such.
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
        ordered, entry = flat.sort()
        row, column = ordered // columns, ordered % columns
        order = (column * rows + row).argsort()
        by_row = _compressed(row, column, rows)
        by_column = _compressed(column[order], row[order], columns)
        distinct = not flat.is_meta and not bool((ordered.diff() == 0).any())  # offloaded ones are not to be looked at
        return cls((rows, columns), by_row, by_column, order, entry, flat, distinct)

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with the given stored values."""
        return self.in_order(values[self.entry])

    def in_order(self, values: Tensor) -> Tensor:
        """The matrix with values that are sorted by row."""
        _announce_sparse()
        return torch.sparse_csr_tensor(*self.by_row, values, self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        _announce_sparse()
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


#: tokens that a thread transposes at once: more would leave its cache between being copied and being read
BLOCK = 256
#: fewest tokens for which a sparse kernel is worth another call
LEAST = 128


def _turned(t: Tensor) -> Tensor:
    """Copy of the transpose. As a batch of one: torch transposes plain matrices on one thread."""
    return t.unsqueeze(0).mT.contiguous()[0]


def _turned_blocks(t: Tensor) -> Iterator[Tensor]:
    """Copies of the transposes of blocks of tokens in the dtype of sparse kernels, as many at a time as there are threads."""
    if t.device.type != "cpu":
        yield _turned(_wide(t))
        return
    threads = torch.get_num_threads()
    for part in t.split(BLOCK * threads) if t.numel() else ():
        tokens = part.shape[0]
        size = -(-tokens // max(1, min(threads, tokens // LEAST)))
        rest = tokens % size
        yield from _shuffled(_wide(part[: tokens - rest]), size)
        if rest:
            yield _turned(_wide(part[tokens - rest :]))


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
        for rows, columns in zip(_turned_blocks(grad), _turned_blocks(x)):
            torch.sparse.sampled_addmm(sampled, rows, columns.T, out=sampled)
        return torch.empty_like(w).index_copy_(0, self.pattern.entry, sampled.values().to(w.dtype))


def _add_product_(y: Tensor, matrix: Tensor, x: Tensor) -> None:
    """``y += matrix x`` for every token."""
    start = 0
    for block in _turned_blocks(x):
        y[start : start + block.shape[1]].add_(_turned(matrix @ block))
        start += block.shape[1]
