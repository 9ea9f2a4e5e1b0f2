"""Adapter settings with which the demo trains the tiny pipeline, one entry an algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..adapters import (
    AdapterConfig,
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    NormConfig,
    OFTConfig,
    ShiraConfig,
    TLoraConfig,
)
from ..errors import ConfigError

UNET_LINEAR = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
UNET_CONV = ["conv1", "conv2"]
TEXT_LINEAR = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Recipe:
    """How the demo trains one algorithm.

    Attributes:
        title: the algorithm's name as people write it.
        config: its config class.
        fields: of the config; `target_modules` where the linear layers (and convolutions) are not what it adapts.
        learning_rate: of AdamW, for both components.
        convs: whether the UNet's residual convolutions are adapted as well.
    """

    title: str
    config: type[AdapterConfig]
    fields: dict[str, Any]
    learning_rate: float
    convs: bool = False

    def configs(self) -> dict[str, AdapterConfig]:
        """Return fresh adapter configs by component."""
        unet = UNET_LINEAR + (UNET_CONV if self.convs else [])
        targets = {"unet": unet, "text_encoder": list(TEXT_LINEAR)}
        return {name: self.config(**{"target_modules": names, **self.fields}) for name, names in targets.items()}


RECIPES: dict[str, Recipe] = {
    "lokr": Recipe("LoKr", LoKrConfig, {"r": 16, "alpha": 16, "use_effective_conv2d": True, "decompose_factor": 4}, 6e-3, True),
    "loha": Recipe("LoHa", LoHaConfig, {"r": 8, "alpha": 8, "use_effective_conv2d": True}, 6e-3, True),
    "miss": Recipe("MiSS", MissConfig, {"r": 8}, 2e-3),
    "shira": Recipe("SHiRA", ShiraConfig, {"r": 8, "random_seed": 0}, 5e-3),
    "lora": Recipe("LoRA", LoraConfig, {"r": 8, "lora_alpha": 8}, 3e-3),
    "dora": Recipe("DoRA", LoraConfig, {"r": 8, "lora_alpha": 8, "weight_decompose": True}, 3e-3),
    "oft": Recipe("OFT", OFTConfig, {"oft_block_size": 8}, 3.5e-3),
    "diag_oft": Recipe("Diag-OFT", DiagOFTConfig, {"r": 8}, 2.8e-3),
    "boft": Recipe("BOFT", BOFTConfig, {"r": 8}, 8e-4),
    "glora": Recipe("GLoRA", GLoraConfig, {"r": 8, "alpha": 8}, 3e-3),
    "tlora": Recipe("T-LoRA", TLoraConfig, {"r": 8, "alpha": 8}, 3e-3),
    "ia3": Recipe("(IA)³", IA3Config, {}, 5e-2, True),
    "norm": Recipe("norms", NormConfig, {"target_modules": None}, 4e-2),
    "full": Recipe("full weights", FullConfig, {}, 3e-4, True),
}


def find_recipe(adapter: str) -> Recipe:
    """Return the recipe of `adapter`, a key of `RECIPES`.

    Raises:
        ConfigError: there is none.
    """
    if adapter not in RECIPES:
        raise ConfigError(f"adapter is {adapter!r}; expected one of {list(RECIPES)}")
    return RECIPES[adapter]
