"""Pictures of the class for prior preservation, generated where they are missing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin
from torch import nn

from ...errors import AdapterError
from ...files import replacing
from .cache import remove_abandoned
from .pictures import all_picture_files
from .reading import UNREADABLE
from .stream import sample_generator

TRIES = 10  # for a picture that the pipeline's safety checker blackens


def ensure_class_pictures(
    pipe: DiffusionPipeline,
    directory: Path,
    prompt: str,
    count: int,
    resolution: tuple[int, int] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    on_picture: Callable[[int, int], None] | None = None,
    steps: int | None = None,
) -> int:
    """Generate pictures in `directory` until there are `count`, with the adapters that are active on `pipe`.

    Every picture there counts, whoever made it. Generated ones are called `class-00000.png` and so on; which picture a number
    stands for depends on the arguments only, so that an interrupted call is continued to the same pictures. Left as they were:
    torch's random state, the pipeline's scheduler and progress bar, and the modes of its modules.

    Args:
        pipe: draws the pictures, as `pipe(prompt)` does.
        directory: made if absent.
        prompt: of every picture; it is written into the files.
        count: how many pictures there have to be.
        resolution: width and height in pixels; None takes the pipeline's own.
        batch_size: pictures drawn at once.
        seed: of the pictures.
        on_picture: called after every picture with the number of pictures made and the number to be made.
        steps: sampling steps; None takes the pipeline's own.

    Returns:
        how many pictures were made.

    Raises:
        AdapterError: `count` or `batch_size` is below 1, pictures were generated there for another prompt, or the pipeline
            gives values that are not finite, or pictures that its safety checker rejects again and again.
        OSError: a file cannot be read or written.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise AdapterError(f"{name} of class pictures is {value!r}; expected a whole number of at least 1")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, ".class-*.png.*")
    missing, end = _missing_numbers(folder, prompt, count)
    if not missing:
        return 0
    call = {} if steps is None else {"num_inference_steps": steps}
    if resolution is not None:
        call |= {"width": resolution[0], "height": resolution[1]}
    made = 0
    with _undisturbed(pipe):
        for first in sorted({number // batch_size * batch_size for number in missing}):
            # always the same pictures together: their pixels may depend on the size of the batch by rounding
            numbers = range(first, min(first + batch_size, end))
            for number, pixels in zip(numbers, _draw(pipe, prompt, numbers, seed, call)):
                if number in missing:
                    _write(_file_of(folder, number), pixels, prompt)
                    made += 1
                    if on_picture is not None:
                        on_picture(made, len(missing))
    return made


def _missing_numbers(folder: Path, prompt: str, count: int) -> tuple[list[int], int]:
    """Numbers of the pictures to make, the lowest that are free, and how many numbers the whole folder needs."""
    taken = set()
    others = 0
    for path in all_picture_files(folder):
        match = re.fullmatch(r"class-(\d{5,})\.png", path.name)
        if match is None or path.parent != folder:
            others += 1
            continue
        try:
            with Image.open(path) as picture:
                made_for = picture.info.get("prompt", prompt)
                picture.verify()
        except UNREADABLE:
            continue  # it is drawn again
        if made_for != prompt:
            raise AdapterError(
                f"{path} was generated for the class prompt {made_for!r}, and now it is {prompt!r}; "
                "give another class_data_dir, or take the pictures away"
            )
        taken.add(int(match[1]))
    end = max(0, count - others)
    free = [number for number in range(end) if number not in taken]
    return free[: max(0, end - len(taken))], end


def _draw(pipe: DiffusionPipeline, prompt: str, numbers: range, seed: int, call: dict[str, int]) -> Iterator[np.ndarray]:
    """Draw the pictures `numbers` at once, each of shape `(height, width, 3)`, values from 0 to 1."""
    pictures, rejected = _call(pipe, prompt, numbers, seed, call, "class picture")
    for number, picture, again in zip(numbers, pictures, rejected):
        for attempt in range(1, TRIES):
            if not again:
                break
            [picture], [again] = _call(pipe, prompt, [number], seed, call, f"class picture, attempt {attempt}")
        if again:
            raise AdapterError(
                f"the pipeline's safety checker rejected {TRIES} pictures of {prompt!r}; choose another class prompt"
            )
        yield picture


def _call(
    pipe: DiffusionPipeline, prompt: str, numbers: Sequence[int], seed: int, call: dict[str, int], role: str
) -> tuple[np.ndarray, Sequence[bool]]:
    generators = [sample_generator(seed, role, number) for number in numbers]
    torch.manual_seed(generators[0].initial_seed())  # some schedulers draw from the global generator
    output = pipe([prompt] * len(numbers), generator=generators, output_type="np", **call)
    pictures = np.asarray(output.images)
    if not np.isfinite(pictures).all():
        raise AdapterError(f"the pipeline draws NaN for {prompt!r} in {pipe.dtype}; load it, or its VAE, in float32")
    return pictures, getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)


def _write(path: Path, pixels: np.ndarray, prompt: str) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add_text("prompt", prompt)
    with replacing(path) as temporary:
        Image.fromarray((pixels * 255).round().astype("uint8")).save(temporary, format="PNG", pnginfo=facts)


def _file_of(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"


@contextmanager
def _undisturbed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Evaluation mode, a scheduler that may be spent and no progress bar, and everything put back at the end."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    modes = [module.training for module in modules]
    scheduler = pipe.scheduler
    had_bar = hasattr(pipe, "_progress_bar_config")
    bar = getattr(pipe, "_progress_bar_config", None)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        for module in modules:
            module.training = False
        pipe.scheduler = copy.deepcopy(scheduler)
        pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
        pipe.scheduler = scheduler
        if had_bar:
            pipe._progress_bar_config = bar
        else:
            del pipe._progress_bar_config
