"""DoRA over a product of two factors, as one autograd operation: ``y = row * (W + up down) x + bias``.

``row = magnitude / ||W + up down||``, row by row. The norms need ``W down^T``, and the gradient of ``down`` through them
another product of the weight with something as narrow. Where there are few tokens, both ride along as more tokens in the
layer's own two products: the weight is read no more often than without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import dora
from .costs import Folded
from .engine import Call, Term, cast, differentiable_backward
from .narrow import times_narrow
from .program import Program
from .rows import row_squares, rows_backward, scale_rows, sum_rows
from .steps import Conv, Factor, Factors, Pointwise


@dataclass(frozen=True)
class Lengths:
    """How the rows of a call get their lengths; its one term is a product of two factors.

    Attributes:
        magnitude: name of the factor that holds them.
        up, down: the product, ``(out, k)`` with the scale and ``(k, in, *kernel)``.
        ride: what the norms need of the weight rides along; all factors have the call's dtype.
    """

    magnitude: str
    up: Factor
    down: Factor
    ride: bool = False

    def product(self, f: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``up`` and ``down``, the latter ``(k, in * K)``, in ``dtype``, float32 or better."""
        up, down = self.up(f), self.down(f).flatten(1)
        wide = torch.promote_types(torch.promote_types(up.dtype, dtype), torch.float32)
        return up.to(wide), down.to(wide)


def factors_of(program: Program) -> tuple[Factor, Factor] | None:
    """The product's two factors, ``up`` first, if a factored form is nothing but one on all channels at once; else None."""
    up, down = program.last.weight, None if program.first is None else program.first.weight
    plain = all([type(step) in (Pointwise, Conv) and step.groups == 1 for step in (program.first, program.last)])  # type: ignore
    return (up, down) if plain and program.mid is None and isinstance(up, Factor) and isinstance(down, Factor) else None


def lengthened(call: Call, how: Lengths, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Host operation with an adapter that gives its rows their lengths, on canonical tensors; arguments as of `adapted`."""
    recorded = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, bias, *tensors)])
    if recorded:
        out: Tensor = _Lengthened.apply(call, how, x, weight, bias, *tensors)
        return out
    return _run(call, how, x, weight, bias, tensors)[0]


def _of(term: Term) -> tuple[Program, Folded]:
    assert term.program is not None  # that is why it is here
    return term.program, term.folded


def _run(call: Call, how: Lengths, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> tuple:
    """Output, output before scaling, row factors, two vectors for their gradients, ``W' down^T``, the first step's output."""
    geo, [(term, own)] = call.geometry, call.split(tensors)
    program, folded = _of(term)
    f = cast(own, call.dtype)
    up, down = how.product(own, call.dtype)
    z = None if folded.forward else program.start(geo, x, f)
    through = call.weight(weight, tensors, "forward")
    if how.ride and not folded.forward:
        both = geo.apply(torch.cat((x, down)), through)
        y, turned = both[: x.shape[0]], both[x.shape[0] :].T
    else:
        y, turned = geo.apply(x, through), times_narrow(weight.flatten(1).to(down.dtype), down)
        y = y if y.is_contiguous() else y.contiguous()
    if z is not None:
        program.finish_(geo, y, z, f)
    changed = torch.addmm(turned, up, down @ down.T)  # the changed weight's product with down
    squares = row_squares(weight) + ((changed + turned) * up).sum(1)
    inverse = dora.inverse_roots(squares)
    row = own[how.magnitude].reshape(-1).to(squares.dtype) * inverse
    return scale_rows(y, row, bias), y, row, inverse, dora.row_slopes(row, squares), changed, z


def _plain(call: Call, how: Lengths, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
    """The same result in plain differentiable operations."""
    [(_, own)] = call.split(tensors)
    up, down = how.product(own, call.dtype)
    merged = weight.flatten(1).to(up.dtype) + up @ down
    return call.plain(x, weight, bias, dora.row_factors(own[how.magnitude], merged.square().sum(1)), *tensors)


class _Lengthened(torch.autograd.Function):
    """`_run` with its derivative."""

    @staticmethod
    def forward(ctx, call: Call, how: Lengths, x, weight, bias, *tensors):
        y, *state, z = _run(call, how, x, weight, bias, tensors)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.how = call, how
        ctx.save_for_backward(x, weight, bias, *state, call.worth_keeping(x, z), *tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        call, how, needs = ctx.call, ctx.how, ctx.needs_input_grad[2:]
        x, weight, bias, unscaled, row, inverse, slope, changed, z, *tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * (2 + len(needs))
        if torch.is_grad_enabled():
            plain = lambda *given: _plain(call, how, *given)
            return None, None, *differentiable_backward(plain, (x, weight, bias, *tensors), needs, grad)
        geo, [(term, own)] = call.geometry, call.split(tensors)
        program, folded = _of(term)
        f = cast(own, call.dtype)
        up, down = how.product(own, call.dtype)
        tokens, beside = grad.shape[0], needs[0] and not folded.backward
        ride = how.ride and beside
        grad = grad.contiguous()
        g_bias = sum_rows(grad).to(bias.dtype) if needs[2] else None
        g_row, scaled = rows_backward(grad, unscaled, row, down.shape[0] if ride else 0)
        grad = scaled[:tokens] if ride else scaled
        wanted = [name for name, need in zip(term.names, needs[3:]) if need]
        found, gz = program.backward_direct(geo, x, z, f, wanted, grad, beside)

        steep = (g_row * slope).unsqueeze(1)
        sloped = steep * up
        g_x = None
        if ride:
            scaled[tokens:] = sloped.T
            both = scaled @ weight.to(call.dtype)
            g_x, below = both[:tokens], both[tokens:]
        else:
            below = sloped.T @ weight.flatten(1).to(up.dtype)
            if needs[0]:
                g_x, _ = geo.gradients(grad, x, call.weight(weight, tensors, "backward"), True, False)
        if g_x is not None and beside:
            g_x = g_x if g_x.is_contiguous() else g_x.contiguous()
            program.push_(geo, g_x, x, f, gz)
        for factor, gradient in ((how.up, steep * changed), (how.down, torch.addmm(below, sloped.T @ up, down))):
            if factor.name in found:
                found[factor.name] = found[factor.name].to(gradient.dtype) + factor.pull(own, gradient)
        if how.magnitude in wanted:
            found[how.magnitude] = (g_row * inverse).view(own[how.magnitude].shape)
        g_tensors = [found[name].to(own[name].dtype) if name in found else None for name in term.names]
        return None, None, g_x, None, g_bias, *g_tensors
