"""Output rows of an adapter: how its factors lie along them, taking a range, exchanging the two halves.

A community file may hold one adapter for a weight that diffusers keeps in several modules (fused q/k/v), or with the rows in
another order (shift and scale of a final modulation). Everything here moves factors about; nothing is fitted, and what has
no exact form of about the same size is refused with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .blocks import at_least_float32
from .checkpoint import Entry
from .lokr_rows import block_rows, dense, first_half, joined, run_of, with_run

#: ranges of output rows, in the order in which they are wanted
Segments = Sequence[tuple[int, int]]
#: factor -> the axis along which it follows the output rows, and how many rows an index stands for; others serve all rows
Layout = dict[str, tuple[int, int]]

MAGNITUDES = ("lora_magnitude_vector", "dora_scale")
CORES = ("lora_mid.weight", "hada_t1", "hada_t2")
#: factors that follow the rows, and the rank axes of every factor
RANKS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "LORA": (("lora_B.weight",), {"lora_A.weight": 0, "lora_B.weight": 1}),
    "LOHA": (("hada_w1_a", "hada_w2_a"), {"hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0}),
}
#: factor that the change is proportional to
_PROPORTIONAL = {"LORA": "lora_B.weight", "LOHA": "hada_w1_a", "MISS": "miss_block", "SHIRA": "shira_weight"}
#: why only the whole weight will do
WHOLE = {
    "LYCORIS_BOFT": "its butterfly mixes all output rows",
    "TLORA": "its start is the SVD of the whole fused weight, which its rows do not tell",
}
COLUMN_DORA = "column-axis DoRA takes its norm over all output rows of the fused weight, of which a module has its own only"
_FUSED = "load it into a model that keeps the weight fused"


def take_rows(entry: Entry, rows: tuple[int, int], total: int) -> Entry:
    """The adapter of some output rows of a weight; factors are shared with the whole where possible.

    Args:
        entry: adapter of the whole weight.
        rows: first and last + 1.
        total: output rows of the whole weight.

    Raises:
        CheckpointError: the adapter has another number of rows, or its change of these rows has no exact form of its own.
    """
    start, stop = rows
    _expect_rows(entry, total)
    if not 0 <= start < stop <= total:
        raise CheckpointError(f"rows {start} to {stop} are not rows of a weight with {total} output rows")
    return entry if (start, stop) == (0, total) else _pick(entry, [(start, stop)], total)


def swap_halves(entry: Entry, total: int) -> Entry:
    """The adapter with the two halves of the ``total`` output rows exchanged; its own inverse.

    Raises:
        CheckpointError: the number of rows is another or odd, or the exchanged adapter has no exact form.
    """
    _expect_rows(entry, total)
    if total % 2:
        raise CheckpointError(f"{entry.algorithm}: {total} output rows have no two halves to exchange")
    return _pick(entry, [(total // 2, total), (0, total // 2)], total)


def row_count(entry: Entry) -> int | None:
    """Output rows of the weight that an adapter changes; None where its factors do not tell."""
    if entry.algorithm == "LOKR":
        rows = entry.options.get("rows")
        return rows[1] if rows else entry.tensors[first_half(entry)].shape[0] * block_rows(entry)
    for name, (axis, unit) in layout(entry).items():
        if name not in MAGNITUDES:
            return entry.tensors[name].shape[axis] * unit
    return None


# --- how the factors lie ------------------------------------------------------------------------------------------------------
def _miss_layout(entry: Entry) -> Layout:
    table: dict[object, Layout] = {"bat": {"miss_block": (0, entry.tensors["miss_block"].shape[-1])}, "mini": {}}
    return table.get(entry.options.get("init_weights", True), {"miss_block": (1, 1)})


_LAYOUTS: dict[str, Callable[[Entry], Layout]] = {
    "LORA": lambda e: {"lora_B.weight": (0, 1)},
    "LOHA": lambda e: dict.fromkeys(("hada_w1_a", "hada_w2_a"), (1 if "hada_t1" in e.tensors else 0, 1)),
    "LOKR": lambda e: {},
    "GLORA": lambda e: {"glora_b1": (0, 1)},
    "IA3": lambda e: {} if e.options.get("on_input") else {"ia3_weight": (0, 1)},
    "FULL": lambda e: {"diff": (0, 1), "diff_b": (0, 1)},
    "NORM": lambda e: {"w_norm": (0, 1), "b_norm": (0, 1)},
    "DIAG_OFT": lambda e: {"oft_blocks": (0, e.tensors["oft_blocks"].shape[-1]), "rescale": (0, 1)},
    "LYCORIS_BOFT": lambda e: {"oft_blocks": (1, e.tensors["oft_blocks"].shape[-1])},
    "OFT": lambda e: {},
    "MISS": _miss_layout,
    "SHIRA": lambda e: {},
    "TLORA": lambda e: {"p_layer": (0, 1)},
}


def layout(entry: Entry) -> Layout:
    """Row factors that are there, DoRA's magnitude of the rows among them.

    Raises:
        CheckpointError: nothing is known about the algorithm's rows.
    """
    if entry.algorithm not in _LAYOUTS:
        raise CheckpointError(f"{entry.algorithm}: not known how its factors follow the output rows, so it stays in one piece")
    found = {k: v for k, v in _LAYOUTS[entry.algorithm](entry).items() if k in entry.tensors}
    for name in MAGNITUDES:
        if name in entry.tensors and entry.options.get("dora_axis", "out") == "out":
            shape = entry.tensors[name].shape
            # (out,) and (out, 1 ...), or PEFT's (1, out, 1 ...) of convolutions
            peft = name == "lora_magnitude_vector" and len(shape) > 2
            found[name] = (next((i for i, n in enumerate(shape) if n > 1), int(peft)), 1)
    return found


def has_column_dora(entry: Entry) -> bool:
    """Whether the adapter's norm runs over the output rows."""
    return entry.options.get("dora_axis") == "in" and any(m in entry.tensors for m in MAGNITUDES)


