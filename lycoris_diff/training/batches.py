"""What the denoiser is fed: the one builder of batches, with or without pictures of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .data.buckets import Bucket
from .data.stream import Draw, Stream, sample_generator
from .families.base import Family, Tensors
from .latents import Latents
from .objective import Objective

INSTANCE, CLASS = "instance", "class"


@dataclass(frozen=True)
class Batch:
    """One forward pass of the denoiser; the subject's samples come first, then as many of the class.

    Attributes:
        latents: clean latents `(batch, channels, height, width)`.
        noise: of the same shape.
        timesteps: `(batch,)`.
        sizes: what `Family.sizes` says of the pictures, `(batch, ...)` by name.
        captions: of every sample.
        instances: how many samples show the subject.
        masks: `(batch, 1, height, width)`, or None where every pixel counts.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    sizes: Tensors
    captions: list[str]
    instances: int
    masks: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on `device`."""
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            sizes={name: value.to(device) for name, value in self.sizes.items()},
            masks=None if self.masks is None else self.masks.to(device),
        )


@dataclass(frozen=True)
class Shown:
    """A picture ready for training.

    Attributes:
        caption: its prompt.
        latents: by bucket; as it is and, if pictures are mirrored, mirrored.
    """

    caption: str
    latents: dict[Bucket, tuple[Latents, ...]]


@dataclass(frozen=True)
class Chance:
    """How samples vary.

    Attributes:
        seed: of everything.
        caption_dropout: part of the samples whose caption is empty.
        noise_offset: strength of a constant a channel in the noise.
    """

    seed: int
    caption_dropout: float = 0.0
    noise_offset: float = 0.0


@dataclass(frozen=True)
class Batches:
    """Batch `n` of a run: a pure function of its number, whoever asks, however often the run was interrupted.

    All that is random about a sample comes from a generator of its own, seeded by the run's seed and by how many samples
    were drawn before it. So two processes with batches of two see what one process with batches of four sees.

    Attributes:
        family, objective: of the model.
        instances: the subject's pictures.
        instance_stream: their order; its batches are those of all processes together.
        classes: the class's pictures, each in all buckets of the subject's; empty without prior preservation.
        class_stream: their order.
        chance: how samples vary.
        rank, world: number of this process, and how many there are.
    """

    family: Family
    objective: Objective
    instances: Sequence[Shown]
    instance_stream: Stream
    classes: Sequence[Shown]
    class_stream: Stream | None
    chance: Chance
    rank: int = 0
    world: int = 1

    def batch(self, number: int) -> Batch:
        """Return this process's part of batch `number`, counted from 0, on the CPU."""
        drawn = self.instance_stream.batch(number)
        samples = [self._sample(INSTANCE, self.instances, draw, drawn.bucket) for draw in self._own(drawn.draws)]
        instances = len(samples)
        if self.class_stream is not None:
            draws = self._own(self.class_stream.batch(number).draws)
            samples += [self._sample(CLASS, self.classes, draw, drawn.bucket) for draw in draws]
        return collate(self.family, self.objective, samples, instances)

    def _own(self, draws: Sequence[Draw]) -> Sequence[Draw]:
        share = len(draws) // self.world
        return draws[self.rank * share : (self.rank + 1) * share]

    def _sample(self, role: str, pictures: Sequence[Shown], draw: Draw, bucket: Bucket) -> Sample:
        generator = sample_generator(self.chance.seed, role, draw.number)
        mirrored, dropped, position = torch.rand(3, generator=generator).tolist()
        picture = pictures[draw.index]
        ways = picture.latents[bucket]
        shown = ways[int(mirrored * len(ways))]
        latents = shown.sample(generator)
        noise = torch.randn(latents.shape, generator=generator)
        if self.chance.noise_offset:
            noise = noise + self.chance.noise_offset * torch.randn(len(noise), 1, 1, generator=generator)
        caption = "" if dropped < self.chance.caption_dropout else picture.caption
        return Sample(shown, latents, noise, position, caption)


@dataclass(frozen=True)
class Sample:
    """One sample before it is part of a batch; `position` in [0, 1) becomes its timestep."""

    picture: Latents
    latents: torch.Tensor
    noise: torch.Tensor
    position: float
    caption: str


def collate(family: Family, objective: Objective, samples: Sequence[Sample], instances: int) -> Batch:
    """Stack samples of one size to a batch of which the first `instances` show the subject."""
    masks = [sample.picture.mask for sample in samples]
    latents = torch.stack([sample.latents for sample in samples])
    ones = torch.ones(1, *latents.shape[-2:])
    return Batch(
        latents=latents,
        noise=torch.stack([sample.noise for sample in samples]),
        timesteps=objective.timesteps(torch.tensor([sample.position for sample in samples])),
        sizes=family.sizes([sample.picture.placement for sample in samples]),
        captions=[sample.caption for sample in samples],
        instances=instances,
        masks=None if all(mask is None for mask in masks) else torch.stack([ones if mask is None else mask for mask in masks]),
    )


def held_out_batches(
    family: Family, objective: Objective, pictures: Sequence[Shown], samples: int, batch_size: int, seed: int
) -> list[Batch]:
    """Return fixed batches that cover the subject's pictures in turn and all noise levels evenly.

    Args:
        family, objective: of the model.
        pictures: of the subject; the means of their latents are used.
        samples: how many triples of picture, noise and noise level in all.
        batch_size: triples in one batch at most; those of one batch have one size.
        seed: of the noise, which training never draws.
    """
    sizes: dict[torch.Size, list[Sample]] = {}
    for number in range(samples):
        picture = pictures[number % len(pictures)]
        shown = next(iter(picture.latents.values()))[0]
        generator = sample_generator(seed, "held out", number)
        noise = torch.randn(shown.mean.shape, generator=generator)
        sample = Sample(shown, shown.mean, noise, (number + 0.5) / samples, picture.caption)
        sizes.setdefault(shown.mean.shape, []).append(sample)
    return [
        collate(family, objective, part, len(part))
        for same in sizes.values()
        for part in (same[start : start + batch_size] for start in range(0, len(same), batch_size))
    ]
