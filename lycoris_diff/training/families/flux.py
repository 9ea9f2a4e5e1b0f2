"""Flux.1: a transformer on packed latents by flow matching, the pooled output of CLIP and the tokens of T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.nn import functional as F

from ..objective import UNIFORM
from .base import Family, Tensors

T5 = "text_encoder_2"
T5_TOKENS = 512  # of the pipeline's own call; other lengths would be other prompts
#: A distilled model is told which guidance its answer has to look like. Pictures are those of no guidance, 1: told any other
#: scale, it would unlearn what that scale does. diffusers' script lets people choose and its examples take 1.
GUIDANCE = 1.0


class Flux(Family):
    """Pipelines of Flux.1, guidance-distilled (dev) or not."""

    title = "Flux.1"
    denoiser = "transformer"
    denoiser_class = FluxTransformer2DModel
    tokenizers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", T5: "tokenizer_2"}
    density = UNIFORM  # as diffusers' script; the scheduler shifts by the picture's size, and only while drawing

    @property
    def patch(self) -> int:
        return 2  # of the packing; the transformer's own patch is one token

    @property
    def channels(self) -> int:
        return super().channels // self.patch**2

    def token_count(self, encoder: str) -> int:
        return T5_TOKENS if encoder == T5 else self.pipe.tokenizer_max_length

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        return {
            "encoder_hidden_states": encoders[T5](tokens[T5])[0],
            "pooled_projections": encoders["text_encoder"](tokens["text_encoder"]).pooler_output,
        }

    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        """Patches of 2 x 2 latents are tokens with their places as ids; the answer is of the latents' shape again."""
        height, width = noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch
        guided = self.pipe.transformer.config.guidance_embeds
        text_ids = noisy.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3)
        answer = denoiser(
            hidden_states=F.pixel_unshuffle(noisy, self.patch).flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,  # which the transformer multiplies again
            guidance=torch.full_like(timesteps, GUIDANCE) if guided else None,
            txt_ids=text_ids,
            img_ids=_places(height, width).to(noisy),
            **conditioning,
        ).sample
        return F.pixel_shuffle(answer.transpose(1, 2).unflatten(2, (height, width)), self.patch)


def _places(height: int, width: int) -> torch.Tensor:
    """Row and column of every patch, `(height * width, 3)`; the first of the three is that of other pictures."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