def changed(entry: Entry, tensors: dict[str, Tensor], rank: int | None = None, **fields: object) -> Entry:
    """Another entry with the same strength; a new rank takes its alpha along."""
    fields |= {"tensors": tensors}
    if rank is not None and rank != entry.rank:
        fields |= {"rank": rank, "alpha": None if entry.alpha is None else entry.scale * rank}
    return dataclasses.replace(entry, **fields)  # type: ignore[arg-type]


def strength_factor(entry: Entry) -> str | None:
    """Name of a factor that takes up a strength, since the change is proportional to it; None where there is none."""
    if entry.algorithm == "LOKR":
        return first_half(entry)
    return None if entry.options.get("init_weights") == "bat" else _PROPORTIONAL.get(entry.algorithm)


def times(t: Tensor, factor: float) -> Tensor:
    """The product, in the tensor's dtype where that is exact, else in float32 or better."""
    product = t.double() * factor
    narrow = product.to(t.dtype)
    return narrow if torch.equal(narrow.double(), product) else product.to(at_least_float32(t.dtype))


def _expect_rows(entry: Entry, total: int) -> None:
    own = row_count(entry)
    if own is not None and own != total:
        raise CheckpointError(f"{entry.algorithm} changes {own} output rows, the weight has {total}")


# --- taking and exchanging ----------------------------------------------------------------------------------------------------
def _pick(entry: Entry, segments: Segments, total: int) -> Entry:
    """Rows of the segments, one after the other."""
    partial = _size(segments) < total
    # the SVD of rows in another order is the SVD with its rows in that order
    if entry.algorithm in WHOLE and (partial or entry.algorithm != "TLORA"):
        raise CheckpointError(f"{entry.algorithm}: {WHOLE[entry.algorithm]}; {_FUSED}")
    if partial and has_column_dora(entry):
        raise CheckpointError(f"{entry.algorithm}: {COLUMN_DORA}; {_FUSED}")
    return _PICK.get(entry.algorithm, _pick_factors)(entry, segments, total)


def _size(segments: Segments) -> int:
    return sum(stop - start for start, stop in segments)


def _pick_factors(entry: Entry, segments: Segments, total: int) -> Entry:
    """Row factors of the segments; the rest is shared."""
    picked = {name: _gather(entry, name, axis, unit, segments) for name, (axis, unit) in layout(entry).items()}
    return changed(entry, {**entry.tensors, **picked})


