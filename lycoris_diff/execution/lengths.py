"""DoRA over a product of two matrices, as one autograd operation: ``y = row * (W + up down) x + bias``.

``row = magnitude / ||W + up down||``, row by row. The norms need ``W down^T``, and the gradient of ``down`` through them
another product of the weight with something as narrow. Where there are few tokens, both ride along as more tokens in the
layer's own two products, the second where the input needs a gradient: the weight is read no more often then than without
an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import dora
from .costs import Folded
from .engine import Call, Term, cast, differentiable_backward
from .narrow import times_narrow
from .products import DEVICE
from .program import Program, trains
from .rows import row_squares, rows_backward, scale_rows, sum_products, sum_rows
from .steps import Conv, Pointwise
from .weights import Factors, Formula

#: numbers of ``(W + up down) down^T`` that may be kept for backward in any case, 1 MiB in float32; as many as the input has
ROOM = 2**18
#: numbers of a weight that are converted at once, as many as stay in a cache
BLOCK = 2**18


@dataclass(frozen=True)
class Lengths:
    """How the rows of a call get their lengths; its one term is a product of two factors.

    Attributes:
        magnitude: name of the factor that holds them.
        up, down: the product, ``(out, k)`` with the scale and ``(k, in, *kernel)``.
        ride: what the norms need of the weight rides along where it can.
    """

    magnitude: str
    up: Formula
    down: Formula
    ride: bool = False

    def rides(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether it does in that dtype: a product has rows of one, and `rows_backward` leaves room for more on processors."""
        return self.ride and dtype is x.dtype and x.device.type == DEVICE

    def product(self, f: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``up`` and ``down``, the latter ``(k, in * K)``, in ``dtype``, float32 or better."""
        up, down = self.up(f), self.down(f).flatten(1)
        wide = torch.promote_types(torch.promote_types(up.dtype, dtype), torch.float32)
        return up.to(wide), down.to(wide)


def dtype_back(weight: Tensor, wide: torch.dtype) -> torch.dtype:
    """Dtype of backward's narrow product with the weight: the weight's where that has float32's range, which spares a copy.

    It is as exact then as the layer's other gradients. The lengths themselves are differences of large sums where a change
    opposes the weight, and are computed in ``wide``, float32 or better, in any case.
    """
    return weight.dtype if weight.dtype is torch.bfloat16 else wide


def turned_in_blocks(weight: Tensor, down: Tensor) -> Tensor:
    """``weight down^T`` in the dtype of ``down``; of a narrower weight, copies are made of a block of rows at a time."""
    if weight.dtype is down.dtype or weight.device.type != DEVICE:
        return times_narrow(weight.to(down.dtype), down)
    rows = weight.split(max(1, BLOCK // weight.shape[1]))
    return torch.cat([times_narrow(block.to(down.dtype), down) for block in rows])


def product_of(program: Program) -> tuple[Formula, Formula] | None:
    """The product's two matrices, ``up`` first, if a factored form is nothing but one on all channels at once; else None."""
    first, last = program.first, program.last
    if program.mid is not None or not isinstance(first, (Pointwise, Conv)) or type(last) is not Pointwise:
        return None
    up, down = last.weight, first.weight
    if first.groups > 1 or last.groups > 1 or not (isinstance(up, Formula) and isinstance(down, Formula)):
        return None
    return None if up.rows is None else (up, down)


def lengthened(call: Call, how: Lengths, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Host operation with an adapter in training that gives its rows their lengths; arguments as of `adapted`."""
    out: Tensor = _Lengthened.apply(call, how, x, weight, bias, *tensors)
    return out


def _of(term: Term) -> tuple[Program, Folded]:
    assert term.program is not None  # that is why it is here
    return term.program, term.folded


class State(NamedTuple):
    """What is found on the way to the output.

    Attributes:
        unscaled: the output before its rows are scaled.
        row: the factor of every row.
        inverse: ``1 / ||W + up down||``.
        slope: twice its derivative by the square of its length.
        changed: ``(W + up down) down^T``.
        started: output of the first step, where there is one.
    """

    unscaled: Tensor
    row: Tensor
    inverse: Tensor
    slope: Tensor
    changed: Tensor
    started: Tensor | None


def _run(
    call: Call, how: Lengths, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, State]:
    geo, pairs = call.geometry, call.split(tensors)
    [(term, own)] = pairs
    program, folded = _of(term)
    f = cast(own, call.dtype)
    up, down = how.product(own, call.dtype)
    z = None if folded.forward else program.start(geo, x, f)
    through = call.weight(weight, pairs, "forward")
    if how.rides(x, down.dtype) and not folded.forward:
        both = geo.apply(torch.cat((x, down)), through)
        y, turned = both[: x.shape[0]], both[x.shape[0] :].T
    else:
        y, turned = geo.apply(x, through), turned_in_blocks(weight.flatten(1), down)
        y = y if y.is_contiguous() else y.contiguous()
    if z is not None:
        program.finish_(geo, y, z, f)
    extra = up @ (down @ down.T)
    squares = row_squares(weight) + (torch.add(extra, turned, alpha=2) * up).sum(1)
    changed = turned.add_(extra)  # in its place: riding, that lies behind the output, which is kept as well
    inverse = dora.inverse_roots(squares)
    row = own[how.magnitude].reshape(-1).to(squares.dtype) * inverse
    return scale_rows(y, row, bias), State(y, row, inverse, dora.row_slopes(row, squares), changed, z)


def _like(row: Tensor, weight: Tensor) -> Tensor:
    """A vector over rows, shaped to broadcast over a weight ``(out, ...)`` and in its dtype."""
    return row.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)


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
        y, state = _run(call, how, x, weight, bias, tensors)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.how = call, how
        kept = state._replace(started=call.worth_keeping(x, state.started)[0])
        ctx.save_for_backward(x, weight, bias, *kept, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        call, how, needs = ctx.call, ctx.how, ctx.needs_input_grad[2:]
        x, weight, bias, *rest = ctx.saved_tensors
        state, tensors = State(*rest[: len(State._fields)]), rest[len(State._fields) :]
        if grad is None:
            return (None,) * (2 + len(needs))
        if torch.is_grad_enabled():
            plain = lambda *given: _plain(call, how, *given)
            return None, None, *differentiable_backward(plain, (x, weight, bias, *tensors), needs, grad)
        grad = grad.contiguous()
        g_bias = sum_rows(grad).to(bias.dtype) if needs[2] else None
        g_x, g_tensors = _backward(call, how, x, weight, state, tensors, needs, grad)
        return None, None, g_x, None, g_bias, *g_tensors


def _backward(call: Call, how: Lengths, x: Tensor, weight: Tensor, state: State, tensors, needs, grad: Tensor):
    """Gradient of the input and of every factor."""
    unscaled, row, inverse, slope, changed, z = state
    geo, pairs = call.geometry, call.split(tensors)
    [(term, own)] = pairs
    program, folded = _of(term)
    f, (up, down) = cast(own, call.dtype), how.product(own, call.dtype)
    wanted = set(compress(term.names, needs[3:]))
    beside = needs[0] and not folded.backward
    near = dtype_back(weight, down.dtype)
    ride = how.rides(x, near) and beside and trains(program.first, wanted)
    rows = how.up.rows
    assert rows is not None  # `product_of` saw to it
    if folded.backward:  # the rows of what the gradient is multiplied with are scaled, not those of the gradient
        g_row, above = sum_products(grad, unscaled), grad
        f = f | {rows: f[rows] * _like(row, f[rows])}
    else:
        g_row, above = rows_backward(grad, unscaled, row, down.shape[0] if ride else 0)
    scaled = above[: grad.shape[0]]
    found, gz = program.backward_direct(geo, x, z, f, wanted, scaled, beside)
    if folded.backward and rows in found:
        found[rows] = found[rows] * _like(row, found[rows])

    # through the norms: row's derivative by W', and from there to the two factors
    steep = (g_row * slope).unsqueeze(1)
    narrow = steep * up
    g_x, below = None, None
    if ride:
        above[grad.shape[0] :] = narrow.T
        both = above @ weight.to(call.dtype)
        g_x, below = both[: grad.shape[0]], both[grad.shape[0] :]
    elif needs[0]:
        through = call.weight(weight, pairs, "backward")
        through = through * _like(row, through) if folded.backward else through
        g_x, _ = geo.gradients(scaled, x, through, True, False)
    wide = cast(own, up.dtype)
    through_norms = how.up.pull(wide, steep * changed, wanted)
    if trains(program.first, wanted):
        below = narrow.T.to(near) @ weight.flatten(1).to(near) if below is None else below
        through_norms |= how.down.pull(wide, torch.addmm(below.to(up.dtype), narrow.T @ up, down), wanted)
    for name, more in through_norms.items():
        found[name] = found[name].to(up.dtype) + more
    if how.magnitude in wanted:
        found[how.magnitude] = (g_row * inverse).view(own[how.magnitude].shape)

    if g_x is not None and beside:
        g_x = g_x if g_x.is_contiguous() else g_x.contiguous()
        program.push_(geo, g_x, x, f, gz)
    return g_x, [found[name].to(own[name].dtype) if name in found else None for name in term.names]
