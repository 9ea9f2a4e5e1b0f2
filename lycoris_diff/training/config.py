"""What a DreamBooth run can be told, checked before anything is loaded or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ..errors import ConfigError

COMPONENTS = ("unet", "text_encoder")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass
class DreamBoothConfig:
    """Settings of `train_dreambooth`.

    Attributes:
        instance_data_dir: directory with pictures of the subject; other files in it are ignored.
        instance_prompt: the prompt that every picture is trained with.
        output_dir: where the adapters go, one PEFT-format sub-directory a component.
        adapters: adapter config by component, `"unet"` and (or) `"text_encoder"`, for example
            `{"unet": LoKrConfig(r=8, target_modules=[...])}`.
        resolution: edge of the square training pictures in pixels; others are scaled and cut around the centre.
        train_batch_size: pictures in one forward pass, on each process.
        gradient_accumulation_steps: forward passes for one optimizer step.
        max_train_steps: optimizer steps.
        learning_rate: of AdamW, for the UNet's adapter.
        text_encoder_learning_rate: for the text encoder's adapter; None takes `learning_rate`.
        weight_decay: of AdamW.
        max_grad_norm: gradients of all adapters together are clipped to this norm; 0 turns clipping off.
        seed: of the adapters' initial values, the order of pictures, noise, timesteps and dropout.
        mixed_precision: "no", "fp16" or "bf16", as accelerate names them.
        held_out_samples: how many fixed pairs of noise and timestep the held-out loss is taken over.
    """

    instance_data_dir: str | PathLike[str]
    instance_prompt: str
    output_dir: str | PathLike[str]
    adapters: Mapping[str, Any] = field(default_factory=dict)
    resolution: int = 512
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 500
    learning_rate: float = 1e-4
    text_encoder_learning_rate: float | None = None
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: str = "no"
    held_out_samples: int = 16

    def learning_rate_of(self, component: str) -> float:
        """Return the learning rate of `component` ("unet" or "text_encoder")."""
        if component == "text_encoder" and self.text_encoder_learning_rate is not None:
            return self.text_encoder_learning_rate
        return self.learning_rate

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot be used."""
        if not self.adapters:
            raise ConfigError(f"adapters is empty: give an adapter config for at least one of {list(COMPONENTS)}")
        for component in self.adapters:
            if component not in COMPONENTS:
                raise ConfigError(f"adapters names {component!r}; expected one of {list(COMPONENTS)}")
        counts = (
            "resolution",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "held_out_samples",
        )
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
        rates = ("learning_rate", "text_encoder_learning_rate", "weight_decay", "max_grad_norm")
        for name in rates:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value!r}; expected a finite number of at least 0")
        if self.mixed_precision not in PRECISIONS:
            raise ConfigError(f"mixed_precision is {self.mixed_precision!r}; expected one of {list(PRECISIONS)}")
