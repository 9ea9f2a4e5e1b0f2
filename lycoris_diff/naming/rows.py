"""Rows of a naming table, and applying them to the modules of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .index import Part, Parts, Site

#: Everything below a block has the same name in both schemes.
SUBTREE = {"{rest}": "{rest}"}
_PLACEHOLDER = re.compile(r"\\\{(\w+)\\\}")
_CAPTURE = {"rest": "(?P<rest>.+)"}


class Block(NamedTuple):
    """Rows below one native and one diffusers prefix.

    Attributes:
        native: prefix of the native names; ``{i}`` and ``{j}`` are numbers, taken over from the diffusers path.
        path: prefix of the diffusers paths.
        rows: native name -> diffusers paths, separated by spaces, whose weights the native weight holds stacked in this
            order. ``~`` before a path: shift and scale, the two halves of the rows, are exchanged; it holds only where the
            layer emits just these two (twice as many rows as columns), so that one row covers all blocks of SD3. ``{rest}``
            is any remainder of a name.
    """

    native: str
    path: str
    rows: Mapping[str, str]


def expand(blocks: Iterable[Block], sites: Mapping[str, Site]) -> dict[str, Parts]:
    """Native names of a model's modules.

    Rows that name modules the model lacks, in whole or in part, are left out.

    Returns:
        dotted native name -> parts in order of rows; ``rows`` of a part are None when it is the only one.
    """
    native: dict[str, Parts] = {}
    for block in blocks:
        for name, targets in block.rows.items():
            marked = targets.split()
            matches = [_match(_join(block.path, t.removeprefix("~")), sites) for t in marked]
            for groups, _ in matches[0].items():
                paths = [m[groups] for m in matches if groups in m]
                if len(paths) == len(marked):
                    full = _join(block.native, name).format(**dict(groups))
                    native[full] = _parts(paths, sites, [t.startswith("~") for t in marked])
    return native


def _parts(paths: list[str], sites: Mapping[str, Site], marked: list[bool]) -> Parts:
    shapes = [sites[path].shape for path in paths]
    swapped = [mark and len(s) == 2 and s[0] == 2 * s[1] for mark, s in zip(marked, shapes)]
    if len(paths) == 1:
        return (Part(paths[0], None, swapped[0]),)
    stops = [sum(s[0] for s in shapes[: k + 1]) for k in range(len(shapes))]
    return tuple(Part(p, (stop - s[0], stop), w) for p, s, stop, w in zip(paths, shapes, stops, swapped))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _match(pattern: str, sites: Mapping[str, Site]) -> dict[tuple[tuple[str, str], ...], str]:
    """Paths that a pattern names, by what its placeholders stand for."""
    if "{" not in pattern:
        return {(): pattern} if pattern in sites else {}
    regex = re.compile(_PLACEHOLDER.sub(lambda m: _CAPTURE.get(m[1], rf"(?P<{m[1]}>\d+)"), re.escape(pattern)))
    return {tuple(m.groupdict().items()): path for path in sites if (m := regex.fullmatch(path))}
