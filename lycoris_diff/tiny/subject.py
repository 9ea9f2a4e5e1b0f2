"""Pictures of one made-up creature, drawn with Pillow: training pictures that need no download.

The creature always looks the same: a teal body with orange bands and feet, one big eye and two antennae with yellow tips.
The base model has seen creatures, but none in teal, none with bands and none with tips or feet in colours. It is
large in all pictures; where it stands and what is behind it change.
"""

from __future__ import annotations

import random
from os import PathLike
from pathlib import Path

from PIL import Image

from .figures import Creature
from .scenes import CREATURE, PLACES, Scene, caption, draw_scene

SUBJECT = Creature(body=(32, 164, 160), trim=(244, 132, 44), tips=(255, 210, 63), eyes=1, bands=True, antennae=True)
#: names of `scenes.BACKGROUNDS` on which all of the subject's colours are seen
SUBJECT_BACKGROUNDS = ("blue", "white", "gray", "green", "black", "brown")


def subject_scene(seed: int = 0) -> Scene:
    """Return what `draw_subject` draws for `seed`; its `colour` is empty, as the subject has several."""
    background = SUBJECT_BACKGROUNDS[seed % len(SUBJECT_BACKGROUNDS)]
    rng = random.Random(f"subject {seed}")
    return Scene(CREATURE, "", background, "big", rng.choice(list(PLACES)))


def draw_subject(path: str | PathLike[str] | None = None, size: int = 64, seed: int = 0) -> Image.Image:
    """Draw the subject on one plain background; `seed` chooses background, place and size.

    Args:
        path: where to save the picture as well (its ending chooses the format); None saves nothing.
        size: edge of the square picture in pixels.
        seed: any integer; six consecutive seeds give six different backgrounds.

    Returns:
        An RGB picture, the same for the same arguments.

    Raises:
        OSError: `path` cannot be written.
    """
    picture = draw_scene(subject_scene(seed), random.Random(seed), size, creature=SUBJECT)
    if path is not None:
        picture.save(path)
    return picture


def draw_subject_images(
    directory: str | PathLike[str], count: int = 5, size: int = 64, seed: int = 0, name: str | None = None
) -> list[Path]:
    """Draw `count` pictures of the subject into `directory` (made if absent) as `subject-1.png` and so on.

    Args:
        directory: where they go; files of the same names are replaced.
        count: how many.
        size: edge of the square pictures in pixels.
        seed: of the first picture; the next one has the next seed.
        name: what captions call the subject, for example "sks creature". Then a caption such as "a sks creature on a blue
            background" is written beside every picture, as `subject-1.txt` and so on; None writes none.

    Returns:
        The pictures written, in order.

    Raises:
        OSError: `directory` cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"subject-{index + 1}.png" for index in range(count)]
    for index, path in enumerate(paths):
        draw_subject(path, size=size, seed=seed + index)
        if name is not None:
            path.with_suffix(".txt").write_text(caption(name, background=subject_scene(seed + index).background) + "\n")
    return paths
