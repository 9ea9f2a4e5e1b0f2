"""Small tensors of a layer that its adapters decide: the change of its bias, DoRA's factors of its rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..execution.precision import outside_autocast
from ..execution.recompute import recompute
from ..execution.rows import row_squares
from ..functional import dora


def bias_change(members: Iterable[tuple[Adapter, dict[str, Tensor]]]) -> Tensor | None:
    """Sum of the adapters' changes of the bias, ``(out,)`` in float32 or better; None when there is none."""
    total = None
    for adapter, f in members:
        total = plus(total, adapter.bias_change(f))
    return total


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum in the wider dtype, None standing for nothing."""
    return a if b is None else b if a is None else a + b


def row_factor(adapter: Adapter, weight: Tensor, f: dict[str, Tensor]) -> Tensor:
    """``magnitude / ||W + dW||`` for every output row, ``(out,)``, in float32 or better, whatever autocast says.

    Nothing of the weight's size is kept for backward, but what compilers decide to keep of a half-precision one.
    """
    names, wide = tuple(f), torch.promote_types(weight.dtype, torch.float32)

    def compute(base: Tensor, *tensors: Tensor) -> Tensor:
        factors = dict(zip(names, tensors))
        with outside_autocast(base.device):
            work = base.to(wide)
            statistics = adapter.row_statistics(work, factors)
            if statistics is None:
                square = adapter.add_delta(work, factors).flatten(1).square().sum(1)
            else:
                inner, delta_square = statistics
                square = row_squares(base) + 2 * inner + delta_square
            return dora.row_factors(factors[adapter.magnitude_name], square)

    if adapter.small_row_statistics and weight.dtype is wide:
        return compute(weight, *f.values())
    return recompute(compute, weight, *f.values())
