"""Layouts of LoRA, LoHa, LoKr, GLoRA and T-LoRA in files, brought to the library's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from .drafts import Draft, Hints, Roles, core, flat, from_config, matrix, need, same, trailing


def lora(t: Roles, hints: Hints) -> Draft:
    """LoRA and LoCon."""
    down, up = need(t, "LoRA", "down", "up")
    mid = t.get("mid")
    if down.dim() < 2:
        raise CheckpointError(f"LoRA: 'down' has shape {tuple(down.shape)}; expected (rank, in, *kernel)")
    if mid is not None:
        down = matrix(down, "LoRA: 'down' beside a core")
    up = matrix(up, "LoRA: 'up'")
    rank = same("LoRA", "rank", down.shape[0], up.shape[1])
    axes = max(down.dim(), t["up"].dim(), 0 if mid is None else mid.dim())
    tensors = {"lora_A.weight": trailing(down, axes)}
    taps = prod(down.shape[2:])
    if mid is not None:
        if mid.dim() < 3 or tuple(mid.shape[:2]) != (rank, rank):
            raise CheckpointError(f"LoRA: 'mid' has shape {tuple(mid.shape)}; expected ({rank}, {rank}, *kernel)")
        tensors["lora_mid.weight"] = trailing(mid, axes)
        taps = prod(mid.shape[2:])
    tensors["lora_B.weight"] = trailing(up, axes)
    options = {} if mid is None else {"use_effective_conv2d": True}
    return Draft("LORA", tensors, rank, options, up.shape[0], down.shape[1] * taps, down.shape[1], axes, taps > 1)


def loha(t: Roles, hints: Hints) -> Draft:
    """LoHa; OneTrainer keeps it in four axes."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a1, b1, a2, b2 = need(t, "LoHa", *names)
    a1, a2 = matrix(a1, "LoHa: 'hada_w1_a'"), matrix(a2, "LoHa: 'hada_w2_a'")
    if not any(name in t for name in ("hada_t1", "hada_t2")):
        b1, b2 = flat(b1, "LoHa: 'hada_w1_b'"), flat(b2, "LoHa: 'hada_w2_b'")
        rank = same("LoHa", "rank", b1.shape[0], a1.shape[1], b2.shape[0], a2.shape[1])
        out, columns = (
            same("LoHa", "row count", a1.shape[0], a2.shape[0]),
            same("LoHa", "column count", b1.shape[1], b2.shape[1]),
        )
        kernel = prod(t["hada_w1_b"].shape[2:]) > 1
        return Draft("LOHA", dict(zip(names, (a1, b1, a2, b2))), rank, {}, out, columns, has_kernel=kernel)
    t1, t2 = need(t, "LoHa", "hada_t1", "hada_t2")
    b1, b2 = matrix(b1, "LoHa: 'hada_w1_b' beside a core"), matrix(b2, "LoHa: 'hada_w2_b' beside a core")
    rank = same("LoHa", "rank", b1.shape[0], a1.shape[0], b2.shape[0], a2.shape[0])
    t1, t2 = core(t1, rank, "LoHa: 'hada_t1'"), core(t2, rank, "LoHa: 'hada_t2'")
    if t1.shape != t2.shape:
        raise CheckpointError(f"LoHa: the cores have shapes {tuple(t1.shape)} and {tuple(t2.shape)}; expected the same")
    out, inp = same("LoHa", "row count", a1.shape[1], a2.shape[1]), same("LoHa", "column count", b1.shape[1], b2.shape[1])
    tensors = dict(zip(names, (a1, b1, a2, b2))) | {"hada_t1": t1, "hada_t2": t2}
    return Draft("LOHA", tensors, rank, {"use_effective_conv2d": True}, out, inp * prod(t1.shape[2:]), inp, has_kernel=True)


def lokr(t: Roles, hints: Hints) -> Draft:
    """LoKr with any of its halves full or in two factors."""
    for half in ("lokr_w1", "lokr_w2"):
        if half in t and any(f"{half}_{x}" in t for x in "ab"):
            raise CheckpointError(f"LoKr: {half!r} is there both whole and as a low-rank pair")
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    if "lokr_w1" in t:
        tensors["lokr_w1"] = matrix(t["lokr_w1"], "LoKr: 'lokr_w1'")
        a, c = tensors["lokr_w1"].shape
    else:
        w1a, w1b = need(t, "LoKr", "lokr_w1_a", "lokr_w1_b")
        w1a, w1b = matrix(w1a, "LoKr: 'lokr_w1_a'"), matrix(w1b, "LoKr: 'lokr_w1_b'")
        ranks["lokr_w1"] = same("LoKr", "first half's rank", w1b.shape[0], w1a.shape[1])
        tensors |= {"lokr_w1_a": w1a, "lokr_w1_b": w1b}
        a, c = w1a.shape[0], w1b.shape[1]
    channels, axes = 0, 0
    if "lokr_w2" in t:
        w2 = tensors["lokr_w2"] = t["lokr_w2"]
        if not 2 <= w2.dim() <= 5 or "lokr_t2" in t:
            raise CheckpointError(
                f"LoKr: 'lokr_w2' has shape {tuple(w2.shape)}; expected (out, in, *kernel) and no core beside it"
            )
        b, columns, channels = w2.shape[0], prod(w2.shape[1:]), c * w2.shape[1]
        axes, kernel = w2.dim(), prod(w2.shape[2:]) > 1
    else:
        w2a, w2b = need(t, "LoKr", "lokr_w2_a", "lokr_w2_b")
        w2a = matrix(w2a, "LoKr: 'lokr_w2_a'")
        if "lokr_t2" in t:
            w2b = matrix(w2b, "LoKr: 'lokr_w2_b' beside a core")
            rank = ranks["lokr_w2"] = same("LoKr", "second half's rank", w2b.shape[0], w2a.shape[0])
            t2 = tensors["lokr_t2"] = core(t["lokr_t2"], rank, "LoKr: 'lokr_t2'")
            b, columns, channels = w2a.shape[1], w2b.shape[1] * prod(t2.shape[2:]), c * w2b.shape[1]
            kernel = True
        else:
            kernel = prod(w2b.shape[2:]) > 1
            w2b = flat(w2b, "LoKr: 'lokr_w2_b'")
            ranks["lokr_w2"] = same("LoKr", "second half's rank", w2b.shape[0], w2a.shape[1])
            b, columns = w2a.shape[0], w2b.shape[1]
        tensors |= {"lokr_w2_a": w2a, "lokr_w2_b": w2b}
    options: dict[str, Any] = {"use_effective_conv2d": True} if "lokr_t2" in tensors else {}
    options |= from_config(hints.config, "LOKR", "rows")
    # where the halves' ranks differ, readers divide alpha by the second one's
    rank = ranks.get("lokr_w2", ranks.get("lokr_w1", 0))
    out = options["rows"][1] if "rows" in options else a * b
    draft = Draft("LOKR", tensors, rank, options, out, c * columns, channels, axes, kernel)
    return _equal_ranks(draft, ranks) if len(set(ranks.values())) > 1 else draft


