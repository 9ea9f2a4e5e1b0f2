"""What merging and combining adapters needs to know of a whole model; no weight is changed here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .adapters.base import Adapter
from .adapters.combined import Combined, CombinedConfig
from .bookkeeping import AdapterState, adapted_layers, saved_copies, state_of
from .building import layer_config
from .errors import AdapterError
from .execution.packed import describe
from .layers.layer import AdaptedLayer
from .layers.rounded import rounded
from .targets import Target

#: False refuses to merge into packed weights; True rounds them anew and prints what that loses; a function is given the report
Requantize = bool | Callable[["RequantizeReport"], Any]
_SHOWN = 5


@dataclass(frozen=True)
class RequantizeReport:
    """What merging into packed (quantized) weights lost.

    Attributes:
        losses: path of every layer that was rounded anew -> ``||rounded - (W + change)|| / ||change||``. 0 keeps the change
            whole; from 1 on the layer is further from it than with no change at all.
    """

    losses: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and how much; ``("", 0.0)`` where nothing was rounded."""
        return max(self.losses.items(), key=lambda pair: pair[1], default=("", 0.0))

    @property
    def median(self) -> float:
        """The middle one of all losses."""
        return statistics.median(self.losses.values()) if self.losses else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return asdict(self) | {"median": self.median, "worst": list(self.worst)}

    def __str__(self) -> str:
        if not self.losses:
            return "no quantized layer was changed"
        ranked = sorted(self.losses.items(), key=lambda pair: -pair[1])
        lines = [
            f"rounded into {len(ranked)} quantized layers; of the adapters' change is lost: median {self.median:.1%}, "
            f"worst {ranked[0][1]:.1%}"
        ]
        lines += [f"  {loss:7.1%}  {path}" for path, loss in ranked[:_SHOWN]]
        lines += [f"  and {len(ranked) - _SHOWN} more"] if len(ranked) > _SHOWN else []
        worse = sum(loss >= 1 for loss in self.losses.values())
        lines += [f"  {worse} of them are further from the change than without it: leave it unmerged"] if worse else []
        return "\n".join(lines)


def report_losses(requantize: Requantize, layers: Iterable[tuple[str, AdaptedLayer]]) -> None:
    """Hand out, or print, what merging has just lost; nothing where it was not asked for."""
    if requantize is False:
        return
    report = RequantizeReport({path: layer.loss for path, layer in layers if layer.loss is not None})
    (print if requantize is True else requantize)(report)


def allow_rounding(layers: Iterable[AdaptedLayer], requantize: Requantize) -> None:
    """Let packed layers be rounded anew, from now on: whatever merges them again may as well."""
    for layer in layers:
        layer.may_round = layer.may_round or requantize is not False


def mergeable_layers(
    model: nn.Module, names: Sequence[str], safe: bool, requantize: Requantize = False
) -> list[tuple[str, AdaptedLayer]]:
    """Layers that carry one of the adapters, after making sure that each can be merged into; nothing is changed.

    Args:
        model: base model.
        names: adapters to merge.
        safe: also compute every merged weight and refuse one that is not finite.
        requantize: layers with packed weights count as well, where their weights can be rounded anew.

    Returns:
        Layers with their paths.

    Raises:
        AdapterError: naming the layer and why it cannot be merged into.
    """
    layers = [(p, m) for p, m in adapted_layers(model) if any(n in m.adapters for n in names)]
    tied = _sharing(model)
    packed = [path for path, layer in layers if not layer.has_plain_weight]
    for path, layer in layers:
        held = layer.base_layer._parameters.get("weight")
        if held is None or held.is_meta:
            state = "is computed by a parametrization" if held is None else "is offloaded"
            raise AdapterError(f"the weight of {path!r} {state}; it cannot be merged into")
        shared = [n for n in ("weight", "bias")[: 1 + layer.biased] if (layer.base_layer, n) in tied]
        if layer.has_plain_weight and shared:
            raise AdapterError(
                f"{path!r} shares its {shared[0]} with another module (tied weights); merging would change both. "
                "Untie them first, or leave the adapter unmerged"
            )
        if not layer.has_plain_weight:
            _check_packed(path, layer, names, packed, requantize)
        if safe:
            every = [n for n in dict.fromkeys((*layer.held, *names)) if n in layer.adapters]
            values = [v for v in layer.merged_tensors(every).values() if v is not None]
            if not all(bool(torch.isfinite(v).all()) for v in values):
                raise AdapterError(
                    f"merging {list(names)} gives non-finite weights in {path!r}; nothing was merged. "
                    "The adapter is damaged, or too strong for the weights' dtype"
                )
    return layers


def _sharing(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Plain parameters, by module and name, that have memory in common with others: the same, or views of it."""
    every = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if type(p) is nn.Parameter]
    held = [one for one in every if one[2].numel() and not one[2].is_meta]
    reach = [sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True)) + 1 for _, _, p in held]
    places = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + numbers * p.element_size(), index)
        for index, ((_, _, p), numbers) in enumerate(zip(held, reach, strict=True))
    )
    found: set[tuple[nn.Module, str]] = set()
    furthest = places[0] if places else None
    for place in places[1:]:
        assert furthest is not None
        if place[0] == furthest[0] and place[1] < furthest[2]:
            found |= {held[index][:2] for index in (place[3], furthest[3])}
        furthest = place if place[0] != furthest[0] or place[2] > furthest[2] else furthest
    return found


def _check_packed(path: str, layer: AdaptedLayer, names: Sequence[str], packed: Sequence[str], requantize: Requantize) -> None:
    if requantize is False:
        some = ", ".join(map(repr, packed[:_SHOWN])) + (f" and {len(packed) - _SHOWN} more" if len(packed) > _SHOWN else "")
        raise AdapterError(
            f"the weights of {some} are packed (quantized; {path!r} is {describe(layer.base_layer)}): merging would round part "
            "of the change away. Leave the adapters unmerged, which loses nothing, or pass requantize=True to round the "
            "weights anew and be told what is lost"
        )
    rest = [n for n in layer.active if n not in (*layer.held, *names) and layer.adapter(n).depends_on_weight]
    if rest:
        raise AdapterError(f"{path!r} is packed, and active {rest} multiply its weight: merge them as well, or switch them off")
    try:  # for nothing: what cannot be rounded must show before anything changes
        wanted: Any = layer.merged_tensors([n for n in dict.fromkeys((*layer.held, *names)) if n in layer.adapters])["weight"]
        rounded(layer.base_layer, wanted, layer.snapshot)
    except AdapterError as error:
        raise AdapterError(f"{path!r} cannot be merged into: {error}") from error


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
