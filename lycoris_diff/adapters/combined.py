"""The exact weighted sum of adapters of any algorithms and ranks, itself one adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..execution.geometry import Geometry, geometry_of
from ..execution.norms import norm_geometry_of
from ..execution.weights import Factors
from .base import Adapter, Site
from .config import AdapterConfig
from .registry import register


@dataclass(init=False)
class CombinedConfig(AdapterConfig):
    """Configuration of a weighted sum; made by ``add_weighted_adapter``.

    Attributes:
        parts: saved form of every part's config.
        weights: one factor a part.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    peft_name: ClassVar[str] = "COMBINED"


@register
class Combined(Adapter):
    """Copies of other adapters with a weight each; factors are named ``parts.<index>.<factor>``.

    Strength multiplies every part's weight, so the change is ``strength * sum_i weight_i * change_i``, each change taken
    against the unmodified base weight.
    """

    config_class = CombinedConfig

    @classmethod
    def of(cls, config: CombinedConfig, parts: dict[int, Adapter]) -> Combined:
        """The sum of (copies of) adapters, by their index in the config."""
        first = next(iter(parts.values()))
        combined = cls(first.geometry, config, {})
        combined.parts = nn.ModuleDict({str(i): copy.deepcopy(p) for i, p in parts.items()})
        combined.factor_shapes = {
            f"parts.{i}.{name}": shape for i, part in parts.items() for name, shape in part.factor_shapes.items()
        }
        combined._owners = {
            f"parts.{i}.{name}": (part if owner is None else owner, leaf)
            for i, part in combined._parts()
            for name, (owner, leaf) in part._owners.items()
        }
        combined.depends_on_weight = any(part.depends_on_weight for part in parts.values())
        combined.set_strength(1.0)
        return combined

    parts: nn.ModuleDict

    @classmethod
    def host(cls, layer: nn.Module) -> Geometry | None:
        return geometry_of(layer) or norm_geometry_of(layer)

    @classmethod
    def owns(cls, name: str) -> bool:
        return re.match(r"parts\.\d+\.", name) is not None

    def set_strength(self, value: float) -> None:
        super().set_strength(value)
        for index, part in self._parts():
            part.set_strength(value * self.config.weights[index])  # type: ignore[attr-defined]

    def _parts(self) -> list[tuple[int, Adapter]]:
        return [(int(i), p) for i, p in self.parts.items()]  # type: ignore[misc]

    def in_use(self) -> list[Adapter]:
        return [one for _, part in self._parts() for one in part.in_use()]

    @property
    def changes_weight(self) -> bool:
        return any(p.changes_weight for _, p in self._parts())

    @property
    def changes_bias(self) -> bool:
        return any(p.changes_bias for _, p in self._parts())

    def settle(self, base: Callable[[], Tensor]) -> None:
        for _, part in self._parts():
            part.settle(base)

    def packed_gap(self) -> str:
        return next((gap for _, part in self._parts() if (gap := part.packed_gap())), "")

    def members(self, exact: bool = False) -> list[tuple[Adapter, dict[str, Tensor]]]:
        return [member for _, part in self._parts() for member in part.members(exact)]

    def exact_factors(self) -> dict[str, Tensor]:
        return {f"parts.{i}.{k}": v for i, part in self._parts() for k, v in part.exact_factors().items()}

    def reset(self, site: Site) -> None:
        """Parts are copies; there is nothing to initialise."""

    def add_change(self, total: Tensor, base: Tensor, f: Factors) -> Tensor:
        for part, inputs in self.members():
            total = part.add_change(total, base, inputs)
        return total
