"""Buckets for every size of picture: covered, centred, undistorted, nearest in shape, never enlarged where that was asked."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lycoris_diff.errors import AdapterError, ConfigError
from lycoris_diff.training.data.buckets import Bucket, make_buckets, place

checked = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

EDGE = st.one_of(st.integers(1, 80), st.integers(1, 6000))
SIZE = st.tuples(EDGE, EDGE)


@st.composite
def grids(draw):
    """Arguments of make_buckets."""
    step = draw(st.sampled_from([1, 2, 8, 16, 32, 64]))
    resolution = step * draw(st.integers(1, 24)) + draw(st.integers(0, step - 1))
    return resolution, step, draw(st.sampled_from([1.0, 1.25, 2.0, 2.5, 4.0]))


def ratio(width, height) -> Fraction:
    return Fraction(width, height)


def off(size, bucket) -> Fraction:
    """How far a bucket's shape is from a picture's: the quotient of their aspect ratios, at least 1."""
    quotient = ratio(*size) / ratio(bucket.width, bucket.height)
    return max(quotient, 1 / quotient)


@checked
@given(grids())
def test_every_bucket_is_on_the_grid_with_the_area_of_the_square(grid):
    resolution, step, largest_ratio = grid
    buckets = make_buckets(*grid)
    assert buckets == sorted(set(buckets))
    square = resolution // step * step
    for bucket in buckets:
        short, long = sorted((bucket.width, bucket.height))
        assert short > 0 and short % step == long % step == 0
        assert long <= largest_ratio * short
        assert Bucket(bucket.height, bucket.width) in buckets
        assert long * short <= resolution**2
        if long > square:
            assert long * (short + step) > resolution**2  # one step more would be too much
    assert Bucket(square, square) in buckets
    # no length of the longer edge is left out
    longs = sorted({max(b.width, b.height) for b in buckets})
    assert longs == list(range(square, longs[-1] + 1, step))


def test_buckets_of_known_resolutions():
    assert make_buckets(512, 64) == [Bucket(384, 640), Bucket(448, 576), Bucket(512, 512), Bucket(576, 448), Bucket(640, 384)]
    landscape = [(b.width, b.height) for b in make_buckets(1024, 64, 4.0) if b.width >= b.height]
    # these are SDXL's own sizes (appendix I of arXiv 2307.01952) wherever the width is that of one of them
    sdxl = {1024: 1024, 1088: 960, 1152: 896, 1216: 832, 1280: 768, 1344: 768, 1408: 704, 1472: 704, 1536: 640, 1600: 640}
    for width, height in sdxl.items():
        assert (width, height) in landscape


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((512, 0), "bucket_step is 0"), ((64, 128), "resolution, which is 64"), ((64, 8, 0.5), "largest_ratio is 0.5")],
)
def test_impossible_buckets_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        make_buckets(*arguments)


@checked
@given(SIZE, grids())
def test_a_picture_covers_its_bucket_and_is_cut_around_the_middle(size, grid):
    placement = place(size, make_buckets(*grid))
    bucket, resized, crop = placement.bucket, placement.resized, placement.crop
    for whole, inner, start in zip(resized, (bucket.width, bucket.height), crop):
        assert whole >= inner
        assert start >= 0 and start + inner <= whole
        assert abs(start - (whole - inner - start)) <= 1
    assert resized[0] == bucket.width or resized[1] == bucket.height  # no larger than covering needs


@checked
@given(SIZE, grids())
def test_nothing_is_distorted(size, grid):
    """The part that is read has exactly the bucket's shape, and the sizes in whole pixels agree with it to a pixel."""
    placement = place(size, make_buckets(*grid))
    width, height = size
    left, top, right, bottom = placement.box
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert left + right == pytest.approx(width, rel=1e-12) and top + bottom == pytest.approx(height, rel=1e-12)
    horizontal, vertical = placement.bucket.width / (right - left), placement.bucket.height / (bottom - top)
    assert horizontal == pytest.approx(vertical, rel=1e-9)
    assert abs(placement.resized[0] - width * horizontal) <= 0.5 + 1e-6
    assert abs(placement.resized[1] - height * vertical) <= 0.5 + 1e-6
    assert abs(placement.crop[0] - left * horizontal) <= 1
    assert abs(placement.crop[1] - top * vertical) <= 1


