"""Pictures as the denoiser sees them: encoded once by the VAE, kept on disk, sampled anew at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import AdapterError
from .data.buckets import Placement
from .data.cache import DiskCache, key_of, model_digest
from .data.pictures import Picture
from .data.reading import read_mask, read_picture
from .families.base import Family

VERSION = 2  # of what is kept on disk; a change of the preparation must raise it


@dataclass(frozen=True)
class Latents:
    """One picture in one bucket, perhaps mirrored; float32 on the CPU.

    Attributes:
        mean: of the scaled latents, `(channels, height, width)`.
        std: the same shape.
        mask: what counts in the loss, `(1, height, width)` from 0 to 1; None counts all.
        placement: how the picture was cut.
    """

    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor | None
    placement: Placement

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Draw latents of the picture, `(channels, height, width)`."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


class LatentStore:
    """Latents of pictures: a look-up in `cache`, or the VAE's work.

    Args:
        family: of the pipeline whose VAE encodes.
        cache: where they are kept, by the VAE's and the picture's content and how it is cut.
    """

    def __init__(self, family: Family, cache: DiskCache) -> None:
        self.family = family
        self.cache = cache
        self._vae = model_digest(family.pipe.vae)

    def get(self, picture: Picture, placement: Placement, mirrored: bool = False) -> Latents:
        """Return the latents of a picture cut to a bucket.

        Raises:
            AdapterError: the bucket's edges are no multiples of the model's factor, or the latents are not finite.
            OSError: the picture cannot be read.
        """
        factor = self.family.edge_factor
        bucket = placement.bucket
        if bucket.width % factor or bucket.height % factor:
            raise AdapterError(f"pictures of {bucket.width} x {bucket.height} pixels: the model needs multiples of {factor}")
        geometry = (*placement.resized, *placement.crop, bucket.width, bucket.height, int(mirrored))
        key = key_of("latents", VERSION, self._vae, picture.digest, *geometry)
        kept = self.cache.get(key)
        if kept is None:
            kept = self._encode(picture, placement, mirrored)
            self.cache.put(key, kept)
        return Latents(kept["mean"], kept["std"], kept.get("mask"), placement)

    def _encode(self, picture: Picture, placement: Placement, mirrored: bool) -> dict[str, torch.Tensor]:
        pixels = read_picture(picture.path, placement)
        mask = read_mask(picture.mask, placement, self.family.latent_factor) if picture.mask is not None else None
        if mirrored:
            pixels = pixels.flip(-1)
            mask = mask.flip(-1) if mask is not None else None
        mean, std = self.family.posterior(pixels[None])
        tensors = {"mean": mean[0], "std": std[0]}
        return tensors if mask is None else tensors | {"mask": mask}
