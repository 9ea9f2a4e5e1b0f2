"""Original values of a layer's tensors, kept in host memory while adapters are merged into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """Copies of named parameters.

    Attributes:
        tensors: name -> copy in host memory, in the parameter's own dtype.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, layer: nn.Module, names: Iterable[str]) -> Snapshot:
        """Copy the named parameters to host memory."""
        return cls({n: layer.get_parameter(n).detach().to("cpu", copy=True) for n in names})

    def restore(self, layer: nn.Module) -> None:
        """Write the copies back in place; the bits are those that were taken."""
        with torch.no_grad():
            for name, value in self.tensors.items():
                layer.get_parameter(name).copy_(value)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
