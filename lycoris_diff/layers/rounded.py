"""Adapters merged into a packed weight: added to the numbers it stands for, and rounded anew by the layer's own scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..execution.packed import describe, held_weight, scheme_of
from .snapshot import Snapshot, write


@dataclass(frozen=True)
class PackedSnapshot:
    """A packed weight as it was before merging, and copies of the layer's other changed parameters.

    Attributes:
        weight: the parameter itself with its scales; it stays where it was, which costs no more than the packed size.
        rest: the others.
    """

    weight: nn.Parameter
    rest: Snapshot

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The copies of the other parameters."""
        return self.rest.tensors

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rest.nbytes + packed_bytes(self.weight)

    def restore(self, layer: nn.Module) -> None:
        """Put the parameter back, and write the copies; the bits are those that were taken."""
        device, held = layer.get_parameter("weight").device, self.weight
        if held.device != device:  # the model has been moved while merged
            moved = held.to(device)
            held = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
        scheme_of(layer).install(layer, held)
        self.rest.restore(layer)


def packed_bytes(weight: Any) -> int:
    """Bytes of a packed weight and of what belongs to it."""
    parts = [weight]
    if hasattr(type(weight), "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    state = getattr(weight, "quant_state", None)
    states = [] if state is None else [state, getattr(state, "state2", None)]
    parts += [s.absmax for s in states if s is not None]
    parts += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    return sum(t.numel() * t.element_size() for t in parts)


def original(layer: nn.Module, taken: Any) -> Tensor:
    """The numbers a layer's packed weight stands for, as stored, in float32; unmerged, also while merged.

    Raises:
        AdapterError: the scheme is not known, or cannot be read just now.
    """
    held = _held(layer, taken)
    return scheme_of(layer).read(held).detach()


def _held(layer: nn.Module, taken: Any) -> nn.Parameter:
    return taken.weight if isinstance(taken, PackedSnapshot) else held_weight(layer)


@torch.no_grad()
def rounded(layer: nn.Module, wanted: Tensor, taken: Any) -> tuple[nn.Parameter | None, float]:
    """A parameter that stands for ``wanted`` as nearly as the layer's scheme can say it, and what that loses.

    Args:
        layer: base layer with a packed weight.
        wanted: weight as stored, in float32.
        taken: the layer's snapshot or None.

    Returns:
        The parameter, None where nothing is to change, and the loss: ``||rounded - wanted|| / ||wanted - original||``.

    Raises:
        AdapterError: the result is not finite.
    """
    held = _held(layer, taken)
    scheme = scheme_of(layer)
    size = torch.linalg.vector_norm(wanted - scheme.read(held).to(wanted.device))
    if size == 0:
        return None, 0.0
    fresh = scheme.pack(held, wanted)
    loss = float(torch.linalg.vector_norm(scheme.read(fresh) - wanted) / size)
    if not loss < float("inf"):
        raise AdapterError(f"{describe(layer)}: the changed weight does not fit its scheme; leave the adapter unmerged")
    return fresh, loss


def write_rounded(layer: nn.Module, fresh: nn.Parameter | None, values: dict[str, Tensor | None]) -> None:
    """Install a parameter that `rounded` made, and write the layer's other changed parameters."""
    if fresh is not None:
        scheme_of(layer).install(layer, fresh)
    write(layer, {k: v for k, v in values.items() if k != "weight"})


def take(layer: nn.Module, values: dict[str, Tensor | None], taken: Any) -> PackedSnapshot:
    """The snapshot to go back to: the one ``taken`` before, or a new one."""
    names = [k for k in values if k != "weight"]
    if isinstance(taken, PackedSnapshot):
        return PackedSnapshot(taken.weight, Snapshot.take(layer, names, taken.rest))
    return PackedSnapshot(held_weight(layer), Snapshot.take(layer, names))
