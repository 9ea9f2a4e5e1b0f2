"""The cost model: how to run one adapter on one layer. A pure function of sizes, printable.

Costs are counted in multiply-adds; moving one number through memory is charged as `PASS` of them, about what a desktop or
server core does in the time of one uncached load. Only the order of the two totals matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

PASS = 16


@dataclass(frozen=True)
class Choice:
    """How an adapter runs and what the model thinks of it.

    Attributes:
        mode: "beside" (factored, added to the host's output) or "instead" (one operation with the changed weight).
        beside: cost of the factored form, in multiply-adds; None when there is none.
        instead: cost of the changed weight beyond the host's own operation, in multiply-adds.
    """

    mode: str
    beside: int | None
    instead: int

    def __str__(self) -> str:
        beside = "none" if self.beside is None else f"{self.beside / 1e6:.1f}M"
        return f"{self.mode} (beside {beside}, instead {self.instead / 1e6:.1f}M multiply-adds)"


def choose(
    shape: tuple[int, ...],
    tokens: int,
    training: bool,
    program_cost: int | None,
    program_width: int = 0,
    build_cost: int = 0,
    build_passes: int = 3,
) -> Choice:
    """Pick the cheaper way.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
        training: a gradient of the factors is needed.
        program_cost: multiply-adds of the factored form per token; None when there is none.
        program_width: channels of its largest intermediate result.
        build_cost: multiply-adds of building the change of the weight.
        build_passes: passes over a tensor of the weight's size while building it.
    """
    size, out, inp = prod(shape), shape[0], shape[1]
    # forward, and in training once more for the recomputation and twice for its derivatives
    runs = 4 if training else 1
    # forward: read the input, read and write the output; backward: twice the input, twice its gradient, twice the output's
    passes = (5 * inp + 4 * out) if training else (inp + 2 * out)
    instead = (build_cost + PASS * build_passes * size) * (4 if training else 1) + (tokens * size if training else 0)
    if program_cost is None:
        return Choice("instead", None, instead)
    beside = tokens * (runs * program_cost + PASS * (passes + 2 * runs * program_width))
    return Choice("beside" if beside <= instead else "instead", beside, instead)
