"""Adapters in the weights: fused for a while and taken out bit for bit, or merged for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from torch import nn

from ..adapters.base import LARGEST_STRENGTH
from ..bookkeeping import state_of
from ..errors import AdapterError
from ..injection import unwrap
from ..layers.layer import AdaptedLayer
from ..merging import Requantize, allow_rounding, mergeable_layers, report_losses
from .beside_peft import MODEL_METHODS, PIPELINE_METHODS, unguard
from .components import chosen_models, forget, forget_unscaled, known_adapter, layers_of, models_of, unscaled
from .offload import regroup, weights_at_hand


def fuse_adapters(
    pipe: Any,
    names: Sequence[str] | str | None = None,
    safe: bool = True,
    components: Iterable[str] | None = None,
    scale: float = 1.0,
    requantize: Requantize = False,
) -> list[str]:
    """Write adapters into the weights until `unfuse_adapters`; the original weights are kept in host memory meanwhile.

    Args:
        pipe: a pipeline with adapters.
        names: which; the active ones by default. Adapters fused already stay fused.
        safe: refuse a result that is not finite.
        components: only these.
        scale: multiplies the weights of the adapters while they are fused.
        requantize: round quantized weights anew by their own scheme, which loses part of the change: True prints how much, a
            function is called with the `RequantizeReport`. False refuses them.

    Returns:
        Names of the adapters that are now in some weights. While adapters are disabled nothing is written; enabling them does.

    Raises:
        AdapterError: an unknown name, a weight that cannot be written (quantized, tied), or a result that is not finite; no
            weight has been touched then.
    """
    models = chosen_models(pipe, components)
    chosen = _names(pipe, names)
    todo = {id(m): _pairs(m, chosen.get(id(m), [])) for m in models.values()}
    scale = checked_scale(scale, [layer.adapter(n).get_strength() for own in todo.values() for layer, n in own])
    with weights_at_hand(models.values()):
        scaled = [(m, _scale(m, todo[id(m)], scale)) for m in models.values()]
        done: list[tuple[AdaptedLayer, tuple[str, ...]]] = []
        try:
            work = _work(models, chosen, safe, requantize)
            for _, layer, own in work:
                done.append((layer, layer.held))
                layer.merge(dict.fromkeys((*layer.held, *own)))
        except BaseException:
            for layer, before in done:
                layer.merge(before)
            for model, pairs in scaled:
                _unscale(model, pairs)
            raise
    report_losses(requantize, [(path, layer) for path, layer, _ in work])
    return fused_adapters(pipe)


def unfuse_adapters(pipe: Any, components: Iterable[str] | None = None) -> None:
    """Put the original weights back, bit for bit; the adapters run beside them again, with the weights they had before."""
    models = chosen_models(pipe, components)
    if not any(layer.held for model in models.values() for layer in layers_of(model).values()):
        return
    with weights_at_hand(models.values()):
        for model in models.values():
            for layer in layers_of(model).values():
                layer.unmerge()
            _unscale(model, [(layer, name) for layer, held in unscaled(model).items() for name in held])


def fused_adapters(pipe: Any) -> list[str]:
    """Names of the adapters that are in some weights."""
    models = models_of(pipe)
    return list(dict.fromkeys(n for m in models.values() for layer in layers_of(m).values() for n in layer.merged))


def merge_adapters(
    pipe: Any,
    names: Sequence[str] | str | None = None,
    safe: bool = True,
    progress: Callable[[int, int], None] | None = None,
    requantize: Requantize = False,
) -> int:
    """Write adapters into the weights for good and remove all adapters; nothing is kept to undo it.

    Args:
        pipe: a pipeline with adapters; other adapters than the named ones are dropped.
        names: which; the active ones by default.
        safe: refuse a result that is not finite.
        progress: called with the number of modules written and of all.
        requantize: as in `fuse_adapters`.

    Returns:
        Number of modules whose weights have changed.

    Raises:
        AdapterError: as `fuse_adapters`; no weight has been touched then.
    """
    models = models_of(pipe)
    chosen = _names(pipe, names)
    with weights_at_hand(models.values()):
        unfuse_adapters(pipe)
        work = _work(models, chosen, safe, requantize)
        for count, (_, layer, own) in enumerate(work, 1):
            layer.merge_for_good(own)
            if progress is not None:
                progress(count, len(work))
        report_losses(requantize, [(path, layer) for path, layer, _ in work])
        remove_all(pipe, models)
    return len(work)


def remove_all(pipe: Any, models: dict[str, nn.Module]) -> None:
    """Take every adapter out of the models, and what was put on them and the pipeline for the adapters' sake."""
    touched = {c: m for c, m in models.items() if state_of(m) is not None}
    for model in touched.values():
        unwrap(model)
        forget(model)
        forget_unscaled(model)
        unguard(model, MODEL_METHODS)
    unguard(pipe, PIPELINE_METHODS)
    regroup(touched)


