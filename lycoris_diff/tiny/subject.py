"""Pictures of made-up creatures, drawn with Pillow: training pictures that need no download.

A creature always looks the same; the demo's has a teal body with orange bands and feet, one big eye and two antennae with
yellow tips. The base model has seen creatures, but none in these colours, none with bands and none with tips or feet in
colours. It is large in all pictures; where it stands and what is behind it change.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image

from .figures import Creature
from .scenes import CREATURE, PLACES, Scene, caption, draw_scene


@dataclass(frozen=True)
class Subject:
    """A creature to be learned.

    Attributes:
        creature: what it looks like.
        backgrounds: names of `scenes.BACKGROUNDS` on which all of its colours are seen.
    """

    creature: Creature
    backgrounds: tuple[str, ...]


#: the first one is the demo's
SUBJECTS = {
    "teal": Subject(
        Creature((32, 164, 160), (244, 132, 44), (255, 210, 63), eyes=1, bands=True, antennae=True),
        ("blue", "white", "gray", "green", "black", "brown"),
    ),
    "lime": Subject(
        Creature((176, 222, 64), (140, 60, 176), (246, 120, 170), eyes=2, bands=True, antennae=True),
        ("black", "white", "blue", "brown", "teal", "gray"),
    ),
    "wine": Subject(
        Creature((130, 40, 60), (120, 204, 240), (250, 240, 150), eyes=3, bands=True, antennae=True),
        ("teal", "black", "green", "gray", "blue", "white"),
    ),
    "lavender": Subject(
        Creature((160, 150, 226), (60, 130, 60), (238, 70, 60), eyes=1, bands=True, antennae=True),
        ("white", "brown", "black", "gray", "teal", "yellow"),
    ),
}
SUBJECT = SUBJECTS["teal"]


def subject_scene(seed: int = 0, subject: Subject = SUBJECT) -> Scene:
    """Return what `draw_subject` draws for `seed`; its `colour` is empty, as a subject has several."""
    background = subject.backgrounds[seed % len(subject.backgrounds)]
    rng = random.Random(f"subject {seed}")
    return Scene(CREATURE, "", background, "big", rng.choice(list(PLACES)))


def draw_subject(
    path: str | PathLike[str] | None = None, size: int = 64, seed: int = 0, subject: Subject = SUBJECT
) -> Image.Image:
    """Draw a subject on one plain background; `seed` chooses background, place and size.

    Args:
        path: where to save the picture as well (its ending chooses the format); None saves nothing.
        size: edge of the square picture in pixels.
        seed: any integer; six consecutive seeds give six different backgrounds.
        subject: which one.

    Returns:
        An RGB picture, the same for the same arguments.

    Raises:
        OSError: `path` cannot be written.
    """
    picture = draw_scene(subject_scene(seed, subject), random.Random(seed), size, creature=subject.creature)
    if path is not None:
        picture.save(path)
    return picture


def draw_subject_images(
    directory: str | PathLike[str],
    count: int = 5,
    size: int = 64,
    seed: int = 0,
    name: str | None = None,
    subject: Subject = SUBJECT,
) -> list[Path]:
    """Draw `count` pictures of a subject into `directory` (made if absent) as `subject-1.png` and so on.

    Args:
        directory: where they go; files of the same names are replaced.
        count: how many.
        size: edge of the square pictures in pixels.
        seed: of the first picture; the next one has the next seed.
        name: what captions call the subject, for example "sks creature". Then a caption such as "a sks creature on a blue
            background" is written beside every picture, as `subject-1.txt` and so on; None writes none.
        subject: which one.

    Returns:
        The pictures written, in order.

    Raises:
        OSError: `directory` cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"subject-{index + 1}.png" for index in range(count)]
    for index, path in enumerate(paths):
        draw_subject(path, size, seed + index, subject)
        if name is not None:
            background = subject_scene(seed + index, subject).background
            path.with_suffix(".txt").write_text(caption(name, background=background) + "\n")
    return paths
