"""The same change of a weight in other factors: what a writer needs where a format cannot say it as it stands.

Every function is exact up to the rounding of one product, which is kept in float32 or better unless the factors' own dtype
holds it without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Entry
from .safety import expect_small
from .slices import strength_factor, times


def with_strength_one(entry: Entry) -> Entry:
    """An entry of strength 1: the strength is multiplied into a factor.

    Raises:
        CheckpointError: the algorithm has no factor that takes it up.
    """
    if entry.scale == 1.0:
        return entry
    name = strength_factor(entry)
    if name is None:
        raise CheckpointError(f"{entry.algorithm}: its strength of {entry.scale:g} cannot be moved into a factor")
    tensors = {**entry.tensors, name: times(entry.tensors[name], entry.scale)}
    return replace(entry, tensors=tensors, scale=1.0, alpha=float(max(entry.rank, 1)))


def without_core(entry: Entry) -> Entry:
    """Tucker cores multiplied into the inner factors; the rank stays.

    ``W = sum_pq up[p] core[p, q, *k] down[q]`` is a plain product with ``down'[p, *k] = sum_q core[p, q, *k] down[q]``.
    """
    t, options = dict(entry.tensors), {k: v for k, v in entry.options.items() if k != "use_effective_conv2d"}
    cores = [row for row in _CORED.get(entry.algorithm, ()) if row[0] in t]
    for core, inner, outer, flat in cores:
        middle, right = t.pop(core), t[inner].flatten(1)
        expect_small(f"{entry.algorithm}: the product of {core!r} and {inner!r}", *middle.shape[2:], *right.shape)
        product = torch.einsum("pq...,qi->pi...", middle.double(), right.double())
        t[inner] = _narrowed(product.flatten(1) if flat else product, t[inner].dtype)
        if outer:
            t[outer] = t[outer].mT.contiguous()
    return replace(entry, tensors=t, options=options) if cores else entry


#: core, inner factor it goes into, outer factor that the core's layout transposes, whether the inner factor is kept flat
_CORED: dict[str, tuple[tuple[str, str, str, bool], ...]] = {
    "LORA": (("lora_mid.weight", "lora_A.weight", "", False),),
    "LOHA": (("hada_t1", "hada_w1_b", "hada_w1_a", True), ("hada_t2", "hada_w2_b", "hada_w2_a", True)),
    "LOKR": (("lokr_t2", "lokr_w2_b", "lokr_w2_a", True),),
    "GLORA": (("glora_bm", "glora_b2", "", False),),
}


def portable_lokr(entry: Entry, shape: Sequence[int] | None = None) -> Entry:
    """A LoKr in one of the forms that all readers agree about.

    LyCORIS and PEFT expect full halves from a rank of half their larger side on, so these are multiplied out; cores and a
    low-rank first half beside a full second half as well. With both halves full the strength is 1, since alpha is ignored then.

    Args:
        entry: the LoKr.
        shape: canonical shape of the weight; without it the second half stays as it is.
    """
    entry = without_core(entry)
    t = dict(entry.tensors)
    if "lokr_w2_a" in t and shape is not None:
        kernel = tuple(shape[2:])
        columns = t["lokr_w2_b"].shape[1] // prod(kernel)
        if 2 * t["lokr_w2_b"].shape[0] >= max(t["lokr_w2_a"].shape[0], columns):
            t["lokr_w2"] = _multiplied(t, "lokr_w2").reshape(-1, columns, *kernel)
    if "lokr_w1_a" in t:
        large = 2 * t["lokr_w1_b"].shape[0] >= max(t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
        if large or "lokr_w2" in t:
            t["lokr_w1"] = _multiplied(t, "lokr_w1")
    full = "lokr_w1" in t and "lokr_w2" in t
    entry = replace(entry, tensors=t)
    return with_strength_one(entry) if full else entry


def _multiplied(t: dict[str, Tensor], half: str) -> Tensor:
    """A half out of its low-rank factors, which are taken away."""
    a, b = t.pop(f"{half}_a"), t.pop(f"{half}_b")
    expect_small(f"LOKR: {half!r}", a.shape[0], b.shape[1])
    return _narrowed(a.double() @ b.double(), a.dtype)


def miss_as_lora(entry: Entry, shape: Sequence[int] | None) -> Entry:
    """MiSS as the LoRA it is: its block times a selection of input channels.

    ``dW[o, i] = B[i mod r, o mod m]`` is ``up (out, r)``, the block repeated along the rows, times ``down (r, in)``, ones
    where ``i mod r`` is the row's number.

    Raises:
        CheckpointError: mode "bat", which depends on the base weight; a kernel larger than one; a layer of unknown size.
    """
    mode, block = entry.options.get("init_weights", True), entry.tensors["miss_block"]
    if mode == "bat":
        raise CheckpointError('MiSS "bat" depends on the base weight and has no form outside PEFT; write format "peft"')
    if shape is None:
        raise CheckpointError("MiSS does not tell the size of its layer; give the base model")
    if block.dim() > 2 and any(n != 1 for n in block.shape[2:]):
        raise CheckpointError('MiSS on a convolution with a kernel has no low-rank form; write format "peft"')
    (out, inp, *kernel), rank = shape, block.shape[0]
    up = block.reshape(rank, -1).mT.repeat(out // block.shape[1], 1)
    down = torch.zeros(rank, inp, dtype=block.dtype)
    down[torch.arange(inp) % rank, torch.arange(inp)] = 1
    ones = [1] * len(kernel)
    tensors = {"lora_A.weight": down.reshape(rank, inp, *ones), "lora_B.weight": up.reshape(out, rank, *ones).contiguous()}
    return Entry("LORA", tensors, scale=entry.scale, rank=rank, alpha=entry.scale * rank, alpha_source=entry.alpha_source)


def weight_shape(entry: Entry, flat: bool = False) -> tuple[int, ...] | None:
    """Canonical shape of the weight that an entry changes, as far as its factors tell it.

    Args:
        entry: factors.
        flat: whether ``(out, in * K)`` will do, where the kernel does not show.

    Returns:
        ``(out, in, *k)``, ``(dim,)`` for norms, None when the factors leave it open.
    """
    t: dict[str, Any] = {name: tuple(value.shape) for name, value in entry.tensors.items()}
    try:
        shape, certain = _SHAPES[entry.algorithm](t) if entry.algorithm in _SHAPES else (None, False)
    except (KeyError, IndexError, ValueError):
        return None
    return shape if certain or flat else None


Found = tuple[tuple[int, ...] | None, bool]


def _lora_shape(t: dict[str, Any]) -> Found:
    (_, inp, *kernel), out = t["lora_A.weight"], t["lora_B.weight"][0]
    return (out, inp, *t.get("lora_mid.weight", (0, 0, *kernel))[2:]), True


def _loha_shape(t: dict[str, Any]) -> Found:
    if "hada_t1" in t:
        return (t["hada_w1_a"][1], t["hada_w1_b"][1], *t["hada_t1"][2:]), len(t["hada_t1"]) != 4 or t["hada_t1"][-1] != 1
    return (t["hada_w1_a"][0], t["hada_w1_b"][1]), False


def _lokr_shape(t: dict[str, Any]) -> Found:
    a, c = t["lokr_w1"] if "lokr_w1" in t else (t["lokr_w1_a"][0], t["lokr_w1_b"][1])
    if "lokr_w2" in t:
        b, d, *kernel = t["lokr_w2"]
        return (a * b, c * d, *kernel), True
    if "lokr_t2" in t:
        core = t["lokr_t2"]
        return (a * t["lokr_w2_a"][1], c * t["lokr_w2_b"][1], *core[2:]), len(core) != 4 or core[-1] != 1
    return (a * t["lokr_w2_a"][0], c * t["lokr_w2_b"][1]), False


def _glora_shape(t: dict[str, Any]) -> Found:
    (_, inp, *kernel), out = t["glora_b2"], t["glora_b1"][0]
    return (out, inp, *t.get("glora_bm", (0, 0, *kernel))[2:]), True


_SHAPES = {
    "LORA": _lora_shape,
    "LOHA": _loha_shape,
    "LOKR": _lokr_shape,
    "GLORA": _glora_shape,
    "FULL": lambda t: (t.get("diff"), True),
    "NORM": lambda t: (t.get("w_norm") or t.get("b_norm"), True),
    "TLORA": lambda t: ((t["p_layer"][0], t["q_layer"][1]), False),
}


def _narrowed(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 result in a dtype where that loses nothing, else in float32 (float64 for float64 factors)."""
    narrow = exact.to(dtype)
    if dtype.itemsize < 8 and not torch.equal(narrow.double(), exact):
        narrow = exact.to(torch.promote_types(dtype if dtype.itemsize > 1 else torch.float32, torch.float32))
    return narrow.contiguous()
