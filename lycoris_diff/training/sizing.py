"""Ask for a size, get the rank or the factor: the config whose adapter comes nearest to so many parameters or bytes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any

import torch
from torch import nn

from ..adapters.config import AdapterConfig, AlphaConfig
from ..adapters.lokr import LoKrConfig
from ..building import layer_config
from ..errors import ConfigError
from ..injection import inject_adapter, unwrap
from .config import ADAPTER, adapter_to_dict
from .filesize import files_of, without_values
from .sizes import Knob, Sizes

#: a target so far outside of what can be had is refused
TOLERANCE = 0.1

_UNITS = {"b": 1} | {p + "b": 1000**n for n, p in enumerate("kmgt", 1)} | {p + "ib": 1024**n for n, p in enumerate("kmgt", 1)}


@dataclass(frozen=True)
class Alternative:
    """A neighbour of the chosen size.

    Attributes:
        value: of the knob.
        parameters: trained values of all components.
        bytes: of the file; None where parameters were asked for.
    """

    value: int
    parameters: int
    bytes: int | None


@dataclass(frozen=True)
class SizeChoice:
    """Outcome of `fit_size`.

    Attributes:
        configs: adapter by component, with the knob set and the strength alpha / r that the given config has.
        knob: component -> field and value; components without a knob are absent.
        label: of the knob, for people.
        parameters: trained values of all components, as `get_nb_trainable_parameters` counts them.
        bytes: of the adapter file; None where parameters were asked for.
        alternatives: the next smaller and the next larger size, where there are any.
    """

    configs: dict[str, AdapterConfig]
    knob: dict[str, tuple[str, int]]
    label: str
    parameters: int
    bytes: int | None
    alternatives: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as plain values that `json.dumps` takes."""
        return {
            "adapters": {component: adapter_to_dict(config) for component, config in self.configs.items()},
            "knob": {component: list(pair) for component, pair in self.knob.items()},
            "label": self.label,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
        }


