"""Dense float64 references, written from the formulas alone; nothing here imports the library.

Every function takes the raw factor tensors under their file names and rebuilds the change of a weight the slow, obvious
way. All of it is plain differentiable torch, so autograd through it is the reference for gradients too.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_transposed(layer: nn.Module) -> bool:
    """transformers' Conv1D keeps its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def canonical_weight(layer: nn.Module) -> Tensor:
    """The weight in float64 as (out, in / groups, *kernel)."""
    weight = layer.weight.detach().to(torch.float64)
    return weight.T if is_transposed(layer) else weight


def to_layout(layer: nn.Module, canonical: Tensor) -> Tensor:
    return canonical.T if is_transposed(layer) else canonical


# ----------------------------------------------------------------------------------------------------- the algorithms


def tucker(core: Tensor, a: Tensor, b: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """sum_ij core[i, j, *k] a[i, p] b[j, q] -> (p, q, *k)."""
    rank_a, rank_b = core.shape[:2]
    core = core.reshape(rank_a, rank_b, *kernel)  # some files carry a trailing axis of one
    total = None
    for i in range(rank_a):
        for j in range(rank_b):
            outer = a[i].reshape(-1, 1, *[1] * len(kernel)) * b[j].reshape(1, -1, *[1] * len(kernel))
            term = outer * core[i, j].reshape(1, 1, *kernel)
            total = term if total is None else total + term
    return total


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Block (i, j) of the result is first[i, j] * second; axes of second after the first two are carried along."""
    rows = [torch.cat([first[i, j] * second for j in range(first.shape[1])], dim=1) for i in range(first.shape[0])]
    return torch.cat(rows, dim=0)


def lokr(t: Tensors, scale: float, shape: tuple[int, ...]) -> Tensor:
    kernel = shape[2:]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"], kernel)
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
        w2 = w2.reshape(w2.shape[0], -1, *kernel)
    return scale * kronecker(w1, w2).reshape(shape)


def loha(t: Tensors, scale: float, shape: tuple[int, ...]) -> Tensor:
    halves = []
    for n in "12":
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        half = tucker(t[f"hada_t{n}"], a, b, shape[2:]) if f"hada_t{n}" in t else a @ b
        halves.append(half.reshape(shape))
    return scale * halves[0] * halves[1]


def lora(t: Tensors, scale: float, shape: tuple[int, ...]) -> Tensor:
    down, up = t["lora_A.weight"], t["lora_B.weight"]
    rank = down.shape[0]
    up = up.reshape(shape[0], rank)
    if "lora_mid.weight" in t:
        core, down = t["lora_mid.weight"], down.reshape(rank, shape[1])
        return scale * torch.einsum("op,pq...,qi->oi...", up, core, down).reshape(shape)
    return scale * (up @ down.reshape(rank, -1)).reshape(shape)


def miss(t: Tensors, mode: Any, weight: Tensor) -> Tensor:
    block, shape = t["miss_block"], weight.shape
    if mode == "bat":
        rank = block.shape[-1]
        flat = weight.reshape(shape[0], -1)
        rows = []
        for a in range(shape[0] // rank):
            row = flat[a * rank : (a + 1) * rank]
            pieces = [row[:, b * rank : (b + 1) * rank] @ block[a] + block[a] for b in range(flat.shape[1] // rank)]
            rows.append(torch.cat(pieces, dim=1))
        return torch.cat(rows, dim=0).reshape(shape)
    out_index = torch.arange(shape[0]) % block.shape[1]  # block.shape[1] is out, or mini_r in the mini mode
    in_index = torch.arange(shape[1]) % block.shape[0]
    return block[in_index.unsqueeze(0), out_index.unsqueeze(1)]


def shira(t: Tensors, weight: Tensor) -> Tensor:
    rows, columns = t["shira_indices"].long()
    flat = torch.zeros(weight.shape[0], weight[0].numel(), dtype=torch.float64)
    return flat.index_put((rows, columns), t["shira_weight"], accumulate=True).reshape(weight.shape)


def magnitude_of(t: Tensors) -> Tensor | None:
    for name in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"):
        if name in t:
            return t[name]
    return None


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, axis: str) -> Tensor:
    """magnitude * (W + dW) / |W + dW|, the norm over one output row ("out") or one input column ("in")."""
    moved = weight + delta
    keep = 0 if axis == "out" else 1
    over = tuple(d for d in range(moved.ndim) if d != keep)
    norm = (moved * moved).sum(dim=over, keepdim=True).sqrt()
    shape = [1] * moved.ndim
    shape[keep] = moved.shape[keep]
    return magnitude.reshape(shape) * moved / norm - weight


def scaling(config: Any) -> float:
    alpha = config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha
    return alpha / math.sqrt(config.r) if getattr(config, "use_rslora", False) else alpha / config.r


def delta(config: Any, tensors: Tensors, layer: nn.Module) -> Tensor:
    """Change of the weight in the layer's own layout, float64, at strength one."""
    t = {k: v.to(torch.float64) if v.is_floating_point() else v for k, v in tensors.items()}
    weight = canonical_weight(layer)
    kind = type(config).__name__
    if kind == "LoKrConfig":
        change = lokr(t, scaling(config), weight.shape)
    elif kind == "LoHaConfig":
        change = loha(t, scaling(config), weight.shape)
    elif kind == "LoraConfig":
        change = lora(t, scaling(config), weight.shape)
    elif kind == "MissConfig":
        change = miss(t, config.init_weights, weight)
    elif kind == "ShiraConfig":
        change = shira(t, weight)
    else:
        raise NotImplementedError(kind)
    if getattr(config, "weight_decompose", False) or getattr(config, "use_dora", False):
        change = dora(weight, change, magnitude_of(t), config.dora_axis)
    return to_layout(layer, change)


# ------------------------------------------------------------------------------------------------------ the host layer


def padding_amounts(layer: nn.Module) -> list[tuple[int, int]]:
    """(before, after) for every spatial axis."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def apply(layer: nn.Module, x: Tensor, weight: Tensor | None = None, bias: bool = True) -> Tensor:
    """The layer's own operation with another weight (own layout), in float64 with explicit padding."""
    x = x.to(torch.float64)
    weight = layer.weight.detach().to(torch.float64) if weight is None else weight
    b = layer.bias.detach().to(torch.float64) if bias and layer.bias is not None else None
    if is_transposed(layer):
        y = x @ weight
        return y if b is None else y + b
    if not is_conv(layer):
        y = x @ weight.T
        return y if b is None else y + b
    n = len(layer.kernel_size)
    batched = x.ndim == n + 2
    x = x if batched else x.unsqueeze(0)
    pads = [amount for pair in reversed(padding_amounts(layer)) for amount in pair]
    if any(pads):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, pads, mode=mode)
    conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    y = conv(x, weight, b, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    return y if batched else y.squeeze(0)


def forward(layer: nn.Module, x: Tensor, changes: list[tuple[float, Tensor]]) -> Tensor:
    """Reference output of the layer with weight W + sum of strength * change."""
    weight = layer.weight.detach().to(torch.float64)
    for strength, change in changes:
        weight = weight + strength * change
    return apply(layer, x, weight)


# ------------------------------------------------------------------------------------------------------ factorization


def peft_factorization(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's rule, restated: a divisor is taken as given; otherwise the most balanced small-first pair under it."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    pairs = [(m, dimension // m) for m in range(1, dimension + 1) if dimension % m == 0 and m <= dimension // m]
    return max((pair for pair in pairs if pair[0] <= limit), default=(1, dimension))


def lokr_shapes(
    out: int, inp: int, kernel: tuple[int, ...], r: int, factor: int = -1, both: bool = False, core: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes PEFT documents for a new LoKr adapter; a Conv1d core keeps PEFT's trailing axis of one."""
    (out_l, out_k), (in_m, in_n) = peft_factorization(out, factor), peft_factorization(inp, factor)
    shapes: dict[str, tuple[int, ...]] = {}
    if both and r < max(out_l, in_m) / 2:
        shapes |= {"lokr_w1_a": (out_l, r), "lokr_w1_b": (r, in_m)}
    else:
        shapes["lokr_w1"] = (out_l, in_m)
    if r >= max(out_k, in_n) / 2:
        shapes["lokr_w2"] = (out_k, in_n, *kernel)
    elif core and any(k != 1 for k in kernel):
        core_kernel = (*kernel, 1) if len(kernel) == 1 else kernel
        shapes |= {"lokr_t2": (r, r, *core_kernel), "lokr_w2_a": (r, out_k), "lokr_w2_b": (r, in_n)}
    else:
        shapes |= {"lokr_w2_a": (out_k, r), "lokr_w2_b": (r, in_n * math.prod(kernel))}
    return shapes


def grid(**axes: list) -> list[dict]:
    return [dict(zip(axes, values)) for values in product(*axes.values())]
