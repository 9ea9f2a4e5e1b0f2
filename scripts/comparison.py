"""One run of the adapters' comparison: who trains, on which subject, and what the pictures show afterwards."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
from accelerate import Accelerator
from benchmarking import machine
from diffusers import StableDiffusionPipeline
from PIL import Image

from lycoris_diff.tiny import draw_subject_images, load_pipeline
from lycoris_diff.tiny.demo import (
    NAME,
    OTHERS,
    PICTURES,
    demo_config,
    draw_class_pictures,
    scene_pairs,
    statements,
    through_autoencoder,
)
from lycoris_diff.tiny.measure import draw_prompts, measure_scenes, picture_distance, read_picture, read_scenes, subject_score
from lycoris_diff.tiny.recipes import RECIPES, Recipe
from lycoris_diff.tiny.scenes import Scene, caption
from lycoris_diff.tiny.subject import SUBJECTS, Subject, draw_subject
from lycoris_diff.training import DreamBoothConfig, TrainStep, load_trained, train_dreambooth
from lycoris_diff.training.components import forked_rng, prepared, repeatable
from lycoris_diff.training.families import family_of
from lycoris_diff.training.loop import Loop
from lycoris_diff.training.prepare import find_data, prepare_data

BATCH = 2  # pictures of the subject in a step, and as many of others
TAKES = 2  # pictures drawn of the subject on every background
FRESH = 60  # drawn pictures of the subject, of which one in twenty is as near to a training picture as a near copy


@dataclass(frozen=True)
class Contender:
    """An adapter and the library that trains it.

    Attributes:
        title: as people write it.
        recipe: its settings, the same for both libraries.
        peft: whether PEFT's implementation is trained instead of ours.
    """

    title: str
    recipe: Recipe
    peft: bool = False


PEFTS = "peft-"
CONTENDERS = {name: Contender(recipe.title, recipe) for name, recipe in RECIPES.items()}
CONTENDERS |= {
    PEFTS + name: Contender(f"{RECIPES[name].title}, PEFT's", RECIPES[name], peft=True) for name in ("lora", "lokr", "loha")
}


@dataclass(frozen=True)
class Run:
    """What is trained: a contender on a subject, with everything that is chosen."""

    contender: str
    subject: str
    seed: int
    learning_rate: float
    steps: int

    def folder(self, root: Path) -> Path:
        """Where its result and pictures are kept."""
        return root / self.contender / f"{self.subject}-{self.seed}-{self.learning_rate:.2g}-{self.steps}"

    def settings(self) -> dict[str, Any]:
        """Return everything that decides about the result, as JSON has it."""
        recipe = CONTENDERS[self.contender].recipe
        configs = {name: config.to_dict() for name, config in recipe.configs().items()}
        chosen = {"run": asdict(self), "batch": BATCH, "takes": TAKES, "fresh": FRESH, "configs": configs}
        return json.loads(json.dumps(chosen, default=str))


@dataclass(frozen=True)
class Result:
    """What was measured of one run.

    Attributes:
        learned: of the way from the base model's pictures to the most that the autoencoder can show of the subject, in
            `subject_score`; 0 is the base model.
        following: part of the subject's pictures whose background is the one asked for.
        kept: what other prompts ask for and get, over what they got from the base model.
        drift: mean absolute difference of other prompts' pixels from the base model's pictures, of 255.
        copies: part of the subject's pictures that are nearer to a training picture than 19 of 20 fresh drawings are.
        leaked: `subject_score` of other prompts' pictures.
        parameters: trained.
        bytes: of the file that is shared, the kohya file where the adapter has one, else PEFT's directories.
        seconds: of the processor for a training step; other processes do not count.
        peak: bytes of memory that the process had at most while training, beyond what it had before.
        processor: that it ran on.
    """

    learned: float
    following: float
    kept: float
    drift: float
    copies: float
    leaked: float
    parameters: int
    bytes: int
    seconds: float
    peak: int
    processor: str

    @property
    def quality(self) -> float:
        """By which learning rates are chosen: the harmonic mean of what was learned, followed, kept, and is no copy."""
        parts = [max(part, 1e-3) for part in (self.learned, self.following, self.kept, 1 - self.copies)]
        return len(parts) / sum(1 / part for part in parts)


def kept_result(run: Run, root: Path) -> Result | None:
    """Return the result that an earlier call left, of just this run with just these settings."""
    path = run.folder(root) / "result.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found.get("settings") == run.settings() and found["result"].keys() == {field.name for field in fields(Result)}
    return Result(**found["result"]) if same else None


def prepare(seed: int, root: Path) -> None:
    """Draw with the base model what all runs of one seed share: class pictures, and other prompts' pictures before."""
    folder = root / "base" / str(seed)
    if (folder / "done").exists():
        return
    pipe = load_pipeline()
    draw_class_pictures(pipe, folder / "class", seed, lambda *_: None)
    save_pictures(measure_scenes(pipe, other_scenes(seed)).pictures, folder / "others")
    for name, subject in SUBJECTS.items():
        save_pictures(draw_prompts(pipe, *prompts_of(subject, seed)), folder / name)
    (folder / "done").touch()