@checked
@given(SIZE, grids())
def test_every_picture_lands_in_the_nearest_shape(size, grid):
    buckets = make_buckets(*grid)
    chosen = place(size, buckets).bucket
    assert off(size, chosen) == min(off(size, bucket) for bucket in buckets)
    # it does not matter in which order the buckets are, nor how large the picture is
    assert place(size, buckets[::-1]).bucket == chosen
    assert place((size[0] * 3, size[1] * 3), buckets).bucket == chosen


@checked
@given(SIZE, grids())
def test_a_picture_on_its_side_gets_the_bucket_on_its_side(size, grid):
    buckets = make_buckets(*grid)
    errors = sorted(off(size, bucket) for bucket in buckets)
    assume(len(errors) == 1 or errors[0] < errors[1])
    one, other = place(size, buckets), place(size[::-1], buckets)
    assert (other.bucket.height, other.bucket.width) == (one.bucket.width, one.bucket.height)
    assert other.resized[::-1] == one.resized and other.crop[::-1] == one.crop


@checked
@given(SIZE, grids(), st.booleans())
def test_no_picture_is_enlarged_when_that_was_asked(size, grid, square):
    resolution, step, _ = grid
    edge = resolution // step * step
    buckets = [Bucket(edge, edge)] if square else make_buckets(*grid)
    assume(min(size) >= step)
    placement = place(size, buckets, upscale=False, step=step)
    bucket = placement.bucket
    assert placement.resized[0] <= size[0] and placement.resized[1] <= size[1]
    assert bucket.width <= size[0] and bucket.height <= size[1]
    assert bucket.width % step == bucket.height % step == 0
    assert bucket.width * bucket.height <= max(b.width * b.height for b in buckets)
    shapes = [ratio(b.width, b.height) for b in buckets]
    assert min(shapes) <= ratio(bucket.width, bucket.height) <= max(shapes)
    large = place(size, buckets)
    if large.resized[0] <= size[0] and large.resized[1] <= size[1]:
        assert placement == large  # large pictures go where they always go


@checked
@given(st.tuples(st.integers(1, 200), st.integers(1, 200)), st.sampled_from([8, 16, 24]), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_the_smaller_bucket_is_the_best_of_all(size, step, largest_ratio):
    """Against trying every size on the grid."""
    assume(min(size) >= step)
    buckets = make_buckets(160, step, largest_ratio)
    bucket = place(size, buckets, upscale=False, step=step).bucket
    assume(bucket not in buckets)
    area = max(b.width * b.height for b in buckets)
    shapes = [ratio(b.width, b.height) for b in buckets]
    every = [
        Bucket(width, height)
        for width in range(step, size[0] + 1, step)
        for height in range(step, size[1] + 1, step)
        if width * height <= area and min(shapes) <= ratio(width, height) <= max(shapes)
    ]
    score = {b: (b.width * b.height / off(size, b), -off(size, b)) for b in every}
    assert score[bucket] == max(score.values())


def test_small_pictures_without_upscaling():
    buckets = make_buckets(512, 64)
    assert place((500, 333), buckets, upscale=False).bucket == Bucket(448, 320)
    assert place((500, 333), buckets, upscale=True).bucket == Bucket(640, 384)
    assert place((300, 400), [Bucket(512, 512)], upscale=False, step=64).bucket == Bucket(256, 256)
    assert place((700, 900), [Bucket(512, 512)], upscale=False).bucket == Bucket(512, 512)
    with pytest.raises(AdapterError, match=r"63 x 400 pixels covers no bucket.*multiples of 64"):
        place((63, 400), buckets, upscale=False)


@checked
@given(SIZE, grids())
def test_size_ids_are_those_of_sdxl_scripts(size, grid):
    """Written down a second time: scale until the bucket is covered, cut in the middle, name the upright file's size."""
    placement = place(size, make_buckets(*grid))
    target = placement.bucket
    scale = max(Fraction(target.width, size[0]), Fraction(target.height, size[1]))
    image_width, image_height = round(size[0] * scale), round(size[1] * scale)
    y1 = max(0, round((image_height - target.height) / 2.0))
    x1 = max(0, round((image_width - target.width) / 2.0))
    original_size, crop_top_left, target_size = (size[1], size[0]), (y1, x1), (target.height, target.width)
    assert placement.size_ids() == original_size + crop_top_left + target_size


def test_size_ids_of_a_photograph():
    assert place((4000, 3000), [Bucket(1024, 1024)]).size_ids() == (3000, 4000, 0, 170, 1024, 1024)
    assert place((3000, 4000), make_buckets(1024, 64)).size_ids() == (4000, 3000, 22, 0, 1152, 896)
