"""Five (or more) pictures of one made-up creature, drawn with Pillow: training pictures that need no download.

The creature always looks the same: a teal body with orange bands, one big eye, two antennae with yellow bobbles and
two feet. Where it stands, how large it is, which way it leans and what is behind it change from picture to picture.
"""

from __future__ import annotations

import math
import random
from os import PathLike
from pathlib import Path

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

TEAL, ORANGE, YELLOW = (32, 164, 160), (244, 132, 44), (255, 210, 63)
WHITE, INK = (255, 255, 255), (24, 26, 38)
OVERSAMPLING = 8


def draw_subject(path: str | PathLike[str] | None = None, size: int = 64, seed: int = 0) -> Image.Image:
    """Draw the creature on one background; `seed` chooses background, place, size and lean.

    Args:
        path: where to save the picture as well (its ending chooses the format); None saves nothing.
        size: edge of the square picture in pixels.
        seed: any integer; five consecutive seeds give five different backgrounds.

    Returns:
        An RGB picture, the same for the same arguments.

    Raises:
        OSError: `path` cannot be written.
    """
    rng = random.Random(seed)
    canvas_size = size * OVERSAMPLING
    canvas = Image.new("RGB", (canvas_size, canvas_size))
    BACKGROUNDS[seed % len(BACKGROUNDS)](canvas, rng)
    height = canvas_size * rng.uniform(0.62, 0.85)
    figure = _creature(round(height)).rotate(rng.uniform(-12, 12), resample=Image.Resampling.BICUBIC)
    left = rng.uniform(-0.1 * height, canvas_size - 0.9 * height)
    top = canvas_size * 0.97 - height
    canvas.paste(figure, (round(left), round(top)), figure)
    picture = canvas.resize((size, size), Image.Resampling.LANCZOS)
    if path is not None:
        picture.save(path)
    return picture


def draw_subject_images(directory: str | PathLike[str], count: int = 5, size: int = 64, seed: int = 0) -> list[Path]:
    """Draw `count` pictures of the creature into `directory` (made if absent) as `subject-1.png` and so on.

    Returns:
        The files written, in order; files of the same names are replaced.

    Raises:
        OSError: `directory` cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"subject-{index + 1}.png" for index in range(count)]
    for index, path in enumerate(paths):
        draw_subject(path, size=size, seed=seed + index)
    return paths


def _creature(height: int) -> Image.Image:
    """Return the creature as an RGBA picture of `height` x `height` pixels, standing on the lower edge."""
    figure = Image.new("RGBA", (height, height))
    pen = ImageDraw.Draw(figure)
    unit = height / 100

    def box(x: float, y: float, radius_x: float, radius_y: float) -> list[float]:
        return [(x - radius_x) * unit, (y - radius_y) * unit, (x + radius_x) * unit, (y + radius_y) * unit]

    outline = round(2.5 * unit)
    for side in (-1, 1):
        pen.line([(50 + 8 * side) * unit, 34 * unit, (50 + 20 * side) * unit, 12 * unit], fill=INK, width=round(3 * unit))
        pen.ellipse(box(50 + 20 * side, 11, 6.5, 6.5), fill=YELLOW, outline=INK, width=outline)
        pen.ellipse(box(50 + 14 * side, 91, 11, 6.5), fill=ORANGE, outline=INK, width=outline)
        pen.ellipse(box(50 + 31 * side, 63, 7, 10), fill=TEAL, outline=INK, width=outline)

    body = Image.new("RGBA", (height, height))
    brush = ImageDraw.Draw(body)
    brush.rectangle([0, 0, height, height], fill=TEAL)
    for y in (66, 80):
        brush.rectangle([0, y * unit, height, (y + 7) * unit], fill=ORANGE)
    shape = Image.new("L", (height, height))
    ImageDraw.Draw(shape).ellipse(box(50, 58, 28, 33), fill=255)
    figure.paste(body, (0, 0), shape)
    pen.ellipse(box(50, 58, 28, 33), outline=INK, width=outline)
    pen.ellipse(box(50, 46, 13.5, 13.5), fill=WHITE, outline=INK, width=outline)
    pen.ellipse(box(52, 47, 6, 6), fill=INK)
    pen.ellipse(box(54, 44.5, 2, 2), fill=WHITE)
    return figure


def _meadow(canvas: Image.Image, rng: random.Random) -> None:
    _gradient(canvas, (120, 196, 250), (222, 242, 255))
    size = canvas.width
    pen = ImageDraw.Draw(canvas)
    _disc(pen, size * rng.uniform(0.15, 0.85), size * 0.18, size * 0.1, (255, 236, 120))
    _disc(pen, size * 0.3, size * 1.5, size * 0.85, (116, 190, 84))
    _disc(pen, size * 0.85, size * 1.45, size * 0.75, (88, 164, 70))


def _night(canvas: Image.Image, rng: random.Random) -> None:
    _gradient(canvas, (16, 18, 58), (74, 52, 120))
    size = canvas.width
    pen = ImageDraw.Draw(canvas)
    for _ in range(26):
        _disc(pen, size * rng.random(), size * rng.random() * 0.8, size * rng.uniform(0.006, 0.016), (250, 246, 214))
    _disc(pen, size * rng.uniform(0.2, 0.8), size * 0.2, size * 0.11, (240, 236, 205))
    pen.rectangle([0, size * 0.86, size, size], fill=(40, 32, 70))


def _sunset(canvas: Image.Image, rng: random.Random) -> None:
    _gradient(canvas, (98, 60, 140), (255, 170, 96))
    size = canvas.width
    pen = ImageDraw.Draw(canvas)
    _disc(pen, size * rng.uniform(0.3, 0.7), size * 0.62, size * 0.24, (255, 226, 140))
    pen.rectangle([0, size * 0.68, size, size], fill=(52, 74, 140))
    for row in range(4):
        y = size * (0.74 + 0.07 * row)
        pen.rectangle([0, y, size, y + size * 0.018], fill=(110, 120, 190))


def _tiles(canvas: Image.Image, rng: random.Random) -> None:
    size = canvas.width
    pen = ImageDraw.Draw(canvas)
    pen.rectangle([0, 0, size, size], fill=(250, 232, 214))
    cells = rng.choice((5, 6))
    edge = math.ceil(size / cells)
    for row in range(cells):
        for column in range(row % 2, cells, 2):
            pen.rectangle([column * edge, row * edge, (column + 1) * edge, (row + 1) * edge], fill=(238, 150, 158))


def _dots(canvas: Image.Image, rng: random.Random) -> None:
    size = canvas.width
    pen = ImageDraw.Draw(canvas)
    pen.rectangle([0, 0, size, size], fill=(250, 214, 92))
    shift = rng.random()
    for row in range(-1, 7):
        for column in range(-1, 7):
            x = (column + shift + (row % 2) / 2) * size / 5
            _disc(pen, x, (row + shift) * size / 5, size * 0.045, (226, 104, 76))


BACKGROUNDS = (_meadow, _night, _sunset, _tiles, _dots)


def _gradient(canvas: Image.Image, top: Colour, bottom: Colour) -> None:
    """Fill `canvas` with a vertical gradient."""
    ramp = Image.linear_gradient("L").resize(canvas.size)
    canvas.paste(Image.composite(Image.new("RGB", canvas.size, bottom), Image.new("RGB", canvas.size, top), ramp))


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
