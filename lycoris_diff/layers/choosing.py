"""Which way an adapter runs on its layer: what the cost model is asked, by layers and by accounts of a model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..execution.costs import Choice, choose
from ..execution.lengths import product_of
from ..execution.products import is_measured
from ..execution.program import Program
from ..execution.weights import Formula

remembered = functools.lru_cache(maxsize=4096)(choose)


def may_fold(x: Tensor) -> bool:
    """Whether changes may run through the weight: on processors, where it was measured, and not in a half precision.

    There the sum would lose what is small beside the weight.
    """
    return is_measured(x)


def scales_rows(adapter: Adapter) -> bool:
    """Whether DoRA comes to a factor on every output row: on the output axis, at full strength."""
    return on_rows(adapter) and adapter.get_strength() == 1.0


def on_rows(adapter: Adapter) -> bool:
    """Whether it is DoRA on the output axis."""
    return adapter.decomposed and adapter.config.dora_axis == "out"  # type: ignore[attr-defined]


def lengthens(adapter: Adapter) -> bool:
    """The same in training. Frozen factors keep to the operations of the path that prepares them, and so to its bits."""
    return scales_rows(adapter) and adapter.learns


def weighed(
    adapter: Adapter,
    program: Program | None,
    tokens: int,
    training: bool = True,
    folds: bool = True,
    alone: bool = True,
) -> Choice:
    """What the cost model picks for an adapter on its layer.

    Args:
        program: its factored form, if there is one.
        tokens: positions the weight is applied to.
        training: a gradient of the factors is needed.
        folds: the input allows changes to run through the weight, as `may_fold` tells.
        alone: no other adapter is active.
    """
    foldable = folds and program is not None and program.foldable
    if foldable and adapter.depends_on_weight:
        foldable = alone and training and lengthened_product(adapter, program) is not None
    cost, width, sampled = (None, 0, None) if program is None else (program.cost, program.width, program.sampled_cost)
    pick = choose if torch.compiler.is_compiling() else remembered  # compilers look through a cache, with a warning
    return pick(adapter.geometry.shape, tokens, training, cost, width, sampled_cost=sampled, foldable=foldable)


def lengthened_product(adapter: Adapter, program: Program | None) -> tuple[Formula, Formula] | None:
    """The product of two matrices whose rows, added to the weight's, DoRA gives their lengths in training by formula."""
    return product_of(program) if program is not None and lengthens(adapter) else None
