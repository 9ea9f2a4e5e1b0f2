"""LoKr (KronA arXiv 2212.10650, LyCORIS arXiv 2309.14859): the change of the weight is a Kronecker product."""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split ``dimension`` into two factors, the first for ``w1``, the second for ``w2``.

    A positive ``factor`` that divides ``dimension`` is taken as it is, also above the square root (PEFT's rule; LyCORIS
    would swap such a pair). Otherwise the first factor is the largest divisor up to ``factor`` and the square root;
    ``-1`` sets no limit but the square root.

    >>> factorization(1280), factorization(1280, 8), factorization(64, 16), factorization(127)
    ((32, 40), (8, 160), (16, 4), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = isqrt(dimension) if factor < 0 else min(factor, isqrt(dimension))
    first = next(d for d in range(limit, 0, -1) if dimension % d == 0)
    return first, dimension // first


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """``w1 (a, c)`` and ``w2 (b, d, *k)`` to ``(a*b, c*d, *k)``: channels multiply, the kernel stays."""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    # two broadcast axes instead of torch.kron: right for any number of kernel axes, and one pass
    product = w1.reshape(a, 1, c, 1, *[1] * len(kernel)) * w2.reshape(1, b, 1, d, *kernel)
    return product.reshape(a * b, c * d, *kernel)
