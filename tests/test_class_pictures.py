"""Class pictures: as many as asked for, the same after an interruption, and nothing of the caller's disturbed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lycoris_diff import AdapterError
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.data.class_pictures import ensure_class_pictures
from lycoris_diff.training.data.stream import sample_generator

PROMPT = "a photo of a creature"


class Painter:
    """Stands for a pipeline: noise of each generator, faintly tinted by the size of the batch, as rounding does."""

    def __init__(self, rejects=()):
        self.unet = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1).eval())
        self.scheduler = SimpleNamespace(steps=None)
        self.dtype = torch.float32
        self.batches = []
        self.rejects = list(rejects)

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler, "tokenizer": None}

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    def __call__(self, prompts, generator, output_type, width=8, height=8):
        assert prompts == [PROMPT] * len(generator) and output_type == "np"
        assert not self.unet.training and self._progress_bar_config == {"disable": True}
        self.scheduler.steps = 7
        self.batches.append(len(prompts))
        pictures = torch.stack([torch.rand(height, width, 3, generator=each) for each in generator])
        pictures[:, 0, 0] = len(prompts) / 255
        pictures[:, 0, 1] = torch.rand(())  # as a scheduler that takes the global generator
        flagged = [self.rejects.pop(0) if self.rejects else False for _ in prompts]
        return SimpleNamespace(images=pictures.numpy(), nsfw_content_detected=flagged)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pipe():
    return build_pipeline(0)


def test_pictures_are_the_pipelines_own(pipe, tmp_path):
    folder = tmp_path / "new" / "class"
    told = []
    made = ensure_class_pictures(
        pipe, folder, PROMPT, 3, (96, 64), 2, 5, on_picture=lambda *numbers: told.append(numbers), steps=2
    )
    assert made == 3 and told == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in folder.iterdir()) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    pipe.set_progress_bar_config(disable=True)
    alone = pipe(PROMPT, width=96, height=64, num_inference_steps=2, generator=sample_generator(5, "class picture", 2)).images[
        0
    ]
    with Image.open(folder / "class-00002.png") as picture:
        assert picture.size == (96, 64) and picture.mode == "RGB" and picture.info["prompt"] == PROMPT
        assert np.array_equal(np.array(picture), np.array(alone))
    assert len(set(contents(folder).values())) == 3
    assert ensure_class_pictures(pipe, folder, PROMPT, 3, (96, 64), 2, 5, steps=2) == 0


def test_interrupted_and_whole_runs_of_a_real_pipeline_are_equal(pipe, tmp_path):
    """With a scheduler that draws noise of its own at every step."""
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    ensure_class_pictures(pipe, tmp_path / "whole", PROMPT, 4, batch_size=3, steps=2)

    def interrupt(made, _):
        if made == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_class_pictures(pipe, tmp_path / "parts", PROMPT, 4, batch_size=3, steps=2, on_picture=interrupt)
    assert len(contents(tmp_path / "parts")) == 2
    torch.rand(100)  # a later process has another random state
    assert ensure_class_pictures(pipe, tmp_path / "parts", PROMPT, 4, batch_size=3, steps=2) == 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 9), batch_size=st.integers(1, 4), own=st.integers(0, 4))
def test_any_pictures_may_be_missing(tmp_path_factory, data, count, batch_size, own):
    folder = tmp_path_factory.mktemp("class")
    for index in range(own):
        Image.new("RGB", (8, 8)).save(folder / f"dog {index}.jpg")
    assert ensure_class_pictures(Painter(), folder, PROMPT, count, batch_size=batch_size) == max(0, count - own)
    whole = contents(folder)
    assert len(whole) == max(own, count)
    gone = data.draw(st.sets(st.sampled_from(sorted(name for name in whole if "class" in name) or [""])))
    for name in gone - {""}:
        (folder / name).unlink()
    assert ensure_class_pictures(Painter(), folder, PROMPT, count, batch_size=batch_size) == len(gone - {""})
    assert contents(folder) == whole


def test_more_pictures_are_added_to_those_that_are_there(tmp_path):
    steps, at_once = tmp_path / "steps", tmp_path / "at once"
    ensure_class_pictures(Painter(), steps, PROMPT, 2, batch_size=2)
    before = contents(steps)
    assert ensure_class_pictures(Painter(), steps, PROMPT, 4, batch_size=2) == 2
    assert before.items() <= contents(steps).items()
    ensure_class_pictures(Painter(), at_once, PROMPT, 4, batch_size=2)
    assert contents(at_once) == contents(steps)


def test_every_picture_that_training_would_find_counts(tmp_path):
    for name in ("a.jpg", "B.PNG", "c.WebP", "d.bmp", "class-1.png", "2_dog/e.png", "class-00000.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a.mask.png", ".hidden.png", "notes.txt", "0_dog/f.png", "backup/g.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "B.PNG").read_bytes())
    assert ensure_class_pictures(Painter(), tmp_path, PROMPT, 7) == 0
    assert ensure_class_pictures(Painter(), tmp_path, PROMPT, 9) == 2
    assert {"class-00000.png", "class-00001.png"} <= {path.name for path in tmp_path.iterdir()}


def test_nothing_is_called_when_all_are_there(tmp_path):
    ensure_class_pictures(Painter(), tmp_path, PROMPT, 2)
    assert ensure_class_pictures(None, tmp_path, PROMPT, 2) == 0


def test_batches_are_as_large_as_asked_and_no_larger_than_needed(tmp_path):
    painter = Painter()
    ensure_class_pictures(painter, tmp_path, PROMPT, 7, batch_size=3)
    assert painter.batches == [3, 3, 1]


def test_seeds_and_numbers_give_different_pictures(tmp_path):
    for seed in (0, 1):
        ensure_class_pictures(Painter(), tmp_path / str(seed), PROMPT, 5, seed=seed)
    assert len({*contents(tmp_path / "0").values(), *contents(tmp_path / "1").values()}) == 10


@pytest.mark.parametrize("config", [None, {"desc": "mine"}])
@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_state_is_put_back(pipe, tmp_path, config, fails):
    if config is not None:
        pipe.set_progress_bar_config(**config)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    modes = [module.training for module in pipe.unet.modules()]
    scheduler, timesteps, kept = pipe.scheduler, pipe.scheduler.timesteps, dict(pipe.scheduler.__dict__)
    state = torch.get_rng_state()

    def fail(*_):
        if fails:
            raise KeyboardInterrupt

    try:
        ensure_class_pictures(pipe, tmp_path, PROMPT, 1, steps=1, on_picture=fail)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler is scheduler and pipe.scheduler.timesteps is timesteps and pipe.scheduler.__dict__ == kept
    assert [module.training for module in pipe.unet.modules()] == modes
    assert not pipe.vae.training
    assert getattr(pipe, "_progress_bar_config", None) == config


def test_modules_in_training_mode_draw_without_dropout(pipe, tmp_path):
    pipe.text_encoder.config.attention_dropout = 0.9
    for layer in pipe.text_encoder.modules():
        if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
            layer.dropout = 0.9
    ensure_class_pictures(pipe, tmp_path / "eval", PROMPT, 1, steps=1)
    pipe.text_encoder.train()
    ensure_class_pictures(pipe, tmp_path / "train", PROMPT, 1, steps=1)
    assert contents(tmp_path / "train") == contents(tmp_path / "eval")


def test_pictures_of_another_prompt_are_refused(tmp_path):
    ensure_class_pictures(Painter(), tmp_path, PROMPT, 2)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=r"'a photo of a creature'.*'a dog'.*class_data_dir"):
        ensure_class_pictures(Painter(), tmp_path, "a dog", 9)
    assert contents(tmp_path) == before


def test_prompts_in_any_language_are_written_into_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PROMPT", "ein Höhlenbär, 熊")
    ensure_class_pictures(Painter(), tmp_path, "ein Höhlenbär, 熊", 1)
    with Image.open(tmp_path / "class-00000.png") as picture:
        assert picture.info["prompt"] == "ein Höhlenbär, 熊"
    assert ensure_class_pictures(Painter(), tmp_path, "ein Höhlenbär, 熊", 1) == 0


@pytest.mark.parametrize("length", [0, 20, 60, -30, -13])
def test_damaged_generated_pictures_are_drawn_again(tmp_path, length):
    ensure_class_pictures(Painter(), tmp_path, PROMPT, 3)
    whole = contents(tmp_path)
    path = tmp_path / "class-00001.png"
    path.write_bytes(path.read_bytes()[:length])
    assert ensure_class_pictures(Painter(), tmp_path, PROMPT, 3) == 1
    assert contents(tmp_path) == whole


def test_pictures_that_are_not_finite_are_not_written(pipe, tmp_path):
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN .*torch.float32"):
        ensure_class_pictures(pipe, tmp_path, PROMPT, 1, steps=1)
    assert contents(tmp_path) == {}


def test_rejected_pictures_are_drawn_with_other_noise(tmp_path):
    ensure_class_pictures(Painter(), tmp_path / "plain", PROMPT, 3)
    painter = Painter(rejects=[False, True, False, True])
    assert ensure_class_pictures(painter, tmp_path / "checked", PROMPT, 3) == 3
    assert painter.batches == [3, 1, 1]  # the second picture was rejected twice
    plain, checked = contents(tmp_path / "plain"), contents(tmp_path / "checked")
    assert {name for name in plain if plain[name] != checked[name]} == {"class-00001.png"}


def test_a_prompt_that_is_always_rejected_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="rejected 10 pictures of 'a photo of a creature'"):
        ensure_class_pictures(Painter(rejects=[True] * 99), tmp_path, PROMPT, 1)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("count", "batch_size", "words"), [(0, 1, "count .* is 0"), (1, 0, "batch_size .* is 0")])
def test_impossible_numbers_are_refused(tmp_path, count, batch_size, words):
    with pytest.raises(AdapterError, match=words):
        ensure_class_pictures(Painter(), tmp_path, PROMPT, count, batch_size=batch_size)


def _killed_at_the_third(folder):
    torch.set_num_threads(1)
    replace = os.replace

    def kill(source, target):
        if target.name == "class-00002.png":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill
    ensure_class_pictures(Painter(), folder, PROMPT, 5, batch_size=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_whole_pictures_only(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed_at_the_third, args=(tmp_path / "killed",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    [left] = [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert ensure_class_pictures(Painter(), tmp_path / "killed", PROMPT, 5, batch_size=2) == 3
    os.utime(left, (0, 0))
    assert ensure_class_pictures(Painter(), tmp_path / "killed", PROMPT, 5, batch_size=2) == 0
    ensure_class_pictures(Painter(), tmp_path / "whole", PROMPT, 5, batch_size=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
