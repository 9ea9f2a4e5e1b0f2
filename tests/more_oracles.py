"""Dense float64 references of GLoRA, (IA)^3, full differences, norms, the OFT family and T-LoRA, written from the formulas.

Nothing here imports the library. Every function takes factors under their names and the canonical weight ``(out, in, *k)``
and gives the adapted weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def channels(weight: Tensor, matrix: Tensor) -> Tensor:
    """``sum_i W[o, i, *k] M[i, j]``, tap by tap."""
    flat = weight.reshape(*weight.shape[:2], -1)
    return torch.stack([flat[..., t] @ matrix for t in range(flat.shape[-1])], -1).reshape(
        weight.shape[0], matrix.shape[1], *weight.shape[2:]
    )


def glora(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    before = channels(weight, t["glora_a1"] @ t["glora_a2"])
    if "glora_bm" in t:
        beside = torch.einsum("op,pq...,qi->oi...", t["glora_b1"], t["glora_bm"], t["glora_b2"])
    else:
        beside = (t["glora_b1"] @ t["glora_b2"].flatten(1)).reshape(weight.shape)
    return weight + scale * (before + beside)


def ia3(t: Tensors, weight: Tensor, on_input: bool, groups: int = 1) -> Tensor:
    out, inp = weight.shape[:2]
    which = [[(o // (out // groups)) * inp + i if on_input else o for i in range(inp)] for o in range(out)]
    return weight * (1 + t["ia3_weight"][torch.tensor(which)]).reshape(out, inp, *[1] * (weight.dim() - 2))


def cayley(q: Tensor) -> Tensor:
    eye = torch.eye(len(q), dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def skew_blocks(blocks: Tensor, limit: float) -> Tensor:
    q = blocks - blocks.transpose(-1, -2)
    norm = q.norm() + 1e-8
    return q * limit / norm if limit > 0 and norm > limit else q


def rescaled(t: Tensors, weight: Tensor) -> Tensor:
    return weight * t["rescale"].reshape(-1, *[1] * (weight.dim() - 1)) if "rescale" in t else weight


def diag_oft(t: Tensors, weight: Tensor, constraint: float = 0.0) -> Tensor:
    q = skew_blocks(t["oft_blocks"], constraint * weight.shape[0])
    b, flat, rows = q.shape[-1], weight.flatten(1), []
    for n in range(len(q)):
        rotation, block = cayley(q[n]), flat[n * b : (n + 1) * b]
        # W'[m] = sum_n R[n, m] W[n]
        rows += [(rotation[:, m].unsqueeze(1) * block).sum(0) for m in range(b)]
    return rescaled(t, torch.stack(rows).reshape(weight.shape))


def boft(t: Tensors, weight: Tensor, constraint: float = 0.0) -> Tensor:
    q = skew_blocks(t["oft_blocks"], constraint * weight.shape[0])
    stages, n, b, _ = q.shape
    flat, out = weight.flatten(1), weight.shape[0]
    for i in range(stages):
        step = 2**i * b // 2
        # row (c, g, j) stands at (c, j, g) while the blocks turn
        order = [c * 2 * step + g * step + j for c in range(out // (2 * step)) for j in range(step) for g in range(2)]
        moved = flat[torch.tensor(order)]
        moved = torch.cat([cayley(q[i, k]) @ moved[k * b : (k + 1) * b] for k in range(n)])
        flat = torch.empty_like(moved).index_copy(0, torch.tensor(order), moved)
    return rescaled(t, flat.reshape(weight.shape))


def peft_oft(t: Tensors, weight: Tensor, scaled: bool = False, exact: bool = False) -> Tensor:
    entries = t["oft_R.weight"]
    b = next(b for b in range(2, 1000) if b * (b - 1) // 2 == entries.shape[1])
    above = torch.tensor([(row, column) for row in range(b) for column in range(row + 1, b)]).T
    eye, flat, columns = torch.eye(b, dtype=weight.dtype), weight.flatten(1), []
    for k in range(flat.shape[1] // b):
        vector = entries[k if len(entries) > 1 else 0] / (2 * math.sqrt(b - 1) if scaled else 1)
        q = torch.zeros(b, b, dtype=weight.dtype).index_put((above[0], above[1]), vector)
        q = q - q.T
        rotation = cayley(-q) if exact else eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        columns.append(flat[:, k * b : (k + 1) * b] @ rotation.T)
    return torch.cat(columns, 1).reshape(weight.shape)


def tlora(t: Tensors, weight: Tensor, scale: float, share: str = "principal") -> Tensor:
    flat, rank = weight.flatten(1), t["lambda_layer"].shape[1]
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    first = {"principal": 0, "last": len(s) - rank, "middle": (len(s) - rank) // 2}[share]
    begun = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in range(first, first + rank))
    now = t["p_layer"] @ torch.diag(t["lambda_layer"][0]) @ t["q_layer"]
    return weight + scale * (now - begun).reshape(weight.shape)
