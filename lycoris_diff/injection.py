"""Putting adapters into a model and taking them out again, all or nothing.

Bookkeeping lives on the base model itself (`AdapterState`), so that it is the same whether a wrapper is used or not.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Adapter, Site
from .adapters.config import AdapterConfig
from .adapters.registry import adapter_class
from .biases import BiasSet, bias_mode
from .errors import AdapterError, ConfigError
from .execution.geometry import is_plain_weight
from .execution.norms import NormGeometry
from .execution.packed import describe, unreadable
from .layers.layer import AdaptedLayer
from .layers.norm import AdaptedNorm
from .layers.saved import SavedModule
from .targets import Target, check_patterns, find_targets, pattern_value, saved_modules

_STATE = "_lycoris_diff_state"


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


def state_of(model: nn.Module) -> AdapterState | None:
    """Bookkeeping of a base model, None when it has no adapters."""
    return model.__dict__.get(_STATE)


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
    if hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r} is an attribute of torch's ModuleDict; choose another")
    if state is not None and name in state.configs:
        raise AdapterError(
            f"adapter {name!r} already exists (adapters: {sorted(state.configs)}); delete it or choose another name"
        )


def layer_config(config: AdapterConfig, path: str) -> AdapterConfig:
    """The config of one layer: patterns resolved."""
    settings = {f: pattern_value(getattr(config, p), path, getattr(config, f)) for p, f in config.patterns.items()}
    return config.for_layer(**settings)


def parameter_dtype(layer: nn.Module, autocast: bool) -> torch.dtype:
    """Dtype of a new adapter: float32 on half-precision and packed bases, the base's otherwise."""
    weight = getattr(layer, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    if dtype.itemsize == 1 or (autocast and dtype in (torch.float16, torch.bfloat16)):
        return torch.float32
    return dtype


def build_adapter(
    model: nn.Module, target: Target, config: AdapterConfig, name: str, low_cpu_mem_usage: bool, autocast: bool
) -> Adapter:
    """A new adapter for one target, initialised unless on meta."""
    cls = adapter_class(config)
    own = layer_config(config, target.path)
    try:
        shapes = cls.shapes(target.geometry, own)
    except ConfigError as error:
        raise ConfigError(f"{target.path}: {error}") from error
    with torch.device("meta" if low_cpu_mem_usage else "cpu"):
        adapter = cls(target.geometry, own, shapes)
    check_packed(target, adapter)
    dtype = parameter_dtype(target.layer, autocast or cls.wide_factors)
    adapter.to(dtype=dtype)
    if not low_cpu_mem_usage:
        weight = partial(base_weight, model, target)
        adapter.reset(Site(target.path, name, target.layer, weight))
        adapter.to(device=_device(target.layer))
        if adapter.decomposed:
            adapter.init_magnitude(weight())
    return adapter


def base_weight(model: nn.Module, target: Target) -> Tensor:
    """Canonical unmodified weight of a target, also where another adapter is merged into it.

    Of a packed (quantized) one the numbers it stands for, in float32: for what is computed once, when adapters are attached.

    Raises:
        AdapterError: the weight is packed in a way that cannot be read.
    """
    layer = model.get_submodule(target.path)
    if not isinstance(layer, AdaptedLayer):
        layer = AdaptedLayer(target.layer, target.geometry)
        layer.path = target.path
    return layer.values()


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
        if _is_packed(target) and _wants_norms(adapter):
            squares[target.path] = base_weight(model, target).square().sum(1)
    state = state_of(model)
    if state is None:
        state = AdapterState(was_trainable={n for n, p in model.named_parameters() if p.requires_grad})
        model.__dict__[_STATE] = state
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
        forget(model)


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
    forget(model)


def forget(model: nn.Module) -> None:
    """Drop the bookkeeping of a model whose adapters are gone; its parameters train as before."""
    state = model.__dict__.pop(_STATE)
    model.__dict__.pop("save_pretrained", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.was_trainable)


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


def _device(layer: nn.Module) -> torch.device:
    parameter = next(iter([*layer.parameters(recurse=False), *layer.buffers(recurse=False)]), None)
    hook = getattr(layer, "_hf_hook", None)
    if parameter is not None and parameter.is_meta and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return torch.device("cpu") if parameter is None else parameter.device


def _check_bias(model: nn.Module, config: AdapterConfig, name: str) -> None:
    state = state_of(model)
    if bias_mode(config) != "none" and state is not None and state.biases is not None:
        raise AdapterError(f"adapter {state.biases.owner!r} already trains base biases; {name!r} cannot do so as well")


def check_packed(target: Target, adapter: Adapter) -> None:
    """Refuse an adapter that cannot do without the values of a packed (quantized) weight.

    Raises:
        ConfigError: naming the layer, its weight's class, and why.
    """
    if not adapter.depends_on_weight or not _is_packed(target):
        return
    gap = adapter.packed_gap()
    if not gap and target.geometry.edges:
        gap = f"{type(adapter).__name__} cannot tell the layer's padding ({target.geometry.edge_mode}) from its input"
    if not gap and _wants_norms(adapter):
        gap = unreadable(target.layer)
    if gap:
        raise ConfigError(
            f"{target.path!r} ({describe(target.layer)}) is quantized, and {gap}. Leave the layer out (exclude_modules), use "
            "an additive algorithm (LoRA, LoKr, LoHa, MiSS, SHiRA), or load the model unquantized"
        )


def _wants_norms(adapter: Adapter) -> bool:
    """Whether the rows' norms are asked for, once: DoRA, by itself or in a sum."""
    return any(a.decomposed for a in adapter.modules() if isinstance(a, Adapter))


def _is_packed(target: Target) -> bool:
    return not is_plain_weight(getattr(target.layer, "weight", None))
