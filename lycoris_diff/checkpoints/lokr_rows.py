"""Output rows of a Kronecker product: its first half follows them in blocks as high as the second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..functional import lokr, lora
from .blocks import at_least_float32
from .checkpoint import Entry


@dataclass
class Run:
    """Consecutive output rows of a Kronecker product: rows of its first half, and the first output row of these that counts."""

    w1: Tensor
    start: int
    count: int


def first_half(entry: Entry) -> str:
    """Name of the LoKr factor that follows the output rows."""
    return "lokr_w1" if "lokr_w1" in entry.tensors else "lokr_w1_a"


def block_rows(entry: Entry) -> int:
    """Output rows of LoKr's second half."""
    if "lokr_t2" in entry.tensors:
        return entry.tensors["lokr_w2_a"].shape[1]
    return entry.tensors["lokr_w2" if "lokr_w2" in entry.tensors else "lokr_w2_a"].shape[0]


def run_of(entry: Entry, start: int, stop: int) -> Run:
    """Rows of an entry over the fewest rows of its first half."""
    block, begin = block_rows(entry), (entry.options.get("rows") or (0, 0))[0]
    first, last = (begin + start) // block, -(-(begin + stop) // block)
    return Run(entry.tensors[first_half(entry)][first:last], begin + start - first * block, stop - start)


def joined(runs: Sequence[Run], block: int) -> Run | None:
    """The runs as one; None where one does not go on in the block in which the run before it ends."""
    pieces, count, last = [runs[0].w1], runs[0].count, runs[0].w1[-1]
    for run in runs[1:]:
        if (runs[0].start + count) % block != run.start:
            return None
        skip = 1 if run.start else 0
        if skip and not torch.equal(last, run.w1[0]):
            return None
        pieces.append(run.w1[skip:])
        count, last = count + run.count, run.w1[-1]
    filled = [p for p in pieces if len(p)]
    return Run(filled[0] if len(filled) == 1 else torch.cat(filled), runs[0].start, count)


def with_run(entry: Entry, run: Run) -> Entry:
    """The entry with the run's rows in place of its own; a window is noted only where the run begins or ends in a block."""
    options = {k: v for k, v in entry.options.items() if k != "rows"}
    if run.start or run.count != run.w1.shape[0] * block_rows(entry):
        options["rows"] = (run.start, run.count)
    return replace(entry, tensors={**entry.tensors, first_half(entry): run.w1}, options=options)


def dense(entry: Entry, segments: Sequence[tuple[int, int]]) -> Entry:
    """Ranges of rows written out, in float32 or better; the kernel's axes may stay flattened."""
    t = {k: v.to(at_least_float32(v.dtype)) for k, v in entry.tensors.items()}
    if "lokr_t2" in t:
        w2 = lora.tucker(t["lokr_t2"], t["lokr_w2_a"].mT, t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    pieces = []
    for start, stop in segments:
        run = run_of(entry, start, stop)
        w1 = run.w1.to(w2.dtype) if "lokr_w1" in t else run.w1.to(w2.dtype) @ t["lokr_w1_b"]
        pieces.append(lokr.kronecker(w1 * entry.scale, w2).narrow(0, run.start, run.count))
    return Entry("FULL", {"diff": torch.cat(pieces)})
