"""What a picture shows is read from its pixels: right on drawn scenes, also blurred and noisy, and hard to fool."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from lycoris_diff.tiny import build_pipeline
from lycoris_diff.tiny.figures import INK, SHAPES, WHITE, Creature, shape_mask
from lycoris_diff.tiny.measure import (
    Rate,
    Reading,
    SceneScores,
    draw_prompts,
    held_out_pairs,
    measure_scenes,
    picture_distance,
    read_picture,
    subject_score,
)
from lycoris_diff.tiny.pixels import largest_region, to_lab
from lycoris_diff.tiny.scenes import BACKGROUNDS, COLOURS, CREATURE, PLACES, SIZES, Scene, draw_scene, random_scene
from lycoris_diff.tiny.subject import SUBJECT, draw_subject, subject_scene

TEAL, ORANGE, YELLOW = SUBJECT.creature.body, SUBJECT.creature.trim, SUBJECT.creature.tips


def worn(picture: Image.Image, seed: int, noise: float = 10, blur: float = 1.0) -> Image.Image:
    """A picture as a poor decoder would draw it."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def plain(colour, edge: int = 64) -> Image.Image:
    return Image.new("RGB", (edge, edge), colour)


def on(background, colour, mask: Image.Image) -> Image.Image:
    picture = plain(background, mask.width)
    picture.paste(plain(colour, mask.width), (0, 0), mask)
    return picture


class TestReadPicture:
    @pytest.mark.parametrize(
        ("change", "least"),
        [
            (lambda picture, seed: picture, 0.99),
            (lambda picture, seed: worn(picture, seed, 5, 0.7), 0.98),
            (worn, 0.97),
        ],
        ids=["drawn", "slightly worn", "worn"],
    )
    def test_scenes(self, change, least):
        rng = random.Random(1)
        right = 0
        for seed in range(300):
            scene = random_scene(rng, held_out=seed % 2 == 0)
            right += read_picture(change(draw_scene(scene, rng), seed)).agrees(scene)
        assert right / 300 >= least

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_at_every_size_and_place(self, shape):
        rng = random.Random(shape)
        for size in SIZES:
            for place in PLACES:
                for background, colour in (("white", "red"), ("black", "blue"), ("gray", "pink"), ("yellow", "white")):
                    reading = read_picture(draw_scene(Scene(shape, colour, background, size, place), rng))
                    assert (reading.background, reading.colour, reading.shape) == (background, colour, shape)

    def test_every_pair_of_colours(self):
        rng = random.Random(0)
        for background in BACKGROUNDS:
            for colour in COLOURS:
                if colour != background:
                    reading = read_picture(draw_scene(Scene("diamond", colour, background), rng))
                    assert (reading.background, reading.colour, reading.shape) == (background, colour, "diamond")

    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_no_thing(self, background):
        assert read_picture(plain(BACKGROUNDS[background])) == Reading(background)
        assert read_picture(worn(plain(BACKGROUNDS[background]), 0)) == Reading(background)

    def test_what_is_no_shape(self):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        assert read_picture(Image.fromarray(pixels)).shape == ""
        stripe = plain("white")
        stripe.paste((214, 40, 40), (4, 30, 60, 34))
        assert (read_picture(stripe).colour, read_picture(stripe).shape) == ("red", "")

    def test_crumbs_beside_the_thing_do_not_count(self):
        picture = on("white", COLOURS["red"], shape_mask("star", 64, (0.4, 0.5), 0.3))
        for x, y in ((2, 60), (58, 5), (60, 60)):
            picture.paste(COLOURS["blue"], (x, y, x + 3, y + 3))
        reading = read_picture(picture)
        assert (reading.background, reading.colour, reading.shape) == ("white", "red", "star")

    @settings(max_examples=25, deadline=None)
    @given(
        st.sampled_from(SHAPES), st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.floats(0.17, 0.3), st.sampled_from([48, 64, 96])
    )
    def test_shape_wherever_it_stands(self, shape, x, y, radius, edge):
        large = shape_mask(shape, 4 * edge, (x, y), radius)
        picture = on("black", COLOURS["orange"], large.resize((edge, edge), Image.Resampling.BOX))
        assert read_picture(picture).shape == shape


class TestPixels:
    def test_lab_of_known_colours(self):
        # values of the CIE definition for sRGB under D65, for example from http://www.brucelindbloom.com
        known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20)}
        for colour, expected in known.items():
            assert to_lab(colour) == pytest.approx(expected, abs=0.02)

    def test_largest_region(self):
        mask = np.zeros((9, 9), dtype=bool)
        mask[0, :4] = True
        corner = mask.copy()
        mask[np.arange(3, 9), np.arange(3, 9)] = True  # touches at corners only
        assert np.array_equal(largest_region(mask), mask & ~corner)
        assert not largest_region(np.zeros((5, 7), dtype=bool)).any()