def _names(pipe: Any, names: Sequence[str] | str | None) -> dict[int, list[str]]:
    """Adapters to fuse by model: those named that it has, or its active ones."""
    models = models_of(pipe)
    if names is None:
        found = {id(m): list(state.active) for m in models.values() if (state := state_of(m)) is not None}
    else:
        wanted = [names] if isinstance(names, str) else list(names)
        on = {name: known_adapter(models, name) for name in wanted}
        found = {id(m): [n for n in wanted if c in on[n]] for c, m in models.items()}
    if not any(found.values()):
        raise AdapterError("there is no active adapter; load one, or pass names")
    return found


def _work(
    models: dict[str, nn.Module], chosen: dict[int, list[str]], safe: bool, requantize: Requantize
) -> list[tuple[str, AdaptedLayer, list[str]]]:
    """Layers to write into with their paths and adapters, every one of them checked, and allowed to round if that is wanted."""
    found = []
    for component, model in models.items():
        names = chosen.get(id(model), [])
        for path, layer in mergeable_layers(model, names, safe, requantize) if names else ():
            found.append((f"{component}.{path}", layer, names))
    allow_rounding([layer for _, layer, _ in found], requantize)
    return found


def checked_scale(scale: Any, strengths: Iterable[float]) -> float:
    """The scale as a number.

    Raises:
        AdapterError: it is no finite number, or too large beside one of the strengths it is to multiply.
    """
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not abs(scale) <= LARGEST_STRENGTH:
        raise AdapterError(f"scale is {scale!r}; expected a finite number")
    factor = float(scale)
    most = max((abs(strength) for strength in strengths), default=0.0)
    if abs(factor) * most > LARGEST_STRENGTH:
        raise AdapterError(f"scale is {scale!r}, and an adapter's weight {most:g}; their product is too large for float32")
    return factor


def _pairs(model: nn.Module, names: list[str]) -> list[tuple[AdaptedLayer, str]]:
    """Layers with adapters that are not fused yet."""
    return [(layer, n) for layer in layers_of(model).values() for n in names if n in layer.adapters and n not in layer.held]


def _scale(model: nn.Module, pairs: list[tuple[AdaptedLayer, str]], scale: float) -> list[tuple[AdaptedLayer, str]]:
    """Multiply strengths until they are fused no longer; what was multiplied."""
    if scale == 1.0:
        return []
    for layer, name in pairs:
        strength = layer.adapter(name).get_strength()
        unscaled(model).setdefault(layer, {})[name] = strength
        layer.adapter(name).set_strength(strength * scale)
    return pairs


def _unscale(model: nn.Module, pairs: list[tuple[AdaptedLayer, str]]) -> None:
    held = unscaled(model)
    for layer, name in pairs:
        strength = held.get(layer, {}).pop(name, None)
        if strength is not None and name in layer.adapters:
            layer.adapter(name).set_strength(strength)
    if not any(held.values()):
        forget_unscaled(model)
