"""Aspect-ratio buckets: which sizes pictures are trained at, and which part of a picture lands in one.

A picture is made just large or small enough to cover its bucket, both edges by the same factor, and what sticks out is cut away
evenly on both sides. A square is the case of one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ...errors import AdapterError, ConfigError


@dataclass(frozen=True, order=True)
class Bucket:
    """A size that pictures are trained at, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Placement:
    """How a picture comes into its bucket.

    Attributes:
        bucket: the size that is trained.
        resized: width and height of the whole picture at the scale of training, rounded to pixels; covers the bucket.
        crop: left and top edge of the bucket in the resized picture.
        original: width and height of the picture itself, turned upright.
    """

    bucket: Bucket
    resized: tuple[int, int]
    crop: tuple[int, int]
    original: tuple[int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of the original that is trained.

        In the middle, as large as fits, and of exactly the bucket's shape: `resized` and `crop` are this rounded to pixels.
        """
        width, height = self.original
        inner_width, inner_height = float(width), float(height)
        if width * self.bucket.height > height * self.bucket.width:
            inner_width = self.bucket.width / self.bucket.height * height
        elif width * self.bucket.height < height * self.bucket.width:
            inner_height = width / (self.bucket.width / self.bucket.height)
        left, top = (width - inner_width) * 0.5, (height - inner_height) * 0.5
        return left, top, left + inner_width, top + inner_height

    def size_ids(self) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's conditioning: original height and width, crop's top and left, target height and width.

        As diffusers' SDXL training scripts feed it: the original size is the upright file's, before any scaling; the crop
        counts in pixels of the resized picture; the target is the bucket.
        """
        width, height = self.original
        left, top = self.crop
        return height, width, top, left, self.bucket.height, self.bucket.width


def make_buckets(resolution: int, step: int, largest_ratio: float = 2.0) -> list[Bucket]:
    """Return sizes with about the area of a square of `resolution`.

    Never more than that, so that what fits into memory does not depend on the pictures' shapes. There is one for every length
    of the longer edge, with the shorter edge as long as the area allows.

    Args:
        resolution: edge of the square in pixels.
        step: every edge is a multiple of it.
        largest_ratio: of the longer edge to the shorter one.

    Returns:
        Sorted by width and height; the square (rounded down to `step`) is among them, and with every size the one on its side.

    Raises:
        ConfigError: `step` is not from 1 to `resolution`, or `largest_ratio` is below 1.
    """
    if not 1 <= step <= resolution:
        raise ConfigError(
            f"bucket_step is {step}; expected 1 to the resolution, which is {resolution}: no bucket is smaller than one step"
        )
    if not largest_ratio >= 1:
        raise ConfigError(f"largest_ratio is {largest_ratio}; expected a number of at least 1, the ratio of a square")
    edge = resolution // step * step
    buckets = {Bucket(edge, edge)}
    for long in range(edge + step, resolution**2 // step + 1, step):
        short = resolution**2 // long // step * step
        if long > largest_ratio * short:
            break
        buckets |= {Bucket(long, short), Bucket(short, long)}
    return sorted(buckets)


def place(size: tuple[int, int], buckets: Sequence[Bucket], upscale: bool = True, step: int | None = None) -> Placement:
    """Choose the bucket whose aspect ratio is nearest, the one that the least of the picture is cut away for.

    Without `upscale` a picture too small to cover it goes into a smaller bucket that it covers: no wider and no narrower in
    shape than the list's, no larger in area, and the one in which most is seen of the picture, counted as pixels of the bucket
    times the part of the picture in it.

    Args:
        size: width and height of the upright picture.
        buckets: what `make_buckets` returns, or one square.
        upscale: whether small pictures may be enlarged.
        step: edges of smaller buckets are multiples of it; None takes the greatest that divides all edges in `buckets`.

    Raises:
        AdapterError: without `upscale`, the picture covers no bucket at all.
    """
    # of equally near ones the larger
    bucket = min(buckets, key=lambda b: (_excess(size, b), -b.width * b.height, b))
    if not upscale and not _covers(size, bucket):
        bucket = _smaller_bucket(size, buckets, step or math.gcd(*(edge for b in buckets for edge in (b.width, b.height))))
    return _place_in(size, bucket)


def _excess(size: tuple[int, int], bucket: Bucket) -> Fraction:
    """How many times as much area the picture has at the scale of the bucket: 1 where nothing is cut away."""
    one, other = size[0] * bucket.height, size[1] * bucket.width
    return Fraction(max(one, other), min(one, other))


def _covers(size: tuple[int, int], bucket: Bucket) -> bool:
    return size[0] >= bucket.width and size[1] >= bucket.height


def _smaller_bucket(size: tuple[int, int], buckets: Sequence[Bucket], step: int) -> Bucket:
    area = max(b.width * b.height for b in buckets)
    widest = max(Fraction(b.width, b.height) for b in buckets)
    tallest = min(Fraction(b.width, b.height) for b in buckets)
    candidates = []
    for width in range(step, size[0] + 1, step):
        # a bucket taller than the picture's shape only has more cut away at its sides
        wanted = max(Fraction(width * size[1], size[0]), width / widest)
        allowed = min(Fraction(size[1]), Fraction(area, width), width / tallest)
        height = min(math.ceil(wanted / step), math.floor(allowed / step)) * step
        if height and Fraction(width, height) <= widest:
            candidates.append(Bucket(width, height))
    if not candidates:
        raise AdapterError(
            f"a picture of {size[0]} x {size[1]} pixels covers no bucket: without upscaling the edges of buckets are "
            f"multiples of {step} and at most the picture's; take the picture away, allow upscaling (bucket_upscale=True) "
            "or choose a smaller bucket_step"
        )
    return max(candidates, key=lambda b: (_kept(size, b), -_excess(size, b), b))


def _kept(size: tuple[int, int], bucket: Bucket) -> Fraction:
    """How much of the picture training sees: pixels of the bucket times the part of the picture in it."""
    return bucket.width * bucket.height / _excess(size, bucket)


def _place_in(size: tuple[int, int], bucket: Bucket) -> Placement:
    width, height = size
    scale = max(Fraction(bucket.width, width), Fraction(bucket.height, height))
    # one edge is the bucket's exactly; the other is at least the bucket's before rounding, so after it as well
    resized = round(width * scale), round(height * scale)
    # rounded as torchvision's center_crop does, which the scripts that SDXL's adapters come from use
    crop = round((resized[0] - bucket.width) / 2), round((resized[1] - bucket.height) / 2)
    return Placement(bucket, resized, crop, (width, height))
