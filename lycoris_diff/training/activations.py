"""What a forward pass keeps for backward, counted in a real step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class SavedForBackward:
    """Counts, inside a `with` block around a forward pass, the bytes that autograd keeps; every storage once.

    Parameters and buffers, which are there anyway, are left out. What `torch.utils.checkpoint` keeps of its inputs in the
    non-reentrant form is not seen.

    Attributes:
        bytes: kept so far.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        held = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        self._known = {tensor.untyped_storage()._cdata for tensor in held}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.bytes = 0

    def __enter__(self) -> SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)  # the graph keeps the storage alive, so no other gets its place
            self.bytes += storage.nbytes()
        return tensor
