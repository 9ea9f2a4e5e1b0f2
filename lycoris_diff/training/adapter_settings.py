"""The adapters of a run from settings: an algorithm's name and its config's fields, by component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from ..adapters.config import AdapterConfig
from ..adapters.registry import ADAPTERS
from ..errors import ConfigError, nearest
from .given import Given, Tree, opened, read, refuse

DENOISERS = ("unet", "transformer")
TEXT_ENCODER = "text_encoder"  # and with a number
#: other spellings of PEFT's names; DoRA is LoRA with `weight_decompose`
_SPELLINGS = {"boft": "lycoris_boft", "dora": "lora", "t_lora": "tlora"}
#: algorithms by the name that people use
ALGORITHMS = tuple(sorted({*(name.lower() for name in ADAPTERS), "boft", "dora"} - {"combined", "lycoris_boft"}))
#: fields that name parts of one model, and mean nothing on another
_PLACES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "on_input_pattern",
)


def open_adapter(tree: Tree, component: str) -> Tree:
    """Return the entries of a component's adapter in the tree of settings; `unet: lokr` is short for `unet: {type: lokr}`.

    Raises:
        ConfigError: `adapters` is no mapping.
    """
    adapters = opened(tree.get("adapters", {}))
    node = adapters.get(component, {})
    entries: Tree = {"type": node} if isinstance(node, Given) and node.items() is None else opened(node)
    adapters[component] = entries
    tree["adapters"] = adapters
    return entries


def read_adapters(tree: Tree, components: Callable[[], list[str]]) -> dict[str, AdapterConfig]:
    """Return the adapter configs by component; learning rates among their fields move to `learning_rates` in the tree.

    Args:
        tree: all settings under their full names.
        components: gives the names of the model's components; called where `train_text_encoder` asks for them.

    Raises:
        FlagError, ConfigError: an algorithm that does not exist, a field that it does not have, or a value of another type.
    """
    adapters = {component: open_adapter(tree, component) for component in opened(tree.get("adapters", {}))}
    denoiser = next((adapters[name] for name in DENOISERS if name in adapters), {})
    wanted = read(tree["train_text_encoder"], bool | None, "train_text_encoder") if "train_text_encoder" in tree else None
    if wanted is False:
        adapters = {name: node for name, node in adapters.items() if not name.startswith(TEXT_ENCODER)}
        rates = opened(tree.get("learning_rates", {}))
        tree["learning_rates"] = {name: rate for name, rate in rates.items() if not name.startswith(TEXT_ENCODER)}
    if wanted:
        for name in components():
            if name.startswith(TEXT_ENCODER) and "type" not in adapters.get(name, {}):
                same = {key: value for key, value in denoiser.items() if key not in (*_PLACES, "learning_rate")}
                adapters[name] = same | adapters.get(name, {})
    for component, node in adapters.items():
        if "type" not in node and "type" in denoiser:
            node["type"] = denoiser["type"]
        if "learning_rate" in node:
            _move_learning_rate(tree, component, node.pop("learning_rate"))
    return {component: _adapter(component, node) for component, node in adapters.items()}


def _move_learning_rate(tree: Tree, component: str, rate: Given | Tree) -> None:
    rates = opened(tree.get("learning_rates", {}))
    other = rates.get(component)
    flags = [isinstance(node, Given) and node.flag for node in (rate, other)]
    if other is not None and flags[0] == flags[1]:
        refuse(rate, f"learning_rates.{component} and adapters.{component}.learning_rate are both given; leave one out")
    if other is None or flags[0]:
        rates[component] = rate
    tree["learning_rates"] = rates


def _adapter(component: str, node: Tree) -> AdapterConfig:
    where = f"adapters.{component}"
    if "type" not in node:
        if not node:
            raise ConfigError(f"{where} says nothing; expected {{type: lokr}} and its fields")
        refuse(next(iter(node.values())), f"{where} has no type; give --{where}.type lokr, or --adapter for the denoiser")
    name = read(node["type"], str, f"{where}.type")
    spelling = name.lower().replace("-", "_")
    cls = _algorithms().get(_SPELLINGS.get(spelling, spelling))
    if cls is None:
        known = f"expected one of {', '.join(ALGORITHMS)}.{nearest(spelling, ALGORITHMS)}"
        return refuse(node["type"], f"{where}.type is {name!r}; {known}")
    kinds = kinds_of(cls)
    values: dict[str, Any] = {}
    for key, item in node.items():
        if key == "type":
            continue
        field = cls.aliases.get(key, key)
        if field not in kinds and field not in cls.unsupported:
            return refuse(item, f"{where}: {name} has no field {key!r}.{nearest(key, [*kinds, *cls.aliases])}")
        values[key] = read(item, kinds.get(field, Any), f"{where}.{key}")
    if spelling == "dora" and values.setdefault("weight_decompose", True) is not True:
        return refuse(node["type"], f"{where}: dora is lora with weight_decompose, which is {values['weight_decompose']}")
    try:
        return cls(**values)
    except ConfigError as error:
        return refuse(node["type"], f"{where}: {error}")


@cache
def _algorithms() -> Mapping[str, Any]:
    return {name.lower(): adapter.config_class for name, adapter in ADAPTERS.items()}


@cache
def adapter_fields() -> frozenset[str]:
    """Return the names of all algorithms' fields, other spellings included."""
    return frozenset(name for cls in _algorithms().values() for name in (*kinds_of(cls), *cls.aliases))


@cache
def kinds_of(cls: Any) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields by name."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}
