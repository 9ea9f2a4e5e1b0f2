"""Geometry: how a host layer applies a weight. Knows nothing of algorithms.

Every kind is seen in one canonical form: the weight is ``(out, in / groups, *kernel)`` (an empty kernel for Linear and for
transformers' Conv1D, whose stored weight is the transpose), inputs have their channels on axis 1: ``(tokens, in)`` for the
linear kinds, ``(batch, in, *space)`` for convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import narrow_product, on_every, summed, times

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_LAYERS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class Geometry:
    """Shape of a host weight and the operation that applies it.

    Attributes:
        out: output channels.
        inp: input channels of one group.
        kernel: kernel sizes, empty for the linear kinds.
        stride, padding, dilation: one integer an axis of the kernel.
        groups: of the convolution.
        edges: explicit padding in the order of `torch.nn.functional.pad`, empty when ``padding`` says it all.
        edge_mode: mode of the explicit padding.
        transposed: the stored weight is ``(in, out)`` (transformers' Conv1D).
        has_bias: the host adds a bias of its own.
    """

    out: int
    inp: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    edges: tuple[int, ...] = ()
    edge_mode: str = "constant"
    transposed: bool = False
    has_bias: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape of the weight, ``(out, inp, *kernel)``."""
        return (self.out, self.inp, *self.kernel)

    @property
    def columns(self) -> int:
        """Columns of the flattened weight: ``inp * prod(kernel)``."""
        return self.inp * prod(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """Applying the weight only mixes channels: Linear, or a 1x1 convolution without stride and padding."""
        plain = not self.edges and self.groups == 1
        return plain and all(k == 1 and s == 1 and p == 0 for k, s, p in zip(self.kernel, self.stride, self.padding))

    @property
    def has_kernel(self) -> bool:
        """A kernel with more than one tap."""
        return prod(self.kernel) > 1

    # --- between the host layer's own layout and the canonical one -------------------------------------------------
    def canonical(self, weight: Tensor) -> Tensor:
        """The host's stored weight as ``(out, inp, *kernel)``; a view."""
        return weight.T if self.transposed else weight

    stored = canonical  # a transposition undoes itself

    def enter(self, x: Tensor) -> tuple[Tensor, torch.Size | None]:
        """Input in canonical form, explicitly padded, and what `leave` needs to restore the leading axes."""
        if not self.kernel:
            return (x, None) if x.dim() == 2 else (x.reshape(-1, x.shape[-1]), x.shape[:-1])
        lead = None
        if x.dim() == len(self.kernel) + 1:
            x, lead = x.unsqueeze(0), torch.Size(())
        if self.edges:
            x = F.pad(x, self.edges, mode=self.edge_mode)
        return x, lead

    def leave(self, y: Tensor, lead: torch.Size | None) -> Tensor:
        """Canonical output back to the host's axes."""
        if lead is None:
            return y
        return y.squeeze(0) if self.kernel else y.view(*lead, y.shape[-1])

    def tokens(self, x: Tensor) -> int:
        """Positions at which the weight is applied to a canonical, padded input."""
        count = x.shape[0]
        for size, k, s, p, d in zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation):
            count *= (size + 2 * p - d * (k - 1) - 1) // s + 1
        return count

    # --- the host's operation and its derivatives ------------------------------------------------------------------
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """The host's own operation with ``weight (p, d, *kernel)`` on a canonical, padded input."""
        if not self.kernel:
            return F.linear(x, weight, bias)
        conv = _CONV[len(self.kernel)]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups if groups is None else groups)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_weight: bool, groups: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `apply` with respect to its input and its weight, each None when not asked for."""
        if not self.kernel:
            return (grad @ weight if of_input else None), (narrow_product(grad, x) if of_weight else None)
        if not (of_input or of_weight):
            return None, None
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.kernel),
            self.groups if groups is None else groups,
            (of_input, of_weight, False),
        )
        return gx, gw

    # --- channel mixing: a linear map on every one of `groups` slices of the channel axis --------------------------
    def pointwise(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``weight (p, d)`` on each of ``groups`` slices of d channels: ``(b, groups*d, *s) -> (b, groups*p, *s)``."""
        p, d = weight.shape
        if not self.kernel:
            return times(x, weight) if groups == 1 else times(x.reshape(-1, d), weight).view(x.shape[0], groups * p)
        y = on_every(weight, x.reshape(x.shape[0] * groups, d, prod(x.shape[2:])))
        return y.view(x.shape[0], groups * p, *x.shape[2:])

    def accumulate_(self, y: Tensor, h: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``y += pointwise(h, weight, groups)`` in place, without a temporary; ``y`` is contiguous."""
        b, q = weight.shape
        if not self.kernel:
            y.view(-1, b).addmm_(h.reshape(-1, q), weight.T)
        else:
            batch = y.shape[0] * groups
            size = prod(y.shape[2:])
            y.view(batch, b, size).baddbmm_(weight.expand(batch, b, q), h.reshape(batch, q, size))
        return y

    def pointwise_weight_grad(self, x: Tensor, grad: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Gradient of `pointwise` with respect to its weight ``(p, d)``."""
        p, d = weight.shape
        if not self.kernel:
            return narrow_product(grad.reshape(-1, p), x.reshape(-1, d))
        batch, size = x.shape[0] * groups, prod(x.shape[2:])
        grad, x = grad.reshape(batch, p, size), x.reshape(batch, d, size)
        # channels before positions: here the wide side first is faster for every width, as it is not in `narrow_product`
        return summed(torch.bmm(grad, x.mT)) if p >= d else summed(torch.bmm(x, grad.mT)).T

    def fold(self, x: Tensor, groups: int) -> Tensor:
        """``(b, groups*d, *s) -> (b*groups, d, *s)``, so that one operation treats every slice."""
        return x if groups == 1 else x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])

    def unfold(self, x: Tensor, groups: int) -> Tensor:
        """Inverse of `fold`."""
        return x if groups == 1 else x.reshape(x.shape[0] // groups, x.shape[1] * groups, *x.shape[2:])


def is_plain_weight(weight: object) -> bool:
    """Whether a weight is an ordinary floating tensor: not absent, not packed, not an 8-bit storage type."""
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1 and not _is_packed(type(weight))


def _is_packed(kind: type) -> bool:
    """Whether a tensor class keeps other tensors inside and only passes for a floating one (torchao's quantized weights)."""
    return hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.")


def geometry_of(layer: nn.Module) -> Geometry | None:
    """Geometry of a supported layer, None for everything else.

    Supported are `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, their subclasses, and transformers' ``Conv1D``.
    """
    if isinstance(layer, nn.Linear):
        return Geometry(layer.out_features, layer.in_features, has_bias=layer.bias is not None)
    if is_transformers_conv1d(layer):
        weight: Any = layer.weight
        return Geometry(weight.shape[1], weight.shape[0], transposed=True, has_bias=layer.bias is not None)
    for kind, axes in _CONV_LAYERS.items():
        if isinstance(layer, kind):
            return _conv_geometry(layer, axes)
    return None


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' ``Conv1D`` (a Linear with a transposed weight)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)


def _conv_geometry(layer: Any, axes: int) -> Geometry:
    before_after = [(p, p) for p in _numeric_padding(layer, axes)]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        before_after = [(t // 2, t - t // 2) for t in totals]
    symmetric = all(a == b for a, b in before_after)
    implicit = layer.padding_mode == "zeros" and symmetric
    needs_edges = not implicit and any(a or b for a, b in before_after)
    return Geometry(
        out=layer.out_channels,
        inp=layer.in_channels // layer.groups,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=tuple(a for a, _ in before_after) if implicit else (0,) * axes,
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        edges=tuple(e for pair in reversed(before_after) for e in pair) if needs_edges else (),
        edge_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        has_bias=layer.bias is not None,
    )


def _numeric_padding(layer: Any, axes: int) -> tuple[int, ...]:
    return (0,) * axes if isinstance(layer.padding, str) else tuple(layer.padding)
