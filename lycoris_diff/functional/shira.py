"""SHiRA (arXiv 2406.13175): a sparse change; a fixed set of entries of the weight is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError


def flat_indices(indices: Tensor, columns: int) -> Tensor:
    """Row/column pairs ``(2, n)`` of any integer (or integral float) type to int64 positions in the flattened weight."""
    pair = indices.to(torch.int64)
    return pair[0] * columns + pair[1]


def scatter(values: Tensor, indices: Tensor, out: int, columns: int) -> Tensor:
    """Dense ``(out, columns)`` with ``values (n,)`` added at ``indices (2, n)``; repeated positions add up."""
    dense = values.new_zeros(out * columns)
    return dense.index_add(0, flat_indices(indices, columns), values).view(out, columns)


def random_positions(total: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` distinct sorted positions below ``total``, int64; ``None`` draws from torch's global generator."""
    if 4 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    # rejection: far cheaper than a permutation of millions of weights when only a per cent is drawn
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        fresh = torch.randint(total, (count + count // 4 + 16,), generator=generator)
        found = torch.cat([found, fresh]).unique()
    keep = torch.randperm(found.numel(), generator=generator)[:count]
    return found[keep].sort().values


def encode_gaps(positions: Tensor) -> Tensor:
    """Sorted distinct positions as gaps to the one before, in uint8 or uint16, whichever is smaller.

    The gap to the position before minus one is stored; the largest value of the type means "that much and more follows".
    """
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    return min((_escape(gaps, dtype) for dtype in (torch.uint8, torch.uint16)), key=lambda t: t.numel() * t.itemsize)


def _escape(gaps: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.iinfo(dtype).max
    escapes = gaps // limit
    ends = (escapes + 1).cumsum(0) - 1
    stream = gaps.new_full((int((escapes + 1).sum()),), limit)
    stream[ends] = gaps % limit
    return stream.to(dtype)


def decode_gaps(stream: Tensor, total: int) -> Tensor:
    """Inverse of `encode_gaps`.

    Raises:
        CheckpointError: the stream is not of a gap type, ends in an escape or leaves ``total`` positions.
    """
    if stream.dtype not in (torch.uint8, torch.uint16):
        raise CheckpointError(f"coded SHiRA indices are uint8 or uint16, got {stream.dtype}")
    limit = torch.iinfo(stream.dtype).max
    wide = stream.to(torch.int64)
    last = wide != limit
    if wide.numel() and not bool(last[-1]):
        raise CheckpointError("coded SHiRA indices end in the middle of a gap: the file is truncated or damaged")
    # sum of every run of escapes and its end, through one cumulative sum
    sums = wide.cumsum(0)[last]
    positions = sums + torch.arange(sums.numel())
    if positions.numel() and int(positions[-1]) >= total:
        raise CheckpointError(f"coded SHiRA indices reach {int(positions[-1])}, the weight has {total} entries")
    return positions
