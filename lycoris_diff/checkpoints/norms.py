"""How large the changes in a file are, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..functional import norms
from .checkpoint import Entry


def delta_norm(entries: Entry | Sequence[Entry]) -> float | None:
    """Frobenius norm of the change of a weight, as trained.

    Args:
        entries: what a file says about one weight; the norms of several are added as if they were orthogonal.

    Returns:
        For DoRA the norm of the low-rank change before it is normalised. None where the change depends on the base weight
        (GLoRA, (IA)^3, rotations, T-LoRA), where the layer's size is needed (MiSS), or where only a bias changes.
    """
    listed = [entries] if isinstance(entries, Entry) else list(entries)
    squares = [s for e in listed if (s := _square(e)) is not None]
    return float(sum(squares)) ** 0.5 if squares else None


@torch.no_grad()
def _square(entry: Entry) -> float | None:
    rule = _RULES.get(entry.algorithm)
    value = rule({k: _wide(v) for k, v in entry.tensors.items()}, entry) if rule else None
    return None if value is None else float(value) * entry.scale**2


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() and t.dtype.itemsize < 4 else t


_RULES: dict[str, Callable[[dict[str, Tensor], Entry], Tensor | None]] = {
    "LORA": lambda t, e: norms.lora(t),
    "LOHA": lambda t, e: norms.loha(t),
    "LOKR": lambda t, e: norms.lokr(t, e.options.get("rows")),
    "FULL": lambda t, e: norms.total(t["diff"]) if "diff" in t else None,
    "NORM": lambda t, e: norms.total(t["w_norm"]) if "w_norm" in t else None,
    "SHIRA": lambda t, e: norms.shira(t),
}
