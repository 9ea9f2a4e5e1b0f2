"""One batch with other adapters for every sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .bookkeeping import BASE, adapted_layers, saved_copies, state_of
from .errors import AdapterError, nearest
from .layers.samples import Samples


@contextlib.contextmanager
def samples_with(models: Sequence[nn.Module], adapter_names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Inside, every sample of a batch runs with adapters of its own, active or not, at the strengths that are set.

    Activation checkpointing runs blocks again in backward; where it is on, call ``backward()`` inside as well.

    Args:
        models: base models with adapters.
        adapter_names: for every sample the name of an adapter, several names, or None (also ``"__base__"`` and ``[]``) for the
            base model alone. A batch may be a multiple of the samples, one round of them all after the other.

    Raises:
        AdapterError: no samples, an unknown name, an adapter that trains whole modules or biases of the base, or one that is
            merged; nothing has changed then.
    """
    if isinstance(adapter_names, str) or not len(adapter_names):
        raise AdapterError(f"adapter_names is {adapter_names!r}; expected a list with an entry for every sample")
    samples = Samples([_names(entry) for entry in adapter_names])
    for model in models:
        _check(model, {name for names in samples.names for name in names})
    known = {name for model in models for name in _adapters(model)}
    for name in (name for names in samples.names for name in names):
        if name not in known:
            raise AdapterError(f"there is no adapter {name!r}; adapters: {sorted(known)}.{nearest(name, known)}")
    layers = [layer for model in models for _, layer in adapted_layers(model)]
    before = [layer.samples for layer in layers]
    for layer in layers:
        layer.samples = samples
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.samples = value


def _names(entry: Any) -> tuple[str, ...]:
    names = (entry,) if isinstance(entry, str) else () if entry is None else entry
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"adapter_names has the entry {entry!r}; expected a name, a list of names or None")
    return tuple(dict.fromkeys(name for name in names if name != BASE))


def _adapters(model: nn.Module) -> list[str]:
    state = state_of(model)
    return list(state.configs) if state else []


def _check(model: nn.Module, names: set[str]) -> None:
    for path, layer in adapted_layers(model):
        if layer.merged:
            raise AdapterError(f"{list(layer.merged)} are merged into {path}, for all samples; unmerge (unfuse) them first")
    for path, module in saved_copies(model):
        found = sorted(names & set(module.modules_to_save))
        if found:
            raise AdapterError(f"{found} bring a whole {path} (modules_to_save), which cannot differ between samples")
    state = state_of(model)
    if state and state.biases is not None and state.biases.owner in names:
        raise AdapterError(f"{state.biases.owner!r} has trained biases of the base model, which cannot differ between samples")
