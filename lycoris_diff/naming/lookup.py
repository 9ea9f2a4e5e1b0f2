"""Looking names up: from a file's name to the modules it means, and back to the weight that holds a module."""

from __future__ import annotations

from collections.abc import Iterable

from .index import NameIndex, Part, Parts, flatten, split_numbers

_LONGEST_NAME = 512
_CLOSE_ENOUGH = 0.6
_PREFIX_SOURCES = 8


def find(index: NameIndex, name: str, flat: bool = False) -> Parts | None:
    """Modules that a name of any scheme means.

    Names are compared with their dots as underscores, since some files mix both; no model has two modules that become
    one by this. Nothing is ever split at underscores.

    Args:
        index: names of the component.
        name: diffusers or native, dotted or flat or half of each, without the component's prefix.
        flat: whether its underscores may be dots; a dotted name that is not flat is tried in its own spelling first.

    Returns:
        One part for a name that is one module, several for a fused native weight, None when no module has this name.
    """
    if not flat:
        exact = index.exact(name)
        if exact is not None:
            return exact
    key = flatten(name)
    parts = index.flat.get(key)
    if parts is None and "_processor_" in key:  # attention processors of old diffusers held the adapter
        parts = index.flat.get(key.replace("_processor_", "_"))
    return parts


def native_of(index: NameIndex, path: str) -> tuple[str, Part]:
    """Native weight that holds a module, and the module's part of it.

    Returns:
        ``("double_blocks.0.img_attn.qkv", Part("transformer_blocks.0.attn.to_k", (3072, 6144)))``. A module that has the same
        name in both schemes, or whose family has no other scheme, comes back under its own path.
    """
    name = index.owner.get(path)
    if name is None:
        return path, Part(path)
    return name, next(part for part in index.native[name] if part.path == path)


def native_names(index: NameIndex) -> dict[str, Parts]:
    """Native name of every weight of the component -> its parts; every module occurs exactly once."""
    own = {path: (Part(path),) for path in index.sites if path not in index.owner}
    return index.native | own


def portable_path(index: NameIndex, path: str) -> str:
    """A module's diffusers path as other programs know it: CLIP's modules are below ``text_model``.

    transformers 5 dropped the segment from `CLIPTextModel`; files are written with it by everybody else.
    """
    spelled = f"text_model.{path}"
    return spelled if index.aliases.get(spelled) == (Part(path),) else path


def nearest_name(index: NameIndex, name: str, flat: bool = False) -> str:
    """The known name that has the most words in common with an unknown one, "" when none is near.

    Cheap enough for thousands of names: names that differ in their numbers only are compared as one.

    Args:
        index: names of the component.
        name: as in `find`.
        flat: as in `find`; the answer is flattened likewise.

    Returns:
        A diffusers or native name.
    """
    pattern, numbers = split_numbers(flatten(name[:_LONGEST_NAME]))
    words = frozenset(pattern.split("_"))

    def likeness(known: str) -> float:
        own = index.tokens[known]
        return 2 * len(words & own) / (len(words) + len(own)) - 0.001 * abs(len(known) - len(pattern))

    best = max(index.tokens, key=likeness, default="")
    if not best or likeness(best) < _CLOSE_ENOUGH:
        return ""
    known = min(index.patterns[best], key=lambda n: sum(abs(a - b) for a, b in zip(n[0], numbers)))[1]
    return flatten(known) if flat else known


def unknown_prefix(index: NameIndex, names: Iterable[str], share: float = 0.9) -> str:
    """A prefix that no table knows but that most names carry in front of a module's name.

    LyCORIS lets users choose the prefix of a file. For names that `find` does not know: cut the prefix off and look again.

    Args:
        index: names of the component.
        names: as found.
        share: how many of them must become known names without it.

    Returns:
        The prefix, "" when none does it.
    """
    pool = list(names)
    for first in pool[:_PREFIX_SOURCES]:
        for cut in (k + 1 for k, c in enumerate(first[:_LONGEST_NAME]) if c in "._"):
            prefix = first[:cut]
            if find(index, first[cut:], True) is None:
                continue
            hits = sum(n.startswith(prefix) and find(index, n[cut:], True) is not None for n in pool)
            if hits >= share * len(pool):
                return prefix
    return ""
