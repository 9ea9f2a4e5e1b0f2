"""A factor on every output row (channel), as DoRA has: the products with it, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

#: numbers in a block whose operations run one after the other while it is in a cache
BLOCK = 2**17


def channel_view(t: Tensor, like: Tensor) -> Tensor:
    """A vector over channels, shaped to broadcast over ``like`` with channels on axis 1."""
    return t.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def scale_rows(y: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """``row * y + bias`` over channels."""
    factor = channel_view(row, y)
    return y * factor if bias is None else torch.addcmul(channel_view(bias, y), y, factor)


def sum_rows(t: Tensor) -> Tensor:
    """Sums over everything but the channels on axis 1."""
    return t.sum([d for d in range(t.dim()) if d != 1])


def rows_backward(grad: Tensor, unscaled: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``row`` and of ``unscaled`` in `scale_rows`; on a processor a block of tokens after the other.

    Args:
        grad: of the output, ``(tokens, out)`` or ``(batch, out, *space)``, as ``unscaled``.
        row: ``(out,)``.
    """
    factor = channel_view(row, grad)
    if grad.dim() > 2 or grad.device.type != "cpu":
        return sum_rows(grad * unscaled), grad * factor
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(grad.shape[1], dtype=wide)
    scaled = torch.empty_like(grad)
    step = max(1, BLOCK // grad.shape[1])
    for g, u, s in zip(grad.split(step), unscaled.split(step), scaled.split(step)):
        total += (g * u).sum(0, dtype=wide)
        torch.mul(g, factor, out=s)
    return total, scaled
