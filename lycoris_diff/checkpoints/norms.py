"""How large a change of a weight is, without building it where its factors tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checkpoint import Entry
from .rewrite import without_core

#: ranks up to which the product of two Gram matrices is cheaper than the product itself
_SMALL_RANK = 24


def delta_norm(entries: Entry | Sequence[Entry]) -> float | None:
    """Frobenius norm of the change of a weight, as trained.

    Args:
        entries: what a file says about one weight; the norms of several are added as if they were orthogonal.

    Returns:
        For DoRA the norm of the low-rank change before it is normalised. None where the change depends on the base weight
        (GLoRA, (IA)^3, rotations, T-LoRA, MiSS "bat") or only a bias changes.
    """
    listed = [entries] if isinstance(entries, Entry) else list(entries)
    squares = [s for e in listed if (s := _square(e)) is not None]
    return float(sum(squares)) ** 0.5 if squares else None


@torch.no_grad()
def _square(entry: Entry) -> float | None:
    rule = _RULES.get(entry.algorithm)
    value = rule({k: _wide(v) for k, v in without_core(entry).tensors.items()}, entry) if rule else None
    return None if value is None else float(value) * entry.scale**2


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() and t.dtype.itemsize < 4 else t


def _sum(t: Tensor) -> Tensor:
    return t.double().square().sum() if t.numel() < 2**16 else t.square().sum(dtype=torch.float64)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of ``left (m, r) @ right (r, n)``: the entrywise product of the Gram matrices."""
    left, right = left.flatten(1), right.flatten(1)
    return ((left.mT @ left).double() * (right @ right.mT).double()).sum()


def _loha(t: dict[str, Tensor], entry: Entry) -> Tensor:
    a1, b1, a2, b2 = t["hada_w1_a"], t["hada_w1_b"], t["hada_w2_a"], t["hada_w2_b"]
    if a1.shape[1] <= _SMALL_RANK:
        # rows of the Khatri-Rao product, so that the change is one product of rank r^2
        left = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        right = (b1[:, None] * b2[None]).flatten(0, 1)
        return _product(left, right)
    return _sum((a1 @ b1) * (a2 @ b2))


def _lokr(t: dict[str, Tensor], entry: Entry) -> Tensor:
    rows = entry.options.get("rows")
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"].flatten(1) if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    if rows is None:
        return _sum(w1) * _sum(w2)
    each = w1.double().square().sum(1)[:, None] * w2.double().square().sum(1)
    return each.flatten()[rows[0] : rows[0] + rows[1]].sum()


_RULES: dict[str, Callable[[dict[str, Tensor], Entry], Tensor | None]] = {
    "LORA": lambda t, e: _product(t["lora_B.weight"], t["lora_A.weight"]),
    "LOHA": _loha,
    "LOKR": _lokr,
    "FULL": lambda t, e: _sum(t["diff"]) if "diff" in t else None,
    "NORM": lambda t, e: _sum(t["w_norm"]) if "w_norm" in t else None,
    "SHIRA": lambda t, e: _sum(t["shira_weight"]),
}
