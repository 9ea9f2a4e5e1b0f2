"""MiSS (arXiv 2409.15371): matrix shard sharing. One block is repeated along the input axis of the weight."""

from __future__ import annotations

import torch
from torch import Tensor


def tile(block: Tensor, out: int, inp: int) -> Tensor:
    """``W[o, i, *k] = block[i mod r, o mod s, *k]`` for a block ``(r, s, *k)``; s = out is the balance form.

    Returns:
        ``(out, inp, *k)``; ``inp`` need not be a multiple of r, ``out`` is one of s.
    """
    r, s = block.shape[:2]
    rows = block.transpose(0, 1)
    wide = torch.cat([rows] * (inp // r) + ([rows[:, : inp % r]] if inp % r else []), dim=1)
    return torch.cat([wide] * (out // s), dim=0) if s < out else wide


def add_tiled(total: Tensor, block: Tensor) -> Tensor:
    """``total + tile(block, *total.shape[:2])`` without the repeated block; total is ``(out, inp, *k)``.

    It is one pass where r divides inp.
    """
    r, s = block.shape[:2]
    out, inp, *kernel = total.shape
    rows = block.transpose(0, 1).contiguous()
    whole = inp - inp % r
    tiles = total[:, :whole].reshape(out // s, s, whole // r, r, *kernel) + rows.unsqueeze(1)
    added = tiles.reshape(out, whole, *kernel)
    if whole == inp:
        return added
    tail = total[:, whole:].unflatten(0, (-1, s)) + rows[:, : inp - whole]
    return torch.cat([added, tail.flatten(0, 1)], dim=1)


def bat(weight: Tensor, block: Tensor) -> Tensor:
    """The nonlinear form: every r x r block of the weight, ``W[a, b] @ B[a] + B[a]``.

    Args:
        weight: ``(out, in)``, flattened for convolutions.
        block: ``(out / r, r, r)``.

    Returns:
        The change of the weight, ``(out, in)``.
    """
    rows, r, _ = block.shape
    out, inp = weight.shape
    blocks = weight.reshape(rows, r * (inp // r), r)
    change = (blocks @ block).reshape(rows, r, inp // r, r) + block.unsqueeze(2)
    return change.reshape(out, inp)


def shard_sum(x: Tensor, r: int) -> Tensor:
    """``y[b, j, ...] = sum over i = j mod r of x[b, i, ...]``: ``(b, n, ...) -> (b, r, ...)``, any n."""
    batch, n, *space = x.shape
    whole = n - n % r
    total = (x if whole == n else x[:, :whole]).reshape(batch, whole // r, r, *space).sum(1)
    if whole == n:
        return total
    tail = torch.zeros_like(total)
    tail[:, : n - whole] = x[:, whole:]
    return total + tail