def _gather(entry: Entry, name: str, axis: int, unit: int, segments: Segments) -> Tensor:
    pieces = []
    for start, stop in segments:
        if start % unit or stop % unit:
            raise CheckpointError(
                f"{entry.algorithm}: rows {start} to {stop} cut a block of {unit} rows of {name!r}, which is not divisible; "
                f"{_FUSED}"
            )
        pieces.append(entry.tensors[name].narrow(axis, start // unit, (stop - start) // unit))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _pick_low_rank(entry: Entry, segments: Segments, total: int) -> Entry:
    """LoRA and LoHa; ranks that only rows elsewhere use stay behind: what was fused block by block comes apart again."""
    part = _pick_factors(entry, segments, total)
    columns, axes = RANKS[entry.algorithm]
    if len(segments) > 1 or any(name in entry.tensors for name in CORES):
        return part
    keep = [_private(entry.tensors[name].flatten(1), part.tensors[name].flatten(1)) for name in columns]
    index = keep[0]
    if index is None or any(k is None or not torch.equal(k, index) for k in keep):
        return part
    tensors = {k: v.index_select(axes[k], index) if k in axes else v for k, v in part.tensors.items()}
    return changed(part, tensors, index.numel())


def _private(whole: Tensor, part: Tensor) -> Tensor | None:
    """Columns that only the part's rows use; None unless every column belongs either to the part or to the rest."""
    everywhere, here = (t.to(torch.float32).count_nonzero(0) for t in (whole, part))
    mine, shared = (here > 0) & (here == everywhere), (here > 0) & (here < everywhere)
    others = (everywhere > 0) & (here == 0)
    return mine.nonzero().squeeze(1) if others.any() and mine.any() and not shared.any() else None


def _pick_shira(entry: Entry, segments: Segments, total: int) -> Entry:
    """Entries that lie in the segments, renumbered; their order stays."""
    indices = entry.tensors["shira_indices"]
    row, moved, kept, position = indices[0], indices[0].clone(), torch.zeros_like(indices[0], dtype=torch.bool), 0
    for start, stop in segments:
        here = (row >= start) & (row < stop)
        moved = torch.where(here, row - start + position, moved)
        kept |= here
        position += stop - start
    pair = torch.stack([moved, indices[1]])[:, kept]
    return changed(entry, {**entry.tensors, "shira_weight": entry.tensors["shira_weight"][kept], "shira_indices": pair})


def _pick_miss(entry: Entry, segments: Segments, total: int) -> Entry:
    """Mode "mini" repeats its block along the rows: whole repetitions are a rotation of it, other rows are written out."""
    if entry.options.get("init_weights") != "mini":
        return _pick_factors(entry, segments, total)
    block, position, shifts = entry.tensors["miss_block"], 0, set()
    period = block.shape[1]
    for start, stop in segments:
        shifts.add((start - position) % period)
        position += stop - start
    if len(shifts) == 1 and position % period == 0:
        shift = shifts.pop()
        return changed(entry, {**entry.tensors, "miss_block": block.roll(-shift, 1)}) if shift else entry
    return _pick_factors(balanced(entry, total), segments, total)


def balanced(entry: Entry, total: int) -> Entry:
    """MiSS "mini" as "balance": the same change with the block's repetitions written out."""
    block = entry.tensors["miss_block"]
    options = {k: v for k, v in entry.options.items() if k != "mini_r"} | {"init_weights": True}
    repeats = [1, -(-total // block.shape[1]), *[1] * (block.dim() - 2)]
    return changed(entry, {**entry.tensors, "miss_block": block.repeat(repeats).narrow(1, 0, total)}, options=options)


def _pick_oft(entry: Entry, segments: Segments, total: int) -> Entry:
    """Blocks of rows; a limit on the norm of all blocks together is applied before they part."""
    return _pick_factors(unconstrained(entry, total) if _size(segments) < total else entry, segments, total)


def unconstrained(entry: Entry, out: int) -> Entry:
    """The same rotation without a limit on its norm: a limit that acts is a factor on the blocks."""
    limit = float(entry.options.get("constraint") or 0.0) * out
    if not limit:
        return entry
    blocks = entry.tensors["oft_blocks"]
    wide = blocks.double()
    norm = float((wide - wide.mT).norm())
    tensors = {**entry.tensors, "oft_blocks": times(blocks, limit / norm)} if norm > limit else entry.tensors
    return changed(entry, tensors, options={**entry.options, "constraint": 0.0})


def _pick_lokr(entry: Entry, segments: Segments, total: int) -> Entry:
    """Rows of the first half; where a boundary lies within a block, a window over the rows that cover it."""
    run = joined([run_of(entry, start, stop) for start, stop in segments], block_rows(entry))
    return dense(entry, segments) if run is None else with_run(_pick_factors(entry, segments, total), run)


_PICK: dict[str, Callable[[Entry, Segments, int], Entry]] = {
    "LORA": _pick_low_rank,
    "LOHA": _pick_low_rank,
    "LOKR": _pick_lokr,
    "MISS": _pick_miss,
    "SHIRA": _pick_shira,
    "DIAG_OFT": _pick_oft,
}
