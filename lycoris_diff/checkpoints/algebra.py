"""Exact algebra on the output rows of adapters: taking some, exchanging the halves, and putting several adapters together.

Fused and separate projections are two ways to write the same weights. What was taken apart here goes together again without
growth; adapters that were trained apart become one with blocks of their own, or are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .blocks import KEEP_NAMES, blocked, stacked, widest
from .checkpoint import Entry
from .lokr_rows import Run, block_rows, first_half, joined, run_of, with_run
from .slices import (
    COLUMN_DORA,
    CORES,
    MAGNITUDES,
    RANKS,
    WHOLE,
    balanced,
    changed,
    has_column_dora,
    layout,
    row_count,
    strength_factor,
    swap_halves,
    take_rows,
    times,
    unconstrained,
)

__all__ = ["fuse_modules", "fuse_rows", "row_count", "swap_halves", "take_rows"]

#: row factors that leave the weight alone at another value than zero
_IDENTITY = {"rescale": 1.0}
#: options that the parts of a whole may differ in, and that are seen to where they are put together
_OWN_OPTIONS = ("rows", "constraint")


def fuse_modules(modules: Sequence[Sequence[Entry]], sizes: Sequence[int]) -> list[Entry]:
    """All algorithms of several modules on one fused weight: the first LoRA of each module becomes one, and so on.

    Args:
        modules: entries of every module, in order of rows; empty where a module has none.
        sizes: output rows of every module.

    Raises:
        CheckpointError: as `fuse_rows`.
    """
    slots: dict[tuple[str, int], list[Entry | None]] = {}
    for position, entries in enumerate(modules):
        counts: dict[str, int] = {}
        for entry in entries:
            number = counts[entry.algorithm] = counts.get(entry.algorithm, 0) + 1
            slots.setdefault((entry.algorithm, number), [None] * len(modules))[position] = entry
    return [fuse_rows(parts, sizes) for parts in slots.values()]


def fuse_rows(entries: Sequence[Entry | None], sizes: Sequence[int]) -> Entry:
    """One adapter whose output rows are those of several, in their order; the inverse of `take_rows`.

    Args:
        entries: one adapter a module; None where a module has none.
        sizes: output rows of every module.

    Returns:
        Without growth where the modules share every factor that is not theirs alone (what `take_rows` hands out does); LoRA
        and LoHa of their own become block-diagonal, with the sum of their ranks.

    Raises:
        CheckpointError: there is no exact form, with the reason.
    """
    found = [e for e in entries if e is not None]
    if not found or len(entries) != len(sizes):
        raise CheckpointError(f"{len(found)} adapters cannot be put together to weights with {list(sizes)} rows")
    for entry, size in zip(entries, sizes):
        own = row_count(entry) if entry else None
        if entry and own is not None and own != size:
            raise CheckpointError(f"{entry.algorithm} changes {own} output rows, its module has {size}")
    if len(entries) == 1:
        return found[0]
    algorithms = sorted({e.algorithm for e in found})
    if len(algorithms) > 1:
        raise CheckpointError(f"{' and '.join(algorithms)} cannot be one adapter; {KEEP_NAMES}")
    algorithm = algorithms[0]
    if algorithm in WHOLE:
        raise CheckpointError(f"{algorithm}: {WHOLE[algorithm]}; {KEEP_NAMES}")
    prepare = _PREPARE.get(algorithm, lambda parts, sizes: parts)
    parts = prepare(list(entries), list(sizes))
    found = [e for e in parts if e is not None]
    _same_options(found)
    if any(has_column_dora(e) for e in found):
        raise CheckpointError(f"{algorithm}: {COLUMN_DORA}; {KEEP_NAMES}")
    whole = _one_scale([_neutral(found[0], size) if e is None else e for e, size in zip(parts, sizes)])
    return _FUSE.get(algorithm, _fuse_shared)(whole, list(sizes))


# --- making the parts alike ---------------------------------------------------------------------------------------------------
def _free(parts: list[Entry | None], sizes: list[int]) -> list[Entry | None]:
    """Diag-OFT: every part's limit is on its own norm, so it is applied before."""
    return [e and unconstrained(e, size) for e, size in zip(parts, sizes)]


def _same_form(parts: list[Entry | None], sizes: list[int]) -> list[Entry | None]:
    """MiSS: "mini" stays only where all parts repeat one block."""
    blocks = [e.tensors["miss_block"] for e in parts if e]
    modes = {e.options.get("init_weights", True) for e in parts if e}
    repeated = None not in parts and modes == {"mini"} and all(_equal(b, blocks[0]) for b in blocks)
    if repeated or "mini" not in modes:
        return parts
    return [balanced(e, n) if e and e.options.get("init_weights") == "mini" else e for e, n in zip(parts, sizes)]


