"""What an entry of a file does to a weight: float64, from the formulas alone, the slow and obvious way.

Nothing here imports the library. `change_weight` is the one function; every algorithm of the neutral form has a formula.
"""

from __future__ import annotations

import oracles
import torch
from torch import Tensor


def change_weight(entry, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in, *k) and bias as the entry leaves them."""
    t = {k: v.double() if v.is_floating_point() else v for k, v in entry.tensors.items()}
    if entry.algorithm in ADDITIVE:
        delta = ADDITIVE[entry.algorithm](entry, t, weight)
        magnitude = oracles.magnitude_of(t)
        if magnitude is not None:
            delta = oracles.dora(weight, delta, magnitude, entry.options["dora_axis"])
        return weight + delta, bias
    return OTHERS[entry.algorithm](entry, t, weight, bias)


# --- added to the weight
def lokr(entry, t, weight):
    window = entry.options.get("rows")
    if window is None:
        return oracles.lokr(t, entry.scale, tuple(weight.shape))
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"]
    second = t["lokr_w2_a"].mT if "lokr_t2" in t else t.get("lokr_w2", t.get("lokr_w2_a"))
    whole = oracles.lokr(t, entry.scale, (first.shape[0] * second.shape[0], *weight.shape[1:]))
    return whole[window[0] : window[0] + window[1]]


def glora(entry, t, weight):
    through = torch.einsum("oi...,ir,rj->oj...", weight, t["glora_a1"], t["glora_a2"])
    b1, b2 = t["glora_b1"].flatten(1), t["glora_b2"]
    if "glora_bm" in t:
        own = torch.einsum("op,pq...,qi->oi...", b1, t["glora_bm"], b2)
    else:
        own = (b1 @ b2.flatten(1)).reshape(weight.shape)
    return entry.scale * (through + own)


def tlora(entry, t, weight):
    """The trained product less the part of the singular value decomposition that training began with (largest values)."""
    rank = t["q_layer"].shape[0]
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    trained = t["p_layer"] * t["lambda_layer"] @ t["q_layer"]
    return entry.scale * (trained - u[:, :rank] * s[:rank] @ v[:rank]).reshape(weight.shape)


ADDITIVE = {
    "LORA": lambda e, t, w: oracles.lora(t, e.scale, tuple(w.shape)),
    "LOHA": lambda e, t, w: oracles.loha(t, e.scale, tuple(w.shape)),
    "LOKR": lokr,
    "MISS": lambda e, t, w: oracles.miss(t, e.options.get("init_weights", True), w),
    "SHIRA": lambda e, t, w: e.scale * oracles.shira(t, w),
    "GLORA": glora,
    "TLORA": tlora,
}


# --- everything else
def ia3(entry, t, weight, bias):
    factor = 1 + t["ia3_weight"]
    if entry.options.get("on_input"):
        return weight * factor.reshape(1, -1, *[1] * (weight.dim() - 2)), bias
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), bias


def full(entry, t, weight, bias):
    weight = weight + t["diff"].reshape(weight.shape) if "diff" in t else weight
    return weight, bias + t["diff_b"] if "diff_b" in t else bias


def diag_oft(entry, t, weight, bias):
    blocks = t["oft_blocks"]
    skew = blocks - blocks.transpose(1, 2)
    limit = entry.options.get("constraint", 0.0) * weight.shape[0]
    if limit and float(skew.norm()) > limit:
        skew = skew * limit / skew.norm()
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rows = []
    for k, q in enumerate(skew):
        rotation = (eye + q) @ torch.linalg.inv(eye - q)
        piece = weight[k * len(eye) : (k + 1) * len(eye)].flatten(1)
        rows.append(rotation.T @ piece)  # the block's second axis counts the new rows
    turned = torch.cat(rows).reshape(weight.shape)
    return turned * t["rescale"].reshape(-1, *[1] * (weight.dim() - 1)) if "rescale" in t else turned, bias


def oft(entry, t, weight, bias):
    """PEFT's: the input is rotated, block by block."""
    vectors = t["oft_R.weight"]
    size = weight.shape[1] // len(vectors)
    above = torch.triu_indices(size, size, 1)
    pieces = []
    for k, vector in enumerate(vectors):
        q = torch.zeros(size, size, dtype=torch.float64)
        q[above[0], above[1]] = vector
        q = q - q.T
        rotation = torch.eye(size, dtype=torch.float64)
        power = torch.eye(size, dtype=torch.float64)
        for term in range(1, 5):
            power = power @ q
            rotation = rotation + (2 if term < 4 else 1) * power
        pieces.append(weight[:, k * size : (k + 1) * size] @ rotation)
    return torch.cat(pieces, 1), bias


OTHERS = {"IA3": ia3, "FULL": full, "DIAG_OFT": diag_oft, "OFT": oft}
