"""T-LoRA (arXiv 2507.05964): the factors start as a share of the weight's own SVD, which is subtracted again."""

from __future__ import annotations

import torch
from torch import Tensor

#: which singular values the factors start from -> the first of them, out of ``count`` for a rank
SHARES = {
    "principal": lambda count, rank: 0,
    "last": lambda count, rank: max(count - rank, 0),
    "middle": lambda count, rank: max(count - rank, 0) // 2,
}


def start(weight: Tensor, rank: int, share: str) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of some of a matrix' singular values; missing ones are zero with value 1e-6, as in LyCORIS.

    Args:
        weight: ``(out, in)``.
        rank: how many.
        share: "principal", "last" or "middle".

    Returns:
        ``(out, rank)``, ``(1, rank)`` and ``(rank, in)``; their product is that share of the weight.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    first = SHARES[share](len(s), rank)
    keep = slice(first, first + rank)
    p, values, q = u[:, keep], s[keep], vh[keep]
    short = rank - len(values)
    if short:
        p, q = torch.nn.functional.pad(p, (0, short)), torch.nn.functional.pad(q, (0, 0, 0, short))
        values = torch.nn.functional.pad(values, (0, short), value=1e-6)
    return p.contiguous(), values.unsqueeze(0).contiguous(), q.contiguous()


def product(p: Tensor, values: Tensor, q: Tensor) -> Tensor:
    """``P diag(values) Q``, ``(out, in)``."""
    return (p * values) @ q
