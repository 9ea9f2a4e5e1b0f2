"""Strengths: by adapter, component, block or pattern; nothing has a silent default."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from torch import nn

from ..adapters.base import LARGEST_STRENGTH
from ..bookkeeping import set_active, state_of
from ..errors import AdapterError, nearest
from ..layers.layer import AdaptedLayer
from .components import adapter_names, forget_unscaled, known_adapter, layers_of, models_of
from .offload import weights_at_hand

#: a number, or numbers by component, block or pattern; lists count the layers of a UNet block
Weight = Any
#: diffusers' short names of a UNet's blocks
_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_NUMBERED = re.compile(r"block_(\d+)")
_EVERYTHING = "*"


@dataclass(frozen=True)
class Strength:
    """One adapter on one module.

    Attributes:
        adapter: its name.
        algorithm: PEFT's or our name of the algorithm.
        weight: as set with `set_adapters`.
        scale: trained strength (alpha / rank).
        state: "active", "off" (another set is active), "disabled" or "fused" (in the weights).
    """

    adapter: str
    algorithm: str
    weight: float
    scale: float
    state: str

    @property
    def final(self) -> float:
        """What the adapter's unscaled change is multiplied by."""
        return self.weight * self.scale if self.state in ("active", "fused") else 0.0


@dataclass(frozen=True)
class Explanation:
    """Final strengths: component -> module path -> adapters on it; `str` gives one line a module."""

    components: dict[str, dict[str, list[Strength]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return {c: {p: [asdict(s) | {"final": s.final} for s in found] for p, found in modules.items()}
                for c, modules in self.components.items()}  # fmt: skip

    def __str__(self) -> str:
        lines = []
        for component, modules in self.components.items():
            for path, found in modules.items():
                parts = (f"{s.adapter} {s.final:g} ({s.algorithm}, {s.state}, {s.weight:g} x {s.scale:g})" for s in found)
                lines.append(f"{component}.{path}: {', '.join(parts)}")
        return "\n".join(lines) or "no adapters"


def set_adapters(pipe: Any, weights: Mapping[str, Weight] | Sequence[str] | str) -> None:
    """Use exactly these adapters with exactly these weights; all others are off.

    Args:
        pipe: a pipeline with adapters.
        weights: adapter name -> weight. A weight is a number (1 is as trained, 0 exactly the base model), or a dict whose keys
            are components (``"unet"``) or patterns: sequences of whole path segments, regular expressions allowed, that
            occur anywhere in a module's path (``"down_blocks.1"``, ``"attn2"``, ``"to_[qk]"``), or ``"*"`` for everything.
            Within a dict the last key that matches a module counts, and what none matches is off. Dicts nest; for UNets
            diffusers' short names work (``{"down": {"block_1": [0.2, 0.8]}, "mid": 1.0}``). A name or a list of names stands
            for weight 1.

    Raises:
        AdapterError: an unknown adapter, component or pattern, or a weight that is not a finite number; nothing is changed.
    """
    models = models_of(pipe)
    if isinstance(weights, str):
        weights = [weights]
    table = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    found = adapter_names(models)
    for name in table:
        known_adapter(models, name)
    layers = {component: layers_of(model) for component, model in models.items()}
    plans = {n: resolve(n, spec, {c: _paths(layers[c], n) for c in found[n]}) for n, spec in table.items()}
    fused = any(layer.merged for own in layers.values() for layer in own.values())
    with weights_at_hand(models.values() if fused else ()):
        for component, model in models.items():
            if state_of(model) is None:
                continue
            forget_unscaled(model)
            use_only(model, [n for n in table if component in found[n]])
            for name, plan in plans.items():
                apply_weights(layers[component], name, plan.get(component, {}))


def use_only(model: nn.Module, names: list[str]) -> None:
    """Make adapters the active ones; merged ones that are not among them leave the weights."""
    set_active(model, names)
    for layer in layers_of(model).values():
        kept = tuple(n for n in layer.held if n in names)
        if kept != layer.held:
            layer.merge(kept)


def apply_weights(layers: Mapping[str, AdaptedLayer], name: str, weights: Mapping[str, float]) -> None:
    """Set the strengths of one adapter; merged ones are merged anew."""
    for path, layer in layers.items():
        if name in layer.adapters and path in weights and layer.adapter(name).get_strength() != weights[path]:
            layer.adapter(name).set_strength(weights[path])
            if name in layer.merged:
                layer.merge(layer.merged)


def explain(pipe: Any) -> Explanation:
    """The final strength of every adapter on every module of a pipeline."""
    found: dict[str, dict[str, list[Strength]]] = {}
    for component, model in models_of(pipe).items():
        layers = layers_of(model)
        if layers:
            found[component] = {path: [_strength(layer, n) for n in layer.adapters] for path, layer in layers.items()}
    return Explanation(found)


def _strength(layer: AdaptedLayer, name: str) -> Strength:
    adapter = layer.adapter(name)
    state = "active" if name in layer.active and not (adapter.pinned and adapter.idle) else "off"
    state = "fused" if name in layer.merged else "disabled" if not layer.enabled else state
    parts = adapter.in_use()
    algorithm = "+".join(p.config.peft_name for p in parts)
    return Strength(name, algorithm, adapter.get_strength(), float(parts[0].scaling) if len(parts) == 1 else 1.0, state)


def _paths(layers: Mapping[str, AdaptedLayer], name: str) -> list[str]:
    return [path for path, layer in layers.items() if name in layer.adapters]


# --- from a specification to one number a module -----------------------------------------------------------------------------
def resolve(name: str, spec: Weight, paths: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """One weight for every module of an adapter.

    Args:
        name: of the adapter, for messages.
        spec: as `set_adapters` takes it.
        paths: component -> paths of the adapter's modules.

    Raises:
        AdapterError: a key that matches nothing, or a weight that is not a finite number.
    """
    if not isinstance(spec, Mapping):
        value = _number(name, spec)
        return {component: dict.fromkeys(own, value) for component, own in paths.items()}
    if not spec:
        raise AdapterError(f"the weights of adapter {name!r} are an empty dict, which names no module; 0 switches it off")
    result = {component: dict.fromkeys(own, 0.0) for component, own in paths.items()}
    for key, value in spec.items():
        if key in paths:
            rules = _rules(name, value, list(paths[key]))
            _apply(name, rules, {key: paths[key]}, result)
        else:
            every = [p for own in paths.values() for p in own]
            _apply(name, _rules(name, {key: value}, every), paths, result, others=list(paths))
    return result


def _apply(
    name: str, rules: list[tuple[str, float]], paths: Mapping[str, Sequence[str]], result: dict, others: Iterable[str] = ()
) -> None:
    for pattern, value in rules:
        found = [(c, p) for c, own in paths.items() for p in own if _matches(pattern, p, name)]
        if not found:
            pool = [*others, *(p for own in paths.values() for p in own)]
            segments = dict.fromkeys(s for p in pool for s in p.split("."))
            raise AdapterError(
                f"adapter {name!r} has no component, block or module {pattern!r}; its components: {sorted(result)}."
                f"{nearest(pattern, [*segments, *pool])}"
            )
        for component, path in found:
            result[component][path] = value


def _rules(name: str, spec: Weight, paths: list[str], prefix: str = "") -> list[tuple[str, float]]:
    """Patterns with their numbers, in the order of the specification."""
    if isinstance(spec, Mapping):
        found: list[tuple[str, float]] = []
        for key, value in spec.items():
            found += _rules(name, value, paths, _joined(str(key), prefix, paths))
        return found
    if isinstance(spec, (list, tuple)):
        if not prefix or not spec:
            raise AdapterError(
                f"adapter {name!r}: a list of weights {spec!r} needs a block, such as {{'up': {{'block_1': [..]}}}}"
            )
        numbers = [_number(name, v) for v in spec]
        # up- and downsamplers follow the block's last layer
        return [(prefix, numbers[-1]), *((rf"{prefix}\.(attentions|resnets)\.{i}", v) for i, v in enumerate(numbers))]
    return [(prefix or _EVERYTHING, _number(name, spec))]


def _joined(key: str, prefix: str, paths: list[str]) -> str:
    if key == _EVERYTHING:
        return prefix or key
    numbered = _NUMBERED.fullmatch(key)
    if prefix and numbered:
        return rf"{prefix}\.{numbered[1]}"
    if not prefix and key in _BLOCKS and not any(key in p.split(".") for p in paths):
        return _BLOCKS[key]
    return rf"{prefix}\.(.*\.)?{key}" if prefix else key


def _matches(pattern: str, path: str, name: str) -> bool:
    if pattern == _EVERYTHING:
        return True
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})(\..*)?", path) is not None
    except re.error as error:
        raise AdapterError(f"adapter {name!r}: {pattern!r} is no pattern: {error}") from error


def _number(name: str, value: object) -> float:
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(number) <= LARGEST_STRENGTH:
        raise AdapterError(f"the weight of adapter {name!r} is {value!r}; expected a finite number, or a dict of them")
    return float(number)
