"""The whole life of an adapter on the tiny pipeline: draw, train, save, load into a fresh pipeline, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..training import DreamBoothConfig, TrainReport, TrainStep, load_trained, train_dreambooth
from .charts import loss_chart, picture_rows
from .pipeline import PICTURE_SIZE, load_pipeline
from .recipes import find_recipe
from .subject import draw_subject_images

PROMPT = "a picture of a sks creature"
PICTURES = 5
SAMPLING_STEPS = 20


@dataclass(frozen=True)
class DemoReport:
    """What `run_demo` did.

    Attributes:
        adapter: name of the algorithm, as given.
        title: the same as people write it.
        prompt: what the subject was trained with and pictures were made with.
        training: the training run.
        files: everything written, by what it is.
    """

    adapter: str
    title: str
    prompt: str
    training: TrainReport
    files: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        files = {name: str(path) for name, path in self.files.items()}
        return {
            "adapter": self.adapter,
            "title": self.title,
            "prompt": self.prompt,
            "training": self.training.to_dict(),
            "files": files,
        }


def run_demo(
    adapter: str,
    directory: str | PathLike[str],
    steps: int = 120,
    seed: int = 0,
    on_step: Callable[[TrainStep], None] | None = None,
) -> DemoReport:
    """Train `adapter` on pictures of one drawn subject and show what changed.

    Written to `directory` (made if absent; files of the same names are replaced): the drawn pictures, the base
    pipeline, the trained adapter, `pictures.png` with the subject and the pipeline's pictures before and after, and
    `loss.png`. The pictures "after" come from a pipeline loaded from disk with the adapter loaded from disk.

    Args:
        adapter: a key of `lycoris_diff.tiny.recipes.RECIPES`.
        directory: where everything goes.
        steps: optimizer steps, at least 1.
        seed: of the drawn pictures, training and generated pictures.
        on_step: called after every optimizer step.

    Raises:
        AdapterError: an argument that cannot be used, or a loss that is not finite.
        OSError: `directory` cannot be written.
    """
    recipe = find_recipe(adapter)
    folder = Path(directory)
    files = {name: folder / name for name in ("subject", "base", "adapter")}
    files |= {"pictures": folder / "pictures.png", "loss": folder / "loss.png"}
    subject = draw_subject_images(files["subject"], count=PICTURES, size=PICTURE_SIZE, seed=seed)
    pipe = load_pipeline()
    pipe.save_pretrained(files["base"])
    before = generate(pipe, seed)
    config = DreamBoothConfig(
        instance_data_dir=files["subject"],
        instance_prompt=PROMPT,
        output_dir=files["adapter"],
        adapters=recipe.configs(),
        resolution=PICTURE_SIZE,
        train_batch_size=4,
        max_train_steps=steps,
        learning_rate=recipe.learning_rate,
        seed=seed,
    )
    report = train_dreambooth(pipe, config, on_step)
    fresh = StableDiffusionPipeline.from_pretrained(files["base"])
    load_trained(fresh, files["adapter"])
    after = generate(fresh, seed)
    rows: list[tuple[str, list[Image.Image]]] = [
        ("the subject, as trained on", [Image.open(path) for path in subject]),
        (f'"{PROMPT}", base model (random weights)', before),
        (f'"{PROMPT}", with the {recipe.title} adapter', after),
    ]
    picture_rows(rows, f"{recipe.title}: {steps} steps on {PICTURES} pictures").save(files["pictures"])
    title = f"{recipe.title} on the tiny pipeline"
    loss_chart(report.losses, report.held_out_before, report.held_out_after, title).save(files["loss"])
    return DemoReport(adapter, recipe.title, PROMPT, report, files)


def generate(pipe: StableDiffusionPipeline, seed: int) -> list[Image.Image]:
    """Make `PICTURES` pictures of `PROMPT`; the same `seed` starts from the same noise.

    The pipeline's progress bar is switched off.
    """
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(PROMPT, num_inference_steps=SAMPLING_STEPS, num_images_per_prompt=PICTURES, generator=generator).images
