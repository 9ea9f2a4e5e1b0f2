"""The pictures as the denoiser sees them: encoded once by the VAE, sampled anew at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from ..errors import AdapterError


@dataclass(frozen=True)
class LatentCache:
    """Mean and standard deviation of every picture's scaled latents, float32 on the CPU.

    Attributes:
        mean: shape `(pictures, channels, height, width)`.
        std: the same shape.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw latents of the pictures `indices`, shape `(len(indices), channels, height, width)`."""
        mean = self.mean[indices]
        return mean + self.std[indices] * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor) -> LatentCache:
    """Encode pictures one at a time, on the device and in the precision the VAE has.

    Args:
        vae: the pipeline's autoencoder.
        images: shape `(pictures, 3, height, width)`, values from -1 to 1.

    Raises:
        AdapterError: the VAE cannot divide the pictures' size, or gives non-finite latents (some do in float16).
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise AdapterError(f"resolution {height} x {width} is not a multiple of {factor}, which the VAE needs")
    means, stds = [], []
    for image in images:
        distribution = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
        means.append(distribution.mean.float().cpu())
        stds.append(distribution.std.float().cpu())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    cache = LatentCache(mean=(torch.cat(means) - shift) * scale, std=torch.cat(stds) * scale)
    if not (cache.mean.isfinite().all() and cache.std.isfinite().all()):
        raise AdapterError(f"the VAE gives non-finite latents in {vae.dtype}; load the pipeline's VAE in float32")
    return cache
