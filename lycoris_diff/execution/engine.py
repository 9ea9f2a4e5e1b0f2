"""One autograd operation for an adapted layer: the host's operation plus every active adapter.

What it keeps for backward is the layer's input, the adapters' factors and what is small beside the input (`KEPT`); every
product of factors and every other intermediate result is computed anew. The adapters' outputs are accumulated into the host's
fresh output, and their gradients into the host's fresh input gradient, so that no temporary of the size of an activation is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .costs import NOWHERE, Folded
from .geometry import Geometry
from .precision import outside_autocast
from .program import Program, add_gradients, is_direct, learned, sampled_gradients
from .rows import channel_view, rows_backward, scale_rows, sum_rows
from .steps import Conv, Step
from .weights import Factors

#: results of a program's steps are kept for backward where they are at most this share of the input; of convolutions, whose
#: base layer keeps the input anyway, twice that
KEPT = 0.25

#: terms with their factors by name
Pairs = Sequence[tuple["Term", dict[str, Tensor]]]
AddChange = Callable[[Tensor, Tensor, Factors], Tensor]
ChangeEntries = Callable[[Tensor, Factors], Tensor | None]


class Term(NamedTuple):
    """One adapter's part in a call: a program to run beside the host's operation, or a change of its weight.

    Attributes:
        names: names of the factors, in the order in which their tensors are passed.
        add_change: ``(total, base, factors) -> total + change``, all ``(out, in, *k)``.
        program: the factored form; None runs the change of the weight instead.
        sampled: step that reads the weight's gradient at single entries; None needs all of it.
        scale: of the change where it is a number; None where a tensor of that name is passed.
        folded: products of the program that run through the changed weight.
        change_entries: ``(base, factors) -> base + change`` in the base's dtype where the change has few entries, else None.
    """

    names: tuple[str, ...]
    add_change: AddChange
    program: Program | None = None
    sampled: Step | None = None
    scale: float | None = None
    folded: Folded = NOWHERE
    change_entries: ChangeEntries | None = None

    @property
    def direct(self) -> bool:
        """Whether the gradients of its factors are known as formulas."""
        if self.program is None:
            return self.sampled is not None and is_direct(self.sampled)
        return self.program.direct


@dataclass(slots=True)
class Call:
    """Everything about a call that is not a tensor.

    Attributes:
        geometry: of the host.
        terms: adapters' parts.
        dtype: in which the operation runs.
        is_dense: some term changes the weight.
        folded: some program's output, or gradient of the input, comes from the changed weight.
        is_direct: every term's gradients are known as formulas.
        names: of all tensors, in order.
    """

    geometry: Geometry
    terms: tuple[Term, ...]
    dtype: torch.dtype
    is_dense: bool = field(init=False)
    folded: Folded = field(init=False)
    is_direct: bool = field(init=False)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.is_dense = any([term.program is None for term in self.terms])
        self.folded = Folded(*map(any, zip(*[term.folded for term in self.terms], strict=True)))
        self.is_direct = all([term.direct for term in self.terms])
        self.names = tuple([name for term in self.terms for name in term.names])

    def split(self, tensors: Sequence[Tensor]) -> list[tuple[Term, dict[str, Tensor]]]:
        """Factors by name for every term."""
        pairs, start = [], 0
        for term in self.terms:
            own: dict[str, Any] = dict(zip(term.names, tensors[start:], strict=False))
            if term.scale is not None:
                own["scale"] = term.scale
            pairs.append((term, own))
            start += len(term.names)
        return pairs

    def weight(self, base: Tensor, pairs: Pairs, way: str = "") -> Tensor:
        """The weight that the host's operation runs with: changes summed in float32 or better, cast once.

        Args:
            base: canonical weight of the host.
            pairs: what `split` returns.
            way: "forward" or "backward", with the changes that are folded then; empty, without.
        """
        folds = way != "" and getattr(self.folded, way)
        if not (self.is_dense or folds):
            return base.to(self.dtype)
        changes = pairs  # a single one is dense, or folded this way
        if len(pairs) > 1:
            changes = [(t, f) for t, f in pairs if t.program is None or (folds and getattr(t.folded, way))]
        return changed_weight(base, changes, self.dtype)

    def beside(self, pairs: Pairs) -> list[tuple[Program, dict[str, Tensor], Folded]]:
        """Programs with their factors in the dtype of the operation, and what of them is folded."""
        found = []
        for term, f in pairs:
            if term.program is not None:
                found.append((term.program, cast(f, self.dtype), term.folded))
        return found

    def worth_keeping(self, x: Tensor, *results: Tensor | None) -> list[Tensor | None]:
        """Results on the way from ``x``, each None unless it is small enough to be kept for backward with those before it."""
        room, kept = (2 if self.geometry.kernel else 1) * KEPT * x.numel(), []
        for t in results:
            kept.append(t if t is not None and t is not x and t.numel() <= room else None)
            room -= 0 if kept[-1] is None else kept[-1].numel()
        return kept

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor | None, *tensors: Tensor) -> Tensor:
        """The same result in plain differentiable operations."""
        geo = self.geometry
        dense = tuple(t if t.program is None or not t.program.eager_only else t._replace(program=None) for t in self.terms)
        call = replace(self, terms=dense)
        host_bias = None if bias is None or row is not None else bias.to(self.dtype)
        pairs = call.split(tensors)
        y = geo.apply(x, call.weight(weight, pairs), host_bias)
        for program, f, _ in call.beside(pairs):
            y = y + program.run(geo, x, f)
        return y if row is None else scale_rows(y, row, bias)


def cast(f: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating factors in another dtype; all others as they are. ``f`` itself where all have it: do not write to it.

    Single numbers, as the scale is, stay in their own: they decide no result's dtype, and might be beyond a half precision.
    """
    for v in f.values():
        if type(v) is not float and v.dtype is not dtype and v.is_floating_point() and v.dim():
            return {k: v.to(dtype) if type(v) is not float and v.is_floating_point() and v.dim() else v for k, v in f.items()}
    return f  # type: ignore[return-value]


