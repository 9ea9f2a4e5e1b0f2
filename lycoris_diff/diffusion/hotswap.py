"""Adapters whose contents change without another compilation of the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from ..adapters.base import Adapter
from ..adapters.config import AdapterConfig
from ..adapters.registry import ADAPTERS
from ..adapters.slot import Slot, alike, blank, larger
from ..bookkeeping import check_new_name, set_active, state_of
from ..building import build_adapter
from ..errors import AdapterError, ConfigError, nearest
from ..injection import attach
from ..targets import Target, find_targets
from .components import FileConfig, Loaded, chosen_models, layers_of, models_of, remember, unscaled
from .offload import weights_at_hand
from .planning import Attachable, Plan, checked_tensors, display, make_plan
from .report import refusal
from .sources import find_source

#: names under which people know algorithms, beside those of the configs
_SPELLINGS = {"DORA": "LORA", "BOFT": "LYCORIS_BOFT", "LOCON": "LORA"}
Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass
class HotswapReport:
    """What `prepare_hotswap` made.

    Attributes:
        names: of the adapters whose contents can be exchanged.
        modules: how many modules have room, by component.
        parts: how many adapters of every algorithm there is room for, over all modules of one name.
        bytes: of the room, for all names.
    """

    names: list[str]
    modules: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def __str__(self) -> str:
        room = ", ".join(f"{count} {name}" for name, count in sorted(self.parts.items()))
        places = ", ".join(f"{count} modules of the {component}" for component, count in self.modules.items())
        return f"{', '.join(self.names)}: room for {room} on {places}, {self.bytes / 2**20:.1f} MiB"


def prepare_hotswap(
    pipe: Any,
    sources: Mapping[str, int] | Sequence[Source] | Source,
    adapter_names: str | Sequence[str] = "hotswap",
    components: Iterable[str] | None = None,
    target_modules: Any = None,
) -> HotswapReport:
    """Make adapters whose contents change without a recompilation; call it before the models are compiled or after, once.

    Afterwards ``load_adapter(pipe, file, adapter_name, hotswap=True)`` exchanges the contents, between files of different
    algorithms and ranks, and `set_adapters` changes weights and which are on. In compiled code all of the room is computed,
    used or not; elsewhere what is in use.

    Args:
        pipe: a diffusers pipeline.
        sources: the files to come (any that `load_adapter` takes), or the highest rank by algorithm, such as
            ``{"lora": 32, "lokr": 16}``: room for adapters of that rank, for LoKr of its default factor.
        adapter_names: as many as are to be in use together; each has all of the room.
        components: with ranks: only these; by default all, with `target_modules` those that it names, or the denoiser.
        target_modules: with ranks: which modules, as in a config, or a dict of that by component; None takes the
            architectures' defaults.

    Raises:
        AdapterError: a taken name, an unknown algorithm, a file that does not fit, or an algorithm that cannot be exchanged
            (T-LoRA); the pipeline is as it was.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    models = chosen_models(pipe, _components(pipe, components, target_modules))
    for name in names:
        for model in models_of(pipe).values():
            check_new_name(model, name)
    if not names or len(set(names)) != len(names) or not sources:
        raise AdapterError(f"adapter_names is {names}, sources is {sources!r}; expected different names, and files or ranks")
    if isinstance(sources, Mapping) and all(isinstance(rank, int) for rank in sources.values()):
        room = _room_of_ranks(models, cast(Mapping[str, int], sources), target_modules)
    elif isinstance(sources, str | os.PathLike | Mapping):
        room = _room_of_files(pipe, [cast(Source, sources)])
    else:
        room = _room_of_files(pipe, sources)
    report = HotswapReport(names)
    for component, modules in room.items():
        if not modules:
            continue
        report.modules[component] = len(modules)
        slots = {n: {path: (target, Slot.around(parts)) for path, (target, parts) in modules.items()} for n in names}
        for name, attachable in slots.items():
            _attach(models_of(pipe)[component], name, attachable)
        for _, parts in modules.values():
            for part in parts:
                report.parts[type(part).__name__] = report.parts.get(type(part).__name__, 0) + 1
                report.bytes += len(names) * sum(part.get_tensor(n).nbytes for n in part.factor_shapes)
    return report


Room = dict[str, dict[str, tuple[Target, list[Adapter]]]]


def _room_of_files(pipe: Any, sources: Sequence[Source]) -> Room:
    """Parts for every module such that each file fits."""
    room: Room = {}
    for source in sources:
        held = checked_tensors(source) if isinstance(source, Mapping) else find_source(source, None)
        plan = make_plan(pipe, "hotswap", display(source), held)
        if plan.report.problems or not plan.parts:
            raise refusal(plan.report)
        for component, part in plan.parts.items():
            modules = room.setdefault(component, {})
            for path, (target, adapter) in part.adapters.items():
                _, parts = modules.setdefault(path, (target, []))
                _make_room(parts, [member for member, _ in adapter.members()])
    return room


