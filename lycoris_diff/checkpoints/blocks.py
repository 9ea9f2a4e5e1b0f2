"""Factors of several adapters in one tensor: one below the other, or as blocks of a larger one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Entry

#: the way out where adapters cannot be put together
KEEP_NAMES = "keep the modules' own names"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in for factors of a type; 8-bit floats have no arithmetic of their own."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """A type that holds the values of all."""
    types = {t.dtype for t in tensors}
    return types.pop() if len(types) == 1 else torch.float64 if torch.float64 in types else torch.float32


def stacked(parts: Sequence[Entry], name: str, axis: int) -> Tensor:
    """A factor of all parts along an axis.

    Raises:
        CheckpointError: a part lacks it, or its other axes differ.
    """
    if any(name not in p.tensors for p in parts):
        raise CheckpointError(f"{parts[0].algorithm}: only some parts have {name!r}; {KEEP_NAMES}")
    tensors = [p.tensors[name] for p in parts]
    _expect_alike(parts[0].algorithm, name, tensors, {axis})
    return torch.cat([t.to(widest(tensors)) for t in tensors], axis)


def blocked(like: Entry, name: str, pieces: Sequence[tuple[Tensor, tuple[int, int]]], extent: tuple[int, int]) -> Tensor:
    """Tensors at corners of the first two axes of a larger one that is zero elsewhere.

    Args:
        like: an entry of the algorithm, and the tensor's form where there are no pieces.
        name: of the factor.
        pieces: tensors and their corners.
        extent: size of the first two axes.

    Raises:
        CheckpointError: the tensors' other axes differ.
    """
    tensors = [t for t, _ in pieces] or [like.tensors[name]]
    _expect_alike(like.algorithm, name, tensors, {0, 1})
    whole = tensors[0].new_zeros(*extent, *tensors[0].shape[2:], dtype=widest(tensors))
    for t, (row, column) in pieces:
        whole[row : row + t.shape[0], column : column + t.shape[1]] = t
    return whole


def _expect_alike(algorithm: str, name: str, tensors: Sequence[Tensor], free: set[int]) -> None:
    """Refuse tensors whose shapes differ in other axes than the free ones."""
    shapes = {tuple(n for axis, n in enumerate(t.shape) if axis not in free) for t in tensors}
    if len(shapes) > 1:
        found = " and ".join(str(tuple(t.shape)) for t in tensors)
        raise CheckpointError(f"{algorithm}: {name!r} has shapes {found}, which do not make one tensor; {KEEP_NAMES}")
