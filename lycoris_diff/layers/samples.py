"""Samples: which adapters every sample of a batch runs with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterError


class Samples:
    """Names of adapters by sample; a batch may hold all samples several times, one round after the other.

    That is how pipelines put the unconditional half of classifier-free guidance before the conditional one.

    Args:
        names: names of every sample's adapters; none is the base model alone.
    """

    def __init__(self, names: list[tuple[str, ...]]) -> None:
        self.names = names
        self._rows: dict[tuple[int, torch.device], list[tuple[tuple[str, ...], Tensor]]] = {}

    def rows(self, batch: int, device: torch.device) -> list[tuple[tuple[str, ...], Tensor]]:
        """Return the sets of adapters in use, each with the indices of its rows in a batch.

        Raises:
            AdapterError: the batch is no multiple of the samples.
        """
        if (batch, device) not in self._rows:
            if batch % len(self.names):
                raise AdapterError(
                    f"a layer got a batch of {batch}, adapters were given for {len(self.names)} samples; "
                    "expected as many samples, or a multiple of them (one round of all samples after the other)"
                )
            found: dict[tuple[str, ...], list[int]] = {}
            for row in range(batch):
                names = self.names[row % len(self.names)]
                if names:
                    found.setdefault(names, []).append(row)
            with torch.inference_mode(False):  # they may be saved for a backward pass later
                self._rows[batch, device] = [(names, torch.tensor(rows, device=device)) for names, rows in found.items()]
        return self._rows[batch, device]
