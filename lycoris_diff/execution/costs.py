"""The cost model: how to run one adapter on one layer. A pure function of sizes, printable.

Costs are counted in multiply-adds; moving one number through memory is charged as `PASS` of them, about what a desktop or
server core does in the time of one uncached load. Only the order of the two totals matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

PASS = 16
#: a transposed copy costs as much as four plain passes
TRANSPOSE = 4 * PASS
#: how often the weight must go into the output, or the input, for its change to be added to it
FOLD = 2
#: how often the weight may go into the output for scaling that to cost less than building a weight and its whole gradient
SCALED = 4
#: numbers in a weight up to which calls cost more than passes over activations
FEW = 2**15


def around_is_cheaper(shape: tuple[int, ...], tokens: int, training: bool, cost: int) -> bool:
    """Whether a change that multiplies the weight is better made on the layer's input or output than on the weight.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
        training: a gradient of the factors is needed.
        cost: multiply-adds per token of the map of the input or the output.
    """
    size, wide = prod(shape), max(shape[0], shape[1])
    build = 3 * PASS * size + cost * min(shape[0], shape[1])
    if training:
        return tokens * (4 * cost + 10 * PASS * wide) < 4 * build + tokens * size
    return tokens * (cost + 4 * PASS * wide) < build


class Folded(NamedTuple):
    """Which products of a factored form run through the weight instead: its change is added to that for one product.

    Attributes:
        forward: the output.
        backward: the gradient of the input. Those of the factors never do.
    """

    forward: bool = False
    backward: bool = False


NOWHERE = Folded()


def folded(shape: tuple[int, ...], tokens: int) -> Folded:
    """Pick the products for which passes over the weight cost less than passes over the output, or over the input.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
    """
    size = prod(shape)
    if size <= FEW:
        return NOWHERE
    return Folded(tokens * shape[0] >= FOLD * size, tokens * shape[1] >= FOLD * size)


def rides(shape: tuple[int, ...], tokens: int) -> bool:
    """Whether a narrow product with the weight is better made by the layer's own, as more tokens, which copies its input.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
    """
    return len(shape) == 2 and tokens <= shape[0]


def scales_cheaply(shape: tuple[int, ...], tokens: int) -> bool:
    """Whether DoRA, in plain operations, is better made on the output's channels than on the weight's rows.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
    """
    return tokens * shape[0] <= SCALED * prod(shape)


@dataclass(frozen=True)
class Choice:
    """How an adapter runs and what the model thinks of it.

    Attributes:
        mode: "beside" (factored, added to the host's output) or "instead" (one operation with the changed weight).
        beside: cost of the factored form, in multiply-adds; None when there is none.
        instead: cost of the changed weight beyond the host's own operation, in multiply-adds.
        sampled: with "instead", read the weight's gradient at single entries rather than all of it.
        folded: with "beside", which products run through the changed weight.
    """

    mode: str
    beside: int | None
    instead: int
    sampled: bool = False
    folded: Folded = NOWHERE

    def __str__(self) -> str:
        beside = "none" if self.beside is None else f"{self.beside / 1e6:.1f}M"
        ways = " and ".join(way for way, chosen in self.folded._asdict().items() if chosen)
        mode = f"{self.mode}, {ways} through the weight" if ways else self.mode
        return f"{mode} (beside {beside}, instead {self.instead / 1e6:.1f}M multiply-adds)"


def choose(
    shape: tuple[int, ...],
    tokens: int,
    training: bool,
    program_cost: int | None,
    program_width: int = 0,
    build_passes: int = 3,
    sampled_cost: int | None = None,
    foldable: bool = False,
) -> Choice:
    """Pick the cheaper way.

    Args:
        shape: canonical weight ``(out, in, *k)``.
        tokens: positions the weight is applied to.
        training: a gradient of the factors is needed.
        program_cost: multiply-adds of the factored form per token; None when there is none.
        program_width: channels of its largest intermediate result.
        build_passes: passes over a tensor of the weight's size while building it.
        sampled_cost: multiply-adds per token of the weight's gradient at the entries that matter; None when all matter.
        foldable: products of the factored form may run through the changed weight.
    """
    size, out, inp = prod(shape), shape[0], shape[1]
    folds = folded(shape, tokens) if foldable else NOWHERE
    # forward, and in training once more for the recomputation and twice for its derivatives
    runs = (4 if training else 1) - folds.forward
    # forward: read the input, read and write the output; backward: twice the input, twice its gradient, twice the output's
    passes = (1 - folds.forward) * (inp + 2 * out)
    if training:
        passes += (4 - 2 * folds.backward) * inp + 2 * out
    built = folds.forward + (training and folds.backward)
    build = PASS * build_passes * size
    instead, sampled = 4 * build + tokens * size if training else build, False
    if training and sampled_cost is not None:
        # built once forward and once backward; the gradient needs both sides transposed
        at_entries = 2 * build + tokens * (sampled_cost + TRANSPOSE * (inp + out))
        instead, sampled = min((instead, False), (at_entries, True))
    if program_cost is None:
        return Choice("instead", None, instead, sampled)
    beside = tokens * (runs * program_cost + PASS * (passes + 2 * runs * program_width)) + 2 * PASS * built * size
    if beside <= instead:
        return Choice("beside", beside, instead, folded=folds)
    return Choice("instead", beside, instead, sampled)
