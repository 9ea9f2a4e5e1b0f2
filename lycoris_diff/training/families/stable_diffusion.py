"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from .base import Family, Tensors


class StableDiffusion(Family):
    """Pipelines of Stable Diffusion 1.x and 2.x."""

    title = "Stable Diffusion 1.x or 2.x"
    denoiser = "unet"
    denoiser_class = UNet2DConditionModel
    denoiser_config: ClassVar[Mapping[str, Any]] = {"addition_embed_type": None}
    tokenizers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        return {"encoder_hidden_states": encoders["text_encoder"](tokens["text_encoder"])[0]}

    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        return denoiser(noisy, timesteps, **conditioning).sample
