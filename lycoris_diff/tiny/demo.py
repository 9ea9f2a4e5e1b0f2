"""DreamBooth on the embedded base model, from drawn pictures to a measured statement of what was learned and what was kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..training import DreamBoothConfig, TrainReport, TrainStep, load_trained, train_dreambooth
from .charts import loss_chart, picture_rows
from .measure import PARTS, STEPS, Rate, SceneScores, draw_prompts, measure_scenes, picture_distance, read_scenes, subject_score
from .pipeline import PICTURE_SIZE, load_pipeline
from .recipes import Recipe, find_recipe
from .scenes import CREATURE, Scene, caption, random_scene
from .subject import SUBJECT, draw_subject_images

NAME = "sks creature"
TRAIN_STEPS = 240
SAMPLING_STEPS = STEPS
PICTURES = 5  # of the subject, each on another background
CLASS_PICTURES = 20
CLASS_GUIDANCE = 2.0  # pictures drawn with more are more saturated than what the base model learned from
OTHERS = 16  # prompts drawn before and after that do not name the subject, half of them of creatures
SHOWN = 8  # of those in the grid
SEEN = 0.4  # of the way from the score before to the most that the autoencoder can show: learned from there on
LOST = 0.12  # part of what other prompts ask for that may be lost: six of 48 statements
ALIKE = 0.2  # score of the subject from which another prompt's picture looks like it

#: called with a stage's name, what is done of it and how much there is
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What was measured in the pictures.

    Attributes:
        subject_before: `subject_score` of pictures of the subject's prompts before training, on average.
        subject_after: the same after training.
        subject_drawn: the same of the pictures that were trained on.
        subject_coded: the same of those pictures after the base model's autoencoder: the most that it can show.
        others_before: how much of what other prompts ask for is there; every picture counts three times, for its background,
            its colour and its shape.
        others_after: the same after training.
        others_distance: mean absolute difference of those pictures before and after, of 255.
        others_subject: `subject_score` of the other prompts' pictures after training, on average.
    """

    subject_before: float
    subject_after: float
    subject_drawn: float
    subject_coded: float
    others_before: Rate
    others_after: Rate
    others_distance: float
    others_subject: float

    @property
    def learned(self) -> bool:
        """Whether the subject appears when it is asked for."""
        return self.subject_after - self.subject_before >= SEEN * (self.subject_coded - self.subject_before)

    @property
    def kept(self) -> bool:
        """Whether other prompts still give what they ask for, and not the subject."""
        return self.others_after.share >= self.others_before.share - LOST and self.others_subject < ALIKE

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        rates = {"others_before": self.others_before.share, "others_after": self.others_after.share}
        return {**vars(self), **rates, "others": self.others_after.total, "learned": self.learned, "kept": self.kept}


@dataclass(frozen=True)
class DemoReport:
    """What `run_demo` did.

    Attributes:
        adapter: name of the algorithm, as given.
        title: the same as people write it.
        prompt: what the subject was trained with.
        training: the training run.
        outcome: what was measured before and after.
        files: everything written, by what it is.
    """

    adapter: str
    title: str
    prompt: str
    training: TrainReport
    outcome: Outcome
    files: dict[str, Path]

    @property
    def succeeded(self) -> bool:
        """Whether the subject was learned and the rest kept."""
        return self.outcome.learned and self.outcome.kept

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        files = {name: str(path) for name, path in self.files.items()}
        return {
            "adapter": self.adapter,
            "title": self.title,
            "prompt": self.prompt,
            "training": self.training.to_dict(),
            "outcome": self.outcome.to_dict(),
            "succeeded": self.succeeded,
            "files": files,
        }


@dataclass(frozen=True)
class Drawn:
    """Pictures of one moment.

    Attributes:
        subject: of the subject's prompts.
        others: of the other prompts, with what was read from them.
    """

    subject: list[Image.Image]
    others: SceneScores


def run_demo(
    adapter: str,
    directory: str | PathLike[str],
    steps: int = TRAIN_STEPS,
    seed: int = 0,
    on_step: Callable[[TrainStep], None] | None = None,
    on_stage: OnStage | None = None,
) -> DemoReport:
    """Teach the embedded base model a subject by DreamBooth with prior preservation, and measure what changed.

    Written to `directory` (made if absent; files of the same names are replaced): the pictures of the subject and of the
    class, what training writes, `pictures.png` with pictures of the subject and of other prompts before and after, and
    `loss.png`. The pictures "after" come from the base model loaded anew, with the adapter loaded from disk.

    Args:
        adapter: a key of `lycoris_diff.tiny.recipes.RECIPES`.
        directory: where everything goes.
        steps: optimizer steps, at least 1.
        seed: of the drawn pictures, training and generated pictures.
        on_step: called after every optimizer step.
        on_stage: called as the stages before and after training proceed.

    Raises:
        AdapterError: an argument that cannot be used, or a loss that is not finite.
        OSError: `directory` cannot be written.
    """
    recipe = find_recipe(adapter)
    stage = on_stage or (lambda name, done, total: None)
    folder = Path(directory)
    files = {name: folder / name for name in ("subject", "class", "adapter")}
    files |= {"pictures": folder / "pictures.png", "loss": folder / "loss.png"}
    paths = draw_subject_images(files["subject"], PICTURES, PICTURE_SIZE, seed, name=NAME)
    pipe = load_pipeline()
    draw_class_pictures(pipe, files["class"], seed, stage)
    before = draw_all(pipe, seed, partial(stage, "pictures before"))
    config = demo_config(recipe, files["subject"], files["class"], files["adapter"], steps, seed)
    training = train_dreambooth(pipe, config, on_step)
    fresh = load_pipeline()
    load_trained(fresh, files["adapter"])
    after = draw_all(fresh, seed, partial(stage, "pictures after"))
    subject = [Image.open(path) for path in paths]
    outcome = compare(subject, through_autoencoder(fresh, subject), before, after)
    title = f"DreamBooth with {recipe.title}: {config.max_train_steps} steps on {PICTURES} pictures"
    grid(subject, before, after, title).save(files["pictures"])
    title = f"{recipe.title} on the tiny base model"
    loss_chart(training.losses, training.held_out_before, training.held_out_after, title).save(files["loss"])
    return DemoReport(adapter, recipe.title, caption(NAME), training, outcome, files)


def demo_config(recipe: Recipe, subject: Path, class_pictures: Path, output: Path, steps: int, seed: int) -> DreamBoothConfig:
    """Return the settings with which the demo trains."""
    return DreamBoothConfig(
        instance_data_dir=subject,
        class_data_dir=class_pictures,
        output_dir=output,
        adapters=recipe.configs(),
        resolution=PICTURE_SIZE,
        train_batch_size=4,
        max_train_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=min(10, steps // 2),
        min_snr_gamma=5.0,  # as the base model was trained
        seed=seed,
    )


def draw_class_pictures(pipe: StableDiffusionPipeline, folder: Path, seed: int, stage: OnStage) -> None:
    """Let the base model draw what must be kept, creatures and shapes, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = scene_pairs(CLASS_PICTURES, f"class {seed}")
    report = partial(stage, "class pictures")
    pictures = measure_scenes(pipe, pairs, SAMPLING_STEPS, CLASS_GUIDANCE, on_pictures=report).pictures
    for index, ((scene, _), picture) in enumerate(zip(pairs, pictures, strict=True), start=1):
        picture.save(folder / f"class-{index:02}.png")
        (folder / f"class-{index:02}.txt").write_text(scene.caption() + "\n")


def scene_pairs(count: int, seed: str) -> list[tuple[Scene, int]]:
    """Return scenes, every second of them of a creature, with a seed each."""
    rng = random.Random(seed)
    return [(random_scene(rng, CREATURE if index % 2 else None), rng.randrange(2**32)) for index in range(count)]


def draw_all(pipe: StableDiffusionPipeline, seed: int, on_pictures: Callable[[int, int], None]) -> Drawn:
    """Draw the subject on every background and the other prompts; the same `seed` starts from the same noise."""
    pairs = scene_pairs(OTHERS, f"others {seed}")
    prompts = [caption(NAME, background=background) for background in SUBJECT.backgrounds]
    seeds = [(seed + index) % 2**32 for index in range(len(prompts))]
    pictures = draw_prompts(
        pipe,
        prompts + [scene.caption() for scene, _ in pairs],
        seeds + [number for _, number in pairs],
        SAMPLING_STEPS,
        on_pictures=on_pictures,
    )
    return Drawn(pictures[: len(prompts)], read_scenes(pairs, pictures[len(prompts) :]))


def through_autoencoder(pipe: StableDiffusionPipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the pictures encoded to latents and decoded again."""
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(list(pictures))).latent_dist.mode()
        return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)


def compare(subject: Sequence[Image.Image], coded: Sequence[Image.Image], before: Drawn, after: Drawn) -> Outcome:
    """Measure what changed; `subject` are the pictures trained on, `coded` the same after the autoencoder."""
    return Outcome(
        subject_before=fmean(map(subject_score, before.subject)),
        subject_after=fmean(map(subject_score, after.subject)),
        subject_drawn=fmean(map(subject_score, subject)),
        subject_coded=fmean(map(subject_score, coded)),
        others_before=statements(before.others),
        others_after=statements(after.others),
        others_distance=picture_distance(before.others.pictures, after.others.pictures),
        others_subject=fmean(map(subject_score, after.others.pictures)),
    )


def statements(scores: SceneScores) -> Rate:
    """Return how many of the pictures' backgrounds, colours and shapes are right."""
    return Rate(sum(scores.rate(part).right for part in PARTS), len(PARTS) * len(scores.pairs))


def grid(subject: Sequence[Image.Image], before: Drawn, after: Drawn, title: str) -> Image.Image:
    """Return the pictures of the subject and of other prompts, before and after, side by side."""
    backgrounds = [f"on {background}" for background in SUBJECT.backgrounds]
    captions = [scene.caption() for scene, _ in before.others.pairs[:SHOWN]]
    rows = [
        ("the subject: the pictures trained on", subject, backgrounds),
        (f'"{caption(NAME)}", before', before.subject, backgrounds),
        (f'"{caption(NAME)}", after', after.subject, backgrounds),
        ("other prompts, before", before.others.pictures[:SHOWN], captions),
        ("other prompts, after", after.others.pictures[:SHOWN], captions),
    ]
    return picture_rows(rows, title)
