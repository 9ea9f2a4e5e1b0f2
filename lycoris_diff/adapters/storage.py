"""Where the factors of an adapter live: parameters under the names of a file's tensors, and the file's own values."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import CheckpointError


class FactorStore(nn.Module):
    """Named tensors; those with dotted names (``lora_A.weight``) live in nested modules.

    Attributes:
        factor_shapes: shape of every tensor by its name in files.
    """

    #: names of integer factors, kept as buffers
    index_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.factor_shapes = dict(shapes)
        #: where each factor lives: a submodule (None is the adapter itself, which would be a reference to itself) and a name
        self._owners: dict[str, tuple[nn.Module | None, str]] = {}
        self._exact: dict[str, tuple[Tensor, torch.dtype]] = {}
        for name, shape in shapes.items():
            self.add_factor(name, torch.empty(shape, dtype=torch.int32 if name in self.index_names else None))

    def add_factor(self, name: str, value: Tensor) -> None:
        """Register a factor: a parameter, or a buffer for integer values."""
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if value.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)
        self._owners[name] = None if owner is self else owner, leaf

    def factors(self) -> dict[str, Tensor]:
        """Live factors by the names of the file's tensors; offloaded ones are brought to their device."""
        live: dict[str, Any] = {}
        if not self._owners:
            return {name: self.get_tensor(name) for name in self.factor_shapes}
        away = False
        for name, (submodule, leaf) in self._owners.items():
            owner = self if submodule is None else submodule
            live[name] = t = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
            away = away or t.is_meta  # type: ignore[union-attr]
        if not away:
            return live
        with contextlib.ExitStack() as stack:
            for module in self.modules():
                stack.enter_context(align_module_device(module))
            return {name: self.get_tensor(name) for name in self.factor_shapes}

    @property
    def learns(self) -> bool:
        """Whether a factor takes a gradient; none is brought from anywhere to find out."""
        held = [(self if owner is None else owner)._parameters.get(leaf) for owner, leaf in self._owners.values()]
        return any([parameter is not None and parameter.requires_grad for parameter in held])

    def _replicate_for_data_parallel(self) -> FactorStore:
        """A copy whose tensors and submodules torch is about to replace by another device's: found by name from then on."""
        replica = super()._replicate_for_data_parallel()
        replica._owners = {}
        return replica

    def get_tensor(self, name: str) -> Tensor:
        """One factor by its file name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def keep_exact(self, values: Mapping[str, Tensor]) -> None:
        """Remember a file's values, in their own dtype in host memory, for merging and saving what computes in less."""
        self._exact = {k: (v.cpu(), self.get_tensor(k).dtype) for k, v in values.items()}

    def exact_factors(self) -> dict[str, Tensor]:
        """Factors as stored in the file where the live ones are those, rounded, else the live ones; on the live device."""
        live = self.factors()
        for name, (value, dtype) in self._exact.items():
            held, value = live[name], value.to(live[name].device)
            if not held.is_meta and torch.equal(held, value.to(dtype).to(held.dtype)):
                live[name] = value
        return live


def expect_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse factors that differ from what is expected.

    Raises:
        CheckpointError: naming the tensor, its shape and the expected one.
    """
    for name in [*expected, *found]:
        if name not in found:
            raise CheckpointError(f"tensor {name!r} is missing; expected shape {tuple(expected[name])}")
        if name not in expected:
            raise CheckpointError(
                f"tensor {name!r} of shape {tuple(found[name])} is not part of this adapter; expected {sorted(expected)}"
            )
        if tuple(found[name]) != tuple(expected[name]):
            raise CheckpointError(f"tensor {name!r} has shape {tuple(found[name])}, expected {tuple(expected[name])}")
