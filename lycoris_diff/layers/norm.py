"""AdaptedNorm: a normalisation layer and its named adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor

from ..adapters.base import Adapter
from ..execution.costs import Choice
from ..execution.engine import changed_weight
from ..execution.norms import run_with
from ..execution.program import Program
from .layer import AdaptedLayer
from .parts import bias_change, plus


class AdaptedNorm(AdaptedLayer):
    """Runs the base layer's own forward with the changed weight and bias; everything else is an adapted layer's."""

    def _fusable(self, x: Tensor) -> bool:
        return False

    def _choose(
        self, adapter: Adapter, f: dict[str, Tensor], x: Tensor, plain: bool, alone: bool = False
    ) -> tuple[Choice, Program | None]:
        return Choice("instead", None, 0), None

    def _contribution(self, names: Sequence[str], x: Tensor) -> Tensor:
        return self._separate(names, x) - self.base_layer(x)

    def _separate(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        active = [(member.adapter, member.f) for member in self._prepare(names, x)]
        base: Any = self.base_layer
        if "forward" in base.__dict__:
            # offloading has patched it to load its parameters, over those we would put there: it runs, and its result goes
            x = x.to(base(x, *args, **kwargs).device)
        weight, bias = base.weight, getattr(base, "bias", None)
        if weight.is_meta:
            with align_module_device(base):
                weight, bias = base.weight, getattr(base, "bias", None)
        tensors = {"weight": changed_weight(weight.to(x.device), active, weight.dtype)}
        bias = plus(None if bias is None else bias.to(x.device), bias_change(active))
        if bias is not None:
            tensors["bias"] = bias.to(weight.dtype)
        return run_with(base, tensors, x, *args, **kwargs)
