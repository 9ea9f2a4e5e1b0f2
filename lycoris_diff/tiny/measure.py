"""What generated pictures show, read from their pixels: no learned judge, only the tables that pictures are drawn from."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from .figures import INK, WHITE, Colour, Creature, draw_creature
from .pixels import (
    Mask,
    Pixels,
    best_shape,
    border_colour,
    distances,
    grown,
    largest_region,
    read_pixels,
    shrunk,
    silhouette,
    smoothed,
    to_lab,
)
from .scenes import BACKGROUNDS, COLOURS, CREATURE, Scene, random_scene
from .subject import SUBJECT

Spectrum: TypeAlias = NDArray[np.complex128]

DIFFERENT = 13.0  # CIELAB distance from which a pixel is not background; no two colours of the tables are nearer than 26
SMALLEST = 40  # pixels of a thing; the smallest that is drawn, a small star, has 100 or more
LARGEST = 0.6  # part of the picture that a thing may fill; a big creature fills 0.45
LEAST_OVERLAP = 0.70  # of a silhouette with a shape's, below which it is none; 99 % of drawn scenes have more
PARTS = ("background", "colour", "shape")
GUIDANCE = 5.0
STEPS = 25
BATCH = 8


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        background: the name of `BACKGROUNDS` nearest to the border's median colour.
        colour: the name of `COLOURS` nearest to most of the thing's pixels; "" if there is no thing.
        shape: the name of `SHAPES`, or `CREATURE`, whose silhouette fits best; "" if there is no thing or none fits.
        overlap: of the thing's silhouette and the one that fits best, intersection over union, from 0 to 1.
    """

    background: str
    colour: str = ""
    shape: str = ""
    overlap: float = 0.0

    def agrees(self, scene: Scene) -> bool:
        """Whether background, colour and shape are those of `scene`."""
        return all(getattr(self, part) == getattr(scene, part) for part in PARTS)


def read_picture(picture: Image.Image) -> Reading:
    """Read background, colour and shape of the one thing in `picture`.

    The thing is the largest connected region of pixels that differ from the border's median. Its silhouette is brought to
    one centre and one size and compared with every shape's, at small shifts and sizes.
    """
    lab = read_pixels(picture)
    behind = border_colour(lab)
    background = _most_named(behind[None], BACKGROUNDS)
    thing = largest_region(np.linalg.norm(smoothed(lab) - behind, axis=-1) > DIFFERENT)
    if not SMALLEST <= thing.sum() <= LARGEST * thing.size:
        return Reading(background)
    inner = shrunk(thing)
    inside = lab[inner if 4 * inner.sum() >= SMALLEST else thing]
    shape, overlap = best_shape(silhouette(_coverage(lab, behind, thing)), CREATURE)
    return Reading(background, _most_named(inside, COLOURS), shape if overlap >= LEAST_OVERLAP else "", overlap)


