"""What the trainer must know about a kind of pipeline: a small definition each, the loop is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import AdapterError, ConfigError
from ..data.buckets import Placement
from ..objective import Objective, objective_of

Tensors = dict[str, torch.Tensor]


class Family:
    """One kind of diffusers pipeline.

    Subclasses name the components and say how prompts, latents and the denoiser's call look.

    Attributes:
        pipe: the pipeline.
    """

    #: what people call it, for messages
    title: ClassVar[str]
    #: name of the component that predicts the noise
    denoiser: ClassVar[str]
    #: text encoder -> its tokenizer
    text_encoders: ClassVar[Mapping[str, str]]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        """Whether the pipeline has this family's components."""
        names = {cls.denoiser, "vae", "scheduler", *cls.text_encoders, *cls.text_encoders.values()}
        encoders = {name for name in pipe.components if name.startswith("text_encoder") and pipe.components[name] is not None}
        return all(getattr(pipe, name, None) is not None for name in names) and encoders == set(cls.text_encoders)

    @property
    def components(self) -> tuple[str, ...]:
        """Components that can have adapters: the denoiser and the text encoders."""
        return (self.denoiser, *self.text_encoders)

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser is fed: its base weights' own."""
        return getattr(self.pipe, self.denoiser).dtype

    def check_components(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for a component that cannot have an adapter."""
        for name in names:
            if name not in self.components:
                raise ConfigError(f"adapters names {name!r}; {self.title} has {', '.join(self.components)}")

    def objective(self, min_snr_gamma: float | None) -> Objective:
        """Return what the denoiser is trained to predict."""
        return objective_of(self.pipe.scheduler, min_snr_gamma)

    # --- pictures ------------------------------------------------------------------------------------------------------
    @property
    def latent_factor(self) -> int:
        """Pixels of a picture's edge for one of its latents'."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of pictures' scaled latents, float32 on the CPU.

        Args:
            pixels: `(pictures, 3, height, width)` from -1 to 1.

        Raises:
            AdapterError: the VAE gives latents that are not finite (some do in float16).
        """
        vae = self.pipe.vae
        distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        mean, std = (distribution.mean.float() - shift) * scale, distribution.std.float() * scale
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise AdapterError(f"the VAE gives latents in {vae.dtype} that are not finite; load the pipeline's VAE in float32")
        return mean.cpu(), std.cpu()

    def sizes(self, placements: Sequence[Placement]) -> Tensors:
        """What the denoiser is told about pictures' sizes, `(pictures, ...)` by name; most families tell nothing."""
        return {}

    # --- prompts -------------------------------------------------------------------------------------------------------
    def tokenize(self, prompts: Sequence[str]) -> Tensors:
        """Token ids `(prompts, tokens)` by text encoder, cut or padded as the pipeline does it, on the CPU."""
        ids: Tensors = {}
        for encoder, name in self.text_encoders.items():
            tokenizer = getattr(self.pipe, name)
            length = tokenizer.model_max_length
            ids[encoder] = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
        return ids

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        """What the denoiser is told about prompts, `(prompts, ...)` by name, from their `tokens`."""
        raise NotImplementedError

    # --- denoiser ------------------------------------------------------------------------------------------------------
    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        """Call the denoiser; `conditioning` has the values of `encode` and `sizes`."""
        raise NotImplementedError
