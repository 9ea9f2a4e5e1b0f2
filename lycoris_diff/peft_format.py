"""PEFT's format: tensor names and the JSON config, in both directions. No file access here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Adapter
from .adapters.combined import Combined, CombinedConfig
from .adapters.config import AdapterConfig
from .adapters.lora import LoraConfig
from .adapters.registry import ADAPTERS
from .bookkeeping import adapted_layers, saved_copies, state_of
from .building import layer_config, parameter_dtype
from .errors import AdapterError, CheckpointError, ConfigError, nearest
from .execution.geometry import is_plain_weight
from .layers.layer import AdaptedLayer
from .layers.saved import SavedModule
from .patterns import check_pattern
from .targets import PRESETS, Target, base_modules, names_module, selected_paths

PREFIX = "base_model.model."
#: peft_type of what PEFT cannot express, so that it refuses the directory instead of misreading it
OWN_PREFIX = "LYCORIS_DIFF_"
#: PEFT's own spellings, written to the JSON
_LORA_SPELLINGS = {"alpha": "lora_alpha", "init_weights": "init_lora_weights", "weight_decompose": "use_dora"}
#: fields of PEFT's config classes, by algorithm; everything else is written only when it differs from its default
_PEFT_COMMON = {
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules",
    "modules_to_save",
}  # fmt: skip
_LAYERED = {"exclude_modules", "layers_to_transform", "layers_pattern"}
_PATTERNS = {"rank_pattern", "alpha_pattern"}
_LYCORIS = {"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", *_LAYERED, *_PATTERNS}
_PEFT_FIELDS = {
    "LORA": {"alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_weights", "weight_decompose", *_LAYERED,
             *_PATTERNS},
    "LOHA": _LYCORIS,
    "LOKR": {*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"},
    "MISS": {"miss_dropout", "mini_r", "init_weights", "bias", *_LAYERED},
    "SHIRA": {"mask_type", "random_seed", "fan_in_fan_out", "init_weights"},
    "OFT": {"oft_block_size", "bias", "init_weights", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
            "peft_version", *_LAYERED},
}  # fmt: skip
#: initialisations of PEFT that leave the base weight alone, so that a file that names them means what it says
_HARMLESS_INITS = ("orthogonal",)


# --- state dicts -----------------------------------------------------------------------------------------------------------
def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """One adapter's tensors under the names of PEFT's files (``base_model.model.<path>.<tensor>``).

    Args:
        model: wrapper or base model with adapters.
        state_dict: values to take instead of the live ones, under the live names of ``model``.
        adapter_name: which.

    Raises:
        AdapterError: there is no such adapter, or ``state_dict`` lacks one of its tensors.
    """
    base = base_of(model)
    state = state_of(base)
    if state is None or adapter_name not in state.configs:
        raise AdapterError(f"there is no adapter {adapter_name!r}; adapters: {sorted(state.configs) if state else []}")
    out: dict[str, Tensor] = {}
    for path, layer in adapted_layers(base):
        if adapter_name in layer.adapters:
            live = f"{path}.adapters.{adapter_name}."
            values = layer.adapter(adapter_name).exact_factors()
            out |= {f"{path}.{k}": _given(state_dict, live + k, v) for k, v in values.items()}
    for path, saved in saved_copies(base):
        if adapter_name in saved.modules_to_save:
            live = f"{path}.modules_to_save.{adapter_name}."
            values = saved.modules_to_save[adapter_name].state_dict()
            out |= {f"{path}.{k}": _given(state_dict, live + k, v) for k, v in values.items()}
    if state.biases is not None and state.biases.owner == adapter_name:
        out |= {k: _given(state_dict, k, v) for k, v in state.biases.trained(base).items()}
    return {PREFIX + k: v.detach() for k, v in out.items()}


def compact_state_dict(base: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The same tensors with every layer's in the algorithm's compact coding."""
    out = dict(tensors)
    for path, layer in adapted_layers(base):
        if adapter_name in layer.adapters:
            prefix = f"{PREFIX}{path}."
            own = {k.removeprefix(prefix): out.pop(k) for k in list(out) if k.startswith(prefix)}
            coded = type(layer.adapter(adapter_name)).encode(layer.geometry, own)
            out |= {prefix + k: v for k, v in coded.items()}
    return out


