"""Stable Diffusion 3 and 3.5: a transformer by flow matching, two CLIP text encoders and perhaps T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn import functional as F

from .base import Family, Tensors

T5 = "text_encoder_3"
T5_TOKENS = 256  # of the pipeline's own call; other lengths would be other prompts


class StableDiffusion3(Family):
    """Pipelines of Stable Diffusion 3 and 3.5, with T5 or without, where zeros stand for what it says."""

    title = "Stable Diffusion 3"
    denoiser = "transformer"
    denoiser_class = SD3Transformer2DModel
    tokenizers: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        T5: "tokenizer_3",
    }
    optional = frozenset({T5})

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    def token_count(self, encoder: str) -> int:
        return T5_TOKENS if encoder == T5 else self.pipe.tokenizer_max_length

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        clips = [encoders[name](tokens[name], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        clip = torch.cat([each.hidden_states[-2] for each in clips], -1)
        if T5 in self.text_encoders:
            t5 = encoders[T5](tokens[T5])[0]
        else:
            t5 = clip.new_zeros(len(clip), T5_TOKENS, self.pipe.transformer.config.joint_attention_dim)
        return {
            "encoder_hidden_states": torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], -2),
            "pooled_projections": torch.cat([each.text_embeds for each in clips], -1),
        }

    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        return denoiser(hidden_states=noisy, timestep=timesteps, **conditioning).sample
