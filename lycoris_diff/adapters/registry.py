"""The algorithms that are known, by the name that PEFT's files give them."""

from __future__ import annotations

from ..errors import ConfigError
from .base import Adapter
from .config import AdapterConfig

ADAPTERS: dict[str, type[Adapter]] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make an algorithm known under its config's ``peft_name``.

    Raises:
        ConfigError: another algorithm has the name.
    """
    name = cls.config_class.peft_name
    if not name:
        raise ConfigError(f"{cls.config_class.__name__} has no peft_name")
    if ADAPTERS.get(name, cls) is not cls:
        raise ConfigError(f"{name!r} is already registered by {ADAPTERS[name].__name__}")
    ADAPTERS[name] = cls
    return cls


def adapter_class(config: AdapterConfig) -> type[Adapter]:
    """Algorithm of a config.

    Raises:
        ConfigError: it is no config of a registered algorithm.
    """
    for cls in ADAPTERS.values():
        if type(config) is cls.config_class:
            return cls
    known = ", ".join(sorted(c.config_class.__name__ for c in ADAPTERS.values()))
    raise ConfigError(f"{type(config).__name__} is not a config of a registered algorithm; expected one of {known}")