@dataclass(frozen=True)
class Rate:
    """How many of how many were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """The part that was right, from 0 to 1."""
        return self.right / self.total

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval of the share."""
        z, n, share = 1.959964, self.total, self.share
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.1%} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class SceneScores:
    """What a pipeline drew for captions of scenes, and what was read there; all tuples in the order of the pairs.

    Attributes:
        pairs: the scenes, each with the seed of its noise.
        pictures: what was drawn.
        readings: what the pictures show.
        seconds: wall-clock time of one picture, on average.
    """

    pairs: tuple[tuple[Scene, int], ...]
    pictures: tuple[Image.Image, ...]
    readings: tuple[Reading, ...]
    seconds: float

    def rate(self, part: str = "") -> Rate:
        """Return in how many pictures `part` (one of `PARTS`) is right; without `part` everything has to be."""
        return Rate(sum(self._right(part)), len(self.pairs))

    def by_name(self, part: str) -> dict[str, Rate]:
        """Return the rate of `part` by the name that was asked for."""
        right: dict[str, list[bool]] = {}
        for (scene, _), one in zip(self.pairs, self._right(part), strict=True):
            right.setdefault(getattr(scene, part), []).append(one)
        return {name: Rate(sum(ones), len(ones)) for name, ones in sorted(right.items())}

    def mistakes(self, part: str) -> dict[tuple[str, str], int]:
        """Return how often which name was asked for and which other one was drawn, the most frequent pair first."""
        counts: dict[tuple[str, str], int] = {}
        for (scene, _), reading in zip(self.pairs, self.readings, strict=True):
            pair = (getattr(scene, part), getattr(reading, part))
            if pair[0] != pair[1]:
                counts[pair] = counts.get(pair, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def _right(self, part: str) -> list[bool]:
        both = zip(self.pairs, self.readings, strict=True)
        return [getattr(got, part) == getattr(scene, part) if part else got.agrees(scene) for (scene, _), got in both]


def held_out_pairs(count: int = 200, seed: int = 0) -> list[tuple[Scene, int]]:
    """Return scenes of shape, colour and background that training never showed together, each with a seed for its noise."""
    rng = random.Random(f"held-out pairs {seed}")
    return [(random_scene(rng, held_out=True), rng.randrange(2**32)) for _ in range(count)]


def measure_scenes(
    pipe: StableDiffusionPipeline,
    pairs: Sequence[tuple[Scene, int]],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = BATCH,
    on_pictures: Callable[[int, int], None] | None = None,
) -> SceneScores:
    """Draw every scene by its caption and read the pictures; for the arguments see `draw_prompts`.

    Args:
        pairs: at least one scene, each with the seed of its noise.
    """
    start = time.perf_counter()
    prompts, seeds = [scene.caption() for scene, _ in pairs], [seed for _, seed in pairs]
    pictures = draw_prompts(pipe, prompts, seeds, steps, guidance, batch_size, on_pictures)
    return read_scenes(pairs, pictures, (time.perf_counter() - start) / len(pairs))


def read_scenes(pairs: Sequence[tuple[Scene, int]], pictures: Sequence[Image.Image], seconds: float = 0.0) -> SceneScores:
    """Read the pictures that were drawn for `pairs`, in the same order; `seconds` is the time that one took."""
    return SceneScores(tuple(pairs), tuple(pictures), tuple(read_picture(picture) for picture in pictures), seconds)


def draw_prompts(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = BATCH,
    on_pictures: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw a picture a prompt, each from noise of its own. The pipeline's progress bar is switched off.

    Args:
        pipe: the pipeline that draws.
        prompts: at least one.
        seeds: of each one's noise.
        steps: sampling steps.
        guidance: guidance scale.
        batch_size: pictures drawn at once; their noise does not depend on it.
        on_pictures: called after every batch with the number of pictures drawn and to be drawn.
    """
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        output = pipe(list(prompts[part]), num_inference_steps=steps, guidance_scale=guidance, generator=generators)
        pictures += output.images
        if on_pictures is not None:
            on_pictures(len(pictures), len(prompts))
    return pictures


def picture_distance(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return the mean absolute difference of two lists of pictures of one size over pixels and channels, from 0 to 255."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean() for one, other in pairs]))


def subject_score(picture: Image.Image, creature: Creature = SUBJECT.creature) -> float:
    """Return how well a subject's `creature` is seen in `picture`, from 0 to 1.

    At every place and size the subject's figure is laid on the picture. A colour of it (that of the body, that of
    bands and feet, that of the tips) is found where the picture has it within one pixel of where the figure has it,
    and is right where the figure has it within one pixel of where the picture has it; of both parts the harmonic mean is
    taken. What has the background's colour counts as background. The score is the geometric mean of the body's part and the
    mean of the other two, at the best place: without a body, or with nothing but that, it is 0. Drawn subjects score
    nearly 1, blurred and noisy ones 0.9, creatures and shapes of the base model's training below 0.4, less than 0.1 on average.
    """
    lab = read_pixels(picture)
    away = np.linalg.norm(lab - border_colour(lab), axis=-1) > DIFFERENT
    apart = distances(lab, to_lab([creature.body, creature.trim, creature.tips, WHITE, INK]))
    nearest = apart.argmin(-1)
    seen = np.stack([away * (nearest == part) * np.clip((45 - apart[..., part]) / 20, 0, 1) for part in range(3)])
    edge = max(lab.shape[:2])
    size, total = (2 * edge, 2 * edge), np.maximum(seen.sum((1, 2)), 1e-9)[:, None, None]
    spectrum, near = np.fft.rfft2(seen, size), np.fft.rfft2([grown(part) for part in seen], size)
    best = 0.0
    for figure, near_figure, sums in _figures(creature, edge):
        found = np.fft.irfft2(near * figure, size).clip(0) / sums[:, None, None]
        right = np.fft.irfft2(spectrum * near_figure, size).clip(0) / total
        both = 2 * found * right / np.maximum(found + right, 1e-9)
        best = max(best, float((both[0] * both[1:].mean(0)).max()))
    return min(1.0, math.sqrt(best))


@lru_cache(maxsize=4)
def _figures(creature: Creature, edge: int) -> list[tuple[Spectrum, Spectrum, Pixels]]:
    """Return, for all sizes in a picture of `edge`, where it has its three colours and where it has them within one pixel,
    both as conjugate spectra, and the sums of the former.
    """
    figures = []
    for size in range(3 * edge // 8, edge + 1, 2):
        figure = np.asarray(draw_creature(creature, 4 * size))
        masks = [(figure == (*colour, 255)).all(-1) for colour in (creature.body, creature.trim, creature.tips)]
        parts = np.stack(masks).reshape(3, size, 4, size, 4).mean((2, 4))
        parts = np.pad(parts, [(0, 0), (1, 1), (1, 1)])
        spectra = [np.fft.rfft2(planes, (2 * edge, 2 * edge)).conj() for planes in (parts, [grown(part) for part in parts])]
        figures.append((spectra[0], spectra[1], parts.sum((1, 2))))
    return figures


def _coverage(lab: Pixels, behind: Pixels, thing: Mask) -> Pixels:
    """Return how much of every pixel is the thing: its edges are mixtures of its colour and the background's."""
    away = np.linalg.norm(lab - behind, axis=-1)
    full = np.median(away[thing])
    return np.where(grown(thing), np.clip(2 * away / full - 0.5, 0, 1), 0)


def _most_named(lab: Pixels, names: Mapping[str, Colour]) -> str:
    """Return the name whose colour is the nearest to most of the pixels `lab`, (pixels, 3)."""
    nearest = distances(lab, to_lab(list(names.values()))).argmin(-1)
    return list(names)[int(np.bincount(nearest).argmax())]
