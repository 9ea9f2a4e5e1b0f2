"""The parts of a pipeline that carry adapters, and the places in them, whoever else has wrapped them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..adapters.config import AdapterConfig
from ..bookkeeping import state_of
from ..checkpoints.checkpoint import Checkpoint, Entry
from ..errors import AdapterError, nearest
from ..layers.layer import AdaptedLayer

#: components that adapter files exist for
_ADAPTABLE = re.compile(r"(unet|transformer|prior|prior_prior|text_encoder|prior_text_encoder)(_\d+)?")
_RECORDS = "_lycoris_diff_files"
_UNSCALED = "_lycoris_diff_unscaled"
#: children in which layers with adapters, PEFT's and ours, keep what they replace
_INNER = ("base_layer", "original_module")


@dataclass(init=False)
class FileConfig(AdapterConfig):
    """Stands for an adapter from a file, whose modules each have a config of their own."""

    inference_mode: bool = True

    peft_name: ClassVar[str] = "FILE"


@dataclass
class Loaded:
    """What a component remembers of an adapter that came from a file.

    Attributes:
        source: the file, directory or repository.
        origin: the file's metadata, extras, dialect and so on; without its modules.
        entries: what the file says of every module of this component, by the module's path without adapters.
    """

    source: str
    origin: Checkpoint
    entries: dict[str, list[Entry]]


@dataclass(frozen=True)
class Place:
    """Where a module that can carry an adapter is.

    Attributes:
        path: its path in the model without adapters; files and reports use it.
        actual: its path in the model as it is, below PEFT's layers where there are any.
        module: the layer itself, or our layer with adapters around it.
    """

    path: str
    actual: str
    module: nn.Module

    @property
    def layer(self) -> nn.Module:
        """The layer without our adapters."""
        return self.module.base_layer if isinstance(self.module, AdaptedLayer) else self.module


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Base models of a pipeline that adapters may go to, by component; wrappers are looked through.

    Raises:
        AdapterError: the object is no pipeline, or has no such component.
    """
    found = getattr(pipe, "components", None)
    if not isinstance(found, dict):
        raise AdapterError(f"expected a diffusers pipeline, got {type(pipe).__name__}; for a bare model use AdapterModel")
    models = {
        name: inner_model(part) for name, part in found.items() if _ADAPTABLE.fullmatch(name) and isinstance(part, nn.Module)
    }
    if not models:
        raise AdapterError(f"{type(pipe).__name__} has no component that takes adapters; it has {sorted(found)}")
    return models


def inner_model(model: nn.Module) -> nn.Module:
    """A model without the wrappers around it: this library's, PEFT's and torch.compile's."""
    while True:
        if hasattr(type(model), "get_base_model"):
            unwrap: Any = model.get_base_model
            model = unwrap()
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def chosen_models(pipe: Any, components: Iterable[str] | None) -> dict[str, nn.Module]:
    """The named components, all by default.

    Raises:
        AdapterError: an unknown name.
    """
    models = models_of(pipe)
    if components is None:
        return models
    names = [components] if isinstance(components, str) else list(components)
    for name in names:
        if name not in models:
            raise AdapterError(
                f"{type(pipe).__name__} has no component {name!r} that takes adapters; it has {sorted(models)}."
                f"{nearest(name, models)}"
            )
    return {name: models[name] for name in names}


def places(model: nn.Module) -> dict[str, Place]:
    """Every module by its path without adapters: what is inside our and PEFT's layers is not walked."""
    return {place.path: place for place in _walk(model, "", "")}


def _walk(module: nn.Module, path: str, actual: str) -> Iterator[Place]:
    while not isinstance(module, AdaptedLayer):
        inner = next((n for n in _INNER if module._modules.get(n) is not None), None)
        if inner is None:
            break
        module, actual = module.get_submodule(inner), f"{actual}.{inner}" if actual else inner
    yield Place(path, actual, module)
    if isinstance(module, AdaptedLayer):
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, f"{actual}.{name}" if actual else name)


def layers_of(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Our layers by path without adapters."""
    if state_of(model) is None:
        return {}
    return {path: place.module for path, place in places(model).items() if isinstance(place.module, AdaptedLayer)}


def adapter_names(models: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Every adapter with the components it is on, in the order in which they were added."""
    found: dict[str, list[str]] = {}
    for component, model in models.items():
        state = state_of(model)
        for name in state.configs if state else ():
            found.setdefault(name, []).append(component)
    return found


def known_adapter(models: dict[str, nn.Module], name: str) -> list[str]:
    """Components that an adapter is on.

    Raises:
        AdapterError: there is no such adapter.
    """
    names = adapter_names(models)
    if name not in names:
        raise AdapterError(f"there is no adapter {name!r}; adapters: {sorted(names)}.{nearest(str(name), names)}")
    return names[name]


def unscaled(model: nn.Module) -> dict[AdaptedLayer, dict[str, float]]:
    """Strengths of fused adapters before the factor they were fused with, by layer and name."""
    return model.__dict__.setdefault(_UNSCALED, {})


def forget_unscaled(model: nn.Module) -> None:
    """Drop what `unscaled` holds."""
    model.__dict__.pop(_UNSCALED, None)


def records(model: nn.Module) -> dict[str, Loaded]:
    """What a model remembers of adapters from files, by name; `remember` and `forget` change it."""
    return model.__dict__.get(_RECORDS, {})


def remember(model: nn.Module, name: str, loaded: Loaded) -> None:
    """Note where an adapter came from."""
    model.__dict__.setdefault(_RECORDS, {})[name] = loaded


def forget(model: nn.Module, name: str | None = None) -> None:
    """Drop the note of one adapter, or all."""
    held = model.__dict__.get(_RECORDS, {})
    if name is not None:
        held.pop(name, None)
    if name is None or not held:
        model.__dict__.pop(_RECORDS, None)