def set_peft_model_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Write tensors under PEFT's names into an adapter that exists.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing has been written then.
    """
    base = base_of(model)
    live = get_peft_model_state_dict(base, adapter_name=adapter_name)
    given = {PREFIX + strip_prefix(k): v for k, v in tensors.items()}
    problems = [f"missing {k}" for k in live if k not in given]
    problems += [f"unexpected {k}{nearest(k, live)}" for k in given if k not in live]
    problems += [
        f"{k} has shape {tuple(v.shape)}, expected {tuple(live[k].shape)}"
        for k, v in given.items() if k in live and v.shape != live[k].shape
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"the tensors do not fit adapter {adapter_name!r}: " + _first(problems))
    state = state_of(base)
    assert state is not None
    with torch.no_grad():
        for key, value in given.items():
            _live_tensor(base, key.removeprefix(PREFIX), adapter_name).copy_(value)
    if state.biases is not None and state.biases.owner == adapter_name and not state.biases.trained_inside:
        state.biases.other = {k: given[PREFIX + k].clone() for k in state.biases.keys}


def base_of(model: nn.Module) -> nn.Module:
    """The base model of a wrapper; a base model itself."""
    found = model.__dict__.get("_modules", {}).get("model")
    return found if found is not None and hasattr(type(model), "get_base_model") else model


def strip_prefix(key: str) -> str:
    """A file's tensor name without ``base_model.model.``."""
    return key.removeprefix(PREFIX)


def _given(state_dict: Mapping[str, Tensor] | None, key: str, value: Tensor) -> Tensor:
    if state_dict is None:
        return value
    for candidate in (key, f"model.{key}"):
        if candidate in state_dict:
            return state_dict[candidate]
    raise AdapterError(f"the given state_dict has no {key!r}")


def _live_tensor(base: nn.Module, key: str, name: str) -> Tensor:
    _, layer, rest = locate(base, key)
    if isinstance(layer, AdaptedLayer) and rest != "base_layer.bias":
        return layer.adapter(name).get_tensor(rest)
    if isinstance(layer, SavedModule):
        return layer.modules_to_save[name].state_dict()[rest]
    return base.get_parameter(key)


def locate(base: nn.Module, key: str) -> tuple[str, nn.Module, str]:
    """The deepest module a key starts with (an adapted or saved module ends the search), and the rest of the key."""
    path, rest, module = [], key.split("."), base
    while rest and not isinstance(module, (AdaptedLayer, SavedModule)):
        child = module._modules.get(rest[0])
        if child is None:
            break
        module = child
        path.append(rest.pop(0))
    return ".".join(path), module, ".".join(rest)