def _equal_ranks(draft: Draft, ranks: Mapping[str, int]) -> Draft:
    """The half of smaller rank, filled up with zeros; the strength is left to the second half's rank."""
    smaller, larger = sorted(ranks, key=lambda half: ranks[half])
    missing = ranks[larger] - ranks[smaller]
    if smaller == "lokr_w2":
        raise CheckpointError(f"LoKr: the halves have ranks {ranks['lokr_w1']} and {ranks['lokr_w2']}; expected the same")
    a, b = draft.tensors["lokr_w1_a"], draft.tensors["lokr_w1_b"]
    draft.tensors |= {"lokr_w1_a": F.pad(a, (0, missing)), "lokr_w1_b": F.pad(b, (0, 0, 0, missing))}
    draft.remark = "the LoKr halves have different ranks; alpha is divided by the second half's, as most readers do"
    return draft


def glora(t: Roles, hints: Hints) -> Draft:
    """GLoRA in the order of LyCORIS today."""
    a1, a2, b1, b2 = need(t, "GLoRA", "a1", "a2", "b1", "b2")
    old = glora_is_old(t)
    remark = ""
    if old is None:
        old = bool(hints.old_glora)
        if hints.config is None:
            remark = f"GLoRA's factors fit both orders; read in the {'old' if old else 'new'} one"
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    a1, a2, b1 = matrix(a1, "GLoRA: 'a1'"), matrix(a2, "GLoRA: 'a2'"), matrix(b1, "GLoRA: 'b1'")
    rank = a2.shape[0]
    taps = prod(b2.shape[2:])
    tensors = {"glora_a1": a1, "glora_a2": a2, "glora_b1": b1, "glora_b2": b2 if taps > 1 else matrix(b2, "GLoRA: 'b2'")}
    if "bm" in t:
        bm = tensors["glora_bm"] = t["bm"]
        if taps > 1 or bm.dim() < 3 or tuple(bm.shape[:2]) != (rank, rank):
            raise CheckpointError(f"GLoRA: 'bm' has shape {tuple(bm.shape)}; expected ({rank}, {rank}, *kernel)")
        taps = prod(bm.shape[2:])
    return Draft("GLORA", tensors, rank, {}, b1.shape[0], b2.shape[1] * taps, has_kernel=taps > 1, remark=remark)


def glora_is_old(t: Roles) -> bool | None:
    """Whether GLoRA's factors are in the order of old LyCORIS versions; None when both orders fit equally well.

    Raises:
        CheckpointError: neither order fits.
    """
    a1, a2, b1, b2 = (tuple(v.shape[:2]) for v in need(t, "GLoRA", "a1", "a2", "b1", "b2"))

    def fits(a1: tuple[int, ...], a2: tuple[int, ...], b1: tuple[int, ...], b2: tuple[int, ...]) -> bool:
        shapes = (a1, a2, b1, b2)
        return all(len(s) == 2 for s in shapes) and a2[0] == a1[1] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]

    new, old = fits(a1, a2, b1, b2), fits(a2, a1, b2, b1)
    if not new and not old:
        raise CheckpointError(
            f"GLoRA: factors of shapes a1 {a1}, a2 {a2}, b1 {b1}, b2 {b2} fit neither the new nor the old order"
        )
    if new and old:  # a square layer: the order with the smaller rank
        return None if a2[0] == a1[0] else a1[0] < a2[0]
    return old


def tlora(t: Roles, hints: Hints) -> Draft:
    """T-LoRA, which starts from singular vectors of the weight."""
    q, p, lam = need(t, "T-LoRA", "q_layer", "p_layer", "lambda_layer")
    if not hints.use_data_init:
        raise CheckpointError("T-LoRA started from a random matrix, which the file does not hold; its change cannot be rebuilt")
    q, p = matrix(q, "T-LoRA: 'q_layer'"), matrix(p, "T-LoRA: 'p_layer'")
    rank = same("T-LoRA", "rank", q.shape[0], p.shape[1], lam.numel())
    told = hints.sig_type or getattr(hints.config, "sig_type", None)
    remark = "" if told else "T-LoRA files do not say which singular vectors they started from; taken as 'principal'"
    tensors = {"q_layer": q, "p_layer": p, "lambda_layer": lam.reshape(1, rank)}
    return Draft("TLORA", tensors, rank, {"sig_type": told or "principal"}, p.shape[0], q.shape[1], remark=remark)
