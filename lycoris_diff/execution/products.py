"""Matrix products whose sides are so unequal, or so many, that how they are asked for decides what they cost on processors."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

#: dtypes and kinds of device for which it was measured
DTYPES = (torch.float32, torch.float64)
DEVICE = "cpu"
#: channels of an output below which a product with a transposed view of a weight is slow in MKL
NARROW = 16
#: rows from which that costs more than a copy of the weight
MANY = 256
#: widths for which a product is up to a third faster as a batch, one for every thread
UNEVEN = range(2 * NARROW, 10 * NARROW + 1)
#: fewest rows of each
ROWS = 256

#: ``given_up(t, shape)``: a contiguous tensor in another shape, to be written to; ``t`` itself must not be used again. To
#: autograd it is no view, so that writing to it costs no copy of its gradient
given_up = torch.ops.aten._unsafe_view.default


def is_measured(x: Tensor) -> bool:
    """Whether what is said here of the time of products was measured for such a tensor."""
    return x.device.type == DEVICE and x.dtype in DTYPES and not torch.compiler.is_compiling()


def blocks(rows: int, least: int, width: int = 0) -> int:
    """In how many matrices of equal size, one a thread, a matrix is treated; 1 is as it is.

    Args:
        rows: of the matrix.
        least: fewest rows of each.
        width: each makes a matrix of so many rows of its own, all of them at most a quarter of the rows.
    """
    threads = torch.get_num_threads()
    return threads if rows % threads == 0 and rows >= max(least, 4 * width) * threads else 1


def times(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x (rows, d)`` and ``weight (p, d)``, differentiable."""
    (rows, d), p = x.shape, weight.shape[0]
    if p < NARROW:
        return F.linear(x, weight.contiguous())  # half the time, where it is a transposed view
    count = blocks(rows, ROWS, p) if is_measured(x) and p in UNEVEN else 1  # in that order: compilers cannot tell the second
    if count > 1:
        return torch.bmm(x.reshape(count, rows // count, d), weight.expand(count, p, d).mT).view(rows, p)
    return F.linear(x, weight)


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """``weight (a, c)`` across the slices: ``(b, c*q, *s) -> (b, a*q, *s)``; the same for every layer kind."""
    a, c = weight.shape
    batch, channels, *space = x.shape
    y = on_every(weight, x.reshape(batch, c, channels // c * prod(space)))
    return y.view(batch, a * (channels // c), *space)


def on_every(matrix: Tensor, batch: Tensor) -> Tensor:
    """``matrix (p, d)`` times every matrix of a batch ``(b, d, n)``."""
    p, d = matrix.shape
    if torch.is_grad_enabled() and copies_are_smaller(p, d, batch.shape[2]):
        return torch.matmul(matrix, batch)
    # `matmul` copies whatever requires a gradient, even where none is recorded
    return torch.bmm(matrix.expand(batch.shape[0], p, d), batch)


def plus_on_every(total: Tensor, matrix: Tensor, batch: Tensor) -> Tensor:
    """``total (b, p, n)`` and `on_every`, differentiable, in the memory of ``total``, which must be given up.

    It is one operation where that does not make larger gradients.
    """
    p, d = matrix.shape
    if copies_are_smaller(p, d, batch.shape[2]):
        return total.add_(on_every(matrix, batch))
    return total.baddbmm_(matrix.expand(batch.shape[0], p, d), batch)


def copies_are_smaller(p: int, d: int, n: int) -> bool:
    """Whether one product of copies of both sides beats a batch of them, each with its own gradient of the ``(p, d)`` matrix.

    Args:
        p, d: sizes of the matrix that all ``(d, n)`` matrices of the batch are multiplied with.
        n: columns of each.
    """
    return p * d > 2 * (p + d) * n


def summed(batch: Tensor) -> Tensor:
    """Sum of a batch of matrices, without a copy of a single one."""
    return batch[0] if batch.shape[0] == 1 else batch.sum(0)


def narrow_product(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` for tall operands: in blocks, or the narrow one first where it is very narrow and last otherwise.

    Products with few columns take up to three times as long as those with few rows; with more columns, a tenth less.
    """
    (rows, p), d = left.shape, right.shape[1]
    count = blocks(rows, 2 * ROWS, min(p, d)) if is_measured(left) and min(p, d) in UNEVEN else 1
    if count > 1:
        left, right = left.reshape(count, -1, p), right.reshape(count, -1, d)
        return torch.bmm(left.mT, right).sum(0) if p <= d else torch.bmm(right.mT, left).sum(0).T
    as_is = p <= d if min(p, d) < 2 * NARROW else p >= d
    return left.T @ right if as_is else (right.T @ left).T
