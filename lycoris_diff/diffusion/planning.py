"""Everything that can be wrong with a file is found here, before the pipeline is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..building import base_weight, check_packed
from ..checkpoints.build import adapter_of
from ..checkpoints.checkpoint import Checkpoint, Entry, RawCheckpoint
from ..checkpoints.guess import closest_base, guess_base
from ..checkpoints.parse import raw_from_tensors, read_raw
from ..checkpoints.place import place
from ..checkpoints.safety import computable, extreme
from ..errors import AdapterError, CheckpointError
from ..execution.geometry import geometry_of, is_plain_weight
from ..execution.norms import norm_geometry_of
from ..naming import BASES, NameIndex, index_model, known_base
from ..targets import Target
from .components import chosen_models, models_of, places
from .norms import change_norm
from .offload import device_of, dtype_of
from .report import LoadReport, ModuleReport

Attachable = tuple[Target, Adapter]
#: what `fuse_qkv_projections` replaces
_FUSED_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass
class Part:
    """What one component is to get.

    Attributes:
        model: the component's base model.
        adapters: finished adapters by their layer's present path.
        entries: what the file says of them, by path without adapters.
    """

    model: nn.Module
    adapters: dict[str, Attachable] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)


@dataclass
class Plan:
    """A file, read, placed, built and checked; nothing of it is in the pipeline.

    Attributes:
        report: all findings.
        parts: by component.
        origin: the file without its modules.
    """

    report: LoadReport
    parts: dict[str, Part]
    origin: Checkpoint


def make_plan(
    pipe: Any,
    name: str,
    source: str,
    held: Path | Mapping[str, Tensor],
    components: Iterable[str] | None = None,
    dialect: str | None = None,
) -> Plan:
    """Read, place, build and check.

    Raises:
        CheckpointError: a file cannot be read at all. Whatever is wrong with single modules is in the report.
    """
    models, wanted = models_of(pipe), chosen_models(pipe, components)
    raw = _read(held, dialect)
    indexes = {component: index_model(model, component) for component, model in models.items()}
    report = LoadReport(source, name)
    if components is not None:
        raw.modules = _asked_for(raw, set(wanted), report)
    checkpoint = place(raw, indexes)
    _note(report, checkpoint)
    parts: dict[str, Part] = {}
    for component, modules in checkpoint.components.items():
        if component in wanted:
            parts[component] = Part(models[component])
            _build(component, parts[component], modules, report)
        else:
            report.skipped[component] = report.skipped.get(component, 0) + len(modules)
    report.zero = [c for c in parts if (own := _of(report, c)) and all(m.zero for m in own)]
    report.matched = [m for m in report.matched if m.component not in report.zero]
    if report.problems:
        report.base_model, report.pipeline_model = _guesses(raw, indexes)
    parts = {c: part for c, part in parts.items() if part.adapters and c not in report.zero}
    return Plan(report, parts, dataclasses.replace(checkpoint, components={}, sources={}))


def _read(held: Path | Mapping[str, Tensor], dialect: str | None) -> RawCheckpoint:
    """A file's content in memory of its own: what is mapped from a file goes bad when somebody writes over the file."""
    raw = raw_from_tensors(held, dialect=dialect) if isinstance(held, Mapping) else read_raw(held, dialect)
    for module in raw.modules:
        for entry in module.entries:
            entry.tensors = {name: value.clone() for name, value in entry.tensors.items()}
    raw.extras = {name: value.clone() for name, value in raw.extras.items()}
    return raw


