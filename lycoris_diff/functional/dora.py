"""DoRA (arXiv 2402.09353): magnitude and direction of the adapted weight are learned apart.

``W' = magnitude * (W + dW) / ||W + dW||``, the norm taken per output row (axis "out", PEFT and the paper) or per input
column (axis "in", LyCORIS before 3.2 and OneTrainer). The gradient flows through the norm, as in LyCORIS.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = ("out", "in")


def norms(weight: Tensor, axis: str) -> Tensor:
    """Norm of every row, shape ``(out, 1, ...)``, or of every input column, shape ``(1, in, 1, ...)``."""
    dims = [d for d in range(weight.dim()) if d != AXES.index(axis)]
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


def row_factors(magnitude: Tensor, squares: Tensor) -> Tensor:
    """``magnitude / sqrt(squares)``, the factor of every output row ``(out,)``; 0 of a row that is all zero."""
    return magnitude.reshape(-1).to(squares.dtype) * inverse_roots(squares)


def inverse_roots(squares: Tensor) -> Tensor:
    """``1 / sqrt(squares)``; 0 of zero, which stays zero in half precision too."""
    return squares.masked_fill(squares <= torch.finfo(squares.dtype).tiny, torch.inf).rsqrt()


def row_slopes(row: Tensor, squares: Tensor) -> Tensor:
    """Twice the derivative of `row_factors` by the squares, ``-row / squares``; 0 where they do not count."""
    return torch.where(squares > torch.finfo(squares.dtype).tiny, row / -squares, 0.0)


def decompose(merged: Tensor, magnitude: Tensor, axis: str) -> Tensor:
    """``magnitude * merged / ||merged||``; a row or column that is all zero stays zero.

    Args:
        merged: ``W + dW``, ``(out, in, *k)``.
        magnitude: one value per row or column, any shape with that many elements.
        axis: "out" or "in".
    """
    norm = norms(merged, axis)
    norm = norm.masked_fill(norm <= torch.finfo(norm.dtype).tiny, torch.inf)
    return merged * (magnitude.reshape(norm.shape) / norm)
