"""Every layout in which files keep an algorithm's factors, brought to the library's names and shapes.

One function an algorithm, in the table `DECODERS`. They look at shapes only and compose nothing, so that a small file
cannot ask for a large product; whether the factors fit a layer is for those to check who know the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..functional import oft
from . import lowrank
from .drafts import Draft, Hints, Roles, from_config, need, same, vector
from .safety import expect_small

_OFT_OPTIONS = ("scaled", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")


# --- dense and elementwise -------------------------------------------------------------------------------------------------
def _ia3(t: Roles, hints: Hints) -> Draft:
    if "ia3_weight" in t:  # as this library saves it, with the side in the config
        weight, on_input = t["ia3_weight"], bool(getattr(hints.config, "on_input", False))
    else:
        weight, flag = need(t, "(IA)^3", "weight", "on_input")
        if flag.numel() != 1:
            raise CheckpointError(f"(IA)^3: 'on_input' has shape {tuple(flag.shape)}; expected a single number")
        on_input = bool(flag.item())
    return Draft("IA3", {"ia3_weight": vector(weight, "(IA)^3: 'weight'")}, options={"on_input": on_input})


def _full(t: Roles, hints: Hints) -> Draft:
    (diff,) = need(t, "full", "diff")
    bias = t.get("diff_b")
    if diff.dim() < 2:  # a norm's weight, trained in full
        return _norm({"w_norm": diff} | ({} if bias is None else {"b_norm": bias}), hints)
    tensors = {"diff": diff} | ({} if bias is None else {"diff_b": vector(bias, "full: 'diff_b'")})
    return Draft("FULL", tensors, out=diff.shape[0], columns=prod(diff.shape[1:]), axes=diff.dim())


def _norm(t: Roles, hints: Hints) -> Draft:
    need(t, "norm", "w_norm")
    tensors = {name: vector(value, f"norm: {name!r}") for name, value in t.items()}
    same("norm", "size", *(v.numel() for v in tensors.values()))
    return Draft("NORM", tensors)


# --- rotations -------------------------------------------------------------------------------------------------------------
def _oft(t: Roles, hints: Hints) -> Draft:
    if "oft_blocks" not in t:
        return _oft_in_lists(t, hints)
    blocks = t["oft_blocks"]
    _expect_blocks(blocks, (3, 4))
    out = blocks.shape[-3] * blocks.shape[-1]
    tensors = {"oft_blocks": blocks}
    if "rescale" in t:
        rescale = vector(t["rescale"], "OFT: 'rescale'")
        if rescale.numel() != out:
            raise CheckpointError(f"OFT: 'rescale' has {rescale.numel()} values; the blocks turn {out} rows")
        tensors["rescale"] = rescale.reshape(out, *(1,) * max(1, t["rescale"].dim() - 1))
    options = {"constraint": _constraint(hints)}
    return Draft("DIAG_OFT" if blocks.dim() == 3 else "LYCORIS_BOFT", tensors, blocks.shape[-1], options, out)


def _oft_in_lists(t: Roles, hints: Hints) -> Draft:
    """sd-scripts' OFT for Flux: one list of blocks, or one for each share of a fused weight, each with a limit of its own."""
    names = [f"oft_blocks.{k}" for k in range(len(t))]
    parts = need(t, "OFT", *names)
    for part in parts:
        _expect_blocks(part, (3,))
    options = {"constraint": _constraint(hints)}
    if len(parts) == 1:
        return Draft("DIAG_OFT", {"oft_blocks": parts[0]}, parts[0].shape[-1], options, parts[0].shape[0] * parts[0].shape[-1])
    size = max(part.shape[-1] for part in parts)
    expect_small("OFT: the rotation in blocks of one size", sum(part.shape[0] * part.shape[-1] for part in parts), size)
    joined = torch.cat([_blocks_of(_limited(part, options["constraint"]), size) for part in parts])
    return Draft("DIAG_OFT", {"oft_blocks": joined}, size, {"constraint": 0.0}, joined.shape[0] * size)


def _expect_blocks(blocks: Tensor, axes: tuple[int, ...]) -> None:
    if blocks.dim() not in axes or blocks.shape[-1] != blocks.shape[-2]:
        raise CheckpointError(f"OFT: 'oft_blocks' has shape {tuple(blocks.shape)}; expected ([stages,] blocks, size, size)")


def _constraint(hints: Hints) -> float:
    """OFT's alpha is no strength but a limit on the rotation, for every output row; none from 0 down."""
    if hints.config is not None:
        return float(getattr(hints.config, "constraint", 0.0))
    if hints.alpha is not None and not math.isfinite(hints.alpha):
        raise CheckpointError(f"OFT: alpha is {hints.alpha}; expected a finite number")
    return max(hints.alpha or 0.0, 0.0)


