"""NameIndex: every name a module of one component goes by, and what part of a native weight it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Site:
    """A weight that can carry an adapter.

    Attributes:
        kind: class of the layer: "Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm", "RMSNorm".
        shape: canonical weight ``(out, in / groups, *kernel)``; ``(dim,)`` for norms.
        bias: it has a bias.
    """

    kind: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def is_norm(self) -> bool:
        """It scales channels instead of mixing them."""
        return len(self.shape) == 1


@dataclass(frozen=True)
class Part:
    """The share of a native weight that one diffusers module holds.

    Attributes:
        path: module path in the diffusers component.
        rows: first and last + 1 output row of the native weight, None for all of them.
        swapped: the two halves of the output rows are exchanged between native and diffusers weight.
    """

    path: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


Parts = tuple[Part, ...]


@dataclass(frozen=True)
class NameIndex:
    """All names of one component. Treat as immutable: the tables for looking names up are made once.

    Attributes:
        component: attribute of the pipeline: "unet", "transformer", "text_encoder" ...
        family: row of the family table ("sd", "sdxl", "flux", "clip" ...), "" for unknown architectures.
        sites: diffusers path -> what is there.
        native: dotted native name (LDM, BFL ...) -> its parts in order of rows; diffusers names are not repeated here.
        aliases: further names that files use, never written; dotted, like ``native``.
    """

    component: str
    family: str
    sites: dict[str, Site]
    native: dict[str, Parts] = field(default_factory=dict)
    aliases: dict[str, Parts] = field(default_factory=dict)

    @cached_property
    def flat(self) -> dict[str, Parts]:
        """Flattened name of any scheme -> parts; diffusers' own names win, then native ones.

        Names that two modules share once flattened are left out: nothing tells which one a file means.
        """
        found: dict[str, Parts] = {}
        shared: set[str] = set()
        for path in self.sites:
            if found.setdefault(flatten(path), (Part(path),)) != (Part(path),):
                shared.add(flatten(path))
        for names in (self.native, self.aliases):
            for name, parts in names.items():
                found.setdefault(flatten(name), parts)
        return {name: parts for name, parts in found.items() if name not in shared}

    def exact(self, name: str) -> Parts | None:
        """Parts of a dotted name spelled exactly so."""
        if name in self.sites:
            return (Part(name),)
        return self.native.get(name) or self.aliases.get(name)

    def whole(self, parts: Parts) -> Site:
        """The weight of which the parts are rows."""
        sites = [self.sites[part.path] for part in parts]
        ends = [part.rows[1] for part in parts if part.rows]
        if not ends:
            return sites[0]
        return Site(sites[0].kind, (max(ends), *sites[0].shape[1:]), any(site.bias for site in sites))

    @cached_property
    def owner(self) -> dict[str, str]:
        """Diffusers path -> native name of the weight that holds it; paths whose native name is their own are left out."""
        return {part.path: name for name, parts in self.native.items() for part in parts}

    @cached_property
    def patterns(self) -> dict[str, list[tuple[tuple[int, ...], str]]]:
        """Flattened names with their numbers taken out -> numbers and dotted name; for finding the nearest name."""
        found: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for names in (self.sites, self.native):
            for name in names:
                pattern, numbers = split_numbers(flatten(name))
                found.setdefault(pattern, []).append((numbers, name))
        return found

    @cached_property
    def tokens(self) -> dict[str, frozenset[str]]:
        """Words of every pattern."""
        return {pattern: frozenset(pattern.split("_")) for pattern in self.patterns}


def flatten(name: str) -> str:
    """A module name as kohya's and LyCORIS' files spell it: dots are underscores."""
    return name.replace(".", "_")


def split_numbers(flat: str) -> tuple[str, tuple[int, ...]]:
    """``down_blocks_0_resnets_1`` -> ``("down_blocks_#_resnets_#", (0, 1))``; absurdly long numbers are cut."""
    return _DIGITS.sub("#", flat), tuple(int(n[:9]) for n in _DIGITS.findall(flat))
