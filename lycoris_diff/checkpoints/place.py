"""From names to modules: which layer of which component each of a file's modules is, and what of it each layer gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..naming import NameIndex, Part, Parts, Site, find, flatten, nearest_name, unknown_prefix
from .algebra import swap_halves, take_rows
from .checkpoint import Checkpoint, Entry, Named, RawCheckpoint
from .fit import dora_axis, fit_entry
from .suffixes import split_key

Indexes = Mapping[str, NameIndex]
#: where modules go whose file says nothing about a model that nobody knows
_SOME_DENOISER = "unet"


@dataclass(frozen=True)
class _Located:
    """A file's module that a component has.

    Attributes:
        named: the module.
        component: attribute of the pipeline.
        parts: modules of the component that hold its weight.
        site: the weight as the file sees it, that of all parts together.
        own: under the name that diffusers gives it.
    """

    named: Named
    component: str
    parts: Parts
    site: Site
    own: bool


def place(raw: RawCheckpoint, indexes: Indexes, base_model: str = "") -> Checkpoint:
    """Find the layers of a model that a file's modules are for.

    Adapters of fused weights are cut into the rows of each module, factors are brought to the shapes that the layers' adapters
    take, and everything is checked against the layers' sizes first. Modules for which this fails are listed, not raised. A
    module that the file holds under two names is taken under one of them: diffusers' own name goes before a native one, a
    dotted name before a flat one, then what comes first in the file.

    Args:
        raw: the file as read.
        indexes: component -> names of its modules; empty when the model is not known, then names stay as they are.
        base_model: what the result says about itself.

    Returns:
        What was placed in ``components``; the rest in ``unmatched``, ``wrong_shape`` and ``conflicts`` under the file's names.
    """
    result = Checkpoint(
        {}, base_model, raw.dialect, dict(raw.metadata), dict(raw.extras), dict(raw.unknown), notes=list(raw.notes),
        trainer=raw.trainer,
    )  # fmt: skip
    if not indexes:
        for named in raw.modules:
            component = named.components[0] if named.components else _SOME_DENOISER
            _add(result, component, named.name, named.entries, named)
        return result
    located, missing = _locate_all(raw.modules, indexes, result.notes)
    axis = _usual_axis(located)
    differing: list[str] = []
    for item in sorted(located, key=lambda item: (not item.own, item.named.flat)):
        _place_one(result, item, indexes[item.component], axis, differing)
    _note_conflicts(result, differing)
    _report_missing(result, missing, indexes)
    return result


def _add(result: Checkpoint, component: str, path: str, entries: list[Entry], named: Named) -> None:
    result.components.setdefault(component, {})[path] = list(entries)
    result.sources.setdefault(component, {})[path] = list(named.keys)


def label(named: Named) -> str:
    """A module's name as the file spells it, with its prefix."""
    return split_key(named.keys[0]).stem if named.keys else named.name


# --- names --------------------------------------------------------------------------------------------------------------------
def _locate_all(modules: Iterable[Named], indexes: Indexes, notes: list[str]) -> tuple[list[_Located], list[Named]]:
    located, missing = [], []
    for named in modules:
        found = _locate(named, named.name, named.flat, indexes)
        if found is None:
            missing.append(named)
        else:
            located.append(found)
    unprefixed = [n for n in missing if not n.components]
    for component in _by_likelihood(indexes):
        prefix = unknown_prefix(indexes[component], [n.name for n in unprefixed])
        if prefix:
            again = {id(n): _locate(n, n.name.removeprefix(prefix), True, indexes) for n in unprefixed}
            located += [found for found in again.values() if found is not None]
            missing = [n for n in missing if again.get(id(n)) is None]
            notes.append(f"the names begin with {prefix!r}, which no known program writes; read without it")
            break
    return located, missing


def _by_likelihood(indexes: Indexes) -> list[str]:
    """Components that a name without a prefix may mean."""
    return sorted(indexes, key=lambda component: component.startswith("text_encoder"))