_PREPARE: dict[str, Callable[[list[Entry | None], list[int]], list[Entry | None]]] = {"DIAG_OFT": _free, "MISS": _same_form}


def _same_options(entries: Sequence[Entry]) -> None:
    """What holds for an adapter as a whole must be the same."""

    def matters(name: str, value: object) -> bool:
        start_only = name == "init_weights" and value is True  # how training began
        return value not in (None, False) and not start_only and name not in _OWN_OPTIONS

    settings = [{k: v for k, v in e.options.items() if matters(k, v)} for e in entries]
    for other in settings[1:]:
        for name in settings[0].keys() | other.keys():
            if settings[0].get(name) != other.get(name):
                raise CheckpointError(
                    f"{entries[0].algorithm}: the parts differ in {name}: {settings[0].get(name)!r} and {other.get(name)!r}; "
                    f"one adapter has one value, {KEEP_NAMES}"
                )


def _neutral(like: Entry, rows: int) -> Entry:
    """An adapter of the same form that leaves its rows alone."""
    if any(m in like.tensors for m in MAGNITUDES):
        raise CheckpointError(f"{like.algorithm}: a module without an adapter has no DoRA magnitude; {KEEP_NAMES}")
    if like.algorithm == "SHIRA":
        return changed(like, {k: v[..., :0] for k, v in like.tensors.items()})
    if like.algorithm == "LOKR":
        block, w1 = block_rows(like), like.tensors[first_half(like)]
        if rows % block:
            raise CheckpointError(f"LOKR: {rows} rows without an adapter are no whole blocks of {block} rows; {KEEP_NAMES}")
        return with_run(like, Run(w1.new_zeros(rows // block, *w1.shape[1:]), 0, rows))
    names = layout(like)
    if like.algorithm == "GLORA" or not names:
        raise CheckpointError(
            f"{like.algorithm} changes all rows of a fused weight, also a module's without an adapter; {KEEP_NAMES}"
        )
    return changed(like, {**like.tensors, **{name: _filled(like, name, rows) for name in names}})


def _filled(like: Entry, name: str, rows: int) -> Tensor:
    """A row factor for so many rows that changes nothing."""
    axis, unit = layout(like)[name]
    if rows % unit:
        raise CheckpointError(f"{like.algorithm}: {rows} rows are no whole number of blocks of {unit} rows; {KEEP_NAMES}")
    shape = list(like.tensors[name].shape)
    shape[axis] = rows // unit
    return like.tensors[name].new_full(shape, _IDENTITY.get(name, 0.0))


def _one_scale(parts: list[Entry]) -> list[Entry]:
    """The same adapters with one common strength."""
    scale = next((p.scale for p in parts if p.scale), parts[0].scale)
    out = []
    for part in parts:
        if part.scale != scale:
            name = strength_factor(part)
            if name is None:
                raise CheckpointError(
                    f"{part.algorithm}: the parts have the strengths {scale:g} and {part.scale:g}; {KEEP_NAMES}"
                )
            tensors = {**part.tensors, name: times(part.tensors[name], part.scale / scale)}
            part = changed(part, tensors, scale=scale, alpha=scale * part.rank)
        out.append(part)
    return out


# --- putting together --------------------------------------------------------------------------------------------------------
def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _differing(parts: Sequence[Entry], own: set[str]) -> str | None:
    """Name of a factor beyond ``own`` that is not the same everywhere; None when all are."""
    first = parts[0].tensors
    names = {n for p in parts for n in p.tensors} - own
    same = (
        n for n in sorted(names) if not all(n in p.tensors and n in first and _equal(p.tensors[n], first[n]) for p in parts)
    )
    return next(same, None)


def _fuse_shared(parts: list[Entry], sizes: list[int]) -> Entry:
    """Row factors one after the other; everything else must be the same in all parts."""
    parts = _completed(parts, sizes)
    axes = layout(parts[0])
    differs = _differing(parts, set(axes))
    if differs:
        raise CheckpointError(f"{parts[0].algorithm}: the parts differ in {differs!r}, which serves all rows; {KEEP_NAMES}")
    rows = {name: stacked(parts, name, axis) for name, (axis, _) in axes.items()}
    return changed(parts[0], {**parts[0].tensors, **rows})


def _completed(parts: list[Entry], sizes: list[int]) -> list[Entry]:
    """Row factors that only some parts have (a bias, a rescaling), at the value that changes nothing."""
    donors = {name: part for part in reversed(parts) for name in layout(part) if name not in MAGNITUDES}
    out = []
    for part, size in zip(parts, sizes):
        missing = {name: _filled(donor, name, size) for name, donor in donors.items() if name not in part.tensors}
        out.append(changed(part, {**part.tensors, **missing}) if missing else part)
    return out


def _fuse_low_rank(parts: list[Entry], sizes: list[int]) -> Entry:
    """LoRA and LoHa: parts with the same inner factors share their ranks, all others get ranks of their own."""
    columns, _ = RANKS[parts[0].algorithm]
    magnitudes = [m for m in MAGNITUDES if m in parts[0].tensors]
    own = {*columns, *MAGNITUDES}
    if not _differing(parts, own):
        return _fuse_shared(parts, sizes)
    names = set(parts[0].tensors)
    if any(set(p.tensors) != names for p in parts):
        raise CheckpointError(f"{parts[0].algorithm}: the parts have different factors; {KEEP_NAMES}")
    live = [any(bool(p.tensors[c].to(torch.float32).any()) for c in columns) for p in parts]
    groups, member = _groups(parts, live, own)
    ranks = [_rank(g) for g in groups]
    starts = [sum(ranks[:k]) for k in range(len(ranks))]
    extent = sum(ranks), sum(sizes)
    tensors = {}
    for name in sorted(names - set(magnitudes)):
        if name in columns:
            axis = layout(parts[0])[name][0]
            corners = [(starts[g], sum(sizes[:k])) for k, g in enumerate(member)]
            pieces = [(p.tensors[name], c if axis else c[::-1]) for p, c, used in zip(parts, corners, live) if used]
            tensors[name] = blocked(parts[0], name, pieces, extent if axis else extent[::-1])
        elif name in CORES:
            pieces = [(g.tensors[name], (s, s)) for g, s in zip(groups, starts)]
            tensors[name] = blocked(parts[0], name, pieces, (sum(ranks), sum(ranks)))
        else:
            tensors[name] = stacked(groups, name, 0)
    for name in magnitudes:
        tensors[name] = stacked(parts, name, layout(parts[0])[name][0])
    return changed(parts[0], tensors, sum(ranks))


def _groups(parts: list[Entry], live: list[bool], own: set[str]) -> tuple[list[Entry], list[int]]:
    """One part for every set of inner factors, and whose set each part uses; parts that change nothing need none."""
    groups: list[Entry] = []
    member = []
    for part, used in zip(parts, live):
        number = next((k for k, g in enumerate(groups) if not _differing([part, g], own)), len(groups))
        if used and number == len(groups):
            groups.append(part)
        member.append(number if used else 0)
    return groups or parts[:1], member


def _rank(entry: Entry) -> int:
    return entry.tensors["lora_A.weight" if entry.algorithm == "LORA" else "hada_w1_b"].shape[0]


def _fuse_lokr(parts: list[Entry], sizes: list[int]) -> Entry:
    """Parts with the same second half: their first halves one below the other, overlapping where a block was cut."""
    magnitudes = {m for m in MAGNITUDES if m in parts[0].tensors}
    differs = _differing(parts, {first_half(parts[0]), *magnitudes})
    if differs:
        raise CheckpointError(
            f"LOKR: the parts differ in {differs!r}; only products with the same second half make one product; {KEEP_NAMES}"
        )
    whole = joined([run_of(p, 0, size) for p, size in zip(parts, sizes)], block_rows(parts[0]))
    if whole is None:
        raise CheckpointError(
            f"LOKR: the parts do not meet at whole blocks of {block_rows(parts[0])} output rows; {KEEP_NAMES}"
        )
    rows = {name: stacked(parts, name, layout(parts[0])[name][0]) for name in magnitudes}
    return with_run(changed(parts[0], {**parts[0].tensors, **rows}), whole)


def _fuse_shira(parts: list[Entry], sizes: list[int]) -> Entry:
    """All entries, their rows counted on."""
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    moved = [torch.stack([p.tensors["shira_indices"][0] + s, p.tensors["shira_indices"][1]]) for p, s in zip(parts, starts)]
    values = [p.tensors["shira_weight"] for p in parts]
    tensors = {"shira_weight": torch.cat([v.to(widest(values)) for v in values]), "shira_indices": torch.cat(moved, 1)}
    return changed(parts[0], tensors)


_FUSE: dict[str, Callable[[list[Entry], list[int]], Entry]] = {
    "LORA": _fuse_low_rank,
    "LOHA": _fuse_low_rank,
    "LOKR": _fuse_lokr,
    "SHIRA": _fuse_shira,
}
