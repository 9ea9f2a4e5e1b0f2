"""Values of settings, from YAML and from flags: what a scalar means is decided by the setting that it goes to.

YAML 1.1 as PyYAML reads it takes `1e-4` for a text, `no` for a truth value and `2026-01-01` for a date. Here scalars stay text
until the type of their setting is known; where a setting takes anything, YAML 1.2's core schema decides.
"""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import yaml

from ..errors import ConfigError

_NULL = ("", "~", "null", "Null", "NULL")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SEQUENCES = (list, tuple, set, frozenset, Sequence)
_MAPPINGS = (dict, Mapping)
_WORDS = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    set: "a list",
    Sequence: "a list",
    dict: "a mapping",
    Mapping: "a mapping",
}


class Plain(str):
    """A scalar without quotes: a number, a truth value, null or text, as its setting wants it."""


def parse_yaml(text: str, name: str) -> Any:
    """Read one YAML document; scalars come as `Plain`, or as `str` if they were quoted.

    Raises:
        ConfigError: `text` is not one YAML document, or names a key twice; the message starts with `name` and says where.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = " ".join(str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        raise ConfigError(f"{name}:{place} {problem or error}") from error


def parse_flag(text: str, kind: Any) -> Any:
    """Read the text of a flag: YAML where it starts with `[` or `{` and `kind` takes what it says, else the text as it is.

    Raises:
        ConfigError: broken YAML where no text is allowed.
    """
    options = _options(kind)
    if text[:1] in ("[", "{"):
        takes_text = str in options or any(str in get_args(option) for option in options)
        try:
            value = parse_yaml(text, text)
        except ConfigError:
            if not takes_text:
                raise
            return Plain(text)  # a pattern, or a prompt
        if any(_fits(value, option) for option in options):
            return value
    return Plain(text) if text else text


def convert(value: Any, kind: Any, name: str) -> Any:
    """Return what `parse_yaml` or `parse_flag` gave as a value of the type `kind`.

    Args:
        value: scalars as `Plain` or `str`, in lists and mappings, or plain values already.
        kind: a type, as `typing.get_type_hints` gives it.
        name: of the setting, for messages.

    Raises:
        ConfigError: `value` cannot be one; the message says what is expected.
    """
    options = _options(kind)
    if Any in options:
        return resolve(value)
    if isinstance(value, Plain) and value == "None" and type(None) in options:
        raise ConfigError(f"{name} is None, which YAML writes as null")
    for option in sorted(options, key=_rank):
        found = _scalar(value, option)
        if found is not _ABSENT:
            return found
    for option in options:
        if _fits(value, option):
            return _container(value, option, name)
    single = next((option for option in options if get_origin(option) in (list, Sequence)), None)
    if single is not None and not isinstance(value, Mapping) and value not in _NULL:
        return _container([value], single, name)
    raise ConfigError(f"{name} is {shown(value)}; expected {describe(kind)}")


def resolve(value: Any) -> Any:
    """Return plain values by YAML 1.2's core schema."""
    if isinstance(value, Mapping):
        return {str(key): resolve(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value in _NULL:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    found = _scalar(value, int) if _INT.fullmatch(value) else _scalar(value, float)
    return str(value) if found is _ABSENT else found


def describe(kind: Any) -> str:
    """Return what a setting of the type `kind` takes, in words."""
    words = [_WORDS.get(get_origin(option) or option, "") for option in _options(kind)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "a value"


def shown(value: Any) -> str:
    """Return a value for a message, as people write it."""
    if isinstance(value, (Mapping, list)):
        return repr(resolve(value))
    return "empty" if isinstance(value, str) and not value else repr(str(value) if isinstance(value, str) else value)


class _Absent:
    """No value: None is one."""


_ABSENT = _Absent()


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _rank(option: Any) -> int:
    order = (type(None), bool, int, float, str)
    return order.index(option) if option in order else len(order)


def _scalar(value: Any, kind: Any) -> Any:
    """The scalar as `kind`, or `_ABSENT`."""
    if kind is type(None):
        return None if value is None or (isinstance(value, Plain) and value in _NULL) else _ABSENT
    if kind is bool:
        return value if isinstance(value, bool) else _TRUTH.get(value.lower(), _ABSENT) if isinstance(value, Plain) else _ABSENT
    if isinstance(value, bool):
        return _ABSENT
    if kind is str:
        return str(value) if isinstance(value, str) else _ABSENT
    if kind is float:
        if isinstance(value, str) and _FLOAT.fullmatch(value):
            return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return float(value) if isinstance(value, (int, float)) else _ABSENT
    if kind is int:
        if isinstance(value, str) and _INT.fullmatch(value):
            return int(value, 0) if value[:2] in ("0x", "0o") else int(value)
        number = _scalar(value, float)  # 5e6 is a whole number
        return int(number) if number is not _ABSENT and number.is_integer() else _ABSENT
    return _ABSENT


def _fits(value: Any, kind: Any) -> bool:
    """Whether `kind` is a container of the sort that `value` is."""
    origin = get_origin(kind) or kind
    if isinstance(value, Mapping):
        return origin in _MAPPINGS or kind is Any
    return isinstance(value, (list, tuple)) and (origin in _SEQUENCES or kind is Any)


def _container(value: Any, kind: Any, name: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in _MAPPINGS:
        item_kind = inner[1] if inner else Any
        return {str(key): convert(item, item_kind, f"{name}.{key}") for key, item in value.items()}
    item_kind = inner[0] if inner else Any
    items = [convert(item, item_kind, f"{name}[{index}]") for index, item in enumerate(value)]
    return tuple(items) if origin is Sequence else items


class _Loader(yaml.SafeLoader):
    """Leaves plain scalars alone, and refuses keys that are there twice."""

    # only the merge key `<<` is something by itself
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