def _locate(named: Named, name: str, flat: bool, indexes: Indexes) -> _Located | None:
    """The first component that has the module in the right size, else the first that has it."""
    found = []
    for component in named.components or _by_likelihood(indexes):
        parts = find(indexes[component], name, flat) if component in indexes else None
        if parts:
            own = len(parts) == 1 and parts[0].rows is None and flatten(parts[0].path) == flatten(name)
            found.append(_Located(named, component, parts, indexes[component].whole(parts), own))
    return next((item for item in found if len(found) > 1 and _fits(item)), found[0] if found else None)


def _fits(item: _Located) -> bool:
    try:
        for entry in item.named.entries:
            fit_entry(entry, item.site)
    except CheckpointError:
        return False
    return True


# --- factors ------------------------------------------------------------------------------------------------------------------
def _usual_axis(located: Iterable[_Located]) -> str:
    """DoRA's axis in most of the modules whose sizes tell."""
    votes = Counter(dora_axis(entry, item.site) for item in located for entry in item.named.entries)
    del votes[""]
    return votes.most_common(1)[0][0] if votes else ""


def _place_one(result: Checkpoint, item: _Located, index: NameIndex, axis: str, differing: list[str]) -> None:
    name = label(item.named)
    try:
        whole = [fit_entry(entry, item.site, axis) for entry in item.named.entries]
        shares = [[_share(entry, part, item.site, index.sites[part.path]) for entry in whole] for part in item.parts]
    except CheckpointError as error:
        result.wrong_shape[name] = str(error)
        return
    taken = result.components.get(item.component, {})
    for part, entries in zip(item.parts, shares):
        if part.path in taken:
            first = result.sources[item.component][part.path]
            result.conflicts[name] = split_key(first[0]).stem if first else part.path
            if name not in differing and not _same(taken[part.path], [entry for entry in entries if entry is not None]):
                differing.append(name)
            continue
        present = [entry for entry in entries if entry is not None]
        if present:
            _add(result, item.component, part.path, present, item.named)


def _same(one: list[Entry], other: list[Entry]) -> bool:
    """Whether these are the same factors, up to what half precision rounds away."""
    if [(e.algorithm, *e.tensors) for e in one] != [(e.algorithm, *e.tensors) for e in other]:
        return False
    pairs = [(a.tensors[name], b.tensors[name]) for a, b in zip(one, other, strict=True) for name in a.tensors]
    return all(math.isclose(a.scale, b.scale, rel_tol=0.01) for a, b in zip(one, other, strict=True)) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0.01, atol=1e-6, equal_nan=True) for a, b in pairs
    )


def _share(entry: Entry, part: Part, whole: Site, site: Site) -> Entry | None:
    """What a part gets of an adapter; None when it has nothing in these rows."""
    if part.rows is not None:
        entry = take_rows(entry, part.rows, whole.shape[0])
    if part.swapped:
        entry = swap_halves(entry, site.shape[0])
    if part.rows is None and not part.swapped:
        return entry
    if entry.algorithm == "SHIRA" and not entry.tensors["shira_weight"].numel():
        return None
    return fit_entry(entry, site)


# --- what is left -------------------------------------------------------------------------------------------------------------
def _note_conflicts(result: Checkpoint, differing: list[str]) -> None:
    if result.conflicts:
        left, kept = next(iter(result.conflicts.items()))
        count = len(result.conflicts)
        result.notes.append(
            f"{count} {'module is' if count == 1 else 'modules are'} in the file under two names; one of each is used, "
            f"for example {kept!r} and not {left!r}"
        )
    if differing:
        result.notes.append(f"of {len(differing)} of them the left-out name has other factors, for example {differing[0]!r}")


def _report_missing(result: Checkpoint, missing: Iterable[Named], indexes: Indexes) -> None:
    absent: Counter[str] = Counter()
    for named in missing:
        known = [c for c in named.components or _by_likelihood(indexes) if c in indexes]
        near = (nearest_name(indexes[c], named.name, named.flat) for c in known)
        result.unmatched[label(named)] = next((n for n in near if n), "")
        if not known:
            absent[named.components[0]] += 1
    for component, count in absent.items():
        modules = "module belongs" if count == 1 else "modules belong"
        result.notes.append(f"{count} {modules} to {component}, which the model does not have")
