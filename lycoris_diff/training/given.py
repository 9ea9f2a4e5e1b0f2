"""What a YAML file and flags say, as a tree of values whose types are not known yet; later ones replace earlier ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from ..errors import ConfigError
from .values import convert, describe, parse_flag, parse_yaml, shown


class FlagError(ConfigError):
    """A flag that does not exist, has no value, or has one of another type: bad usage of a command."""


@dataclass(frozen=True)
class Given:
    """A value under a name.

    Attributes:
        path: the name and the names inside of it.
        value: as `parse_yaml` gives it; of a flag its texts, None for one that stood alone.
        file: where it stands; None for a flag.
    """

    path: tuple[str, ...]
    value: Any
    file: str | None = None

    @property
    def flag(self) -> bool:
        """Whether it comes from a flag."""
        return self.file is None

    def read(self, kind: Any, name: str, alone: Any = None) -> Any:
        """Return the value as `kind`.

        Args:
            kind: a type, as `typing.get_type_hints` gives it.
            name: of the setting, for messages.
            alone: what a flag without a value means; None where it means nothing (a truth value is true then).

        Raises:
            FlagError, ConfigError: it cannot be one.
        """
        if not isinstance(self.value, tuple):  # of a file, or inside of a flag's mapping
            return self.refuse(convert, self.value, kind, name)
        if alone is None and describe(kind).startswith("true or false"):
            alone = True
        read = [self.refuse(_read_text, text, kind, name, alone) for text in self.value]
        if len(read) > 1 and all(isinstance(value, (list, tuple)) for value in read):
            return tuple(item for value in read for item in value)
        return read[-1]

    def items(self) -> dict[str, Given] | None:
        """Return the entries of a mapping; None for any other value."""
        value = self.value
        if isinstance(value, tuple):
            value = None if value[-1] is None else self.refuse(parse_flag, value[-1], Any)
        if not isinstance(value, Mapping):
            return None
        return {str(key): Given((*self.path, str(key)), item, self.file) for key, item in value.items()}

    def refuse(self, function: Any, *args: Any) -> Any:
        """Call `function`; what it refuses is said to be this file's or this flag's fault."""
        try:
            return function(*args)
        except ConfigError as error:
            if self.file is not None:
                raise ConfigError(f"{self.file}: {error}") from error
            raise FlagError(f"--{'.'.join(self.path)}: {error}") from error


#: names to what is under them
Tree = dict[str, Union[Given, "Tree"]]


def read_file(path: str | PathLike[str]) -> list[Given]:
    """Return the entries of a YAML file's mapping.

    Raises:
        ConfigError: no YAML, or no mapping. OSError: the file cannot be opened.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from error
    tree = parse_yaml(text, str(path))
    if tree is not None and not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: found {shown(tree)[:80]}; expected a line `name: value` for every setting")
    return [Given((str(name).replace("-", "_"),), value, str(path)) for name, value in (tree or {}).items()]


def read_flags(arguments: Sequence[str]) -> list[Given]:
    """Return flags in the order of their first appearance; a repeated one has all of its texts.

    Raises:
        FlagError: an argument that belongs to no flag.
    """
    texts: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    for name, text in split_flags(arguments):
        path = tuple(name.split("."))
        texts[path] = (*texts.get(path, ()), text)
    return [Given(path, value) for path, value in texts.items()]


def split_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield name and text of every `--name text`, `--name=text` or `--name`; dashes in names become underscores.

    A text that starts with two dashes needs the form with `=`.

    Raises:
        FlagError: an argument that belongs to no flag.
    """
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not re.match(r"--\w", flag):
            raise FlagError(f"unexpected argument {flag!r}; settings are given as --name value")
        name, sign, text = flag[2:].partition("=")
        alone = not sign and (not rest or rest[0].startswith("--"))
        yield name.replace("-", "_"), None if alone else text if sign else rest.pop(0)


def put(tree: Tree, path: tuple[str, ...], given: Given) -> None:
    """Put a value under a path, in place of what was there; mappings on the way are opened."""
    for key in path[:-1]:
        below = tree.setdefault(key, {})
        if isinstance(below, Given):
            below = opened(below)
            tree[key] = below
        tree = below
    tree[path[-1]] = given


def opened(node: Given | Tree) -> Tree:
    """Return the entries of a mapping.

    Raises:
        ConfigError: `node` is none.
    """
    if not isinstance(node, Given):
        return node
    entries = node.items()
    if entries is None:
        return node.refuse(_refuse_value, node)
    return dict(entries)


def read(node: Given | Tree, kind: Any, name: str, alone: Any = None) -> Any:
    """Return what is under a name as `kind`.

    Raises:
        FlagError, ConfigError: it cannot be one.
    """
    if isinstance(node, Given):
        return node.read(kind, name, alone)
    if "mapping" not in describe(kind):
        return refuse(node, f"{name} takes {describe(kind)}; there is nothing inside of it")
    inside = get_args(kind) if get_origin(kind) in (dict, Mapping) else ()
    item_kind = inside[1] if inside else Any
    return {key: read(item, item_kind, f"{name}.{key}") for key, item in node.items()}


def refuse(node: Given | Tree, message: str) -> Any:
    """Raise what says that something given cannot be used.

    Raises:
        FlagError: a flag gave it (the first of several). ConfigError: a file.
    """
    while not isinstance(node, Given):
        node = next(iter(node.values()))
    return node.refuse(_raise, message)


def _raise(message: str) -> None:
    raise ConfigError(message)


def _refuse_value(node: Given) -> None:
    value = node.value[-1] if isinstance(node.value, tuple) else node.value
    raise ConfigError(f"{'.'.join(node.path)} is {shown(value)}; expected a mapping, {{name: value}}")


def _read_text(text: str | None, kind: Any, name: str, alone: Any) -> Any:
    if text is not None:
        return convert(parse_flag(text, kind), kind, name)
    if alone is None:
        raise ConfigError(f"there is no value; expected {describe(kind)}")
    return alone