class TestRates:
    def test_wilson(self):
        # the worked values of Wilson's formula for 8 of 10 and for 0 of 20
        assert Rate(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
        assert Rate(0, 20).interval() == pytest.approx((0.0, 0.1611), abs=1e-4)
        assert Rate(20, 20).interval()[1] == 1.0
        assert str(Rate(8, 10)) == "80.0% (49.0% to 94.3%)"

    def test_scores(self):
        pairs = ((Scene("star", "red", "blue"), 1), (Scene("ring", "red", "white"), 2), (Scene("ring", "pink", "white"), 3))
        readings = (Reading("blue", "red", "star"), Reading("white", "orange", "ring"), Reading("white", "orange", ""))
        scores = SceneScores(pairs, (), readings, 0.0)
        assert [scores.rate(part).right for part in ("background", "colour", "shape", "")] == [3, 1, 2, 1]
        assert scores.by_name("colour") == {"pink": Rate(0, 1), "red": Rate(1, 2)}
        assert scores.mistakes("colour") == {("pink", "orange"): 1, ("red", "orange"): 1}
        assert scores.mistakes("shape") == {("ring", ""): 1}

    def test_held_out_pairs(self):
        pairs = held_out_pairs(50)
        assert pairs == held_out_pairs(60)[:50] != held_out_pairs(50, seed=1)
        assert all(scene.held_out for scene, _ in pairs)
        assert len({seed for _, seed in pairs}) == 50

    def test_measure_does_not_depend_on_batches(self):
        pipe = build_pipeline(0)
        pairs = held_out_pairs(3)
        one, all_of_them = (measure_scenes(pipe, pairs, steps=1, batch_size=size) for size in (1, 3))
        assert one.seconds > 0 and len(one.pictures) == len(one.readings) == 3
        for first, second in zip(one.pictures, all_of_them.pictures, strict=True):
            assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
        assert picture_distance(one.pictures, all_of_them.pictures) < 0.1
        assert picture_distance(one.pictures[:2], one.pictures[1:]) > 1

    def test_a_pipeline_that_draws_what_is_asked(self):
        class Drawing:
            def set_progress_bar_config(self, disable):
                assert disable

            def __call__(self, prompts, num_inference_steps, guidance_scale, generator):
                self.images = [
                    draw_scene(scenes[prompt], random.Random(g.initial_seed())) for prompt, g in zip(prompts, generator)
                ]
                return self

        pairs = held_out_pairs(20)
        scenes = {scene.caption(): scene for scene, _ in pairs}
        assert measure_scenes(Drawing(), pairs).rate() == Rate(20, 20)

    def test_torch_state_stays(self):
        state = torch.random.get_rng_state()
        draw_prompts(build_pipeline(0), ["a red circle"], [3], steps=1)
        assert torch.equal(state, torch.random.get_rng_state())


class TestSubjectScore:
    @pytest.mark.parametrize("background", SUBJECT.backgrounds)
    def test_drawn(self, background):
        rng = random.Random(background)
        for place in PLACES:
            picture = draw_scene(Scene(CREATURE, "", background, "big", place), rng, creature=SUBJECT.creature)
            assert 0.95 < subject_score(picture) <= 1
            assert subject_score(worn(picture, 0)) > 0.8

    def test_pictures_of_the_training_set(self):
        assert all(subject_score(draw_subject(seed=seed)) > 0.95 for seed in range(12))
        assert len({subject_scene(seed).background for seed in range(6)}) == 6

    def test_other_things(self):
        rng = random.Random(0)
        for shape in (None, CREATURE):
            scores = [subject_score(draw_scene(random_scene(rng, shape), rng)) for _ in range(40)]
            assert max(scores) < 0.4 and sum(scores) / 40 < 0.1

    @pytest.mark.parametrize(
        "creature",
        [
            Creature(TEAL, INK, INK, eyes=1, antennae=True),
            Creature(TEAL, WHITE, WHITE, eyes=1, bands=True, antennae=True),
            Creature(TEAL, ORANGE, ORANGE, eyes=1),
            Creature(TEAL, ORANGE, ORANGE, eyes=1, bands=True),
            Creature(ORANGE, TEAL, YELLOW, eyes=1, bands=True, antennae=True),
            Creature(YELLOW, TEAL, ORANGE, eyes=1, bands=True, antennae=True),
        ],
    )
    @pytest.mark.parametrize("background", ["white", "black", "teal", "yellow"])
    def test_creatures_with_some_of_its_colours(self, creature, background):
        picture = draw_scene(Scene(CREATURE, "", background, "big"), random.Random(0), creature=creature)
        assert subject_score(picture) < 0.8

    @pytest.mark.parametrize("shape", SHAPES)
    def test_teal_shapes_and_teal_backgrounds(self, shape):
        mask = shape_mask(shape, 64, radius=0.4)
        assert subject_score(on("white", TEAL, mask)) == pytest.approx(0, abs=0.01)
        for colour in (ORANGE, YELLOW):
            assert subject_score(on(TEAL, colour, mask)) == pytest.approx(0, abs=0.01)

    def test_its_colours_in_another_order(self):
        rng = np.random.default_rng(0)
        pixels = np.asarray(draw_subject(seed=1))
        blocks = pixels.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
        shuffled = rng.permutation(blocks).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 64, 3)
        assert subject_score(Image.fromarray(shuffled)) < 0.4
        upside_down = draw_subject(seed=1).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert subject_score(upside_down) < 0.4
