"""Kinds of pipelines that can be trained."""

from __future__ import annotations

from typing import Any

from ...errors import AdapterError
from .base import Family
from .stable_diffusion import StableDiffusion

__all__ = ["FAMILIES", "Family", "StableDiffusion", "family_of"]

FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)


def family_of(pipe: Any) -> Family:
    """Return how to train `pipe`.

    Raises:
        AdapterError: it is no pipeline of a kind in `FAMILIES`.
    """
    for family in FAMILIES:
        if family.matches(pipe):
            return family(pipe)
    known = ", ".join(family.title for family in FAMILIES)
    parts = ", ".join(name for name, part in pipe.components.items() if part is not None)
    raise AdapterError(f"{type(pipe).__name__} with {parts} cannot be trained; expected a pipeline of {known}")
