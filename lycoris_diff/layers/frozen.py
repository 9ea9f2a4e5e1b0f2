"""What a layer's frozen adapters come to, prepared once: built weights of steps, casts, DoRA's factors of the rows.

Used where no gradient is recorded and nothing trains. Kept is only what is small beside the layer's weight: an adapter that
runs by changing the weight changes it anew in every call, and is fused by those who want that time back.

A change of a tensor is seen by its version, its place in memory and its storage. Writing into the ``.data`` of a frozen factor
leaves no such mark; write into the factor itself, under `torch.no_grad`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..execution.engine import Call, Term, cast
from ..execution.marks import mark
from ..execution.program import Program
from ..execution.steps import Step
from ..execution.weights import Factors

#: a step's weight is kept where it has at most this share of the layer's
SMALL = 0.25
#: inputs of so many sizes are prepared for, a layer
SIZES = 8


class Ready(NamedTuple):
    """Arguments of `engine.adapted` beside the input and the weight."""

    call: Call
    bias: Tensor | None
    row: Tensor | None
    tensors: list[Tensor]


class Prepared(NamedTuple):
    """What was prepared for a layer, and what it was prepared from.

    Attributes:
        setting: names and trained strengths of the adapters, dtype and mode of the call.
        sources: the tensors that everything was computed from. Those of the host may be replaced and freed meanwhile.
        storages: of those tensors: another one may have been given the address of a freed one.
        marks: where their values were, and in which version.
        ready: by tokens.
    """

    setting: tuple[object, ...]
    sources: list[weakref.ref[Tensor]]
    storages: list[weakref.ref[torch.UntypedStorage]]
    marks: list[tuple[int, int]]
    ready: dict[int, Ready]


_PREPARED: weakref.WeakKeyDictionary[nn.Module, Prepared] = weakref.WeakKeyDictionary()


def frozen(adapters: Sequence[Adapter], others: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Every tensor that a call without gradients depends on; None if some of them may change unseen, or trains.

    Args:
        adapters: the active ones.
        others: tensors of the host.
    """
    if torch.is_grad_enabled():
        return None
    sources = [t for t in others if t is not None]
    for adapter in adapters:
        if not adapter.single or adapter.training:
            return None
        values = adapter.factors().values()
        if any([t.requires_grad for t in values]):
            return None
        sources += [*values, adapter.strength]
    return None if any([t.is_inference() for t in sources]) else sources


def prepared(
    layer: nn.Module, setting: tuple[object, ...], sources: list[Tensor], tokens: int, prepare: Callable[[], Ready]
) -> Ready:
    """What `prepare` returns, remembered for as long as nothing that it depends on changes.

    Args:
        layer: whose it is.
        setting: what it depends on beside tensors.
        sources: those tensors, as `frozen` gives them.
        tokens: of the input.
        prepare: makes it.
    """
    setting = (*setting, torch.is_inference_mode_enabled())
    marks = [mark(t) for t in sources]
    found = _PREPARED.get(layer)
    storages = [t.untyped_storage() for t in sources]
    same = found is not None and found.setting == setting and found.marks == marks
    if found is None or not same or not (_alive(found.sources, sources) and _alive(found.storages, storages)):
        found = _PREPARED[layer] = Prepared(setting, [*map(weakref.ref, sources)], [*map(weakref.ref, storages)], marks, {})
    ready = found.ready.get(tokens)
    if ready is None:
        if len(found.ready) >= SIZES:
            found.ready.clear()
        ready = found.ready[tokens] = prepare()
    return ready


def _alive(held: Sequence[weakref.ref[Any]], found: Sequence[Any]) -> bool:
    return all([a() is b for a, b in zip(held, found, strict=True)])


def forget(layer: nn.Module) -> None:
    """Drop what was prepared for a layer."""
    _PREPARED.pop(layer, None)


def settled(ready: Ready, numel: int) -> Ready:
    """The same with casts made and the weights of steps built, where they are small beside the layer's `numel` numbers."""
    limit = int(SMALL * numel)
    terms: list[Term] = []
    tensors: list[Tensor] = []
    for term, f in ready.call.split(ready.tensors):
        if term.program is not None:
            f = cast(f, ready.call.dtype)
            term = term._replace(program=_bound(term.program, f, limit))
        terms.append(term)
        tensors += f.values()
    return ready._replace(call=replace(ready.call, terms=tuple(terms)), tensors=tensors)


def _bound(program: Program, f: Factors, limit: int) -> Program:
    """The program with the weights of its steps built."""

    def built(step: Step | None) -> Step | None:
        if step is None or step.weight is None:
            return step
        weight = step.weight(f)
        return replace(step, weight=lambda f: weight) if weight.numel() <= limit else step

    mid = built(program.mid) if isinstance(program.mid, Step) else program.mid
    return replace(program, first=built(program.first), mid=mid, last=built(program.last) or program.last)
