"""The embedded base model, its tokenizer, its drawn pictures and the demo's charts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageColor
from safetensors.torch import load_file

from lycoris_diff.tiny import build_pipeline, draw_subject, draw_subject_images, load_pipeline, pipeline, save_pipeline
from lycoris_diff.tiny.charts import BEFORE, loss_chart, picture_rows, picture_sheet, smooth, ticks
from lycoris_diff.tiny.figures import SHAPES
from lycoris_diff.tiny.measure import held_out_pairs, measure_scenes, read_picture
from lycoris_diff.tiny.pixels import distances, to_lab
from lycoris_diff.tiny.scenes import COLOURS, CREATURE, Scene, caption, draw_scene, random_scene
from lycoris_diff.tiny.subject import SUBJECT
from lycoris_diff.tiny.tokenizer import WORDS, build_tokenizer, byte_alphabet, learn_merges


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(0)


def picture(pipe, seed=0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.array(pipe("a photo of a red circle", num_inference_steps=2, generator=generator).images[0])


class TestTokenizer:
    def test_every_word_is_one_token(self):
        tokenizer = build_tokenizer()
        assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
        assert len({tokenizer.tokenize(word)[0] for word in WORDS}) == len(set(WORDS))

    def test_prompt(self):
        tokenizer = build_tokenizer()
        words = [token.removesuffix("</w>") for token in tokenizer.tokenize("A photo of a RED circle")]
        assert words == ["a", "photo", "of", "a", "red", "circle"]
        ids = tokenizer("a photo of a red circle", padding="max_length").input_ids
        assert len(ids) == tokenizer.model_max_length == 77
        assert ids[0] == tokenizer.bos_token_id
        assert ids[7:] == [tokenizer.eos_token_id] * 70

    @pytest.mark.parametrize("text", ["zyzzyva", "naïve café", "7 + 35", "猫"])
    def test_unknown_text_falls_apart_into_known_symbols(self, text):
        tokenizer = build_tokenizer()
        ids = tokenizer(text).input_ids[1:-1]
        assert ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")

    def test_ids_agree_with_the_text_encoder(self, pipe):
        config, tokenizer = pipe.text_encoder.config, pipe.tokenizer
        assert config.vocab_size == len(tokenizer) == tokenizer.eos_token_id + 1
        assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id

    def test_merges_are_learned_in_order(self):
        assert learn_merges(["ab", "ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
        assert learn_merges(["a"]) == []
        assert len(set(byte_alphabet())) == 256


class TestPipeline:
    def test_seed_decides_and_global_state_stays(self, pipe):
        state = torch.random.get_rng_state()
        again, other = build_pipeline(0), build_pipeline(1)
        assert torch.equal(state, torch.random.get_rng_state())
        for name in ("unet", "vae", "text_encoder"):
            weights = getattr(pipe, name).state_dict()
            assert all(torch.equal(value, weights[key]) for key, value in getattr(again, name).state_dict().items())
        assert not torch.equal(pipe.unet.conv_in.weight, other.unet.conv_in.weight)

    def test_module_names_are_those_of_stable_diffusion(self, pipe):
        unet = dict(pipe.unet.named_modules())
        for name in (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.3.resnets.1.conv2",
            "mid_block.attentions.0.proj_in",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "up_blocks.2.upsamplers.0.conv",
        ):
            assert name in unet
        assert any(name.endswith("layers.2.self_attn.q_proj") for name, _ in pipe.text_encoder.named_modules())
        assert not any(module.training for module in (pipe.unet, pipe.vae, pipe.text_encoder))

    def test_saved_pipeline_makes_the_same_picture(self, pipe, tmp_path):
        save_pipeline(tmp_path)
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
        before = picture(pipe)
        assert before.shape == (64, 64, 3) and before.std() > 0
        assert np.array_equal(before, picture(loaded))


class TestTrainedBase:
    def test_weights(self):
        tensors = load_file(pipeline.WEIGHTS)
        assert pipeline.WEIGHTS.stat().st_size < 16e6
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        pipe = load_pipeline()
        for component in pipeline.COMPONENTS:
            for name, value in getattr(pipe, component).state_dict().items():
                assert torch.equal(value, tensors[f"{component}.{name}"].to(value.dtype))

    def test_saved_weights_are_loaded_again(self, pipe, tmp_path):
        pipeline.save_weights(pipe, tmp_path / "weights.safetensors")
        again = build_pipeline(1)
        pipeline.load_weights(again, tmp_path / "weights.safetensors")
        assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())

    def test_it_draws_what_is_asked(self):
        """The bars over 200 pictures are measured by scripts/measure_tiny_base.py; this is whether it draws at all."""
        scores = measure_scenes(load_pipeline(), held_out_pairs(16), batch_size=16)
        assert min(scores.rate(part).right for part in ("background", "colour", "shape")) >= 11


class TestScenes:
    def test_captions(self):
        assert Scene("circle", "red", "blue", "big", "left").caption() == "a big red circle on the left on a blue background"
        assert Scene("star", "orange", "white").caption() == "an orange star on a white background"
        assert caption("sks creature") == "a sks creature"

    def test_words_are_tokens(self):
        rng = random.Random(0)
        captions = " ".join(random_scene(rng, held_out=index % 2 == 0).caption() for index in range(300))
        assert set(captions.split()) <= set(WORDS)

    def test_held_out(self):
        rng = random.Random(0)
        for held_out in (False, True):
            scenes = [random_scene(rng, held_out=held_out) for _ in range(200)]
            assert all(scene.held_out is held_out and scene.colour != scene.background for scene in scenes)
            assert {scene.shape for scene in scenes} == set(SHAPES) | (set() if held_out else {CREATURE})

    def test_chance_decides(self):
        scene = Scene(CREATURE, "pink", "black", "big")
        first, again, other = (np.array(draw_scene(scene, random.Random(seed))) for seed in (1, 1, 2))
        assert np.array_equal(first, again) and not np.array_equal(first, other)

    def test_no_creature_of_the_training_looks_like_the_subject(self):
        assert all(distance > 30 for distance in distances(to_lab(SUBJECT.creature.body), to_lab(list(COLOURS.values()))))


class TestSubject:
    def test_same_seed_same_picture(self):
        first, again, other = (np.array(draw_subject(seed=seed)) for seed in (3, 3, 8))
        assert first.shape == (64, 64, 3)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_files(self, tmp_path):
        paths = draw_subject_images(tmp_path / "new" / "folder", count=5, size=32)
        pictures = [np.array(Image.open(path)) for path in paths]
        assert [path.name for path in paths] == [f"subject-{index}.png" for index in range(1, 6)]
        assert all(picture.shape == (32, 32, 3) for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == 5
        assert np.array_equal(pictures[2], np.array(draw_subject(size=32, seed=2)))
        assert not list(tmp_path.glob("**/*.txt"))

    def test_captions(self, tmp_path):
        paths = draw_subject_images(tmp_path, count=6, name="sks creature")
        captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
        assert captions[0] == "a sks creature on a blue background"
        assert captions == [f"a sks creature on a {background} background" for background in SUBJECT.backgrounds]
        assert [read_picture(Image.open(path)).background for path in paths] == list(SUBJECT.backgrounds)


class TestCharts:
    def test_smooth(self):
        assert smooth([4.0]) == [4.0]
        assert smooth([1.0, 2.0, 3.0, 4.0], window=3) == [1.5, 2.0, 3.0, 3.5]

    @pytest.mark.parametrize(
        ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 200, [50, 100, 150, 200]), (5, 5, [5])]
    )
    def test_ticks(self, low, high, expected):
        assert ticks(low, high) == pytest.approx(expected)

    @pytest.mark.parametrize("losses", [[1.0], [1.0, 1.0], [0.9 - 0.001 * step for step in range(300)]])
    def test_loss_chart(self, losses):
        chart = loss_chart(losses, before=1.0, after=losses[-1])
        assert chart.size == (960, 540)
        assert len(chart.getcolors(maxcolors=10**6)) > 10

    def test_picture_rows(self):
        red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        grid = picture_rows([("two", [red, blue], ["a", "b"]), ("one", [blue], [])], "title", cell=20)
        counts = {colour: count for count, colour in grid.getcolors(maxcolors=10**6)}
        assert (counts[(255, 0, 0)], counts[(0, 0, 255)]) == (400, 800)

    def test_captions_need_room(self):
        one = Image.new("RGB", (4, 4), "red")
        without, short, long = (
            picture_rows([("row", [one], captions)], "title").height for captions in ([], ["a"], ["a few words " * 6])
        )
        assert without < short < long

    def test_picture_sheet_marks_what_is_wrong(self):
        red = Image.new("RGB", (4, 4), "red")
        sheets = [picture_sheet([(red, "a", True), (red, "b", right)], "title", columns=1, cell=20) for right in (True, False)]
        assert sheets[0].size == sheets[1].size
        colours = [{colour for _, colour in sheet.getcolors(maxcolors=10**6)} for sheet in sheets]
        frame = ImageColor.getrgb(BEFORE)
        assert [frame in some for some in colours] == [False, True]
