"""Stable Diffusion XL: a UNet that is told of the pictures' sizes as well, and two CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..data.buckets import Placement
from .base import Family, Tensors


class StableDiffusionXL(Family):
    """Pipelines of Stable Diffusion XL's base model.

    Nothing reads the first text encoder's last layer, so that adapters on it stay as they begin.
    """

    title = "Stable Diffusion XL"
    denoiser = "unet"
    denoiser_class = UNet2DConditionModel
    denoiser_config: ClassVar[Mapping[str, Any]] = {"addition_embed_type": "text_time"}
    tokenizers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    def sizes(self, placements: Sequence[Placement]) -> Tensors:
        # mirrored pictures have the same ones: what is cut away is cut away evenly on both sides
        return {"time_ids": torch.tensor([placement.size_ids() for placement in placements], dtype=torch.float32)}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        found = [encoders[name](tokens[name], output_hidden_states=True) for name in self.tokenizers]
        return {
            "encoder_hidden_states": torch.cat([each.hidden_states[-2] for each in found], -1),
            "text_embeds": found[1].text_embeds,
        }

    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        text = conditioning["encoder_hidden_states"]
        return denoiser(noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample
