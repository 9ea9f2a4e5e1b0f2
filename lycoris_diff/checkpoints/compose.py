"""From a Checkpoint to the tensors of one file: modules get the names of the format, parts of fused weights come together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..naming import NameIndex, Part, Site, known_base, native_of, written_name
from ..naming.index import Parts
from .algebra import fuse_modules, swap_halves
from .checkpoint import Checkpoint, Entry
from .encode import encode
from .formats import FORMATS, Format, Style
from .rewrite import weight_shape

Modules = Mapping[str, list[Entry]]
Indexes = Mapping[str, NameIndex]
#: called with the number of modules done and of all
Progress = Callable[[int, int], None]

#: schemes whose names follow from diffusers' paths alone
_NEED_NO_BASE = ("lycoris", "onetrainer-legacy", "diffusers", "peft")

_UP, _BIAS = ".lora_B.weight", ".lora_B.bias"


@dataclass
class Composed:
    """What goes into a file.

    Attributes:
        tensors: by their names.
        written: name of every weight -> algorithms as written.
        notes: what was rewritten, in words.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Weight:
    """One weight of a file: the parts it has and what is on each of them."""

    parts: Parts
    modules: dict[str, list[Entry]] = field(default_factory=dict)


def compose(ckpt: Checkpoint, target: Format, indexes: Indexes, progress: Progress | None = None) -> Composed:
    """Tensors of a whole file.

    Args:
        ckpt: what is written.
        target: the format.
        indexes: names of the base model's components; `provisional_indexes` when the base model is not known.
        progress: see `Progress`.

    Raises:
        CheckpointError: naming the first modules that the format cannot express, with the reasons.
    """
    out = Composed()
    problems: dict[str, list[str]] = {}
    done, total = 0, sum(len(modules) for modules in ckpt.components.values())
    families = {c: i.family for c, i in indexes.items()}
    for component, modules in ckpt.components.items():
        index = indexes[component]
        style = target.style(component, index.family, families)
        if style is None:
            raise CheckpointError(
                f'readers of {target.name} files take nothing for the component {component!r}; write format "peft"'
            )
        for name, weight in _gather(modules, style, indexes, component).items():
            try:
                _write(out, name, weight, style, index, target)
            except CheckpointError as error:
                problems.setdefault(str(error), []).append(name)
            done += len(weight.modules)
            if progress is not None:
                progress(done, total)
    if problems:
        raise CheckpointError("; ".join(_counted(reason, names) for reason, names in list(problems.items())[:3]))
    out.tensors |= _missing_biases(out.tensors)
    return out


def _missing_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the LoRA layers without a bias beside some that have one, since PEFT gives all of a component one."""
    with_bias = {name.partition(".")[0] for name in tensors if name.endswith(_BIAS)}
    rows = {n.removesuffix(_UP) + _BIAS: t for n, t in tensors.items() if n.endswith(_UP) and n.partition(".")[0] in with_bias}
    return {name: t.new_zeros(t.shape[0]) for name, t in rows.items() if name not in tensors}


def _counted(reason: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more {'module' if len(names) == 2 else 'modules'}" if len(names) > 1 else ""
    return f"{names[0]}{more}: {reason}"


def indexes_of(ckpt: Checkpoint) -> dict[str, NameIndex]:
    """Names of the components of a checkpoint's base model, empty when it is not known.

    Raises:
        CheckpointError: there is no such base model, or it lacks a component of the checkpoint.
    """
    if not ckpt.base_model:
        return {}
    indexes = known_base(ckpt.base_model)
    missing = sorted(ckpt.components.keys() - indexes.keys())
    if missing:
        raise CheckpointError(f"base model {ckpt.base_model!r} has no component {missing[0]!r}; it has {', '.join(indexes)}")
    return indexes


def provisional_indexes(ckpt: Checkpoint, target: Format) -> dict[str, NameIndex]:
    """Names of a checkpoint's own modules, for base models that nobody knows: each goes by its path.

    Raises:
        CheckpointError: the format's names do not follow from these.
    """
    found: dict[str, NameIndex] = {}
    for component, modules in ckpt.components.items():
        style = target.style(component, "", {})
        dotted = any("." in path for path in modules)
        scheme = style.scheme if style else ""
        same = ckpt.dialect == target.name or ckpt.dialect.startswith(f"{target.name}-")
        if not same and (scheme not in _NEED_NO_BASE or (not dotted and scheme != "lycoris")):
            raise CheckpointError(
                f"the base model is not known, and {target.name} names of modules such as {next(iter(modules), '')!r} do not "
                "follow without it; give base_model, a name or a pipeline's directory"
            )
        sites = {path: Site("Linear", _shape_of(entries) or (0, 0)) for path, entries in modules.items()}
        found[component] = NameIndex(component, "", sites)
    return found


def _shape_of(entries: Sequence[Entry]) -> tuple[int, ...] | None:
    return next((shape for e in entries if (shape := weight_shape(e, flat=True)) is not None), None)


def _gather(modules: Modules, style: Style, indexes: Indexes, component: str) -> dict[str, _Weight]:
    weights: dict[str, _Weight] = {}
    old, new = style.prefix
    windows = {path for path, entries in modules.items() if style.whole and any(e.options.get("rows") for e in entries)}
    fused = {native_of(indexes[component], path)[0] for path in windows}
    for path, entries in modules.items():
        scheme = style.whole if native_of(indexes[component], path)[0] in fused else style.scheme
        name, parts = written_name(scheme, indexes, component, path)
        name = new + name[len(old) :] if old and name.startswith(old) else name
        weights.setdefault(name, _Weight(parts)).modules[path] = entries
    return weights


def _write(out: Composed, name: str, weight: _Weight, style: Style, index: NameIndex, target: Format) -> None:
    """Add one weight; where its parts have no common adapter, they go by their own names if readers take these."""
    try:
        whole = _fused(weight, index)
    except CheckpointError as error:
        prefix = target.split.get(index.family)
        if prefix is None:
            apart = ["lycoris", "onetrainer", "peft", *(["comfyui"] if index.family in FORMATS["comfyui"].split else [])]
            raise CheckpointError(f"{error}; formats that keep them apart: {', '.join(apart)}") from error
        for path, entries in weight.modules.items():
            _add(out, prefix + path, entries, _known_shape(index, (Part(path),)), style, target)
        out.notes.append(f"{name} is written as its parts, under diffusers' names: {error}")
        return
    _add(out, name, whole, _known_shape(index, weight.parts), style, target)


def _add(
    out: Composed, name: str, entries: Sequence[Entry], shape: tuple[int, ...] | None, style: Style, target: Format
) -> None:
    encoded = encode(entries, shape, style.table, target.name)
    out.tensors |= {f"{name}.{suffix}": value for suffix, value in encoded.items()}
    out.written[name] = [e.algorithm for e in entries]


def _known_shape(index: NameIndex, parts: Parts) -> tuple[int, ...] | None:
    unknown = any(index.sites[part.path].shape == (0, 0) for part in parts)
    return None if unknown else index.whole(parts).shape


def _fused(weight: _Weight, index: NameIndex) -> list[Entry]:
    """Adapters of the weight as the format has it, out of those of its parts."""
    (first, *others) = weight.parts
    if not others:
        return [_unswapped(_with_bias(e, index.sites[first.path]), first, index) for e in weight.modules[first.path]]
    sites = [index.sites[part.path] for part in weight.parts]
    modules = [[_unswapped(e, part, index) for e in weight.modules.get(part.path, [])] for part in weight.parts]
    return fuse_modules(modules, [site.shape[0] for site in sites])


def _with_bias(entry: Entry, site: Site) -> Entry:
    """A norm's change with that of its bias: A1111 takes only both together."""
    if entry.algorithm != "NORM" or "b_norm" in entry.tensors or not site.bias:
        return entry
    return replace(entry, tensors={**entry.tensors, "b_norm": torch.zeros_like(entry.tensors["w_norm"])})


def _unswapped(entry: Entry, part: Part, index: NameIndex) -> Entry:
    return swap_halves(entry, index.sites[part.path].shape[0]) if part.swapped else entry