def execute(run: Run, root: Path) -> Result:
    """Train, draw and measure; the result and the subject's pictures are kept in the run's folder."""
    folder, shared, subject = run.folder(root), root / "base" / str(run.seed), SUBJECTS[run.subject]
    shutil.rmtree(folder, ignore_errors=True)
    photos = draw_subject_images(folder / "photos", PICTURES, seed=run.seed, name=NAME, subject=subject)
    contender = CONTENDERS[run.contender]
    config = demo_config(contender.recipe, folder / "photos", shared / "class", folder / "adapter", run.steps, run.seed)
    config = replace(config, learning_rate=run.learning_rate, train_batch_size=BATCH, cache_dir=root / "cache", trackers=())
    start = restarted_peak()
    pipe, costs = (train_with_peft if contender.peft else train_with_us)(contender.recipe, config)
    costs |= {"peak": peak_memory() - start, "processor": machine()["CPU"]}
    pictures = draw_prompts(pipe, *prompts_of(subject, run.seed))
    save_pictures(pictures, folder / "pictures")
    result = Result(**costs, **scores(run, pipe, pictures, [Image.open(path) for path in photos], shared))
    shutil.rmtree(folder / "adapter")
    written = folder / "result.json.part"
    kept = {"settings": run.settings(), "result": asdict(result)}
    written.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    written.replace(folder / "result.json")
    return result


# ------------------------------------------------------------------------------------------------------------ training


def train_with_us(_: Recipe, config: DreamBoothConfig) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Train; return the base model loaded anew with the adapter loaded from disk, and what it cost."""
    clock = StepClock()
    report = train_dreambooth(load_pipeline(), config, clock)
    fresh = load_pipeline()
    load_trained(fresh, config.output)
    size = report.bytes.get("kohya", sum(report.bytes.values()))
    return fresh, {"parameters": sum(report.parameters.values()), "bytes": size, "seconds": clock.seconds}


def train_with_peft(recipe: Recipe, config: DreamBoothConfig) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Train PEFT's adapters in our loop: the same pictures, noise, optimizer and schedule, and at the same places."""
    pipe = load_pipeline()
    family, accelerator = family_of(pipe), Accelerator()
    data = prepare_data(family, config, find_data(config), accelerator, config.cache, lambda *_: None)
    with forked_rng(config.seed), repeatable(accelerator.device):
        for component, adapter in config.adapters.items():
            theirs = getattr(peft, recipe.config.__name__)(target_modules=adapter.target_modules, **recipe.fields)
            setattr(pipe, component, peft.get_peft_model(getattr(pipe, component), theirs))
        with prepared(family, config, accelerator) as models:
            torch.manual_seed(config.seed + 1)
            loop = Loop(family, family.objective(config.min_snr_gamma), config, data, accelerator, models)
            loop.start()
            clock = StepClock()
            loop.run(clock)
            loop.finish()
    for component, model in loop.adapted.items():
        model.save_pretrained(config.output / component)
    size = sum(path.stat().st_size for path in config.output.rglob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in loop.parameters)
    return pipe, {"parameters": parameters, "bytes": size, "seconds": clock.seconds}


class StepClock:
    """Measures the processor's time of training steps from the first one's end on; to be called after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, step: TrainStep) -> None:
        self.times.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of a step; 0 where there was one alone."""
        return (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)


# --------------------------------------------------------------------------------------------------------- measurement


def scores(
    run: Run, pipe: StableDiffusionPipeline, pictures: Sequence[Image.Image], photos: Sequence[Image.Image], shared: Path
) -> dict[str, float]:
    """Measure the subject's pictures, and those of other prompts that are drawn here."""
    subject = SUBJECTS[run.subject]
    score = partial(subject_score, creature=subject.creature)
    coded = through_autoencoder(pipe, photos)
    least, most = (fmean(map(score, group)) for group in (read_pictures(shared / run.subject), coded))
    asked, pairs = backgrounds_of(subject), other_scenes(run.seed)
    others, before = measure_scenes(pipe, pairs), read_pictures(shared / "others")
    limit = copy_distance(subject, run.seed, coded)
    return {
        "learned": (fmean(map(score, pictures)) - least) / (most - least),
        "following": fmean(read_picture(picture).background == name for picture, name in zip(pictures, asked, strict=True)),
        "kept": statements(others).right / statements(read_scenes(pairs, before)).right,
        "drift": picture_distance(before, others.pictures),
        "copies": fmean(nearest(picture, coded) < limit for picture in pictures),
        "leaked": fmean(map(score, others.pictures)),
    }


def prompts_of(subject: Subject, seed: int) -> tuple[list[str], list[int]]:
    """Return the prompts that name the subject, one of each on a background that it was not trained on, and their seeds."""
    prompts = [caption(NAME, background=background) for background in backgrounds_of(subject)]
    return prompts, [1000 * (seed + 1) + index for index in range(len(prompts))]


def backgrounds_of(subject: Subject) -> list[str]:
    """Return the background that each of the subject's pictures is asked for."""
    return [background for background in subject.backgrounds for _ in range(TAKES)]


def other_scenes(seed: int) -> list[tuple[Scene, int]]:
    """Return the scenes of the other prompts, with a seed each."""
    return scene_pairs(OTHERS, f"others {seed}")


def copy_distance(subject: Subject, seed: int, photos: Sequence[Image.Image]) -> float:
    """Return the distance to the nearest training picture that one in twenty fresh drawings of the subject has or is below."""
    first = len(subject.backgrounds) * (seed + 100)  # whole rounds of backgrounds, far from the seeds of the training pictures
    return float(np.quantile([nearest(draw_subject(seed=first + n, subject=subject), photos) for n in range(FRESH)], 0.05))


def nearest(picture: Image.Image, photos: Sequence[Image.Image]) -> float:
    """Return the mean absolute difference to the nearest one of `photos`, of 255."""
    return min(picture_distance([picture], [photo]) for photo in photos)


def save_pictures(pictures: Sequence[Image.Image], folder: Path) -> None:
    """Write pictures into a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:02}.png")


def read_pictures(folder: Path) -> list[Image.Image]:
    """Return what `save_pictures` wrote, in order."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def restarted_peak() -> int:
    """Forget the process' highest memory, where Linux can; return what it has now, in bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the process' highest memory in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
