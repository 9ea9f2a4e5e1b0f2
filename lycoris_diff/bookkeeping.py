"""What a model remembers of its adapters, kept on the base model itself: the same whether a wrapper is used or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .adapters.config import AdapterConfig
from .biases import BiasSet
from .errors import AdapterError
from .layers.layer import AdaptedLayer
from .layers.saved import SavedModule

_STATE = "_lycoris_diff_state"
#: PEFT's name of the model without adapters
BASE = "__base__"


@dataclass
class AdapterState:
    """What a model with adapters remembers.

    Attributes:
        configs: config of every adapter by name.
        active: names of the active adapters.
        was_trainable: base parameters that required gradients before the first adapter.
        frozen: the base parameters require none now.
        biases: base biases trained by one of the adapters.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    was_trainable: set[str] = field(default_factory=set)
    frozen: bool = False
    biases: BiasSet | None = None


def state_of(model: nn.Module) -> AdapterState | None:
    """Bookkeeping of a base model, None when it has no adapters."""
    return model.__dict__.get(_STATE)


def begin(model: nn.Module) -> AdapterState:
    """Begin the bookkeeping of a base model that has none; `forget` ends it."""
    state = AdapterState(was_trainable={n for n, p in model.named_parameters() if p.requires_grad})
    model.__dict__[_STATE] = state
    return state


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Adapted layers with their paths."""
    return ((p, m) for p, m in model.named_modules() if isinstance(m, AdaptedLayer))


def saved_copies(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Modules trained in full with their paths."""
    return ((p, m) for p, m in model.named_modules() if isinstance(m, SavedModule))


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuse an adapter name that is taken or cannot be part of a parameter's name.

    Raises:
        AdapterError: naming the adapters that exist.
    """
    state = state_of(model)
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"adapter name {name!r} is not usable; use a non-empty name without dots")
    if name == BASE:
        raise AdapterError(f"{name!r} stands for the base model alone; choose another adapter name")
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r} is an attribute of torch's ModuleDict; choose another")
    if state is not None and name in state.configs:
        raise AdapterError(
            f"adapter {name!r} already exists (adapters: {sorted(state.configs)}); delete it or choose another name"
        )


def set_active(model: nn.Module, names: list[str], inference_mode: bool = False) -> None:
    """Make the named adapters the active ones; all others are frozen.

    Raises:
        AdapterError: an unknown name, or two active adapters with their own copy of one module.
    """
    state = state_of(model)
    known = {} if state is None else state.configs
    for name in names:
        if name not in known:
            raise AdapterError(f"there is no adapter {name!r}; adapters: {sorted(known)}")
    copies: dict[str, str | None] = {}
    for path, module in saved_copies(model):
        own = [n for n in names if n in module.modules_to_save]
        if len(own) > 1:
            raise AdapterError(f"adapters {own} each have their own copy of {path!r}; only one of them can be active")
        copies[path] = own[0] if own else None
    assert state is not None
    state.active = list(dict.fromkeys(names))
    trainable = {n for n in names if not (inference_mode or known[n].inference_mode)}
    for _, layer in adapted_layers(model):
        pinned = tuple(name for name, adapter in layer.named_adapters() if adapter.pinned)
        layer.active = pinned + tuple(n for n in state.active if n in layer.adapters and n not in pinned)
        for name, adapter in layer.named_adapters():
            adapter.requires_grad_(name in trainable)
            adapter.switch(name in state.active)
    for path, module in saved_copies(model):
        module.active = copies[path]
        for name, copied in module.modules_to_save.items():
            copied.requires_grad_(name in trainable)
    if state.biases is not None:
        state.biases.use(model, trained=state.biases.owner in names)
        for bias in state.biases.parameters(model).values():
            bias.requires_grad_(state.biases.owner in trainable)


def forget(model: nn.Module) -> None:
    """Drop the bookkeeping of a model whose adapters are gone; its parameters train as before."""
    state = model.__dict__.pop(_STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.was_trainable)
