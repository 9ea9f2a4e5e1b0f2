"""What the library refuses. Every refusal is an `AdapterError`, raised before anything has changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterError(ValueError):
    """Base of everything this library refuses; the message names the thing, the value and the way out."""


class ConfigError(AdapterError):
    """A configuration that cannot be used: unknown field, impossible value, unsupported option."""


class TargetError(AdapterError):
    """Target modules that do not exist, are not adaptable, or are already taken."""


class CheckpointError(AdapterError):
    """An adapter file that is not readable, not finite, or does not fit the model."""


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Close candidates as text for a message, e.g. ``" Did you mean 'to_q'?"``; empty when nothing is close.

    The last component of dotted names is compared as well, so that a typo in a suffix finds the full path.
    """
    pool = list(dict.fromkeys(candidates))
    tails: dict[str, str] = {}
    for candidate in pool:
        tails.setdefault(candidate.rpartition(".")[2], candidate)
    close = difflib.get_close_matches(name, pool, count, 0.6)
    close += [tail for tail in difflib.get_close_matches(name, tails, count, 0.6) if tail not in close]
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(c) for c in close[:count])}?"
