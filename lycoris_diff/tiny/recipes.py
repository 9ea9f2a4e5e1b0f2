"""Adapter settings with which the demo trains the tiny pipeline, one entry an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..adapters import LoHaConfig, LoKrConfig, LoraConfig, MissConfig, ShiraConfig
from ..errors import ConfigError

UNET_LINEAR = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
UNET_CONV = ["conv1", "conv2"]
TEXT_LINEAR = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Recipe:
    """How the demo trains one algorithm.

    Attributes:
        title: the algorithm's name as people write it.
        make: gives a fresh config for a list of target modules.
        convs: whether the UNet's residual convolutions are adapted as well.
        learning_rate: of AdamW, for both components.
    """

    title: str
    make: Callable[[list[str]], Any]
    convs: bool
    learning_rate: float

    def configs(self) -> dict[str, Any]:
        """Return fresh adapter configs by component."""
        unet = UNET_LINEAR + (UNET_CONV if self.convs else [])
        return {"unet": self.make(unet), "text_encoder": self.make(TEXT_LINEAR)}


def _lokr(targets: list[str]) -> LoKrConfig:
    return LoKrConfig(r=8, alpha=8, target_modules=targets, use_effective_conv2d=True)


def _loha(targets: list[str]) -> LoHaConfig:
    return LoHaConfig(r=8, alpha=8, target_modules=targets, use_effective_conv2d=True)


def _miss(targets: list[str]) -> MissConfig:
    return MissConfig(r=8, target_modules=targets)


def _shira(targets: list[str]) -> ShiraConfig:
    return ShiraConfig(r=8, target_modules=targets, random_seed=0)


def _lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=8, target_modules=targets)


RECIPES: dict[str, Recipe] = {
    "lokr": Recipe("LoKr", _lokr, convs=True, learning_rate=1e-2),
    "loha": Recipe("LoHa", _loha, convs=True, learning_rate=1e-2),
    "miss": Recipe("MiSS", _miss, convs=False, learning_rate=3e-3),
    "shira": Recipe("SHiRA", _shira, convs=False, learning_rate=1e-2),
    "lora": Recipe("LoRA", _lora, convs=False, learning_rate=5e-3),
}


def find_recipe(adapter: str) -> Recipe:
    """Return the recipe of `adapter`, a key of `RECIPES`.

    Raises:
        ConfigError: there is none.
    """
    if adapter not in RECIPES:
        raise ConfigError(f"adapter is {adapter!r}; expected one of {list(RECIPES)}")
    return RECIPES[adapter]