# --- from tensors to adapters ------------------------------------------------------------------------------------------------
def read_adapters(
    base: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], trainable: bool, autocast: bool
) -> tuple[dict[str, tuple[Target, Adapter]], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Finished adapters for a file's tensors; the model is only looked at.

    Returns:
        Adapters by path, tensors of fully trained modules by path, and trained biases by key.

    Raises:
        CheckpointError: naming the first tensors that fit nothing.
    """
    modules = dict(base_modules(base))
    cls = ADAPTERS[config.peft_name]
    saved_names = list(config.modules_to_save or [])
    saved_paths = [p for p in modules if any(names_module(n, p) for n in saved_names)]
    groups: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        key = strip_prefix(name)
        owner = next((p for p in saved_paths if key.startswith(f"{p}.")), None)
        if owner is not None:
            saved.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = tensor
            continue
        path, _, factor = locate(base, key)
        if factor in ("bias", "base_layer.bias") and getattr(config, "bias", "none") != "none":
            biases[key] = tensor
        elif path in modules and cls.owns(factor):
            groups.setdefault(path, {})[factor] = tensor
        else:
            problems.append(f"{name} (the model has no module for it{nearest(key.rpartition('.')[0], modules)})")
    if problems or not groups:
        raise CheckpointError(f"the file does not fit {type(base).__name__}: " + _first(problems or ["it holds no adapter"]))
    missing = [] if isinstance(config, CombinedConfig) else sorted(selected_paths(base, config) - groups.keys())
    if missing:
        raise CheckpointError(f"the config names modules the file has no tensors for: {_first(missing)}")
    adapters: dict[str, tuple[Target, Adapter]] = {}
    for path, found in groups.items():
        geometry = cls.host(modules[path])
        if geometry is None:
            raise CheckpointError(f"{path!r} is {type(modules[path]).__name__}, which cannot carry an adapter")
        target = Target(path, modules[path], geometry)
        try:
            adapters[path] = target, adapter_from_tensors(target, config, found, trainable, autocast)
        except AdapterError as error:
            raise CheckpointError(f"{path}: {error}") from error
    for path, values in saved.items():
        _check_saved(modules[path], path, values)
    return adapters, saved, biases


def adapter_from_tensors(
    target: Target, config: AdapterConfig, tensors: Mapping[str, Tensor], trainable: bool, autocast: bool
) -> Adapter:
    """An adapter that takes over a file's tensors.

    Raises:
        CheckpointError: they do not compose to the layer's weight.
    """
    own = layer_config(config, target.path)
    if isinstance(own, CombinedConfig):
        return _combined_from_tensors(target, own, tensors, trainable, autocast)
    cls = ADAPTERS[config.peft_name]
    values = cls.decode(target.geometry, tensors)
    for name, value in values.items():
        if value.is_floating_point() == (name in cls.index_names):
            raise CheckpointError(
                f"tensor {name!r} is {value.dtype}; expected {'integers' if name in cls.index_names else 'floats'}"
            )
    shapes = {k: tuple(v.shape) for k, v in values.items()}
    cls.fits(target.geometry, own, shapes)
    with torch.device("meta"):
        adapter = cls(target.geometry, own, shapes)
    weight: Any = target.layer.weight
    dtype = weight.dtype if is_plain_weight(weight) and not trainable else parameter_dtype(target.layer, autocast)
    dtype = torch.promote_types(dtype, torch.float32) if cls.wide_factors else dtype
    for name, value in values.items():
        live = value.to(weight.device, dtype) if value.is_floating_point() else value.to(weight.device)
        adapter.add_factor(name, live)
    adapter.register_buffer("strength", torch.ones((), dtype=dtype, device=weight.device), persistent=False)
    adapter.keep_exact({k: v for k, v in values.items() if v.is_floating_point() and v.dtype != dtype})
    return adapter


def _combined_from_tensors(
    target: Target, config: CombinedConfig, tensors: Mapping[str, Tensor], trainable: bool, autocast: bool
) -> Combined:
    by_part: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        _, number, factor = name.split(".", 2)
        by_part.setdefault(int(number), {})[factor] = value
    parts: dict[int, Adapter] = {}
    for index, values in sorted(by_part.items()):
        if index >= len(config.parts):
            raise CheckpointError(f"part {index} has no config; the config lists {len(config.parts)}")
        part = config_from_dict(config.parts[index])
        parts[index] = adapter_from_tensors(target, part, values, trainable, autocast)
    return Combined.of(config, parts)


def _check_saved(module: nn.Module, path: str, values: Mapping[str, Tensor]) -> None:
    expected = module.state_dict()
    problems = [f"missing {path}.{k}" for k in expected if k not in values]
    problems += [f"unexpected {path}.{k}" for k in values if k not in expected]
    problems += [
        f"{path}.{k} has shape {tuple(v.shape)}, expected {tuple(expected[k].shape)}"
        for k, v in values.items() if k in expected and v.shape != expected[k].shape
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"the fully trained module {path!r} does not fit: " + _first(problems))


def _first(problems: list[str], count: int = 5) -> str:
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


# --- configs -----------------------------------------------------------------------------------------------------------------
def config_to_dict(config: AdapterConfig, base: nn.Module, adapter_name: str, compact: bool = False) -> dict[str, Any]:
    """What ``adapter_config.json`` says: PEFT's words where PEFT can express the adapter, an own ``peft_type`` elsewhere."""
    gap = peft_gap(config, base, adapter_name, compact)
    values, out = config.to_dict(), written_fields(config, gap is not None)
    layers = {p: m for p, m in adapted_layers(base) if adapter_name in m.adapters}
    targets = out.get("target_modules")
    selects = any(values.get(k) is not None for k in ("exclude_modules", "layers_to_transform")) and config.peft_name == "SHIRA"
    if targets is None or targets in PRESETS or selects:
        out["target_modules"] = sorted(layers)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            out.pop(field, None)
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or getattr(base, "name_or_path", None)
    if name and not out.get("base_model_name_or_path"):
        out["base_model_name_or_path"] = str(name)
    if not gap and isinstance(config, LoraConfig):
        out["fan_in_fan_out"] = any(layer.geometry.transposed for layer in layers.values())
    return out


def written_fields(config: AdapterConfig, foreign: bool) -> dict[str, Any]:
    """A config's fields as the JSON has them; ``foreign``: PEFT cannot express the adapter, so it gets a type of our own."""
    values = config.to_dict()
    known = _PEFT_COMMON | _PEFT_FIELDS.get(config.peft_name, set())
    defaults = type(config)().to_dict()
    out = {k: v for k, v in values.items() if foreign or k in known or v != defaults[k]}
    out = {k: v for k, v in out.items() if v is not None or k == "target_modules"}
    out["inference_mode"] = True
    if foreign:
        out["peft_type"] = OWN_PREFIX + config.peft_name
    elif isinstance(config, LoraConfig):
        out = {_LORA_SPELLINGS.get(k, k): v for k, v in out.items()}
    return out


def peft_gap(config: AdapterConfig, base: nn.Module, adapter_name: str, compact: bool = False) -> str | None:
    """Why PEFT cannot express an adapter, or None."""
    if compact and config.peft_name == "SHIRA":
        return "the indices are coded"
    for path, layer in adapted_layers(base):
        if adapter_name not in layer.adapters:
            continue
        adapter = layer.adapter(adapter_name)
        gap = type(adapter).peft_gap(layer.geometry, adapter.config)
        if gap is None and config.peft_name in ("LOKR", "OFT"):
            derived = type(adapter).shapes(layer.geometry, adapter.config)
            if adapter.factor_shapes != derived:
                gap = "PEFT derives other factor shapes from the config"
        if gap is not None:
            return f"{path}: {gap}"
    return None


def config_from_dict(values: Mapping[str, Any], source: str = "the adapter's config") -> AdapterConfig:
    """A config from its JSON form, PEFT's or ours.

    Raises:
        CheckpointError: unknown algorithm, a field this library does not know at a value that matters, a bad value or pattern.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source} is not a JSON object")
    name = str(values.get("peft_type", "")).removeprefix(OWN_PREFIX)
    if name not in ADAPTERS:
        raise CheckpointError(f"{source} names peft_type {values.get('peft_type')!r}; known are {sorted(ADAPTERS)}")
    cls = ADAPTERS[name].config_class
    known = {f.name for f in fields(cls)} | set(cls.aliases) | set(cls.unsupported)
    given = {k: v for k, v in values.items() if k not in ("peft_type", "peft_version")}
    for key in list(given):
        if key not in known:
            if given[key] not in (None, False, 0, "", [], {}):
                raise CheckpointError(f"{source} sets {key!r} to {given[key]!r}, which this library does not know")
            del given[key]
    for key in ("init_weights", "init_lora_weights"):
        if given.get(key) in _HARMLESS_INITS:
            given[key] = True
    try:
        config = cls(**given)
        config.inference_mode = True
        config.check()
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    for field in config.patterns:
        for pattern in getattr(config, field):
            check_pattern(pattern, f"{source}: {field}")
    return config
