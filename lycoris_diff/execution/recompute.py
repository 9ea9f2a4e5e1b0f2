"""Run a function of small tensors and keep only its inputs for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import outside_autocast


def recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``; intermediate results are computed anew in backward instead of kept.

    Backward runs outside autocast, so that what `function` does in full precision it does there too. Unlike activation
    checkpointing it handles no random state and no modules, and costs next to nothing. Under `torch.compile` and
    `torch.func` the function simply runs: they keep what they need by their own rules.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function(*tensors)
    out: Tensor = _Recompute.apply(function, *tensors)
    return out


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        twice = torch.is_grad_enabled()
        needs = ctx.needs_input_grad[1:]
        held = ctx.saved_tensors
        if not twice:
            held = [t.detach().requires_grad_(n) if t.is_floating_point() else t for t, n in zip(held, needs)]
        wanted = [t for t, n in zip(held, needs) if n]
        with torch.enable_grad(), outside_autocast(grad.device):
            y = ctx.function(*held)
            grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice, allow_unused=True))
        return (None, *[next(grads) if n else None for n in needs])
