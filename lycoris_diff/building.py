"""A new adapter for one module: its config with patterns resolved, its dtype and device, its first values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .adapters.base import Adapter, Site
from .adapters.config import AdapterConfig
from .adapters.registry import adapter_class
from .errors import ConfigError
from .execution.geometry import is_plain_weight
from .execution.packed import describe, unreadable
from .execution.precision import outside_autocast
from .layers.layer import AdaptedLayer
from .targets import Target, pattern_value


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
        weight, device = partial(base_weight, model, target), _device(target.layer)
        with outside_autocast(device):
            adapter.reset(Site(target.path, name, target.layer, weight))
            adapter.to(device=device)
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
    return layer.values().detach()


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


def keeps_row_squares(target: Target, adapter: Adapter) -> bool:
    """Whether the squared row norms of a packed weight are asked for; they are computed once, when the adapter is attached."""
    return _is_packed(target) and _wants_norms(adapter)


def _wants_norms(adapter: Adapter) -> bool:
    """Whether the rows' norms are asked for, once: DoRA, by itself or in a sum."""
    return any(a.decomposed for a in adapter.modules() if isinstance(a, Adapter))


def _is_packed(target: Target) -> bool:
    return not is_plain_weight(getattr(target.layer, "weight", None))


def _device(layer: nn.Module) -> torch.device:
    parameter = next(iter([*layer.parameters(recurse=False), *layer.buffers(recurse=False)]), None)
    hook = getattr(layer, "_hf_hook", None)
    if parameter is not None and parameter.is_meta and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return torch.device("cpu") if parameter is None else parameter.device
