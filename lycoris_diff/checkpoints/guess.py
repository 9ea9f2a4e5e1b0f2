"""Guessing the base model of an adapter file from its names, the shapes of its factors and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..errors import CheckpointError
from ..naming import BASES, NameIndex, Parts, find, flatten, unknown_prefix
from ..naming.bases import Base, base_component
from ..naming.families import CLASSES
from .checkpoint import Entry, Named, RawCheckpoint
from .rewrite import weight_shape
from .slices import row_count

_VERSION_KEYS = ("ss_base_model_version", "modelspec.architecture")
_SAME_MODEL = 0.9


@dataclass(frozen=True)
class BaseGuess:
    """What a file says about its base model.

    Attributes:
        base: row of `BASES`; "" when no base model has at least half of the modules in the right shapes.
        fits: modules of the file that the base model has, in the right shapes.
        total: modules of the file.
        ties: other base models that fit equally well.
        said: what the metadata calls the base model, "" when it says nothing.
    """

    base: str
    fits: int = 0
    total: int = 0
    ties: tuple[str, ...] = ()
    said: str = ""

    @property
    def reasons(self) -> list[str]:
        """The guess in words."""
        words = [f"{self.fits} of {self.total} modules have names and shapes of {self.base or 'no known base model'}"]
        if self.ties:
            words.append(f"as many fit {', '.join(self.ties)}")
        if self.said:
            words.append(f"the metadata says {self.said!r}")
        return words


def guess_base(raw: RawCheckpoint) -> str:
    """The base model that a file's names and factor shapes fit: `explain_base` without the reasons."""
    return explain_base(raw).base


def explain_base(raw: RawCheckpoint) -> BaseGuess:
    """The base model that a file's names and factor shapes fit, and why.

    Metadata only decides between base models that fit equally well; otherwise the first of these in the table is taken.

    Args:
        raw: the file as read.
    """
    modules = raw.modules
    names = [flatten(m.name) for m in modules]
    told = [sum(n.startswith(base.blocks) for n in names) for base in BASES.values()]
    fits = {name: _fit(modules, name) for name, count in zip(BASES, told) if count == max(told)}
    said = next((v for key in _VERSION_KEYS if (v := raw.metadata.get(key, ""))), "")
    best = max(fits.values(), default=0)
    if not best or 2 * best < len(modules):
        return BaseGuess("", best, len(modules), (), said)
    tied = [name for name in fits if fits[name] == best]
    chosen = max(tied, key=lambda name: _told_by_metadata(raw.metadata, BASES[name]))
    return BaseGuess(chosen, best, len(modules), tuple(name for name in tied if name != chosen), said)


def closest_base(index: NameIndex) -> str:
    """The base model whose denoiser or encoder a model is: nine of ten modules have the same names and shapes.

    Args:
        index: of a live model.

    Returns:
        A row of `BASES`, or the model's family when it is none of them.
    """
    best, chosen = 0.0, ""
    classes = {cls for cls, _, family in CLASSES if family == index.family}
    for name, base in BASES.items():
        if base.components.get(index.component, ("", {}))[0] not in classes:
            continue
        known = _component(name, index.component)
        if known is None or known.family != index.family:
            continue
        same = sum(index.sites.get(path) == site for path, site in known.sites.items())
        likeness = same / max(len(known.sites), len(index.sites), 1)
        if likeness > best:
            best, chosen = likeness, name
    return chosen if best >= _SAME_MODEL else index.family


def _told_by_metadata(metadata: Mapping[str, str], base: Base) -> int:
    """Length of the longest beginning of a version's name that means this base model, 0 for none."""
    values = [metadata.get(key, "").lower() for key in _VERSION_KEYS]
    values += ["sd_v2"] if metadata.get("ss_v2") == "True" else []
    return max((len(v) for v in base.versions if any(value.startswith(v) for value in values)), default=0)


def _component(base: str, component: str) -> NameIndex | None:
    try:
        return base_component(base, component)
    except CheckpointError:  # the installed diffusers does not know the class
        return None


def _fit(modules: list[Named], base: str) -> int:
    """How many modules a base model has, in the shapes of the file."""
    count, unplaced = 0, []
    for module in modules:
        found = []
        for component in module.components or BASES[base].components:
            index = _component(base, component)
            parts = index and find(index, module.name, module.flat)
            found += [_agrees(module.entries, index, parts)] if index and parts else []
            if any(found):
                break
        count += any(found)
        unplaced += [] if found else [module]
    return count + _fit_behind_prefix([m for m in unplaced if not m.components], base)


def _fit_behind_prefix(modules: list[Named], base: str) -> int:
    """As `_fit`, for names with a prefix that no table knows."""
    for component in BASES[base].components if modules else ():
        index = _component(base, component)
        cut = len(unknown_prefix(index, (m.name for m in modules))) if index else 0
        if index and cut:
            found = [(m.entries, find(index, m.name[cut:], True)) for m in modules]
            return sum(_agrees(entries, index, parts) for entries, parts in found if parts)
    return 0


def _agrees(entries: list[Entry], index: NameIndex, parts: Parts) -> bool:
    """Whether factors make weights of the right size; what cannot be told counts as right."""
    rows, *rest = index.whole(parts).shape
    columns = prod(rest)
    told = [(row_count(entry), weight_shape(entry, flat=True)) for entry in entries]
    return all(own in (None, rows) and (shape is None or prod(shape[1:]) == columns) for own, shape in told)
