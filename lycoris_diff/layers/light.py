"""Small layers in training: where the calls around an operation cost more than its passes over memory.

There the fused operation, whose backward is Python, is slower than the plain operations that it saves: autograd runs those by
itself. What is kept for backward is the same input, or less, and small things beside it: small results of programs, and changed
weights that are small themselves.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from ..adapters.base import Adapter
from ..execution.engine import cast, changed_weight
from ..execution.geometry import Geometry
from ..execution.program import Program
from ..execution.weights import Factors

#: numbers in the layer's input and output, together, up to which it is small: the fused operation saves passes over them, half
#: a millisecond for so many, and spends that on calls when none of them is in a cache
SMALL = 3 * 2**18
#: numbers that may be kept for backward in any case, an eighth of a MiB
LITTLE = 2**15
#: multiply-adds of a little weight's gradient that take no longer than DoRA's calls beside the layer
CHEAP = 2**22

#: active adapters, each with the program that it runs beside the layer (None changes the weight instead) and its known scale
Parts = list[tuple[Adapter, Program | None, float]]


def is_small(geometry: Geometry, tokens: int) -> bool:
    """Whether calls outweigh passes."""
    return tokens * (geometry.inp * geometry.groups + geometry.out) <= SMALL


def keeps_little(geometry: Geometry, tokens: int, program: Program, f: Factors) -> bool:
    """Whether what autograd keeps beside the input is small: weights of steps, and results between them."""
    inputs = geometry.inp * geometry.groups
    sides = inputs + geometry.out
    built = sum(t.numel() for t in f.values()) if program.is_view else program.width * sides
    between = tokens * program.width * (1 if program.mid is None else 2)
    return built <= max(tokens * sides, LITTLE) and between <= max(tokens * inputs // 2, 2 * LITTLE)


def has_little_weight(geometry: Geometry) -> bool:
    """Whether keeping changed weights of this size for backward does not matter."""
    return prod(geometry.shape) <= LITTLE


def changes_cheaply(geometry: Geometry, tokens: int) -> bool:
    """Whether DoRA's factors of the rows cost more calls than changing the weight costs arithmetic."""
    return has_little_weight(geometry) and tokens * prod(geometry.shape) <= CHEAP


def run_light(geometry: Geometry, weight: Tensor, bias: Tensor | None, x: Tensor, parts: Parts) -> Tensor:
    """The layer's output with every adapter's change.

    Args:
        geometry: of the layer.
        weight, bias: of the base layer, frozen, in the dtype of ``x``.
        x: the layer's input.
        parts: adapters with what they run.
    """
    inner, lead = geometry.enter(x)
    weight = geometry.canonical(weight) if geometry.transposed else weight
    for _, program, _ in parts:
        if program is None:
            weight = changed_weight(weight, [(a, a.inputs()) for a, none, _ in parts if none is None], x.dtype)
            break
    y = geometry.apply(inner, weight, bias)
    for adapter, program, scale in parts:
        if program is not None:
            f: dict[str, Any] = adapter.factors()
            f["scale"] = scale
            y = program.plus(geometry, y, inner, cast(f, x.dtype))
    return geometry.leave(y, lead)
