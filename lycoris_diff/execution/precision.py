"""Full precision inside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, operations on tensors of that device run in the tensors' own dtype."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
