"""A factor on every output row (channel), as DoRA has: the products with it, and their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .marks import mark

_FLOAT16 = torch.finfo(torch.float16).max
#: numbers in a block whose operations run one after the other while it is in a cache
BLOCK = 2**17


def channel_view(t: Tensor, like: Tensor) -> Tensor:
    """A vector over channels, shaped to broadcast over ``like`` with channels on axis 1; of float16 never beyond its range."""
    if like.dtype is torch.float16:  # or a row of zeros times infinity is no number
        t = t.clamp(-_FLOAT16, _FLOAT16)
    return t.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def scale_rows(y: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """``row * y + bias`` over channels."""
    factor = channel_view(row, y)
    return y * factor if bias is None else torch.addcmul(channel_view(bias, y), y, factor)


def sum_rows(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sums over everything but the channels on axis 1."""
    return t.sum([d for d in range(t.dim()) if d != 1], dtype=dtype)


def rows_backward(grad: Tensor, unscaled: Tensor, row: Tensor, room: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of ``row`` and of ``unscaled`` in `scale_rows`; on a processor a block of tokens after the other.

    Args:
        grad: of the output, ``(tokens, out)`` or ``(batch, out, *space)``, as ``unscaled``.
        row: ``(out,)``.
        room: the second gradient has so many more tokens, to be written to; on a processor only.
    """
    factor = channel_view(row, grad)
    if not _in_blocks(grad):
        return sum_products(grad, unscaled), grad * factor
    scaled = grad.new_empty(len(grad) + room, grad.shape[1])
    return _summed(grad, unscaled, lambda g, start: torch.mul(g, factor, out=scaled[start : start + len(g)])), scaled


def sum_products(grad: Tensor, unscaled: Tensor) -> Tensor:
    """The first of the two, in float32 or better."""
    if _in_blocks(grad):
        return _summed(grad, unscaled)
    return sum_rows(grad * unscaled, torch.promote_types(grad.dtype, torch.float32))


def _in_blocks(grad: Tensor) -> bool:
    return grad.dim() == 2 and grad.device.type == "cpu"


def _summed(grad: Tensor, unscaled: Tensor, also: Callable[[Tensor, int], object] = lambda g, start: None) -> Tensor:
    """Products summed over tokens, in float32 or better; ``also`` is called with every block while it is in a cache."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    step = max(1, BLOCK // grad.shape[1])
    if step >= len(grad):
        also(grad, 0)
        return (grad * unscaled).sum(0, dtype=wide)
    total = grad.new_zeros(step if wide is grad.dtype else 1, grad.shape[1], dtype=wide)
    for start in range(0, len(grad), step):
        g, u = grad[start : start + step], unscaled[start : start + step]
        if wide is grad.dtype:
            total[: len(g)].addcmul_(g, u)
        else:
            total += (g * u).sum(0, dtype=wide)
        also(g, start)
    return total.sum(0)


def row_squares(weight: Tensor) -> Tensor:
    """Squared norm of every row in float32 or better, ``(out,)``; remembered while a frozen weight does not change.

    Writing into the ``.data`` of the weight is a change that cannot be seen; write into the weight, under `torch.no_grad`.
    """

    def compute() -> Tensor:
        work = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return torch.linalg.vector_norm(work.flatten(1), dim=1).square()

    if torch.compiler.is_compiling() or weight.requires_grad or torch._C._are_functorch_transforms_active():
        return compute()
    if torch.is_inference_mode_enabled() or weight.is_inference() or forward_ad.unpack_dual(weight).tangent is not None:
        return compute()
    of_storage = _ROW_SQUARES.setdefault(weight.untyped_storage(), {})
    view, at = (weight.shape, weight.stride(), weight.storage_offset(), weight.dtype), mark(weight)
    found = of_storage.get(view)
    if found is None or found[0] != at:
        found = of_storage[view] = at, compute()
    return found[1]


#: squared row norms by the weights' storage and by what of it they are, with the place and version they belong to
_ROW_SQUARES: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Any, tuple[Any, Tensor]]] = weakref.WeakKeyDictionary()
