"""Regions, silhouettes and colours in pictures of a few dozen pixels, with numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .figures import SHAPES, Colour, Creature, draw_creature, shape_mask

Pixels: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

GRID = 40  # edge of the raster on which silhouettes are compared
SPREAD = 0.25  # of a silhouette there: root mean square distance from its centre, over the edge
SHIFTS = (-0.04, 0.0, 0.04)  # over the raster's edge
SCALES = (0.92, 1.0, 1.08)
BORDER = 3  # width of the strip that tells the background, in pixels


def read_pixels(picture: Image.Image) -> Pixels:
    """Return a picture's pixels in CIELAB, where distances are like those the eye sees: (height, width, 3)."""
    return to_lab(np.asarray(picture.convert("RGB")))


def to_lab(colours: NDArray[np.generic] | Sequence[Colour] | Colour) -> Pixels:
    """Return sRGB colours from 0 to 255, (..., 3), as CIELAB under D65, (..., 3)."""
    encoded = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratios = linear @ _XYZ.T / _XYZ.sum(axis=1)
    roots = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    x, y, z = np.moveaxis(roots, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def distances(colours: Pixels, others: Pixels) -> Pixels:
    """Return the distance of every colour, (..., 3), from every one of `others`, (names, 3): (..., names)."""
    return np.linalg.norm(colours[..., None, :] - others, axis=-1)


def border_colour(lab: Pixels) -> Pixels:
    """Return the median colour of the strip along the edges: (3,)."""
    strip = np.ones(lab.shape[:2], dtype=bool)
    strip[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(lab[strip], axis=0)


def smoothed(values: Pixels) -> Pixels:
    """Return the mean over 3 x 3 pixels, (height, width, ...); edges are repeated."""
    padded = np.pad(values, [(1, 1), (1, 1)] + [(0, 0)] * (values.ndim - 2), mode="edge")
    return np.mean(list(_neighbours(padded)), axis=0)


def grown(mask: Mask | Pixels) -> Mask | Pixels:
    """Return the largest value of every pixel and those that touch it, corners included: a mask grows by one pixel."""
    return np.max(list(_neighbours(np.pad(mask, 1))), axis=0)


def shrunk(mask: Mask) -> Mask:
    """Return the mask without the pixels that touch its outside."""
    return np.all(list(_neighbours(np.pad(mask, 1))), axis=0)


def largest_region(mask: Mask) -> Mask:
    """Return the largest connected part of a mask, pixels that touch at corners being connected."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, np.max(list(_neighbours(np.pad(labels, 1))), axis=0), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return mask & (labels == sizes.argmax())


def _neighbours(padded: NDArray) -> Iterator[NDArray]:
    """Yield the nine shifts of what was padded by one pixel on each side."""
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    for down in range(3):
        for right in range(3):
            yield padded[down : down + height, right : right + width]


def silhouette(coverage: Pixels, shift: tuple[float, float] = (0.0, 0.0), scale: float = 1.0) -> Pixels:
    """Return a thing's coverage, (height, width) from 0 to 1, at one centre and one size on a raster of `GRID` x `GRID`.

    Args:
        coverage: how much of every pixel is the thing; not all 0.
        shift: downwards and rightwards, over the raster's edge.
        scale: of the thing on the raster.
    """
    rows, columns = np.indices(coverage.shape)
    total = coverage.sum()
    row, column = (rows * coverage).sum() / total, (columns * coverage).sum() / total
    spread = np.sqrt((((rows - row) ** 2 + (columns - column) ** 2) * coverage).sum() / total)
    places = ((np.arange(GRID) + 0.5) / GRID - 0.5) / scale
    unit = max(spread, 0.5) / SPREAD
    return _sampled(coverage, row + (places - shift[0]) * unit, column + (places - shift[1]) * unit)


def _sampled(coverage: Pixels, rows: Pixels, columns: Pixels) -> Pixels:
    """Return the bilinear interpolation at all pairs of rows and columns; outside is 0."""
    padded = np.pad(coverage, 1)
    return _weights(rows, coverage.shape[0]) @ padded @ _weights(columns, coverage.shape[1]).T


def _weights(places: Pixels, length: int) -> Pixels:
    """Return the weights of linear interpolation, (places, length + 2), on a line padded by one pixel on both sides."""
    inside = np.clip(places + 1, 0, length + 1)
    return np.clip(1 - np.abs(inside[:, None] - np.arange(length + 2)), 0, 1)


def best_shape(thing: Pixels, creature: str) -> tuple[str, float]:
    """Return the name of the silhouette that fits `thing`, a result of `silhouette`, best, and their overlap.

    Args:
        thing: (GRID, GRID).
        creature: the name that stands for all creatures.

    Returns:
        One of `SHAPES` or `creature`, and intersection over union, the best over small shifts and sizes.
    """
    names, bank = _silhouettes(creature)
    flat = thing.ravel()
    together = np.minimum(bank, flat).sum(-1) / np.maximum(bank, flat).sum(-1)
    best = int(together.argmax())
    return names[best], float(together[best])


@lru_cache(maxsize=2)
def _silhouettes(creature: str) -> tuple[list[str], Pixels]:
    """Return the name of every known silhouette at every shift and size, and the silhouettes: (number, GRID * GRID)."""
    edge = 192
    known = [(shape, shape_mask(shape, edge, radius=0.45)) for shape in SHAPES]
    for antennae in (False, True):
        figure = draw_creature(Creature((0, 0, 0), (0, 0, 0), (0, 0, 0), antennae=antennae), edge)
        known.append((creature, figure.getchannel("A")))
    names, bank = [], []
    for name, mask in known:
        coverage = np.asarray(mask, dtype=np.float64) / 255
        for down in SHIFTS:
            for right in SHIFTS:
                for scale in SCALES:
                    names.append(name)
                    bank.append(silhouette(coverage, (down, right), scale).ravel())
    return names, np.stack(bank)
