"""Squared Frobenius norms of changes of a weight, from the factors alone; nothing much larger than these is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import loha as hadamard

Factors = Mapping[str, Tensor]

#: ranks up to which a LoHa may be taken for the product of rank r^2 that it is
_SMALL_RANK = 24
#: values of a change that are built at a time where there is no way around it
_AT_ONCE = 2**22


def total(t: Tensor) -> Tensor:
    """``||t||^2``."""
    return t.double().square().sum() if t.numel() < 2**16 else t.square().sum().double()


def product(left: Tensor, right: Tensor) -> Tensor:
    """``||left @ right||^2`` of ``(m, r)`` and ``(r, n)``: from r x r matrices, or the product if smaller."""
    if left.shape[1] ** 2 > left.shape[0] * right.shape[1]:
        return total(left @ right)
    return ((left.mT @ left).double() * (right @ right.mT).double()).sum()


def product_rows(left: Tensor, right: Tensor) -> Tensor:
    """``||row||^2`` of every row of ``left @ right``, ``(m,)``."""
    if left.shape[1] ** 2 > left.shape[0] * right.shape[1]:
        return (left @ right).double().square().sum(1)
    return ((left @ (right @ right.mT)).double() * left.double()).sum(1)


def core_gram(core: Tensor, inner: Tensor) -> Tensor:
    """``sum_k C_k B B^T C_k^T``, ``(r, r)`` in float64, of a core ``(r, r, *k)`` and the factor ``B (r, in)`` behind it."""
    flat = core.flatten(2).double()
    return torch.einsum("uvk,wvk->uw", torch.einsum("uqk,qv->uvk", flat, (inner @ inner.mT).double()), flat)


def lora(f: Factors) -> Tensor:
    """LoRA, with or without a core."""
    up, down = f["lora_B.weight"].flatten(1), f["lora_A.weight"].flatten(1)
    if "lora_mid.weight" not in f:
        return product(up, down)
    return ((up.mT @ up).double() * core_gram(f["lora_mid.weight"], down)).sum()


def loha(f: Factors, sampled: int = 0) -> Tensor:
    """LoHa; of large rank piece by piece.

    Args:
        f: its factors.
        sampled: estimate large ranks from so many evenly spaced rows; 0 takes all.
    """
    if "hada_t1" in f:
        return _loha_rows(f, f["hada_w1_a"].mT, f["hada_w2_a"].mT, sampled)
    (out, rank), columns = f["hada_w1_a"].shape, f["hada_w1_b"].shape[1]
    if rank <= _SMALL_RANK and rank**3 * (out + columns) <= 2 * out * columns:
        up = hadamard.khatri_rao(f["hada_w1_a"].mT, f["hada_w2_a"].mT).mT
        return product(up, hadamard.khatri_rao(f["hada_w1_b"], f["hada_w2_b"]))
    return _loha_rows(f, f["hada_w1_a"], f["hada_w2_a"], sampled)


def _loha_rows(f: Factors, a1: Tensor, a2: Tensor, sampled: int) -> Tensor:
    out, columns = a1.shape[0], f["hada_w1_b"].shape[1]
    rows = torch.linspace(0, out - 1, sampled).round().long() if sampled else torch.arange(out)
    cores = [(None, None)] if "hada_t1" not in f else list(zip(*(f[t].flatten(2).unbind(2) for t in ("hada_t1", "hada_t2"))))
    found = a1.new_zeros((), dtype=torch.float64)
    for some in rows.to(a1.device).split(max(1, _AT_ONCE // columns)):
        for first, second in cores:
            left = a1[some] if first is None else a1[some] @ first
            right = a2[some] if second is None else a2[some] @ second
            found += total((left @ f["hada_w1_b"]) * (right @ f["hada_w2_b"]))
    return found * (out / rows.numel())


def lokr(f: Factors, rows: tuple[int, int] | None = None) -> Tensor:
    """LoKr, or a window of its rows: the first of them, and how many."""
    if rows is None:
        return _first(f) * _second(f)
    first = f["lokr_w1"].double().square().sum(1) if "lokr_w1" in f else product_rows(f["lokr_w1_a"], f["lokr_w1_b"])
    second = _second_rows(f)

    def up_to(row: int) -> Tensor:
        block, rest = divmod(row, len(second))
        return first[:block].sum() * second.sum() + first[block : block + 1].sum() * second[:rest].sum()

    return up_to(rows[0] + rows[1]) - up_to(rows[0])


def _first(f: Factors) -> Tensor:
    return total(f["lokr_w1"]) if "lokr_w1" in f else product(f["lokr_w1_a"], f["lokr_w1_b"])


def _second(f: Factors) -> Tensor:
    if "lokr_w2" in f:
        return total(f["lokr_w2"])
    a, b = f["lokr_w2_a"], f["lokr_w2_b"]
    if "lokr_t2" in f:
        return ((a @ a.mT).double() * core_gram(f["lokr_t2"], b)).sum()
    return product(a, b)


def _second_rows(f: Factors) -> Tensor:
    if "lokr_w2" in f:
        return f["lokr_w2"].flatten(1).double().square().sum(1)
    a, b = f["lokr_w2_a"], f["lokr_w2_b"]
    if "lokr_t2" in f:
        return ((a.mT.double() @ core_gram(f["lokr_t2"], b)) * a.mT.double()).sum(1)
    return product_rows(a, b)


def miss(f: Factors, out: int, inp: int) -> Tensor:
    """MiSS in the modes "balance" and "mini" on so many output and input channels."""
    r, width = f["miss_block"].shape[:2]
    block = f["miss_block"].reshape(r, width, -1)
    repeats = torch.full((r,), inp // r, dtype=block.dtype, device=block.device)
    repeats[: inp % r] += 1
    return (block.square().sum((1, 2)) * repeats).sum() * (out // width)


def shira(f: Factors) -> Tensor:
    """SHiRA; values at the same position add up."""
    values, indices = f["shira_weight"], f.get("shira_indices")
    if indices is None or not values.numel():  # coded positions are never repeated
        return total(values)
    row, column = indices.long()
    flat = row * (int(column.max()) + 1) + column
    if not bool((flat[1:] > flat[:-1]).all()):
        place = flat.unique(return_inverse=True)[1]
        values = torch.zeros_like(values).index_add_(0, place, values)
    return total(values)


def dense(f: Factors) -> Tensor:
    """Changes that are stored as such."""
    return torch.stack([total(t) for t in f.values()]).sum()
