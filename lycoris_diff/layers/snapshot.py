"""Original values of a layer's tensors, kept in host memory while adapters are merged into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """Copies of named parameters.

    Attributes:
        tensors: name -> copy in host memory, in the parameter's own dtype; None for a bias that the layer does not have.
    """

    tensors: dict[str, Tensor | None]

    @classmethod
    def take(cls, layer: nn.Module, names: Iterable[str], taken: Snapshot | None = None) -> Snapshot:
        """Copy the named parameters to host memory, but for those that are ``taken`` already."""
        tensors = {} if taken is None else dict(taken.tensors)
        for name in names:
            parameter = layer._parameters[name]
            if name not in tensors:
                tensors[name] = None if parameter is None else parameter.detach().to("cpu", copy=True)
        return cls(tensors)

    def restore(self, layer: nn.Module) -> None:
        """Write the copies back in place; the bits are those that were taken."""
        write(layer, self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values() if t is not None)


def write(layer: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Write values into a layer's parameters in place; a bias that the layer lacks is added, and taken out by None."""
    with torch.no_grad():
        for name, value in tensors.items():
            parameter = layer._parameters[name]
            if parameter is not None and value is not None:
                parameter.copy_(value)
            else:
                layer._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
