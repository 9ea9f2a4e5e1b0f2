"""Adapters from files onto a pipeline and off again: all or nothing."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..bookkeeping import check_new_name, state_of
from ..errors import AdapterError, nearest
from ..injection import attach, detach
from .beside_peft import MODEL_METHODS, PIPELINE_METHODS, guard, unguard
from .components import FileConfig, Loaded, adapter_names, chosen_models, forget, known_adapter, layers_of, models_of, remember
from .fusing import fused_adapters, remove_all, unfuse_adapters
from .hotswap import refill
from .offload import regroup, weights_at_hand
from .planning import Part, Plan, checked_tensors, display, make_plan
from .report import LoadReport, refusal
from .sources import HUB_ARGUMENTS, find_source
from .weights import Weight, resolve


def load_adapter(
    pipe: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str = "default",
    weight: Weight = 1.0,
    strict: bool = True,
    components: Iterable[str] | None = None,
    weight_name: str | None = None,
    dialect: str | None = None,
    hotswap: bool = False,
    **hub: Any,
) -> LoadReport:
    """Put an adapter file onto a pipeline as an active adapter; those that are active stay active.

    Args:
        pipe: a diffusers pipeline, in any precision and on any device, offloaded or not.
        source: a safetensors file of any community dialect, a PEFT directory or one with a PEFT directory for every component,
            a Hub repository (``"owner/name"``), or the tensors of such a file in a dict.
        adapter_name: must be new; with `hotswap` one that `prepare_hotswap` made.
        weight: multiplies the strength as trained; a number, or a dict by component, block or pattern (see `set_adapters`).
        strict: refuse a file with anything that does not fit, or does nothing; False loads what fits.
        components: only these (``["unet"]``); what the file holds for others is left out.
        weight_name: the file in a directory or repository with several.
        dialect: naming scheme, when the detected one is wrong.
        hotswap: exchange a prepared adapter's contents, in place, instead of adding an adapter: compiled models are not
            compiled again.
        **hub: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Returns:
        What was found: matched modules with algorithm, rank, strength, alpha source and norm, and everything else.

    Raises:
        LoadError: the file does not fit; its ``report`` says why. CheckpointError: the file is damaged or of another kind.
        AdapterError: a taken name, an unknown component, or a weight that means nothing. OSError: it cannot be opened. The
            pipeline is as it was in every case.
    """
    unknown = sorted(hub.keys() - HUB_ARGUMENTS)
    if unknown:
        raise AdapterError(f"load_adapter has no argument {unknown[0]!r}.{nearest(unknown[0], _ARGUMENTS)}")
    models = models_of(pipe)
    wanted = None if components is None else list(chosen_models(pipe, components))
    for component, model in models.items():
        if not hotswap:
            check_new_name(model, adapter_name)
        if adapter_name in (getattr(model, "peft_config", None) or ()):
            raise AdapterError(f"PEFT has an adapter {adapter_name!r} on the {component}; choose another name")
    held = checked_tensors(source) if isinstance(source, Mapping) else find_source(source, weight_name, **hub)
    text = display(source)
    plan = make_plan(pipe, adapter_name, text, held, wanted, dialect)
    if (strict and plan.report.problems) or not plan.parts:
        raise refusal(plan.report)
    strengths = resolve(adapter_name, weight, {c: list(part.entries) for c, part in plan.parts.items()})
    if hotswap:
        refill(pipe, adapter_name, plan, strengths, text)
    else:
        _attach(pipe, adapter_name, plan, strengths, text)
    plan.report.loaded = True
    return plan.report


_ARGUMENTS = [*inspect.signature(load_adapter).parameters, *HUB_ARGUMENTS]


def _attach(pipe: Any, name: str, plan: Plan, strengths: dict[str, dict[str, float]], source: str) -> None:
    """Everything is checked; should something fail all the same, what was attached is taken out again."""
    done: list[nn.Module] = []
    disabled = any(not layer.enabled for model in models_of(pipe).values() for layer in layers_of(model).values())
    try:
        for component, part in plan.parts.items():
            done.append(part.model)
            _attach_part(name, part, strengths[component], disabled)
            remember(part.model, name, Loaded(source, plan.origin, part.entries))
            guard(part.model, MODEL_METHODS)
        if not hasattr(type(pipe), "lycoris_adapters"):  # our own pipeline classes see to it themselves
            guard(pipe, PIPELINE_METHODS)
        regroup({c: p.model for c, p in plan.parts.items()})
    except BaseException:
        for model in done:
            if (state := state_of(model)) is not None:
                state.configs.setdefault(name, FileConfig())  # interrupted half-way, it is not in the books yet
                _detach(pipe, model, name)
        raise


def _attach_part(name: str, part: Part, strengths: dict[str, float], disabled: bool) -> None:
    for path, (_, adapter) in zip(part.entries, part.adapters.values(), strict=True):
        adapter.set_strength(strengths[path])
    attach(part.model, FileConfig(), name, part.adapters, freeze=False)
    # one more active adapter, frozen as it is: the others, however many, need not be looked at
    state = state_of(part.model)
    assert state is not None
    state.active.append(name)
    for path in part.adapters:
        layer: Any = part.model.get_submodule(path)
        layer.active = (*layer.active, name)
        if disabled and layer.enabled:
            layer.suspend()


def list_adapters(pipe: Any) -> list[str]:
    """Names of the adapters on a pipeline, active or not, in the order in which they were added."""
    return list(adapter_names(models_of(pipe)))


def active_adapters(pipe: Any) -> list[str]:
    """Names of the adapters that are in use on some component."""
    states = [state for model in models_of(pipe).values() if (state := state_of(model)) is not None]
    return list(dict.fromkeys(name for state in states for name in state.active))


def delete_adapter(pipe: Any, adapter_name: str) -> None:
    """Take one adapter off, fused or not; what only it had touched is as it was.

    Raises:
        AdapterError: an unknown name.
    """
    models = models_of(pipe)
    touched = {component: models[component] for component in known_adapter(models, adapter_name)}
    with weights_at_hand(touched.values() if adapter_name in fused_adapters(pipe) else ()):
        for model in touched.values():
            _detach(pipe, model, adapter_name)
    regroup(touched)


def unload_adapters(pipe: Any) -> None:
    """Take every adapter off; the pipeline is then as if never touched."""
    unfuse_adapters(pipe)
    remove_all(pipe, models_of(pipe))


def _detach(pipe: Any, model: nn.Module, name: str) -> None:
    detach(model, name, successor=False)
    forget(model, name)
    if state_of(model) is None:
        unguard(model, MODEL_METHODS)
    if all(state_of(m) is None for m in models_of(pipe).values()):
        unguard(pipe, PIPELINE_METHODS)


def disable_adapters(pipe: Any) -> None:
    """Run the base model alone until `enable_adapters`; fused adapters leave the weights meanwhile."""
    _switch(pipe, on=False)


def enable_adapters(pipe: Any) -> None:
    """Undo `disable_adapters`."""
    _switch(pipe, on=True)


def _switch(pipe: Any, on: bool) -> None:
    models = models_of(pipe)
    layers = [layer for model in models.values() for layer in layers_of(model).values() if layer.enabled != on]
    fused = any(layer.merged or layer.suspended for layer in layers)
    with weights_at_hand(models.values() if fused else ()):
        for layer in layers:
            layer.resume() if on else layer.suspend()
