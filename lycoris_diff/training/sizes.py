"""How large one algorithm is on one model, and what makes it larger or smaller; nothing is built for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, prod
from typing import Any

from torch import nn

from ..adapters.base import Adapter
from ..adapters.config import AdapterConfig
from ..adapters.lokr import LoKr
from ..adapters.oft import OFTConfig
from ..adapters.registry import adapter_class
from ..building import layer_config
from ..diffusion.components import inner_model
from ..errors import ConfigError
from ..execution.geometry import Geometry
from ..targets import check_patterns, find_targets, pattern_value

#: what `r` is called where it is no rank
_LABELS = {
    "MISS": "shard width",
    "SHIRA": "entries per row and column",
    "DIAG_OFT": "block size",
    "LYCORIS_BOFT": "block size",
}
#: algorithms whose size follows from the layers alone
_FIXED = ("FULL", "NORM", "IA3", "COMBINED")


@dataclass(frozen=True)
class Knob:
    """What makes an adapter larger or smaller.

    Attributes:
        field: of the config.
        label: its name for people: "rank", or "factor" for a LoKr with full halves, where more of it is less.
    """

    field: str
    label: str


def size_knob(model: nn.Module, config: AdapterConfig) -> Knob | None:
    """Return what sets the size of an adapter on a model; None where the algorithm leaves no choice.

    Raises:
        AdapterError: the config does not fit the model.
    """
    return Sizes.of(model, config).knob


def count_parameters(model: nn.Module, config: AdapterConfig) -> int:
    """Return how many values an adapter's factors have, without making them.

    Modules trained in full and biases, which do not depend on the size, are not counted.

    Raises:
        AdapterError: the config does not fit the model.
    """
    return Sizes.of(model, config).count(config)


@dataclass
class Sizes:
    """The layers that an adapter goes on, with equal ones counted once.

    Attributes:
        cls: the algorithm.
        config: as given.
        layers: geometry and an example path of layers with equal shapes -> how many there are.
        paths: of all layers.
    """

    cls: type[Adapter]
    config: AdapterConfig
    layers: Counter[tuple[Geometry, str]]
    paths: list[str]

    @classmethod
    def of(cls, model: nn.Module, config: AdapterConfig) -> Sizes:
        config.check()
        layers: Counter[tuple[Geometry, str]] = Counter()
        examples: dict[Any, tuple[Geometry, str]] = {}
        paths: list[str] = []
        for target in find_targets(inner_model(model), config):
            paths.append(target.path)
            own = tuple(repr(pattern_value(getattr(config, pattern), target.path, None)) for pattern in config.patterns)
            layers[examples.setdefault((target.geometry, own), (target.geometry, target.path))] += 1
        check_patterns(config, paths)
        return cls(adapter_class(config), config, layers, paths)

    def shapes(self, config: AdapterConfig) -> Iterable[tuple[dict[str, tuple[int, ...]], int]]:
        for (geometry, path), count in self.layers.items():
            yield self.cls.shapes(geometry, layer_config(config, path)), count

    def count(self, config: AdapterConfig) -> int:
        indices = set(self.cls.index_names)
        return sum(n * prod(s) for shapes, n in self.shapes(config) for name, s in shapes.items() if name not in indices)

    @property
    def full(self) -> bool:
        """Whether this is a LoKr with both halves full on every layer, which has no rank."""
        return self.cls is LoKr and self.is_full(self.config)

    def is_full(self, config: AdapterConfig) -> bool:
        return all({"lokr_w1", "lokr_w2"} <= shapes.keys() for shapes, _ in self.shapes(config))

    @property
    def knob(self) -> Knob | None:
        name = self.config.peft_name
        if name in _FIXED:
            return None
        if self.full:
            return Knob("decompose_factor", "factor")
        if isinstance(self.config, OFTConfig):
            return Knob("r", "blocks") if self.config.r else Knob("oft_block_size", "block size")
        return Knob("r", _LABELS.get(name, "rank"))

    def candidates(self, knob: Knob) -> set[int]:
        """Values worth trying: every other one gives the shapes of one of these."""
        geometries = [geometry for geometry, _ in self.layers]
        if knob.field == "decompose_factor":
            return set(range(1, isqrt(max(max(g.out, g.inp) for g in geometries)) + 1))
        if self.config.peft_name == "OFT":  # the divisor nearest to the value: it changes half-way between two of them
            rows = [sorted(_divisors(n)) for n in {g.columns for g in geometries}]
            return {1} | {start for row in rows for a, b in pairwise(row) for start in (b, (a + b) // 2 + 1)}
        if self.config.peft_name in ("DIAG_OFT", "LYCORIS_BOFT"):  # divisors, and what lies below roots
            sizes = {g.out for g in geometries}
            return {d for n in sizes for d in _divisors(n)} | set(range(1, isqrt(max(sizes)) + 1))
        return set(range(1, max(min(g.out, g.columns) for g in geometries) + 1))

    def usable(self, config: AdapterConfig) -> bool:
        """Whether every layer takes the config, and a LoKr stays of the kind that its knob belongs to."""
        try:
            return self.is_full(config) == self.full if self.cls is LoKr else bool(list(self.shapes(config)))
        except ConfigError:
            return False


def _divisors(number: int) -> set[int]:
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return {*low, *(number // d for d in low)}
