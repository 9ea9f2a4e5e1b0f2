"""Changes that multiply a weight, run around a layer: where its values are not at hand, or changing it costs more.

``change(W) x = W before(x) + after(W x) + beside(x)``: but for lengths of rows, the layer's own operation is the only one that
reads W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry
from .rows import channel_view

Map = Callable[[Tensor], Tensor]


class Around(NamedTuple):
    """Linear maps of canonical tensors (channels on axis 1), at the adapter's strength; each may be missing.

    Attributes:
        before: of the input, ``(n, in, ...)`` to the same shape.
        after: of the layer's output without its bias, ``(n, out, ...)`` to the same shape.
        beside: from the input to an output of its own.
        moved: ``x + before(x)`` in one pass, for changes that have nothing but `before`.
        changed: ``W x`` with the change, from ``x`` and ``W x``; for changes that have nothing else.
    """

    before: Map | None = None
    after: Map | None = None
    beside: Map | None = None
    moved: Map | None = None
    changed: Callable[[Tensor, Tensor], Tensor] | None = None


class Host(NamedTuple):
    """The layer that they run around.

    Attributes:
        run: the layer on a canonical input, with its bias.
        bias: that bias, ``(out,)``, or None.
        dtype: of the input.
        row_squares: squared norm of every row of the weight, ``(out,)`` in float32; None where nothing has asked for it.
        bare: the weight alone on a canonical input; None where that is only known as `run` less the bias.
        weight: canonical and unmodified, where it is at hand.
    """

    run: Map
    bias: Tensor | None
    dtype: torch.dtype
    row_squares: Tensor | None = None
    bare: Map | None = None
    weight: Tensor | None = None

    def plain(self, x: Tensor) -> Tensor:
        """The weight alone on a canonical input."""
        return self.outputs(x)[1] if self.bare is None else self.bare(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """With the bias, and without."""
        y = (self.run if self.bare is None else self.bare)(x)
        if self.bias is None:
            return y, y
        bias = channel_view(self.bias, y)
        return (y, y - bias) if self.bare is None else (y + bias, y)


def channels(x: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """Matrices ``(p, d)`` on the channels one after the other: ``(n, d, *s) -> (n, p, *s)``."""
    y = x.movedim(1, -1)
    for matrix in matrices:
        y = F.linear(y, matrix.to(x.dtype))
    return y.movedim(-1, 1)


def pointwise_input(geometry: Geometry) -> bool:
    """Whether a map of the weight's flattened columns is one of the input's channels."""
    return geometry.groups == 1 and not geometry.has_kernel


def apply_around(member: Around, x: Tensor, host: Host) -> Tensor:
    """What one change alone adds to the layer's output, on a canonical input."""
    parts = []
    if member.before is not None:
        parts.append(host.plain(member.before(x)))
    if member.after is not None:
        parts.append(member.after(host.plain(x)))
    if member.beside is not None:
        parts.append(member.beside(x))
    if member.changed is not None:
        plain = host.plain(x)
        parts.append(member.changed(x, plain) - plain)
    return sum(parts[1:], parts[0])


def run_around(members: Sequence[Around], x: Tensor, host: Host) -> Tensor:
    """The layer's output with the changes, from as few runs of the layer as possible.

    Changes of the input alone take one run, and so do changes of the output alone; both kinds together take two.
    """
    if len(members) == 1 and members[0].moved is not None:
        return host.run(members[0].moved(x))
    if len(members) == 1 and members[0].changed is not None:
        y = members[0].changed(x, host.plain(x))
        return y if host.bias is None else y + channel_view(host.bias, y)
    befores, afters, besides, _, changes = ([maps for maps in kind if maps is not None] for kind in zip(*members))
    moved = [before(x) for before in befores]
    if afters or changes:
        y, plain = host.outputs(x)
        y = sum([after(plain) for after in afters], y)
        y = sum([changed(x, plain) - plain for changed in changes], y)
        if moved:
            y = y + host.plain(sum(moved[1:], moved[0]))
    else:
        y = host.run(sum(moved, x))
    return sum([beside(x).to(y.dtype) for beside in besides], y)