def _make_room(parts: list[Adapter], contents: Sequence[Adapter]) -> None:
    free = list(range(len(parts)))
    for content in contents:
        index = next((i for i in free if alike(parts[i], content)), None)
        if index is None:
            parts.append(blank(content, content.factor_shapes))
        else:
            parts[index] = larger(parts[index], content)
            free.remove(index)


def _room_of_ranks(models: Mapping[str, nn.Module], ranks: Mapping[str, int], target_modules: Any) -> Room:
    """Empty new adapters of the given ranks on the models' modules."""
    room: Room = {}
    for algorithm, rank in ranks.items():
        config = _config(algorithm, rank)
        for component, model in models.items():
            modules = room.setdefault(component, {})
            config.target_modules = target_modules[component] if isinstance(target_modules, Mapping) else target_modules
            for target in find_targets(model, config):
                adapter = build_adapter(model, target, config, "hotswap", False, False)
                _, parts = modules.setdefault(target.path, (target, []))
                parts.append(blank(adapter, adapter.factor_shapes))
    return room


def _components(pipe: Any, components: Iterable[str] | None, target_modules: Any) -> Iterable[str] | None:
    if components is not None or target_modules is None:
        return components
    if isinstance(target_modules, Mapping):
        return list(target_modules)
    return [name for name in models_of(pipe) if not name.startswith("text_encoder")]


def _config(algorithm: str, rank: int) -> AdapterConfig:
    name = _SPELLINGS.get(algorithm.upper(), algorithm.upper())
    if name not in ADAPTERS or not ADAPTERS[name].config_class.peft_name:
        known = sorted(n.lower() for n in (*ADAPTERS, *_SPELLINGS))
        raise AdapterError(f"there is no algorithm {algorithm!r}; expected one of {known}.{nearest(algorithm.lower(), known)}")
    fields = {"weight_decompose": True} if algorithm.upper() == "DORA" else {}
    config = ADAPTERS[name].config_class(r=rank, **fields)
    config.inference_mode = True
    try:
        config.check()
    except ConfigError as error:
        raise AdapterError(f"{algorithm}: {error}") from error
    return config


def _attach(model: nn.Module, name: str, slots: Mapping[str, Attachable]) -> None:
    attach(model, FileConfig(), name, slots, freeze=False)
    state = state_of(model)
    assert state is not None
    set_active(model, [*state.active, name])


def prepared_adapters(pipe: Any) -> list[str]:
    """Names of the adapters whose contents can be exchanged."""
    found: dict[str, None] = {}
    for model in models_of(pipe).values():
        for layer in layers_of(model).values():
            found |= dict.fromkeys(name for name, adapter in layer.named_adapters() if isinstance(adapter, Slot))
    return list(found)


def _slots(model: nn.Module, name: str) -> dict[str, Slot]:
    layers = layers_of(model)
    return {p: a for p, layer in layers.items() if name in layer.adapters and isinstance(a := layer.adapter(name), Slot)}


def refill(pipe: Any, name: str, plan: Plan, strengths: Mapping[str, Mapping[str, float]], source: str) -> None:
    """Exchange the contents of a prepared adapter for a plan's.

    Raises:
        AdapterError: a module was not prepared, or not for this; nothing has changed then.
    """
    slots = {component: _slots(model, name) for component, model in models_of(pipe).items()}
    if not any(slots.values()):
        raise AdapterError(
            f"adapter {name!r} is not prepared for exchanging its contents; call prepare_hotswap(pipe, ...) first"
        )
    contents: dict[str, dict[str, list[Adapter]]] = {}
    problems = []
    for component, part in plan.parts.items():
        for path, (_, adapter) in zip(part.entries, part.adapters.values(), strict=True):
            members = [member for member, _ in adapter.members()]
            contents.setdefault(component, {})[path] = members
            try:
                if path not in slots[component]:
                    raise AdapterError("nothing is prepared there")
                slots[component][path].places(members)
            except AdapterError as error:
                problems.append(f"{component}.{path}: {error}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise AdapterError(
            f"{source} does not fit what was prepared as {name!r}: {problems[0]}{more}; "
            "give prepare_hotswap() this file as well"
        )
    models = models_of(pipe)
    fused = any(name in layer.held for model in models.values() for layer in layers_of(model).values())
    for component, own in slots.items():
        model, layers = models[component], layers_of(models[component])
        with weights_at_hand([model] if fused else ()):
            for path, slot in own.items():
                slot.fill(contents.get(component, {}).get(path, []))
                slot.set_strength(strengths.get(component, {}).get(path, 1.0))
                if name in layers[path].held:
                    unscaled(model).get(layers[path], {}).pop(name, None)
                    layers[path].merge(layers[path].held)
        if own:
            state = state_of(model)
            assert state is not None
            entries = plan.parts[component].entries if component in plan.parts else {}
            remember(model, name, Loaded(source, plan.origin, entries))
            set_active(model, list(dict.fromkeys([*state.active, name])))
