"""Tensors of every algorithm in the layouts of community files, and the change of the weight that they stand for, in float64.

Written from the formats' documentation only: no formula here comes from the library under test. A maker takes the
shape of one weight and returns tensors under their kohya/LyCORIS suffixes and a function from base weight and bias to
their changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor, "Tensor | None", float], "tuple[Tensor | None, Tensor | None]"]


@dataclass
class Made:
    """One algorithm on one weight.

    Attributes:
        tensors: suffix -> tensor, without alpha.
        change: (base weight, base bias, scale) -> (change of the weight, change of the bias), all float64.
        alpha: tensor of the file, None when the file has none.
        scale: strength that a reader of a community file must use.
        rank: for PEFT's configuration, where the scale is always alpha / r.
        peft_type, peft_options: how PEFT calls it, "" when it does not know the algorithm.
    """

    tensors: dict[str, Tensor]
    change: Change
    alpha: Tensor | None = None
    scale: float = 1.0
    rank: int = 0
    peft_type: str = ""
    peft_options: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Random factors, the same for the same seed: float32 tensors whose values a file's dtype holds exactly."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, std: float = 0.3) -> Tensor:
        return (std * torch.randn(*shape, generator=self.generator)).to(self.dtype).float()

    def positive(self, *shape: int) -> Tensor:
        return (0.4 + torch.rand(*shape, generator=self.generator)).to(self.dtype).float()


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(shape) - 2)


def _additive(delta: Callable[[], Tensor]) -> Change:
    """A change that does not depend on the base weight."""
    return lambda w, b, s: (s * delta().reshape(w.shape), None)


def _pairs(n: int) -> tuple[int, int]:
    """The two factors of n nearest its square root, small one first."""
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return small, n // small


# --- LoRA


def lora(d: Draw, shape: tuple[int, ...], rank: int = 3, alpha: float | None = 2.0) -> Made:
    out, inp, *k = shape
    down, up = d(rank, inp, *k), d(out, rank, *_ones(shape))

    def delta() -> Tensor:
        return up.double().reshape(out, rank) @ down.double().reshape(rank, -1)

    return Made(
        {"lora_down.weight": down, "lora_up.weight": up},
        _additive(delta),
        None if alpha is None else torch.tensor(alpha),
        1.0 if alpha is None else alpha / rank,
        rank,
        "LORA",
    )


def lora_tucker(d: Draw, shape: tuple[int, ...], rank: int = 3) -> Made:
    out, inp, *k = shape
    down, mid, up = d(rank, inp, *_ones(shape)), d(rank, rank, *k), d(out, rank, *_ones(shape))

    def delta() -> Tensor:
        return torch.einsum(
            "op,pqk,qi->oik",
            up.double().reshape(out, rank),
            mid.double().reshape(rank, rank, -1),
            down.double().reshape(rank, inp),
        )

    return Made(
        {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up},
        _additive(delta),
        torch.tensor(2.0),
        2.0 / rank,
        rank,
    )


def decomposed(made: Made, d: Draw, shape: tuple[int, ...], axis: str) -> Made:
    """DoRA on top of an additive algorithm: the norm is that of the changed weight, over rows ("out") or columns ("in")."""
    out, inp, *_ = shape
    size = (out, 1, *_ones(shape)) if axis == "out" else (1, inp, *_ones(shape))
    scale = d.positive(*size)
    dims = [i for i in range(len(shape)) if i != (0 if axis == "out" else 1)]
    inner = made.change

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        changed = w + inner(w, b, s)[0]
        norm = changed.pow(2).sum(dims, keepdim=True).sqrt()
        return changed * scale.double() / norm - w, None

    kept = made.peft_type if made.peft_type == "LORA" and axis == "out" else ""
    return Made(
        {**made.tensors, "dora_scale": scale},
        change,
        made.alpha,
        made.scale,
        made.rank,
        kept,
        {"use_dora": True} if kept else {},
    )


# --- LoHa


def loha(d: Draw, shape: tuple[int, ...], rank: int = 3, alpha: float | None = 1.5, four_d: bool = False) -> Made:
    out, inp, *k = shape
    span = inp * math.prod(k)
    a = [d(out, rank, std=0.6) for _ in range(2)]
    b = [d(rank, span, std=0.6) for _ in range(2)]

    def delta() -> Tensor:
        return (a[0].double() @ b[0].double()) * (a[1].double() @ b[1].double())

    def stored(t: Tensor, right: bool) -> Tensor:
        if not four_d or not k:
            return t
        return t.reshape(rank, inp, *k) if right else t.reshape(out, rank, *_ones(shape))

    tensors = {
        "hada_w1_a": stored(a[0], False),
        "hada_w1_b": stored(b[0], True),
        "hada_w2_a": stored(a[1], False),
        "hada_w2_b": stored(b[1], True),
    }
    scale = 1.0 if alpha is None else alpha / rank
    return Made(tensors, _additive(delta), None if alpha is None else torch.tensor(alpha), scale, rank, "LOHA")


def loha_cp(d: Draw, shape: tuple[int, ...], rank: int = 3) -> Made:
    out, inp, *k = shape
    halves = [(d(rank, rank, *k, std=0.6), d(rank, out, std=0.6), d(rank, inp, std=0.6)) for _ in range(2)]

    def half(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ijk,io,jc->ock", t.double().reshape(rank, rank, -1), a.double(), b.double())

    names = ("hada_t{}", "hada_w{}_a", "hada_w{}_b")
    tensors = {name.format(n + 1): t for n, half_ in enumerate(halves) for name, t in zip(names, half_)}
    return Made(tensors, _additive(lambda: half(*halves[0]) * half(*halves[1])), torch.tensor(1.5), 1.5 / rank, rank)


# --- LoKr


def lokr(
    d: Draw,
    shape: tuple[int, ...],
    *,
    w1: str = "full",
    w2: str = "low",
    rank: int = 2,
    alpha: float | None = 1.0,
    split: tuple[int, int] | None = None,
    swap_out: bool = False,
    alpha_dtype: torch.dtype = torch.float32,
) -> Made:
    """``w1`` and ``w2`` are "full", "low" (two factors) or, for ``w2`` of a convolution, "tucker".

    Args:
        split: rows and columns of the first Kronecker factor; by default the small halves of balanced factorizations.
        swap_out: the first factor gets the big half of the rows, as LyCORIS' unbalanced factorization does.
    """
    out, inp, *k = shape
    ol, im = split or (_pairs(out)[1 if swap_out else 0], _pairs(inp)[0])
    ok, in_ = out // ol, inp // im
    tensors: dict[str, Tensor] = {}
    if w1 == "full":
        tensors["lokr_w1"] = d(ol, im, std=0.6)
    else:
        tensors["lokr_w1_a"], tensors["lokr_w1_b"] = d(ol, rank, std=0.6), d(rank, im, std=0.6)
    if w2 == "full":
        tensors["lokr_w2"] = d(ok, in_, *k)
    elif w2 == "low":
        tensors["lokr_w2_a"], tensors["lokr_w2_b"] = d(ok, rank, std=0.6), d(rank, in_ * math.prod(k), std=0.6)
    else:
        tensors["lokr_t2"] = d(rank, rank, *k, std=0.6)
        tensors["lokr_w2_a"], tensors["lokr_w2_b"] = d(rank, ok, std=0.6), d(rank, in_, std=0.6)

    def delta() -> Tensor:
        t = {name: value.double() for name, value in tensors.items()}
        left = t["lokr_w1"] if w1 == "full" else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if w2 == "full":
            right = t["lokr_w2"].reshape(ok, in_, -1)
        elif w2 == "low":
            right = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(ok, in_, -1)
        else:
            right = torch.einsum("ijk,ip,jq->pqk", t["lokr_t2"].reshape(rank, rank, -1), t["lokr_w2_a"], t["lokr_w2_b"])
        return torch.einsum("ab,pqk->apbqk", left, right).reshape(out, -1)

    both_full = w1 == "full" and w2 == "full"
    scale = 1.0 if both_full or alpha is None else alpha / rank
    options = {"decompose_both": w1 == "low"}
    stored = None if alpha is None else torch.tensor(alpha, dtype=torch.float64).to(alpha_dtype)
    # PEFT keeps a factor whole from a rank of half its size on: a large rank in its configuration
    return Made(tensors, _additive(delta), stored, scale, 64 if both_full else rank, "LOKR", options)


# --- algorithms that depend on the base weight


def glora(d: Draw, shape: tuple[int, ...], rank: int = 3, old: bool = False) -> Made:
    out, inp, *k = shape
    one = _ones(shape)
    a1, a2, b1, b2 = d(inp, rank, *one), d(rank, inp, *one), d(out, rank, *one), d(rank, inp, *k)

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        mix = a1.double().reshape(inp, rank) @ a2.double().reshape(rank, inp)
        wa = torch.einsum("oik,ij->ojk", w.reshape(out, inp, -1), mix)
        ba = (b1.double().reshape(out, rank) @ b2.double().reshape(rank, -1)).reshape(out, inp, -1)
        return s * (wa + ba).reshape(w.shape), None

    names = (
        ("a2.weight", "a1.weight", "b2.weight", "b1.weight") if old else ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    )
    return Made(dict(zip(names, (a1, a2, b1, b2))), change, torch.tensor(2, dtype=torch.int64), 2 / rank, rank)


def ia3(d: Draw, shape: tuple[int, ...], on_input: bool = False) -> Made:
    out, inp, *k = shape
    size = inp if on_input else out
    w_ = d(1, size, *_ones(shape)) if k else d(size)

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        factor = w_.double().reshape((1, -1, *_ones(shape)) if on_input else (-1, 1, *_ones(shape)))
        return w * factor, None

    return Made({"weight": w_, "on_input": torch.tensor(int(on_input))}, change)


def full(d: Draw, shape: tuple[int, ...], bias: bool = False) -> Made:
    diff, diff_b = d(*shape, std=0.05), d(shape[0], std=0.05)
    tensors = {"diff": diff, "diff_b": diff_b} if bias else {"diff": diff}
    return Made(tensors, lambda w, b, s: (diff.double(), diff_b.double() if bias else None))


def norm(d: Draw, shape: tuple[int, ...], bias: bool = True) -> Made:
    w_, b_ = d(shape[0]), d(shape[0])
    tensors = {"w_norm": w_, "b_norm": b_} if bias else {"w_norm": w_}
    return Made(tensors, lambda w, b, s: (w_.double(), b_.double() if bias else None))


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """Rotations of skew parts of square blocks; the norm of all of them together is held under ``limit`` unless that is 0."""
    q = blocks.double() - blocks.double().transpose(-1, -2)
    norm_ = q.norm()
    if limit > 0 and norm_ > limit:
        q = q * (limit / norm_)
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def diag_oft(
    d: Draw, shape: tuple[int, ...], constraint: float = 0.0, rescale: bool = False, block: int = 4, alpha: bool = True
) -> Made:
    out = shape[0]
    blocks = d(out // block, block, block)
    scale = d.positive(out, 1, *_ones(shape)) if rescale else None

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        r = _cayley(blocks, constraint * out)
        new = torch.einsum("knm,kn...->km...", r, w.reshape(out // block, block, *w.shape[1:])).reshape(w.shape)
        return (new if scale is None else scale.double() * new) - w, None

    tensors = {"oft_blocks": blocks} | ({} if scale is None else {"rescale": scale})
    return Made(tensors, change, torch.tensor(constraint) if alpha else None)


def boft(d: Draw, shape: tuple[int, ...], constraint: float = 0.0, rescale: bool = False) -> Made:
    out = shape[0]
    block = 2 if out % 4 else 4
    count = out // block
    stages = max(1, (count & -count).bit_length())  # stage i mixes rows 2^i * block / 2 apart, in pairs that must fit the rows
    blocks = d(stages, count, block, block)
    scale = d.positive(out, 1, *_ones(shape)) if rescale else None

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        r = _cayley(blocks, constraint * out)
        new, half = w.reshape(out, -1), block // 2
        for i in range(stages):
            stride = 2**i * half
            order = (
                torch.arange(out).reshape(-1, 2, stride).transpose(1, 2).reshape(-1)
            )  # neighbours become rows `stride` apart
            mixed = torch.einsum("dij,djx->dix", r[i], new[order].reshape(count, block, -1)).reshape(out, -1)
            new = torch.empty_like(new)
            new[order] = mixed
        new = new.reshape(w.shape)
        return (new if scale is None else scale.double() * new) - w, None

    return Made({"oft_blocks": blocks} | ({} if scale is None else {"rescale": scale}), change, torch.tensor(constraint))


def kohya_oft(d: Draw, shape: tuple[int, ...], count: int = 4) -> Made:
    return diag_oft(d, shape, constraint=1e-2, block=shape[0] // count)


def peft_oft(d: Draw, shape: tuple[int, ...], block: int = 4, scaled: bool = False) -> Made:
    """PEFT's OFT on a linear layer: rotates the input, Cayley's transform as a Neumann series of five terms."""
    inp = shape[1] * math.prod(shape[2:])
    count = inp // block
    vectors = d(count, block * (block - 1) // 2, std=0.1)

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        q = torch.zeros(count, block, block, dtype=torch.float64)
        rows, columns = torch.triu_indices(block, block, 1)
        v = vectors.double() / (2 * math.sqrt(block - 1)) if scaled else vectors.double()
        q[:, rows, columns] = v
        q = q - q.transpose(1, 2)
        eye = torch.eye(block, dtype=torch.float64)
        power, r = q, eye + 2 * q
        for _ in range(2, 4):
            power = power @ q
            r = r + 2 * power
        r = r + power @ q
        new = torch.einsum("okm,knm->okn", w.reshape(w.shape[0], count, block), r).reshape(w.shape)
        return new - w, None

    tensors = {"oft_R.weight": vectors}
    if scaled:
        tensors["oft_R.scaled_oft"] = torch.tensor(1.0)
    return Made(tensors, change, None, 1.0, count, "" if scaled else "OFT", {"oft_block_size": block, "r": 0})


def tlora(d: Draw, shape: tuple[int, ...], rank: int = 3, trained_from: Tensor | None = None) -> Made:
    """Training starts from the largest singular vectors of the base weight (or from random ones), and moves them a little."""
    out, inp, *_ = shape
    q, p, lam = d(rank, inp, std=0.1), d(out, rank, std=0.1), d(1, rank, std=0.1)
    if trained_from is None:
        start = (d(rank, inp), d(out, rank), d.positive(1, rank))
    else:
        u, sigma, vh = torch.linalg.svd(trained_from.reshape(out, -1).double(), full_matrices=False)
        start = (vh[:rank], u[:, :rank], sigma[None, :rank])
    q, p, lam = ((t + s).to(d.dtype).float() for t, s in zip((q, p, lam), start))
    q, p = q.reshape(rank, inp, *_ones(shape)), p.reshape(out, rank, *_ones(shape))

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        u, sigma, vh = torch.linalg.svd(w.reshape(out, -1), full_matrices=False)
        before = u[:, :rank] * sigma[:rank] @ vh[:rank]
        after = p.double().reshape(out, rank) * lam.double() @ q.double().reshape(rank, inp)
        return s * (after - before).reshape(w.shape), None

    return Made({"q_layer.weight": q, "p_layer.weight": p, "lambda_layer": lam}, change, torch.tensor(2.0), 2 / rank, rank)


# --- PEFT's own


def miss(d: Draw, shape: tuple[int, ...], mode: str = "balance", rank: int = 4) -> Made:
    out, inp = shape
    o, i = torch.meshgrid(torch.arange(out), torch.arange(inp), indexing="ij")
    if mode == "bat":
        block = d(out // rank, rank, rank)

        def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
            blocks = w.reshape(out // rank, rank, inp // rank, rank).transpose(1, 2)
            mix = block.double()[:, None]
            return (blocks @ mix + mix).transpose(1, 2).reshape(w.shape), None

        return Made({"miss_block": block}, change, None, 1.0, rank, "MISS", {"init_weights": "bat"})
    width = out // 2 if mode == "mini" else out
    block = d(rank, width)
    options = {"init_weights": "mini", "mini_r": width} if mode == "mini" else {"init_weights": True}
    return Made(
        {"miss_block": block}, lambda w, b, s: (block.double()[i % rank, o % width], None), None, 1.0, rank, "MISS", options
    )


def shira(d: Draw, shape: tuple[int, ...], index_dtype: torch.dtype = torch.int32, rank: int = 1) -> Made:
    out, inp = shape
    n = rank * (out + inp)
    places = torch.randperm(out * inp, generator=d.generator)[:n].sort().values
    index = torch.stack([places // inp, places % inp])
    values = d(n)

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        dense = torch.zeros_like(w)
        dense[index[0], index[1]] = values.double()
        return dense, None

    return Made({"shira_weight": values, "shira_indices": index.to(index_dtype)}, change, None, 1.0, rank, "SHIRA")


def sparse_bias(d: Draw, shape: tuple[int, ...]) -> Made:
    """LoRA with the entries that LyCORIS' extraction keeps beside it, as int16 places and fp16 values."""
    made = lora(d, shape)
    out, inp, *k = shape
    span = inp * math.prod(k)
    places = torch.randperm(out * span, generator=d.generator)[:7]
    index = torch.stack([places // span, places % span]).to(torch.int16)
    values = d(7).half()

    def change(w: Tensor, b: Tensor | None, s: float) -> tuple[Tensor, None]:
        dense = torch.zeros(out, span, dtype=torch.float64)
        dense[index[0].long(), index[1].long()] = values.double()
        return made.change(w, b, s)[0] + dense.reshape(w.shape), None

    extra = {"bias_indices": index, "bias_values": values, "bias_size": torch.tensor([out, span], dtype=torch.int16)}
    return Made({**made.tensors, **extra}, change, made.alpha, made.scale, made.rank)


@dataclass(frozen=True)
class Row:
    """One algorithm of the matrix: how it is made and what layers it exists for.

    ``kinds``: "linear", "conv1" (1x1), "conv" (kernel > 1), "norm"; ``square``: only on weights with as many inputs as outputs;
    ``divisible``: rows and columns are multiples of it; ``needs_weight``: the maker takes the base weight too.
    """

    make: Callable[..., Made]
    kinds: tuple[str, ...] = ("linear", "conv1", "conv")
    square: bool | None = None
    divisible: int = 1
    needs_weight: bool = False


LINEAR = ("linear",)
KERNEL = ("conv",)

ALGORITHMS: dict[str, Row] = {
    "lora": Row(lora),
    "lora-no-alpha": Row(lambda d, s: lora(d, s, alpha=None)),
    "lora-alpha-0": Row(lambda d, s: _with_alpha(lora(d, s), torch.tensor(0.0), 1.0)),
    "lora-alpha-1d": Row(lambda d, s: _with_alpha(lora(d, s), torch.tensor([1.5]), 0.5)),
    "lora-alpha-int64": Row(lambda d, s: _with_alpha(lora(d, s), torch.tensor(6), 2.0)),
    "lora-alpha-bf16": Row(lambda d, s: _with_alpha(lora(d, s), torch.tensor(27.71, dtype=torch.bfloat16), 27.75 / 3)),
    "lora-tucker": Row(lora_tucker, KERNEL),
    "lora-dora-rows": Row(lambda d, s: decomposed(lora(d, s), d, s, "out")),
    "lora-dora-columns": Row(lambda d, s: decomposed(lora(d, s), d, s, "in"), square=False),
    "dylora": Row(lambda d, s: lora(d, s, rank=4, alpha=4.0)),
    "loha": Row(loha),
    "loha-cp": Row(loha_cp, KERNEL),
    "loha-4d": Row(lambda d, s: loha(d, s, four_d=True), KERNEL),
    "loha-dora-rows": Row(lambda d, s: decomposed(loha(d, s), d, s, "out")),
    "loha-dora-columns": Row(lambda d, s: decomposed(loha(d, s), d, s, "in"), square=False),
    "lokr-full": Row(lambda d, s: lokr(d, s, w2="full", alpha=4.0)),
    "lokr-full-no-alpha": Row(lambda d, s: lokr(d, s, w2="full", alpha=None)),
    "lokr-full-alpha-1e10": Row(lambda d, s: lokr(d, s, w2="full", alpha=9999999999.0)),
    "lokr-full-alpha-inf": Row(lambda d, s: lokr(d, s, w2="full", alpha=9999999999.0, alpha_dtype=torch.float16)),
    "lokr-full-alpha-nan": Row(lambda d, s: lokr(d, s, w2="full", alpha=math.nan)),
    "lokr-full-rs": Row(lambda d, s: lokr(d, s, w2="full", alpha=4 * math.sqrt(2))),
    "lokr-w2": Row(lokr),
    "lokr-w1": Row(lambda d, s: lokr(d, s, w1="low", w2="full")),
    "lokr-both": Row(lambda d, s: lokr(d, s, w1="low")),
    "lokr-both-rank-1": Row(lambda d, s: lokr(d, s, w1="low", rank=1)),
    "lokr-tucker": Row(lambda d, s: lokr(d, s, w2="tucker"), KERNEL),
    "lokr-unbalanced": Row(lambda d, s: lokr(d, s, swap_out=True)),
    "lokr-factor": Row(lambda d, s: lokr(d, s, split=(s[0] // 2, s[1] // 2), w2="full"), divisible=2),
    "lokr-dora-rows": Row(lambda d, s: decomposed(lokr(d, s), d, s, "out")),
    "lokr-dora-columns": Row(lambda d, s: decomposed(lokr(d, s), d, s, "in"), square=False),
    "glora": Row(glora, square=False),
    "glora-old": Row(lambda d, s: glora(d, s, old=True), square=False),
    "glora-square": Row(glora, square=True),
    "ia3-out": Row(ia3),
    "ia3-in": Row(lambda d, s: ia3(d, s, on_input=True)),  # not on grouped convolutions, which LyCORIS cannot run
    "full": Row(full),
    "full-bias": Row(lambda d, s: full(d, s, bias=True)),
    "norm": Row(norm, ("norm",)),
    "diag-oft": Row(diag_oft, divisible=4),
    "diag-oft-no-alpha": Row(lambda d, s: diag_oft(d, s, alpha=False), divisible=4),
    "diag-oft-constraint": Row(lambda d, s: diag_oft(d, s, constraint=0.05), divisible=4),
    "diag-oft-rescale": Row(lambda d, s: diag_oft(d, s, rescale=True), divisible=4),
    "boft": Row(boft, divisible=4),
    "boft-constraint": Row(lambda d, s: boft(d, s, constraint=0.05), divisible=4),
    "boft-rescale": Row(lambda d, s: boft(d, s, rescale=True), divisible=4),
    "kohya-oft": Row(kohya_oft, divisible=4),
    "peft-oft": Row(peft_oft, LINEAR, divisible=4),
    "peft-oft-scaled": Row(lambda d, s: peft_oft(d, s, scaled=True), LINEAR, divisible=4),
    "tlora-data": Row(lambda d, s, w: tlora(d, s, trained_from=w), ("linear", "conv1"), needs_weight=True),
    "tlora-random": Row(tlora, ("linear", "conv1")),  # cannot be read: what training began with is lost
    "miss": Row(miss, LINEAR),
    "miss-odd": Row(lambda d, s: miss(d, s, rank=5), LINEAR),
    "miss-mini": Row(lambda d, s: miss(d, s, "mini"), LINEAR, divisible=2),
    "miss-bat": Row(lambda d, s: miss(d, s, "bat"), LINEAR, divisible=4),
    "shira": Row(shira, LINEAR),
    "shira-float-indices": Row(lambda d, s: shira(d, s, torch.float32), LINEAR),
    "sparse-bias": Row(sparse_bias),
}


def _with_alpha(made: Made, alpha: Tensor, scale: float) -> Made:
    made.alpha, made.scale = alpha, scale
    return made


def kind_of(shape: tuple[int, ...]) -> str:
    """Class of a weight in the matrix."""
    if len(shape) == 1:
        return "norm"
    if len(shape) == 2:
        return "linear"
    return "conv1" if all(k == 1 for k in shape[2:]) else "conv"


def fits(name: str, shape: tuple[int, ...]) -> bool:
    """Files of this algorithm exist for a weight of this shape."""
    row = ALGORITHMS[name]
    if kind_of(shape) not in row.kinds:
        return False
    if len(shape) == 1:
        return True
    if row.square is not None and row.square != (shape[0] == shape[1]):
        return False
    return all(n % row.divisible == 0 for n in shape[:2])


def make(name: str, weight: Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Made:
    """Factors of one algorithm for one weight."""
    row, shape = ALGORITHMS[name], tuple(weight.shape)
    return row.make(Draw(seed, dtype), shape, weight) if row.needs_weight else row.make(Draw(seed, dtype), shape)