def checked_tensors(source: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors given in place of a file, as reading a file would give them.

    Raises:
        CheckpointError: something else than tensors by name, or tensors without plain values.
    """
    for name, value in source.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r:.100} is {type(value).__name__}; expected a dict of torch tensors by the file's names"
            )
        if value.is_meta or value.layout != torch.strided or value.is_complex() or value.is_quantized:
            raise CheckpointError(
                f"tensor {name!r:.100} is {value.dtype}, {value.layout}, on {value.device}; expected plain values"
            )
    return {name: computable(value.detach()) for name, value in source.items()}


def _asked_for(raw: RawCheckpoint, wanted: set[str], report: LoadReport) -> list[Any]:
    """Modules that may belong to one of the components asked for; the others are counted."""
    kept = []
    for module in raw.modules:
        if module.components and wanted.isdisjoint(module.components):
            first = module.components[0]
            report.skipped[first] = report.skipped.get(first, 0) + 1
        else:
            kept.append(module)
    return kept


def _note(report: LoadReport, found: Checkpoint) -> None:
    report.dialect = found.dialect
    report.trainer = found.trainer
    report.unmatched |= found.unmatched
    report.unused |= found.unknown
    report.wrong_shape |= found.wrong_shape
    report.extras += list(found.extras)
    report.notes += found.notes


def _build(component: str, part: Part, modules: Mapping[str, list[Entry]], report: LoadReport) -> None:
    where = places(part.model)
    for path, entries in modules.items():
        label = f"{component}.{path}"
        spot = where[path]
        geometry = geometry_of(spot.layer) or norm_geometry_of(spot.layer)
        if geometry is None:
            report.wrong_shape[label] = f"it is {type(spot.layer).__name__}, which cannot carry an adapter"
            continue
        if _bypassed(part.model, path):
            report.wrong_shape[label] = (
                "the model's q, k and v are fused, so that it is not used; unfuse_qkv_projections() first"
            )
            continue
        target = Target(spot.actual, spot.layer, geometry)
        dtype = dtype_of(spot.layer, part.model)
        bad = _unusable(entries, dtype)
        if bad:
            report.non_finite[label] = bad
            continue
        try:
            adapter = adapter_of(entries, geometry, dtype, device_of(spot.layer))
            norm = _settle(adapter, part.model, target)
        except AdapterError as error:
            report.wrong_shape[label] = str(error)
            continue
        if norm is not None and not norm < float("inf"):
            report.non_finite[label] = "the change of the weight is not finite"
            continue
        part.adapters[spot.actual] = target, adapter
        part.entries[path] = entries
        report.matched.append(_module_report(component, path, entries, norm))


def _bypassed(model: nn.Module, path: str) -> bool:
    """Whether diffusers' ``fuse_qkv_projections`` has copied a layer's weight into another one, which runs instead."""
    parent, _, leaf = path.rpartition(".")
    if leaf not in _FUSED_QKV:
        return False
    attention = model.get_submodule(parent)
    # a UNet's attention keeps the mark when its processors are put back; other classes go by the mark
    processor = type(getattr(attention, "processor", None)).__name__
    fused = "Fused" in processor or type(attention).__name__ != "Attention"
    return fused and bool(getattr(attention, "fused_projections", False))


def _settle(adapter: Adapter, model: nn.Module, target: Target) -> float | None:
    """Let the adapter take what it needs of its layer's weight, and measure its change.

    Raises:
        AdapterError: it needs a weight that is packed or quantized.
    """
    check_packed(target, adapter)
    weight = partial(base_weight, model, target)
    adapter.settle(weight)
    known = adapter.depends_on_weight and is_plain_weight(getattr(target.layer, "weight", None))
    return change_norm(adapter, weight() if known else None)


def _unusable(entries: Sequence[Entry], dtype: torch.dtype) -> str:
    """Names of factors with values that are not finite, or that the layer's dtype cannot hold."""
    largest = torch.finfo(dtype).max
    for entry in entries:
        for factor, value in entry.tensors.items():
            top = extreme(value) if value.is_floating_point() else 0.0
            if not top < float("inf"):
                return f"{factor} holds NaN or infinite values"
            if top > largest:
                return f"{factor} reaches {top:.3g}, more than {dtype} holds; load the pipeline in bfloat16 or float32"
    return ""


def _module_report(component: str, path: str, entries: Sequence[Entry], norm: float | None) -> ModuleReport:
    first = entries[0]
    algorithm = "+".join(e.algorithm for e in entries)
    return ModuleReport(component, path, algorithm, first.rank, first.scale, first.alpha, first.alpha_source, norm)


def _of(report: LoadReport, component: str) -> list[ModuleReport]:
    return [m for m in report.matched if m.component == component]


# --- what the file and the pipeline seem to be ------------------------------------------------------------------------------
def _guesses(raw: RawCheckpoint, indexes: Mapping[str, NameIndex]) -> tuple[str, str]:
    """Base models of file and pipeline; the pipeline's family where it is none of the known ones, unless the file fits that."""
    file, pipeline = guess_base(raw), base_model_of(indexes)
    if pipeline not in BASES and file and pipeline in {i.family for i in known_base(file).values()}:
        return file, ""
    return file, pipeline


def base_model_of(indexes: Mapping[str, NameIndex]) -> str:
    """The base model that the denoiser is, else its family, "" when there is no denoiser."""
    return next((closest_base(i) for c, i in indexes.items() if not c.startswith("text_encoder")), "")


def display(source: Any) -> str:
    """A source as reports name it."""
    if isinstance(source, Mapping):
        return f"a dict of {len(source)} tensors"
    return str(Path(source)) if Path(source).exists() else str(source)