def changed_weight(base: Tensor, dense: Sequence[tuple[Any, Factors]], dtype: torch.dtype) -> Tensor:
    """``base`` plus every change, each taken against the unmodified base, summed in float32 or better and rounded once.

    Args:
        base: canonical weight ``(out, in, *k)``.
        dense: pairs of something with ``add_change`` and ``change_entries``, as `Term` has them, and its factors.
        dtype: of the result.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    if len(dense) == 1 and dtype is base.dtype is not wide:  # a change of few entries leaves all others as they are
        [(term, f)] = dense
        changed = None if term.change_entries is None else term.change_entries(base, f)
        if changed is not None:
            return changed
    with outside_autocast(base.device):
        work = base.to(wide)
        total = work
        for term, f in dense:
            total = term.add_change(total, work, f)
    return total.to(dtype)


def adapted(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor | None, tensors: list[Tensor]) -> Tensor:
    """Host operation with adapters, on canonical tensors.

    Args:
        call: geometry and terms.
        x: ``(tokens, in)`` or ``(batch, in, *space)``, in the dtype of the call.
        weight: frozen canonical base weight.
        bias: base bias or None.
        row: optional factor for every output channel, applied before the bias (DoRA).
        tensors: factors of all terms, in order.
    """
    watched = x.requires_grad or any([t is not None and t.requires_grad for t in (bias, row, *tensors)])
    if watched and torch.is_grad_enabled():
        out: Tensor = _Adapted.apply(call, x, weight, bias, row, *tensors)
        return out
    return _run(call, x, weight, bias, row, tensors)[0]


#: of a program, the first step's output and what its last step ran on, each None where it is not to be kept
Midway = tuple[Tensor | None, Tensor | None]
_NOTHING: Midway = (None, None)


def _run(call: Call, x, weight, bias, row, tensors) -> tuple[Tensor, Tensor | None, list[Midway]]:
    """Output, the unscaled output when rows are scaled, and what backward might keep of every program.

    The first steps come before the host's operation: they read the input while it is likely still in a cache.
    """
    geo = call.geometry
    pairs = call.split(tensors)
    beside, started = call.beside(pairs), []
    for program, f, folded in beside:
        started.append(None if folded.forward else program.start(geo, x, f))
    host_bias = None if bias is None or row is not None else bias.to(call.dtype)
    y = geo.apply(x, call.weight(weight, pairs, "forward"), host_bias)
    y = y if y.is_contiguous() else y.contiguous()
    midway: list[Midway] = []
    for (program, f, _), z in zip(beside, started):
        h = None if z is None else program.finish_(geo, y, z, f)
        # anything but a convolution is quickly done again
        midway.append((z, h if call.is_direct and isinstance(program.mid, Conv) else None))
    return (y, None, midway) if row is None else (scale_rows(y, row, bias), y, midway)


class _Adapted(torch.autograd.Function):
    """`_run` with its derivative. Function transforms and compiled code take the plain path and never come here."""

    @staticmethod
    def forward(ctx, call: Call, x, weight, bias, row, *tensors):
        y, unscaled, midway = _run(call, x, weight, bias, row, tensors)
        kept: list[Tensor | None] = []
        for pair in midway:
            kept += pair if pair[0] is None and pair[1] is None else call.worth_keeping(x, *pair)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.factors = call, len(tensors)
        ctx.save_for_backward(x, weight, bias, row, unscaled, *tensors, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, row, unscaled, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.factors], rest[ctx.factors :]
        kept = list(zip(kept[::2], kept[1::2]))
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needs))
        if torch.is_grad_enabled():
            return None, *differentiable_backward(ctx.call.plain, (x, weight, bias, row, *tensors), needs, grad)
        grad = grad.contiguous()
        g_row = None
        g_bias = sum_rows(grad).to(bias.dtype) if needs[2] else None
        if needs[3]:
            g_row, grad = rows_backward(grad, unscaled, row)
            g_row = g_row.to(row.dtype)
        elif row is not None:
            grad = grad * channel_view(row, grad)
        g_x, g_tensors = _backward(ctx.call, x, weight, tensors, kept, needs, grad)
        return (None, g_x, None, g_bias, g_row, *g_tensors)


def _backward(call: Call, x, weight, tensors, kept, needs, grad):
    """Gradient of the input and of every factor; the adapters' part in it follows the host's into the same tensor."""
    geo = call.geometry
    if call.is_direct and not ("scale" in call.names and any([n for t, n in zip(call.names, needs[4:]) if t == "scale"])):
        pairs = call.split(tensors)
        g_tensors, pushes = _direct_gradients(call, x, pairs, kept, needs, grad)
        g_x = geo.gradients(grad, x, call.weight(weight, pairs, "backward"), True, False)[0] if needs[0] else None
    else:
        g_tensors, pushes, g_x = _gradients(call, x, weight, tensors, kept, needs, grad)
    if g_x is not None:
        g_x = g_x if g_x.is_contiguous() else g_x.contiguous()
        for program, f, gz in pushes:
            program.push_(geo, g_x, x, f, gz)
    return g_x, g_tensors


def _direct_gradients(call: Call, x, pairs: Pairs, kept, needs, grad):
    """Gradients of the factors by formula, and what is to be pushed into the input's gradient."""
    found: list[Tensor | None] = []
    pushes = []
    kept = iter(kept)
    for term, own in pairs:
        z, h = _NOTHING if term.program is None else next(kept)
        wanted = set(compress(term.names, needs[4 + len(found) :]))
        f = cast(own, call.dtype)
        if term.program is None:
            assert term.sampled is not None and term.sampled.weight is not None  # every term is direct
            by_name = learned(term.sampled, call.geometry, x, term.sampled.weight(f), f, wanted, grad)
        else:
            beside = needs[0] and not term.folded.backward
            by_name, gz = term.program.backward_direct(call.geometry, x, z, f, wanted, grad, beside, h)
            pushes += [(term.program, f, gz)] if beside else []
        for name in term.names:
            found.append(by_name[name].to(own[name].dtype) if name in by_name else None)
    return found, pushes