def parse_size(text: str | int) -> int:
    """Return a number of bytes: `"10MB"` (1000 * 1000), `"10 MiB"` (1024 * 1024), `"2.5 GB"`, or a plain number.

    Raises:
        ConfigError: no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", str(text).lower())
    if not found or (unit := found[2] or "b") not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise ConfigError(f'{text!r} is no size; expected a number and one of B, KB, MB, GB, KiB, MiB, GiB, such as "10MB"')
    return round(float(found[1]) * _UNITS[unit])


def fit_size(
    models: Mapping[str, nn.Module],
    configs: Mapping[str, AdapterConfig],
    parameters: int | None = None,
    bytes: int | None = None,
    format: str = "kohya",
    title: str = "adapter",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SizeChoice:
    """Choose the rank or factor whose size is closest to a target, above or below; of two equally close the smaller.

    One value serves all components. Components whose algorithm has no knob keep their size, which counts. Layers in
    `rank_pattern` keep their rank. The models are only looked at.

    Args:
        models: all components of the pipeline that can take adapters, by name.
        configs: adapter by component; the knob's own value there is not used.
        parameters: wanted number of trained values, of all components together.
        bytes: wanted size of the kohya file, or of all weight files where `format` is "peft". One of the two is given.
        format, title, dtype, metadata: of the file, as for `predict_files`.

    Raises:
        ConfigError: no component has a knob, components have different ones, or the target is more than a tenth below the
            smallest or above the largest size.
        AdapterError: a config does not fit its model, or the format cannot say it.
    """
    if (parameters is None) == (bytes is None):
        raise ConfigError(f"parameters is {parameters} and bytes is {bytes}; give one of them")
    search = _Search(models, configs)
    measure: Callable[[int], int] = search.parameters
    if bytes is not None:
        measure = lambda value: search.bytes(value, format, title, dtype, metadata)
    target, unit = (parameters, "parameters") if bytes is None else (bytes, "bytes")
    assert target is not None
    smallest, largest = measure(search.values[0]), measure(search.values[-1])
    if not smallest * (1 - TOLERANCE) <= target <= largest * (1 + TOLERANCE):
        raise ConfigError(_out_of_range(target, unit, search, smallest, largest))
    above = min(bisect_left(search.values, target, key=measure), len(search.values) - 1)
    best = min((max(above - 1, 0), above), key=lambda i: (abs(measure(search.values[i]) - target), i))

    def alternative(value: int) -> Alternative:
        return Alternative(value, search.parameters(value), None if bytes is None else measure(value))

    chosen = alternative(search.values[best])
    near = [search.values[i] for i in (best - 1, best + 1) if 0 <= i < len(search.values)]
    return SizeChoice(
        search.configs(chosen.value),
        {component: (search.knob.field, chosen.value) for component in search.sized},
        search.knob.label,
        chosen.parameters,
        chosen.bytes,
        tuple(alternative(value) for value in near),
    )


def _out_of_range(target: int, unit: str, search: _Search, smallest: int, largest: int) -> str:
    least, most, label = search.values[0], search.values[-1], search.knob.label
    way = "adapt fewer modules" if target < smallest else "adapt more modules"
    if target > largest and label == "rank" and any(isinstance(c, LoKrConfig) for c in search.given.values()):
        way += ", or set full_matrix=True, which is sized by decompose_factor"
    return (
        f"{target:,} {unit} are not to be had: {label} {least} has {smallest:,} and {label} {most} has {largest:,}; "
        f"ask for a size between these, or {way}"
    )


class _Search:
    """The sizes that one knob can give; `values` are sorted by the size they give, without repetitions."""

    def __init__(self, models: Mapping[str, nn.Module], configs: Mapping[str, AdapterConfig]) -> None:
        self.given = dict(configs)
        self._sizes = {component: Sizes.of(models[component], config) for component, config in configs.items()}
        knobs = {component: knob for component, sizes in self._sizes.items() if (knob := sizes.knob) is not None}
        self.knob = _common(knobs, configs)
        self.sized = tuple(knobs)
        self._blank = {component: without_values(model) for component, model in models.items()}
        self._counts: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        for value in sorted(set().union(*(self._sizes[c].candidates(self.knob) for c in self.sized))):
            found = {c: configs[c].for_layer(**{self.knob.field: value}) for c in self.sized}
            if all(self._sizes[c].usable(config) for c, config in found.items()):
                self._counts[value] = sum(self._sizes[c].count(config) for c, config in found.items())
        if not self._counts:
            raise ConfigError(f"no {self.knob.label} fits every layer of {', '.join(self.sized)}; leave some out")
        first = {count: value for value, count in reversed(self._counts.items())}  # the least value of equal sizes
        self.values = [first[count] for count in sorted(first)]
        self._constant = 0
        self._constant = self._exact(self.values[0]) - self._counts[self.values[0]]

    def configs(self, value: int) -> dict[str, AdapterConfig]:
        resized = {c: _resized(self.given[c], self.knob.field, value, self._sizes[c].paths) for c in self.sized}
        return self.given | resized

    def parameters(self, value: int) -> int:
        return self._counts[value] + self._constant

    def bytes(self, value: int, format: str, title: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> int:
        if value not in self._bytes:
            self._inject(value)
            try:
                files = files_of(self._blank, format, title, dtype, metadata)
            finally:
                self._remove()
            self._bytes[value] = sum(file.bytes for file in files if file.tensors)
        return self._bytes[value]

    def _exact(self, value: int) -> int:
        """Trained values with modules trained in full and biases, from the model itself."""
        self._inject(value)
        try:
            trained = [p.numel() for c in self.given for p in self._blank[c].parameters() if p.requires_grad]
        finally:
            self._remove()
        return sum(trained)

    def _inject(self, value: int) -> None:
        for component, config in self.configs(value).items():
            inject_adapter(self._blank[component], config, ADAPTER, low_cpu_mem_usage=True)

    def _remove(self) -> None:
        for component in self.given:
            unwrap(self._blank[component])


def _common(knobs: Mapping[str, Knob], configs: Mapping[str, AdapterConfig]) -> Knob:
    if not knobs:
        names = ", ".join(f"{config.peft_name} on {component}" for component, config in configs.items())
        raise ConfigError(
            f"{names}: the size follows from the layers and cannot be chosen; take the target size out, or use an algorithm "
            "with a rank such as LoRA or LoKr"
        )
    if len(set(knobs.values())) > 1:
        words = " and ".join(f"{component} by {knob.field}" for component, knob in knobs.items())
        raise ConfigError(f"the size is set by different fields, {words}; one target needs one, so use one algorithm for both")
    return next(iter(knobs.values()))


def _resized(config: AdapterConfig, field: str, value: int, paths: Iterable[str]) -> AdapterConfig:
    """The config with its knob set. Every layer keeps its strength alpha / r, about which a target size says nothing."""
    changed = config.for_layer(**{field: value})
    if not isinstance(config, AlphaConfig) or not isinstance(changed, AlphaConfig) or not config.alpha:
        return changed
    changed.alpha = _alpha(config, changed)
    if not (config.rank_pattern or config.alpha_pattern):
        return changed
    exact: dict[str, float] = {}
    for path in paths:
        own, new = layer_config(config, path), layer_config(changed, path)
        assert isinstance(own, AlphaConfig) and isinstance(new, AlphaConfig)
        if own.alpha and not isclose(own.scaling(), new.scaling()):
            exact[re.escape(path)] = _alpha(own, new)
    changed.alpha_pattern = exact | config.alpha_pattern | exact  # the first that matches counts
    return changed


def _alpha(old: AlphaConfig, new: AlphaConfig) -> float:
    """The alpha that gives the new config the old one's strength."""
    alpha = new.alpha * old.scaling() / new.scaling()
    return int(alpha) if alpha == int(alpha) else alpha
