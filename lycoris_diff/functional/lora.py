"""LoRA / LoCon (arXiv 2106.09685, 2309.14859): a low-rank change, with an optional Tucker core for convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squeeze_core(core: Tensor, kernel: Sequence[int]) -> Tensor:
    """A Tucker core ``(p, q, *kernel)`` without the axis of size one that PEFT gives those of Conv1d at the end."""
    return core.reshape(*core.shape[:2], *kernel)


def tucker(core: Tensor, out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """``W[o, i, *k] = sum_pq out[o, p] core[p, q, *k] in[q, i]`` (FedPara, arXiv 2108.06098, proposition 3).

    Args:
        core: ``(p, q, *k)``.
        out_factor: ``(out, p)``.
        in_factor: ``(q, in)``.

    Returns:
        ``(out, in, *k)``.
    """
    return torch.einsum("pq...,op,qi->oi...", core, out_factor, in_factor)


def delta(up: Tensor, down: Tensor, mid: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Change of the weight, ``up @ down`` or ``mid x1 up x2 down``.

    Args:
        up: ``(out, r)``, trailing kernel axes of size one allowed.
        down: ``(r, in, *k)``; ``(r, in, 1...)`` when there is a core.
        mid: Tucker core ``(r, r, *k)`` or None.
        shape: ``(out, in, *k)`` of the weight.
    """
    up = up.flatten(1)
    if mid is not None:
        return tucker(mid, up, down.flatten(1)).reshape(shape)
    return (up @ down.flatten(1)).reshape(shape)
