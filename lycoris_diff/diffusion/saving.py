"""Adapters of a pipeline back to files, as trained: the weights they are used with are not written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters.base import Adapter
from ..adapters.combined import Combined
from ..adapters.slot import options_of
from ..bookkeeping import saved_copies, state_of
from ..checkpoints.checkpoint import Checkpoint, Entry
from ..checkpoints.rewrite import with_strength_one
from ..checkpoints.write import WriteReport, write_checkpoint
from ..errors import AdapterError
from ..naming import BASES, index_model, known_base
from ..naming.bases import ALIASES
from .components import known_adapter, layers_of, models_of, records
from .planning import base_model_of


def save_adapter(
    pipe: Any,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    format: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    base_model: str | None = None,
) -> WriteReport:
    """Write one adapter of a pipeline, loaded from a file or trained here, in a community format.

    Args:
        pipe: a pipeline with the adapter.
        path: file to write; a directory for ``format="peft"``.
        adapter_name: which adapter.
        format: "kohya", "lycoris", "peft", "diffusers", "comfyui", "ai-toolkit" or "onetrainer".
        dtype: of the file's factors; the one they were stored or trained in by default.
        metadata: added to what the adapter's own file said.
        base_model: "sd15", "sdxl" ...; found from the pipeline by default.

    Returns:
        What `write_checkpoint` reports.

    Raises:
        AdapterError: an unknown name, or something the format cannot say; no file has been written then.
    """
    checkpoint = checkpoint_of(pipe, adapter_name)
    indexes = {component: index_model(model, component) for component, model in models_of(pipe).items()}
    known = base_model_of(indexes)
    if base_model:
        known_base(base_model)  # refuses what it does not know
        row = ALIASES.get(base_model, base_model)
        if row in BASES and known in BASES and row != known:
            raise AdapterError(f"the pipeline is {known!r}, not {base_model!r}; leave base_model out")
    base = base_model or checkpoint.base_model or (known if known in BASES else "")
    checkpoint = replace(checkpoint, base_model=base)
    return write_checkpoint(checkpoint, path, format, dtype=dtype, metadata=metadata, indexes=indexes)


def checkpoint_of(pipe: Any, adapter_name: str) -> Checkpoint:
    """An adapter of a pipeline in the neutral form, as trained.

    Raises:
        AdapterError: an unknown name, modules trained in full, or a weighted sum that no file can say.
    """
    models = models_of(pipe)
    components: dict[str, dict[str, list[Entry]]] = {}
    origin = Checkpoint({})
    for component in known_adapter(models, adapter_name):
        held = records(models[component]).get(adapter_name)
        if held is not None:
            components[component] = held.entries
            origin = held.origin
        else:
            components[component] = _live_entries(models[component], adapter_name, component)
    return replace(origin, components=components)


def _live_entries(model: nn.Module, name: str, component: str) -> dict[str, list[Entry]]:
    for path, module in saved_copies(model):
        if name in module.modules_to_save:
            raise AdapterError(
                f"adapter {name!r} trains {component}.{path} in full, which community formats have no place for; "
                "save_pretrained() keeps it"
            )
    state = state_of(model)
    if state is not None and state.biases is not None and state.biases.owner == name:
        raise AdapterError(
            f"adapter {name!r} trains biases of the {component} (bias={getattr(state.configs[name], 'bias', 'all')!r}), which "
            "community formats have no place for; save_pretrained() keeps them"
        )
    layers = layers_of(model)
    return {path: _entries(layer.adapter(name), path) for path, layer in layers.items() if name in layer.adapters}


def _entries(adapter: Adapter, path: str) -> list[Entry]:
    if not isinstance(adapter, Combined):
        return [_entry(adapter)]
    found = []
    for index, part in adapter._parts():
        weight = adapter.config.weights[index]  # type: ignore[attr-defined]
        if weight != 1.0 and part.depends_on_weight:
            raise AdapterError(
                f"{path}: a weight of {weight:g} on {part.config.peft_name}, whose change depends on the base weight, "
                "cannot be written; save the parts of the sum by themselves"
            )
        entry = _entry(part)
        weighed = replace(entry, scale=entry.scale * weight)
        found.append(weighed if hasattr(part.config, "alpha") else with_strength_one(weighed))
    return found


def _entry(adapter: Adapter) -> Entry:
    config = adapter.config
    tensors = {k: v.detach().cpu() for k, v in adapter.exact_factors().items()}
    alpha = getattr(config, "alpha", None)
    source = "config" if alpha is not None else "none"
    return Entry(config.peft_name, tensors, float(adapter.scaling), config.r, alpha, source, options_of(config))
