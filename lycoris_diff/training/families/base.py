"""What the trainer must know about a kind of pipeline: a small definition each, the loop is shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ...diffusion.components import inner_model
from ...errors import AdapterError, ConfigError
from ..data.buckets import Placement
from ..objective import LOGIT_NORMAL, Objective, objective_of

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
    #: its class
    denoiser_class: ClassVar[type[nn.Module]]
    #: what its config says where the class serves several families
    denoiser_config: ClassVar[Mapping[str, Any]] = {}
    #: text encoder -> its tokenizer
    tokenizers: ClassVar[Mapping[str, str]]
    #: text encoders that a pipeline may be without
    optional: ClassVar[frozenset[str]] = frozenset()
    #: how noise levels of flow matching are drawn, see `objective.Flow`
    density: ClassVar[str] = LOGIT_NORMAL

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        """Whether the pipeline has this family's components."""
        parts = {name: part for name, part in pipe.components.items() if part is not None}
        encoders = {name for name in parts if name.startswith("text_encoder")}
        if not cls.tokenizers.keys() - cls.optional <= encoders <= cls.tokenizers.keys():
            return False
        needed = {cls.denoiser, "vae", "scheduler", *(cls.tokenizers[name] for name in encoders)}
        if not needed <= parts.keys() or not isinstance(inner_model(parts[cls.denoiser]), cls.denoiser_class):
            return False
        return all(parts[cls.denoiser].config.get(name) == value for name, value in cls.denoiser_config.items())

    @property
    def text_encoders(self) -> dict[str, str]:
        """The pipeline's text encoders and their tokenizers."""
        return {name: tokenizer for name, tokenizer in self.tokenizers.items() if getattr(self.pipe, name) is not None}

    @property
    def components(self) -> tuple[str, ...]:
        """Components that can have adapters: the denoiser and the text encoders."""
        return (self.denoiser, *self.text_encoders)

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser is fed: its base weights' own."""
        return getattr(self.pipe, self.denoiser).dtype

    def check_channels(self) -> None:
        """Raise `AdapterError` for a denoiser that is told more than noisy latents: one for inpainting, depth, edges."""
        takes, has = self.channels, self.pipe.vae.config.latent_channels
        if takes != has:
            raise AdapterError(
                f"the {self.denoiser} takes {takes} channels and the VAE's latents have {has}: it is told of other pictures as "
                "well, which no training here has; load a model that draws from text alone"
            )

    @property
    def channels(self) -> int:
        """Channels of latents that the denoiser takes."""
        return getattr(self.pipe, self.denoiser).config.in_channels

    def check_components(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for a component that cannot have an adapter."""
        for name in names:
            if name not in self.components:
                raise ConfigError(f"adapters names {name!r}; {self.title} has {', '.join(self.components)}")

    def objective(self, min_snr_gamma: float | None) -> Objective:
        """Return what the denoiser is trained to predict."""
        return objective_of(self.pipe.scheduler, min_snr_gamma, self.density)

    # --- pictures ------------------------------------------------------------------------------------------------------
    @property
    def patch(self) -> int:
        """Edge of the squares of latents that the denoiser takes as one."""
        return 1

    @property
    def latent_factor(self) -> int:
        """Pixels of a picture's edge for one of its latents'."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def edge_factor(self) -> int:
        """What pictures' edges must be multiples of, in pixels."""
        return self.latent_factor * self.patch

    @torch.no_grad()
    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of pictures' scaled latents, float32 on the CPU.

        Args:
            pixels: `(pictures, 3, height, width)` from -1 to 1.

        Raises:
            AdapterError: the VAE gives latents that are not finite (some do in float16).
        """
        vae = self.pipe.vae
        with _in_float32(vae):
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
            ids[encoder] = getattr(self.pipe, name)(
                list(prompts),
                padding="max_length",
                max_length=self.token_count(encoder),
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return ids

    def token_count(self, encoder: str) -> int:
        """Tokens of a prompt for one of the text encoders, padding included."""
        return getattr(self.pipe, self.tokenizers[encoder]).model_max_length

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, torch.Tensor]) -> Tensors:
        """What the denoiser is told about prompts, `(prompts, ...)` by name, from their `tokens`."""
        raise NotImplementedError

    # --- denoiser ------------------------------------------------------------------------------------------------------
    def predict(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        """Call the denoiser; `conditioning` has the values of `encode` and `sizes`."""
        raise NotImplementedError


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """A VAE that overflows in float16, and says so, in float32 for as long as it takes, as pipelines decode with it."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)
