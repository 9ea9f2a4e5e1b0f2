"""Which pictures go into which batch: a function of the batch's number, so that a resumed run needs no replay."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import AdapterError

if TYPE_CHECKING:
    from .buckets import Bucket


@dataclass(frozen=True)
class Draw:
    """One picture in a batch.

    Attributes:
        index: of the picture.
        number: how many samples the run has drawn before this one; it seeds what is left to chance in the sample.
    """

    index: int
    number: int


@dataclass(frozen=True)
class DrawBatch:
    """Pictures of one bucket, as many as the batch size says."""

    bucket: Bucket
    draws: tuple[Draw, ...]


class Stream:
    """An endless sequence of full batches, each of one bucket.

    After any number of batches, every bucket has had its part of them (pictures times repeats) to within less than one
    batch, and after `sum(repeats)` batches exactly. Within a bucket, a round shows every picture as often as its repeats say,
    shuffled; a batch may end one round and begin the next.

    Args:
        buckets: of every picture.
        repeats: of every picture: how often a round shows it.
        batch_size: pictures in a batch, of all processes together.
        seed: of the order.

    Raises:
        AdapterError: no pictures, or a number of repeats or a batch size below 1.
    """

    def __init__(self, buckets: Sequence[Bucket], repeats: Sequence[int], batch_size: int, seed: int) -> None:
        if not buckets:
            raise AdapterError("a stream needs at least one picture")
        if len(buckets) != len(repeats):
            raise AdapterError(f"{len(buckets)} buckets and {len(repeats)} repeats; expected one of each for every picture")
        for index, count in enumerate(repeats):
            if count < 1:
                raise AdapterError(f"repeats of picture {index} is {count!r}; expected a whole number of at least 1")
        if batch_size < 1:
            raise AdapterError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self._rounds: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
        for index, (bucket, count) in enumerate(zip(buckets, repeats)):
            self._rounds[bucket] += [index] * count
        sizes = [len(pictures) for pictures in self._rounds.values()]
        divisor = math.gcd(*sizes)
        self._shares = [size // divisor for size in sizes]
        # what was computed already, replaced as a whole: several threads may ask for batches
        self._turns: list[tuple[int, int]] = []
        self._shuffled: dict[Bucket, tuple[int, list[int]]] = {}

    def batch(self, number: int) -> DrawBatch:
        """Return batch `number`, counted from 0, whichever batches were asked for before.

        Raises:
            AdapterError: `number` is negative.
        """
        if number < 0:
            raise AdapterError(f"batch {number} does not exist; batches are counted from 0")
        cycle, place = divmod(number, sum(self._shares))
        turns = self._turns
        if place >= len(turns):
            turns = self._turns = take_turns(self._shares, min(sum(self._shares), max(64, 2 * place + 1)))
        served, turn = turns[place]
        bucket = list(self._rounds)[served]
        first = (cycle * self._shares[served] + turn) * self.batch_size
        pictures = (self._picture(bucket, first + position) for position in range(self.batch_size))
        start = number * self.batch_size
        return DrawBatch(bucket, tuple(Draw(index, start + position) for position, index in enumerate(pictures)))

    def _picture(self, bucket: Bucket, position: int) -> int:
        """Index of the picture at `position` of all that the run draws from `bucket`."""
        pictures = self._rounds[bucket]
        number, place = divmod(position, len(pictures))
        latest, order = self._shuffled.get(bucket, (-1, []))
        if latest != number:
            generator = sample_generator(self.seed, f"order of {bucket.width} x {bucket.height}", number)
            order = torch.randperm(len(pictures), generator=generator).tolist()
            self._shuffled[bucket] = (number, order)
        return pictures[order[place]]


def take_turns(shares: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Share `count` turns out in proportion: after n turns, each has had `n * share / total` of them, less than one off.

    This is earliest deadline first among those that are due (Baruah et al., "Proportionate progress", 1996): turn k of a
    share is due at time `k * total / share` and has to be over at `(k + 1) * total / share`.

    Returns:
        for every turn, who has it, and how many turns it had before.
    """
    total = sum(shares)
    had = [0] * len(shares)
    turns = []
    for now in range(count):
        due = [i for i, share in enumerate(shares) if had[i] * total < (now + 1) * share]
        chosen = min(due, key=lambda i: -(-(had[i] + 1) * total // shares[i]))
        turns.append((chosen, had[chosen]))
        had[chosen] += 1
    return turns


def sample_generator(seed: int, role: str, number: int) -> torch.Generator:
    """Return a generator on the CPU for one sample: what it gives depends on the three arguments only.

    torch seeds it with 32 bits: of a hundred thousand generators one or two pairs are alike, which does no harm to noise.
    """
    digest = hashlib.sha256(f"{seed} {number} {role}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
