"""Offloaded pipelines: where new factors go, and weights that are elsewhere while they are to be changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from torch import nn

from ..execution.geometry import is_plain_weight
from .components import places


def device_of(layer: nn.Module) -> torch.device:
    """Where factors for a layer go: to its weight, or where its hook brings the weight when it is used."""
    held = next(iter([*layer.parameters(recurse=False), *layer.buffers(recurse=False)]), None)
    if held is None:
        return torch.device("cpu")
    if held.is_meta:
        target = getattr(layer.__dict__.get("_hf_hook"), "execution_device", None)
        return torch.device("cpu" if target is None else target)
    return held.device


def dtype_of(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """What a layer computes in: its weight's dtype; for packed and 8-bit weights that of the model's other parameters."""
    weight: Any = getattr(layer, "weight", None)
    if is_plain_weight(weight):
        return weight.dtype
    others = (p.dtype for p in model.parameters() if is_plain_weight(p))
    return next(others, torch.get_default_dtype())


def regroup(models: Mapping[str, nn.Module]) -> None:
    """Have diffusers' group offloading notice layers that came or went; nothing for models without it."""
    try:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
    except ImportError:  # diffusers before 0.34 groups once and for all
        return
    for model in models.values():
        if any("_diffusers_hook" in vars(m) for place in places(model).values() for m in (place.module, place.layer)):
            _maybe_remove_and_reapply_group_offloading(model)


@contextmanager
def weights_at_hand(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, weights that hooks bring layer by layer are real tensors; afterwards the models are offloaded again."""
    devices = [(model, device) for model in models if (device := _layerwise_device(model)) is not None]
    for model, _ in devices:
        remove_hook_from_module(model, recurse=True)
    try:
        yield
    finally:
        for model, device in devices:  # as diffusers does it in enable_sequential_cpu_offload
            cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def _layerwise_device(model: nn.Module) -> torch.device | None:
    """Where a sequentially offloaded model runs, None for any other."""
    hooks = (_aligning(m.__dict__.get("_hf_hook")) for m in model.modules())
    return next((torch.device(h.execution_device) for h in hooks if h is not None and h.execution_device is not None), None)


def _aligning(hook: object) -> AlignDevicesHook | None:
    if isinstance(hook, SequentialHook):
        return next((found for h in hook.hooks if (found := _aligning(h)) is not None), None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None
