"""What merging and combining adapters needs to know of a whole model; nothing here changes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from .adapters.base import Adapter
from .adapters.combined import Combined, CombinedConfig
from .errors import AdapterError
from .injection import AdapterState, adapted_layers, layer_config, saved_copies, state_of
from .layers.layer import AdaptedLayer
from .targets import Target


def mergeable_layers(model: nn.Module, names: Sequence[str], safe: bool) -> list[AdaptedLayer]:
    """Layers that carry one of the adapters, after making sure that each can be merged into; nothing is changed.

    Args:
        model: base model.
        names: adapters to merge.
        safe: also compute every merged weight and refuse one that is not finite.

    Raises:
        AdapterError: naming the layer and why it cannot be merged into.
    """
    layers = [(p, m) for p, m in adapted_layers(model) if any(n in m.adapters for n in names)]
    owners = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)
    for path, layer in layers:
        held = layer.base_layer._parameters.get("weight")
        if held is None or held.is_meta:
            state = "is computed by a parametrization" if held is None else "is offloaded"
            raise AdapterError(f"the weight of {path!r} {state}; it cannot be merged into")
        if layer.has_plain_weight and owners[layer.base_layer.get_parameter("weight")] > 1:
            raise AdapterError(
                f"{path!r} shares its weight with another module (tied weights); merging would change both. "
                "Untie them first, or leave the adapter unmerged"
            )
        if not layer.has_plain_weight:
            raise AdapterError(f"{path!r} ({type(layer.base_layer).__name__}) has a packed weight; it cannot be merged into")
        if safe:
            every = [n for n in dict.fromkeys((*layer.held, *names)) if n in layer.adapters]
            values = [v for v in layer.merged_tensors(every).values() if v is not None]
            if not all(bool(torch.isfinite(v).all()) for v in values):
                raise AdapterError(
                    f"merging {list(names)} gives non-finite weights in {path!r}; nothing was merged. "
                    "The adapter is damaged, or too strong for the weights' dtype"
                )
    return [layer for _, layer in layers]


def weighted_sum(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float]
) -> tuple[CombinedConfig, dict[str, tuple[Target, Adapter]]]:
    """Config and finished adapters of a weighted sum, ready to be attached.

    Raises:
        AdapterError: one of the adapters trains a whole module; such copies cannot be summed.
    """
    configs = (state_of(model) or AdapterState()).configs
    copies = [p for p, m in saved_copies(model) if any(n in m.modules_to_save for n in adapters)]
    if copies:
        raise AdapterError(f"{copies[0]!r} is trained in full by one of {list(adapters)}; such copies cannot be summed")
    parts = [configs[n].to_dict() for n in adapters]
    config = CombinedConfig(parts=parts, weights=[float(w) for w in weights])
    layers: dict[str, tuple[Target, Adapter]] = {}
    for path, layer in adapted_layers(model):
        found = {i: layer.adapter(n) for i, n in enumerate(adapters) if n in layer.adapters}
        if found:
            own = layer_config(config, path)
            assert isinstance(own, CombinedConfig)
            layers[path] = Target(path, layer.base_layer, layer.geometry), Combined.of(own, found)
    return config, layers
