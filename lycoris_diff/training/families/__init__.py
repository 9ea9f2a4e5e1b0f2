"""Kinds of pipelines that can be trained."""

from __future__ import annotations

from typing import Any

from ...errors import AdapterError
from .base import Family
from .flux import Flux
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL

__all__ = ["FAMILIES", "Family", "Flux", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL", "family_of"]

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)


def family_of(pipe: Any) -> Family:
    """Return how to train `pipe`.

    Raises:
        AdapterError: it is no pipeline of a kind in `FAMILIES`, or one whose denoiser takes more than noisy latents.
    """
    for kind in FAMILIES:
        if kind.matches(pipe):
            family = kind(pipe)
            family.check_channels()
            return family
    known = ", ".join(kind.title for kind in FAMILIES)
    parts = ", ".join(name for name, part in pipe.components.items() if part is not None)
    raise AdapterError(f"{type(pipe).__name__} with {parts} cannot be trained; expected a pipeline of {known}")