def _gradients(call: Call, x, weight, tensors, kept, needs, grad):
    """The same with a graph from what was built of the factors back to them; and the host's gradient of the input."""
    geo = call.geometry
    wanted = needs[4:]
    with torch.enable_grad():
        held = [t.detach().requires_grad_() if n else t for t, n in zip(tensors, wanted)]
    leaves = [t for t, n in zip(held, wanted) if n]
    total: list[Tensor | None] = [None] * len(leaves)
    pushes = []
    with torch.enable_grad():
        pairs = call.split(held)
        running = call.beside(pairs)
    for (program, f, folded), (z, _) in zip(running, kept):
        beside = needs[0] and not folded.backward
        grads, gz = program.backward(geo, x, z, f, leaves, grad, beside)
        total = add_gradients(total, grads)
        pushes += [(program, f, gz)] if beside else []
    effective, whole = weight.to(call.dtype), False
    if call.is_dense:
        with torch.enable_grad():
            effective = call.weight(weight.detach(), pairs)
        sampled = [(t.sampled, f) for t, f in pairs if t.sampled is not None]
        whole = effective.requires_grad and len(sampled) < sum(t.program is None for t in call.terms)
        for step, f in [] if whole or not leaves else sampled:
            total = add_gradients(total, sampled_gradients(step, geo, x, cast(f, call.dtype), leaves, grad))
    through = effective.detach()
    if call.folded.backward and needs[0]:
        through = call.weight(weight, call.split(tensors), "backward")
    g_x, g_w = geo.gradients(grad, x, through, needs[0], whole)
    if g_w is not None:
        total = add_gradients(total, torch.autograd.grad(effective, leaves, g_w, allow_unused=True))
    found = iter(total)
    return [next(found) if n else None for n in wanted], pushes, g_x


def differentiable_backward(plain: Callable[..., Tensor], tensors, needs, grad):
    """Backward under ``create_graph=True``: gradients of a plain form of some tensors, themselves differentiable."""
    with torch.enable_grad():
        wanted = [t for t, need in zip(tensors, needs) if need]
        y = plain(*tensors)
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