def _limited(blocks: Tensor, constraint: float) -> Tensor:
    """Blocks whose rotation is within the limit."""
    norm = float(torch.linalg.vector_norm((blocks - blocks.mT).double()))
    limit = constraint * blocks.shape[0] * blocks.shape[-1]
    return blocks * (limit / norm) if 0 < limit < norm else blocks


def _blocks_of(blocks: Tensor, size: int) -> Tensor:
    """The same rotation in larger blocks."""
    count, small, _ = blocks.shape
    per, rest = divmod(size, small)
    if rest or count % per:
        raise CheckpointError(f"OFT: {count} blocks of size {small} beside ones of size {size} cannot be one adapter")
    if per == 1:
        return blocks
    larger = blocks.new_zeros(count // per, per, small, per, small)
    index = torch.arange(per)
    larger[:, index, :, index, :] = blocks.reshape(count // per, per, small, small).transpose(0, 1)
    return larger.reshape(count // per, size, size)


def _peft_oft(t: Roles, hints: Hints) -> Draft:
    (triangles,) = need(t, "OFT", "oft_R")
    if triangles.dim() != 2 or oft.triangle_size(triangles.shape[1]) < 2:
        raise CheckpointError(f"OFT: 'oft_R' has shape {tuple(triangles.shape)}; expected (blocks, size * (size - 1) / 2)")
    marker = t.get("scaled")
    options = {"scaled": marker is not None and bool((marker != 0).all())} | from_config(hints.config, "OFT", *_OFT_OPTIONS)
    return Draft("OFT", {"oft_R.weight": triangles}, triangles.shape[0], options)


# --- PEFT's sparse and shared ones -----------------------------------------------------------------------------------------
def _miss(t: Roles, hints: Hints) -> Draft:
    (block,) = need(t, "MiSS", "miss_block")
    mode: bool | str | None = None if hints.config is None else hints.config.init_weights
    if block.dim() < 2:
        raise CheckpointError(f"MiSS: 'miss_block' has shape {tuple(block.shape)}; expected at least two axes")
    if mode is None:  # without a config: a block of the whole width is "mini" as well
        mode = "bat" if block.dim() == 3 and block.shape[1] == block.shape[2] else "mini"
    if mode == "bat":
        if block.dim() != 3 or block.shape[1] != block.shape[2]:
            raise CheckpointError(f"MiSS \"bat\": 'miss_block' has shape {tuple(block.shape)}; expected (out / r, r, r)")
        return Draft("MISS", dict(t), block.shape[-1], {"init_weights": "bat"}, out=block.shape[0] * block.shape[1])
    options: dict[str, Any] = {"init_weights": "mini", "mini_r": block.shape[1]} if mode == "mini" else {"init_weights": True}
    return Draft("MISS", dict(t), block.shape[0], options)


def _shira(t: Roles, hints: Hints) -> Draft:
    (values,) = need(t, "SHiRA", "shira_weight")
    if "shira_gaps" in t:
        return Draft("SHIRA", {"shira_weight": vector(values, "SHiRA: 'shira_weight'"), "shira_gaps": t["shira_gaps"]})
    (indices,) = need(t, "SHiRA", "shira_indices")
    return sparse(values, indices, "SHiRA: 'shira_weight'", "SHiRA: 'shira_indices'")


def sparse(values: Tensor, indices: Tensor, what: str, where: str) -> Draft:
    """Single entries of the weight, at rows and columns of any integer or integral floating type."""
    values = vector(values, what)
    if tuple(indices.shape) != (2, values.numel()):
        raise CheckpointError(f"{where} has shape {tuple(indices.shape)}; expected {(2, values.numel())}")
    whole = indices.to(torch.int64)
    if indices.is_floating_point() and not bool((whole == indices).all()):
        raise CheckpointError(f"{where} holds numbers that are no positions")
    if int(whole.min()) < 0 or int(whole.max()) >= 2**31:
        raise CheckpointError(f"{where} runs from {int(whole.min())} to {int(whole.max())}; expected positions in a weight")
    return Draft("SHIRA", {"shira_weight": values, "shira_indices": whole.to(torch.int32)})


Decoder = Callable[[Roles, Hints], Draft]
#: group of suffixes -> decoder, in the order in which LyCORIS takes the first that matches
DECODERS: dict[str, Decoder] = {
    "lora": lowrank.lora,
    "loha": lowrank.loha,
    "ia3": _ia3,
    "lokr": lowrank.lokr,
    "full": _full,
    "norm": _norm,
    "oft": _oft,
    "glora": lowrank.glora,
    "tlora": lowrank.tlora,
    "peft_oft": _peft_oft,
    "miss": _miss,
    "shira": _shira,
}
