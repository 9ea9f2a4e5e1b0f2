"""GLoRA (arXiv 2306.07967) as LyCORIS has it: ``dW = W A1 A2 + B1 B2``."""

from __future__ import annotations

import torch
from torch import Tensor


def on_inputs(weight: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """``W A1 A2`` along the input channels: ``(out, in, *k), (in, r), (r, in) -> (out, in, *k)``."""
    if weight.dim() == 2:
        return (weight @ a1) @ a2
    return torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
