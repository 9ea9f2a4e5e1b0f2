"""Putting adapters into a model and taking them out again, all or nothing."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .adapters.base import Adapter
from .adapters.config import AdapterConfig
from .adapters.registry import adapter_class
from .biases import BiasSet, bias_mode
from .bookkeeping import adapted_layers, begin, check_new_name, forget, saved_copies, set_active, state_of
from .building import base_weight, build_adapter, check_packed, keeps_row_squares
from .errors import AdapterError
from .execution.norms import NormGeometry
from .layers.layer import AdaptedLayer
from .layers.norm import AdaptedNorm
from .layers.saved import SavedModule
from .targets import Target, check_patterns, find_targets, saved_modules


@dataclass(frozen=True)
class InjectReport:
    """What an injection did.

    Attributes:
        adapter_name: the adapter.
        algorithm: PEFT's name of its algorithm.
        matched: paths of the adapted modules.
        saved: paths of modules trained in full.
        trainable_parameters: parameters of the adapter.
        total_parameters: parameters of the model with it.
    """

    adapter_name: str
    algorithm: str
    matched: list[str]
    saved: list[str]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return (
            f"{self.algorithm} {self.adapter_name!r}: {len(self.matched)} modules, "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.3f} %)"
        )


def inject_adapter(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
) -> InjectReport:
    """Add an adapter to a model in place, without a wrapper, and make it the active one.

    The base model's parameters are frozen; `AdapterModel(model)` gives the methods of a wrapper later.

    Args:
        model: any module; not an `AdapterModel`.
        config: which algorithm, which modules.
        adapter_name: must be new, without dots.
        low_cpu_mem_usage: create the factors on the meta device, to be filled by a file.
        autocast_adapter_dtype: float32 factors on half-precision bases (False: the base's dtype).

    Returns:
        What was matched, and parameter counts.

    Raises:
        ConfigError, TargetError, AdapterError: before anything has changed.
    """
    check_new_name(model, adapter_name)
    adapter_class(config)
    config.check()
    targets = find_targets(model, config)
    check_patterns(config, [t.path for t in targets])
    saved = saved_modules(model, config)
    _check_bias(model, config, adapter_name)
    adapters = {
        t.path: build_adapter(model, t, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype) for t in targets
    }
    attach(model, config, adapter_name, {t.path: (t, adapters[t.path]) for t in targets}, saved)
    set_active(model, [adapter_name])
    own = sum(p.numel() for a in adapters.values() for p in a.parameters())
    own += sum(
        p.numel()
        for _, m in saved_copies(model)
        if adapter_name in m.modules_to_save
        for p in m.modules_to_save[adapter_name].parameters()
    )
    total = sum(p.numel() for p in model.parameters())
    return InjectReport(adapter_name, config.peft_name, list(adapters), saved, own, total)


def attach(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    adapters: Mapping[str, tuple[Target, Adapter]],
    saved: Iterable[str] = (),
    freeze: bool = True,
) -> None:
    """Swap finished adapters in.

    ``freeze=False`` leaves the base parameters' ``requires_grad`` alone, on which the bits of an operation may depend even
    where nothing is recorded.

    Raises:
        AdapterError: an adapter needs its layer's weight and cannot have it, or belongs to another; nothing has changed then.
    """
    squares: dict[str, Tensor] = {}
    for target, adapter in adapters.values():
        check_packed(target, adapter)
        adapter.settle(partial(base_weight, model, target))
        if keeps_row_squares(target, adapter):
            squares[target.path] = base_weight(model, target).square().sum(1)
    state = state_of(model)
    if state is None:
        state = begin(model)
        save = _own_save(model)
        if save is not None:
            model.__dict__["save_pretrained"] = save
    if freeze and not state.frozen:
        model.requires_grad_(False)
        state.frozen = True
    swaps: dict[nn.Module, nn.Module] = {}
    for path, (target, adapter) in adapters.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, AdaptedLayer):
            kind = AdaptedNorm if isinstance(target.geometry, NormGeometry) else AdaptedLayer
            layer = swaps[target.layer] = kind(target.layer, target.geometry)
            layer.path = path
        adapter.train(layer.training)
        layer.add(name, adapter)
        if path in squares:
            layer.row_squares = squares[path]
    for path in saved:
        module = model.get_submodule(path)
        if not isinstance(module, SavedModule):
            original, module = module, SavedModule(module)
            swaps[original] = module
        module.add(name)
    replace_modules(model, swaps)
    state.configs[name] = config
    if bias_mode(config) != "none":
        state.biases = BiasSet.begin(model, config, name)


def detach(model: nn.Module, name: str, successor: bool = True) -> None:
    """Take one adapter out; layers without adapters become the base layers again.

    ``successor`` activates the first adapter left when the only active one goes, as PEFT does.
    """
    state = state_of(model)
    assert state is not None
    if state.biases is not None and state.biases.owner == name:
        merged = [(layer, layer.held) for _, layer in adapted_layers(model) if layer.held]
        for layer, _ in merged:  # merged values may include biases
            layer.unmerge()
        state.biases.use(model, trained=False)
        state.biases = None
        for layer, names in merged:
            layer.merge(n for n in names if n != name)
    swaps: dict[nn.Module, nn.Module] = {}
    for _, layer in adapted_layers(model):
        if name not in layer.adapters:
            continue
        if name in layer.merged:
            layer.merge(n for n in layer.merged if n != name)
        layer.remove(name)
        if not layer.adapters:
            swaps[layer] = layer.base_layer
    for _, module in saved_copies(model):
        if name in module.modules_to_save:
            del module.modules_to_save[name]
        if not module.modules_to_save:
            swaps[module] = module.original_module
    replace_modules(model, swaps)
    del state.configs[name]
    rest = [n for n in state.active if n != name]
    if successor and not rest and name in state.active:
        rest = list(state.configs)[:1]
    if state.configs:
        set_active(model, rest)
    else:
        _leave(model)


def unwrap(model: nn.Module, keep_saved: bool = False) -> None:
    """Take every adapter out: the base model's own layers, names and trainability again.

    Args:
        keep_saved: put the active copies of ``modules_to_save`` in the originals' place, and keep trained biases.
    """
    state = state_of(model)
    if state is None:
        return
    if not keep_saved and state.biases is not None:
        state.biases.use(model, trained=False)
    swaps: dict[nn.Module, nn.Module] = {layer: layer.base_layer for _, layer in adapted_layers(model)}
    swaps |= {m: m.current if keep_saved else m.original_module for _, m in saved_copies(model)}
    replace_modules(model, swaps)
    _leave(model)


def save_base_model(base: nn.Module, directory: Any, *args: Any, **arguments: Any) -> None:
    """The base model's own ``save_pretrained``, with its own module tree for as long as it takes.

    Raises:
        AdapterError: the base model cannot save itself.
    """
    save = getattr(type(base), "save_pretrained", None)
    if save is None:
        raise AdapterError(f"{type(base).__name__} has no save_pretrained of its own")
    swaps: dict[nn.Module, nn.Module] = {m: m.base_layer for _, m in adapted_layers(base)}
    swaps |= {m: m.original_module for _, m in saved_copies(base)}
    replace_modules(base, swaps)
    try:
        save(base, directory, *args, **arguments)
    finally:
        replace_modules(base, {original: adapted for adapted, original in swaps.items()})


def _own_save(model: nn.Module) -> types.MethodType | None:
    """``save_pretrained`` for a model with adapters in place: pipelines that call it save the base under its own names."""
    original = getattr(type(model), "save_pretrained", None)
    if original is None:
        return None

    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save_base_model(self, save_directory, *args, **kwargs)

    save_pretrained.__doc__ = original.__doc__
    save_pretrained.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return types.MethodType(save_pretrained, model)


# --- helpers -------------------------------------------------------------------------------------------------------------
def replace_modules(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in others' places, wherever they occur; a module used in several places stays one module."""
    for parent in list(model.modules()) if swaps else ():
        for name, child in list(parent._modules.items()):
            if child is not None and child in swaps:
                setattr(parent, name, swaps[child])


def _leave(model: nn.Module) -> None:
    forget(model)
    model.__dict__.pop("save_pretrained", None)


def _check_bias(model: nn.Module, config: AdapterConfig, name: str) -> None:
    state = state_of(model)
    if bias_mode(config) != "none" and state is not None and state.biases is not None:
        raise AdapterError(f"adapter {state.biases.owner!r} already trains base biases; {name!r} cannot do so as well")
