"""What the denoiser is fed: an endless stream for training, a fixed set for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .latents import LatentCache


@dataclass(frozen=True)
class Batch:
    """One forward pass of the denoiser; all tensors share their first size.

    Attributes:
        latents: clean latents `(batch, channels, height, width)`.
        noise: standard normal noise of the same shape.
        timesteps: whole numbers `(batch,)`.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on `device`."""
        return Batch(self.latents.to(device), self.noise.to(device), self.timesteps.to(device))


def training_batches(cache: LatentCache, timesteps: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end; every picture is shown once before any is shown again.

    Args:
        cache: the pictures' latents, sampled anew each time.
        timesteps: length of the noise schedule; timesteps are drawn evenly from it.
        batch_size: pictures in a batch; may exceed the number of pictures.
        generator: on the CPU; the only source of chance here.
    """
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(cache), generator=generator)])
        indices, order = order[:batch_size], order[batch_size:]
        latents = cache.sample(indices, generator)
        noise = torch.randn(latents.shape, generator=generator)
        yield Batch(latents, noise, torch.randint(timesteps, (batch_size,), generator=generator))


def held_out_batches(cache: LatentCache, timesteps: int, samples: int, batch_size: int, seed: int) -> list[Batch]:
    """Return fixed batches that cover all pictures in turn and all noise levels evenly.

    Noise comes from a generator of its own: the same arguments give the same batches, whatever training draws.

    Args:
        cache: latents of the training pictures; their means are used.
        timesteps: length of the noise schedule.
        samples: how many triples of picture, noise and timestep in all.
        batch_size: triples in one batch; the last may be shorter.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = cache.mean[torch.arange(samples) % len(cache)]
    noise = torch.randn(latents.shape, generator=generator)
    levels = ((torch.arange(samples) + 0.5) * timesteps / samples).long()
    parts = zip(latents.split(batch_size), noise.split(batch_size), levels.split(batch_size), strict=True)
    return [Batch(*part) for part in parts]
