"""Files for fused weights, kept fused: what the separate modules of diffusers have no form for still changes its format."""

from __future__ import annotations

import os

from ..naming import FAMILIES, NameIndex, Part, Site, known_base, native_names
from ..naming.index import Parts
from .checkpoint import Checkpoint
from .formats import Format
from .parse import read_raw
from .place import place


def native_index(index: NameIndex) -> NameIndex:
    """The modules of the original code as an index of their own: fused weights are single modules, nothing is exchanged."""
    sites: dict[str, Site] = {}
    aliases: dict[str, Parts] = {}
    for name, parts in native_names(index).items():
        sites[name] = index.whole(parts)
        if len(parts) == 1 and not parts[0].swapped:
            aliases |= {other: (Part(name),) for other in (parts[0].path, *_spellings(index, parts)) if other != name}
    return NameIndex(index.component, index.family, sites, {}, aliases)


def _spellings(index: NameIndex, parts: Parts) -> list[str]:
    return [alias for alias, meant in index.aliases.items() if meant == parts]


def takes_native_names(target: Format, indexes: dict[str, NameIndex]) -> bool:
    """Whether a format writes the original code's names for all of these components."""
    families = {component: index.family for component, index in indexes.items()}
    for component, index in indexes.items():
        style = target.style(component, index.family, families)
        naming = style.scheme if style is not None else ""
        fused = any(len(parts) > 1 for parts in index.native.values())
        native = naming == "comfyui" or (naming == "kohya" and FAMILIES[index.family].kohya == "native")
        if fused and not native:
            return False
    return True


def read_whole(path: str | os.PathLike[str], base_model: str, target: Format) -> tuple[Checkpoint, dict[str, NameIndex]] | None:
    """A file with native names placed on native modules, for writing it in another native format.

    Args:
        path: file.
        base_model: as for `read_checkpoint`.
        target: format that it will be written in.

    Returns:
        The checkpoint and the indexes its paths belong to; None when the format has other names, or the file does not go
        by native ones.
    """
    indexes = known_base(base_model)
    if not takes_native_names(target, indexes):
        return None
    whole = {component: native_index(index) for component, index in indexes.items()}
    ckpt = place(read_raw(path), whole, base_model)
    lost = ckpt.unmatched or ckpt.wrong_shape or not ckpt.components
    return None if lost else (ckpt, whole)
