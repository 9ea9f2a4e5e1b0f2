"""Configurations: PEFT's field names, defaults and meaning; other spellings; what is refused and what only warns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from ..errors import ConfigError, nearest


@dataclass(init=False)
class AdapterConfig:
    """Fields every adapter shares.

    Attributes:
        r: rank, or the algorithm's own measure of size.
        target_modules: list of module names or suffixes, a regular expression (full match), ``"all-linear"``, ``"all"`` or a
            preset ("attention", "mlp", "conv"); None takes the defaults for the model's architecture.
        exclude_modules: list of names or suffixes, or a regular expression, that are left alone.
        layers_to_transform: block index or indices to adapt; all others are left alone.
        layers_pattern: name(s) of the module list whose index is meant; by default the first number in a name.
        rank_pattern: module name, suffix or regular expression -> another ``r``.
        modules_to_save: modules trained in full and saved with the adapter.
        init_weights: True starts as a no-op, False at random; algorithms add further names.
        inference_mode: the adapter's parameters need no gradient.

    Raises:
        ConfigError: an unknown field, two spellings of a field that disagree, or a PEFT field that is not supported here and
            is not at its default.
    """

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    #: other spellings of a field, name -> field
    aliases: ClassVar[Mapping[str, str]] = {}
    #: PEFT's fields that are not supported here, name -> the only value accepted
    unsupported: ClassVar[Mapping[str, Any]] = {}
    #: fields that hold other values for some modules, pattern field -> field
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}
    #: PEFT's name of the algorithm
    peft_name: ClassVar[str] = ""
    #: values of init_weights beyond True and False
    inits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **values: Any) -> None:
        known = {f.name: f for f in fields(self)}
        given: dict[str, Any] = {}
        for name, value in values.items():
            target = self.aliases.get(name, name)
            if name in self.unsupported:
                if value != self.unsupported[name]:
                    raise ConfigError(f"{type(self).__name__}: {name}={value!r} is not supported; leave it out")
                continue
            if target not in known:
                spellings = [*known, *self.aliases]
                raise ConfigError(f"{type(self).__name__} has no field {name!r}.{nearest(name, spellings)}")
            if target in given and given[target] != value:
                raise ConfigError(
                    f"{type(self).__name__}: {name!r} and another spelling of it disagree: {value!r} and {given[target]!r}"
                )
            given[target] = value
        for name, spec in known.items():
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            setattr(self, name, given.get(name, default))
        self.peft_type = self.peft_name
        self.__post_init__()

    def __post_init__(self) -> None:
        """Hook for subclasses; values are checked when the config is used, not here."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for alias, name in cls.aliases.items():
            if not hasattr(cls, alias):
                setattr(cls, alias, property(_reader(name), _writer(name)))

    # --- use -------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Check the values that do not depend on a layer.

        Raises:
            ConfigError: naming the field, its value and what is expected.
        """
        self._positive("r")
        for name in self.patterns:
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; expected a dict")
        for pattern, value in self.rank_pattern.items():
            if not isinstance(value, int) or value <= 0:
                raise ConfigError(f"rank_pattern[{pattern!r}] is {value!r}; expected a positive integer")
        if not isinstance(self.init_weights, bool) and self.init_weights not in self.inits:
            allowed = ", ".join(repr(v) for v in (True, False, *self.inits))
            raise ConfigError(f"{type(self).__name__}: init_weights is {self.init_weights!r}; expected one of {allowed}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform; set both")
        if isinstance(self.target_modules, (list, set, tuple)) and not self.target_modules:
            raise ConfigError("target_modules is an empty list; name modules, or leave it None for the defaults")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}; expected a positive integer")

    def _probability(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}; expected a probability in [0, 1)")

    def _warn_without_effect(self, name: str, why: str) -> None:
        default = next(f for f in fields(self) if f.name == name).default
        if getattr(self, name) != default:
            warnings.warn(f"{type(self).__name__}: {name}={getattr(self, name)!r} has no effect {why}", stacklevel=3)

    def scaling(self) -> float:
        """Trained strength of the delta; algorithms with an alpha return alpha / r."""
        return 1.0

    def for_layer(self, **changes: Any) -> AdapterConfig:
        """A copy with other values, as used by one layer."""
        own = dataclasses.replace(self, **changes)
        # what is set on the config beside its fields (SHiRA's mask function) comes along
        vars(own).update({k: v for k, v in vars(self).items() if k not in vars(own)})
        return own

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name; sets become sorted lists, tuples lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: sorted(v) if isinstance(v, set) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _reader(name: str):
    return lambda self: getattr(self, name)


def _writer(name: str):
    return lambda self, value: setattr(self, name, value)


@dataclass(init=False)
class AlphaConfig(AdapterConfig):
    """Algorithms whose change is scaled by alpha / r, with dropouts.

    Attributes:
        alpha: numerator of the scaling; another spelling is ``lora_alpha``.
        rank_dropout: probability of dropping an output row of the delta (named as in PEFT and LyCORIS).
        rank_dropout_scale: divide the kept rows by the kept fraction, so that the expectation stays.
        module_dropout: probability of skipping the adapter for a call; not rescaled, as in PEFT and LyCORIS.
    """

    alpha: float = 8
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0

    aliases: ClassVar[Mapping[str, str]] = {"lora_alpha": "alpha"}
    patterns: ClassVar[Mapping[str, str]] = {**AdapterConfig.patterns, "alpha_pattern": "alpha"}

    def scaling(self) -> float:
        return self.alpha / self.r

    def check(self) -> None:
        super().check()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not abs(self.alpha) < float("inf"):
            raise ConfigError(f"{type(self).__name__}: alpha is {self.alpha!r}; expected a finite number")
        for pattern, value in self.alpha_pattern.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ConfigError(f"alpha_pattern[{pattern!r}] is {value!r}; expected a finite number")
        for name in ("rank_dropout", "module_dropout"):
            self._probability(name)
        if not self.rank_dropout:
            self._warn_without_effect("rank_dropout_scale", "without rank_dropout")


@dataclass(init=False)
class ScaledConfig(AlphaConfig):
    """Algorithms scaled by alpha / r that can be weight-decomposed.

    Attributes:
        use_effective_conv2d: a Tucker core for convolutions.
        weight_decompose: DoRA; another spelling is ``use_dora``.
        dora_axis: "out" (per output row, the paper and PEFT) or "in" (per input column).
    """

    use_effective_conv2d: bool = False
    weight_decompose: bool = False
    dora_axis: str = "out"

    aliases: ClassVar[Mapping[str, str]] = {**AlphaConfig.aliases, "use_dora": "weight_decompose"}

    def check(self) -> None:
        super().check()
        if self.dora_axis not in ("out", "in"):
            raise ConfigError(f"{type(self).__name__}: dora_axis is {self.dora_axis!r}; expected 'out' or 'in'")
        if not self.weight_decompose:
            self._warn_without_effect("dora_axis", "without weight_decompose=True")
