"""(IA)^3 (arXiv 2205.05638) as LyCORIS has it: one factor an input or output channel, ``W' = W * (1 + w)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..execution.around import Around, Host
from ..execution.geometry import Geometry
from ..execution.rows import channel_view
from ..execution.weights import Factors
from .base import Adapter, Site, fill
from .config import AdapterConfig
from .registry import register


@dataclass(init=False)
class IA3Config(AdapterConfig):
    """Configuration of `IA3Model`; ``r`` has no meaning here.

    Attributes:
        on_input: scale the input channels instead of the output channels.
        on_input_pattern: module name, suffix or regular expression -> another ``on_input``.
    """

    on_input: bool = False
    on_input_pattern: dict[str, bool] = field(default_factory=dict)

    peft_name: ClassVar[str] = "IA3"
    patterns: ClassVar[Mapping[str, str]] = {**AdapterConfig.patterns, "on_input_pattern": "on_input"}

    def check(self) -> None:
        super().check()
        for where, value in [("on_input", self.on_input), *self.on_input_pattern.items()]:
            if not isinstance(value, bool):
                raise ConfigError(f"IA3Config: {where} is {value!r}; expected True or False")


@register
class IA3(Adapter):
    """Offsets ``ia3_weight``: ``(out,)``, or ``(in,)`` over all groups with ``on_input``. The bias stays, as in LyCORIS."""

    config_class = IA3Config
    factor_names = ("ia3_weight",)
    additive = False

    @classmethod
    def shapes(cls, geometry: Geometry, config: IA3Config) -> dict[str, tuple[int, ...]]:
        return {"ia3_weight": (geometry.inp * geometry.groups if config.on_input else geometry.out,)}

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Axes of size one, which LyCORIS writes for convolutions, are dropped."""
        return {k: v.flatten() for k, v in tensors.items()}

    def reset(self, site: Site) -> None:
        fill(self, {"ia3_weight": nn.init.zeros_ if self.config.init_weights else partial(nn.init.normal_, std=0.1)})

    def change(self, base: Tensor, f: Factors) -> Tensor:
        w = f["ia3_weight"].to(base.dtype)
        ones = (1,) * len(self.geometry.kernel)
        if not self.config.on_input:  # type: ignore[attr-defined]
            return base * w.view(-1, 1, *ones)
        # output channels of one group see the input channels of that group
        groups = self.geometry.groups
        return (base.unflatten(0, (groups, -1)) * w.view(groups, 1, -1, *ones)).reshape(base.shape)

    @property
    def around_cost(self) -> int:
        return self.factor_shapes["ia3_weight"][0] if self.config.on_input else self.geometry.out  # type: ignore[attr-defined]

    def packed_gap(self) -> str:
        return ""

    def packed_form(self, f: Factors, host: Host) -> Around:
        change = f["ia3_weight"].flatten() * f["strength"]

        def scaled(x: Tensor) -> Tensor:
            return x * channel_view(change, x)

        return Around(before=scaled) if self.config.on_input else Around(after=scaled)  # type: ignore[attr-defined]
