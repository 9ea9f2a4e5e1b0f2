"""Orthogonal finetuning (arXiv 2306.07280, 2311.06243): blocks of rows or columns of the weight are rotated.

A rotation is written as a skew-symmetric ``Q``: Cayley's ``(I + Q) (I - Q)^-1``, or the first terms of its series in ``Q``.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def skew(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """``B - B^T`` of every block; with a ``limit`` above 0 the norm of all of them together is cut to it."""
    q = blocks - blocks.mT
    if limit > 0:
        norm = torch.linalg.vector_norm(q) + 1e-8
        q = q * (limit / norm).clamp(max=1.0)
    return q


def skew_from_triangle(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric ``(n, size, size)`` from the entries above the diagonal, ``(n, size * (size - 1) / 2)``, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = torch.zeros(vectors.shape[0], size * size, dtype=vectors.dtype, device=vectors.device)
    upper = upper.index_copy(1, rows * size + columns, vectors).view(-1, size, size)
    return upper - upper.mT


def triangle_size(entries: int) -> int:
    """Size of the block that has so many entries above its diagonal; 0 when there is none."""
    size = (1 + isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else 0


def cayley(q: Tensor) -> Tensor:
    """``(I + Q) (I - Q)^-1`` of every block."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, eye + q)  # the two commute


def neumann(q: Tensor, terms: int) -> Tensor:
    """PEFT's series for `cayley`: ``I + 2 Q + 2 Q^2 + ... + Q^n``, where n is ``terms - 1`` but never 2."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms < 3:
        return one if terms == 1 else torch.add(one, q, alpha=2)
    if terms == 5:  # PEFT's default: two products instead of three, by (I + Q + Q^2)^2 = series + Q^2
        square = torch.bmm(q, q)
        root = one + q + square
        return torch.baddbmm(square, root, root, beta=-1)
    two, rotation = 2 * one, q + 2 * one
    for _ in range(max(terms - 1, 3) - 2):  # Horner's way
        rotation = torch.baddbmm(two, q, rotation)
    return torch.baddbmm(one, q, rotation)


def back_less_identity(rotation: Tensor, strength: Tensor) -> Tensor:
    """``strength * (R^T - I)`` of every block: what turning back adds."""
    return (rotation.mT - torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)) * strength


def rotate_rows(weight: Tensor, rotation: Tensor) -> Tensor:
    """``R^T`` of every block on its rows: ``(out, ...), (n, b, b) -> (out, ...)`` with ``n * b = out``."""
    n, b = rotation.shape[:2]
    return (rotation.mT @ weight.reshape(n, b, -1)).view(weight.shape)


def rotate_columns(weight: Tensor, rotation: Tensor) -> Tensor:
    """Every block of columns times ``R^T``: ``(out, in), (n or 1, b, b) -> (out, in)``; one block serves all."""
    blocks = weight.unflatten(1, (-1, rotation.shape[-1])).transpose(0, 1)
    turned = torch.bmm(blocks, rotation.mT.expand(len(blocks), -1, -1))
    return turned.transpose(0, 1).reshape(weight.shape)


def butterfly(weight: Tensor, rotation: Tensor) -> Tensor:
    """LyCORIS' BOFT: stage i turns rows that lie ``2^i * b / 2`` apart: ``(out, ...), (stages, n, b, b) -> (out, ...)``."""
    b = rotation.shape[-1]
    flat = weight.flatten(1)
    for i, stage in enumerate(rotation):
        step = 2**i * b // 2
        # pairs of rows that far apart come next to each other, are turned in blocks of b, and go back
        pairs = flat.reshape(len(flat) // (2 * step), 2, step, flat.shape[1]).transpose(1, 2)
        turned = stage @ pairs.reshape(len(flat) // b, b, flat.shape[1])
        flat = turned.view(len(flat) // (2 * step), step, 2, flat.shape[1]).transpose(1, 2).reshape(flat.shape)
    return flat.view(weight.shape)
