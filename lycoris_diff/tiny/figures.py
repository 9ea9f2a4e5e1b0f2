"""Shapes and creatures, drawn with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
RING_HOLE = 0.55  # radius of a ring's hole over the ring's own
INK: Colour = (24, 26, 38)
WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Creature:
    """What one creature looks like.

    Attributes:
        body: colour of body and arms.
        trim: colour of the feet, and of the bands if it has any.
        tips: colour of the knobs on its antennae.
        eyes: 1 (a large one), 2 or 3.
        bands: whether two bands run around the body.
        antennae: whether it has two.
    """

    body: Colour
    trim: Colour
    tips: Colour
    eyes: int = 2
    bands: bool = False
    antennae: bool = False


def shape_mask(shape: str, edge: int, centre: Point = (0.5, 0.5), radius: float = 0.5) -> Image.Image:
    """Return a picture of mode "L" and size `edge` x `edge`, 255 inside `shape` (one of `SHAPES`) and 0 outside.

    Args:
        shape: name of the shape.
        edge: in pixels.
        centre: where the shape's circle has its centre, as parts of the edge from the left and from the top.
        radius: of that circle, as a part of the edge.
    """
    mask = Image.new("L", (edge, edge))
    pen = ImageDraw.Draw(mask)
    x, y, r = centre[0] * edge, centre[1] * edge, radius * edge
    pen.polygon([(x + r * px, y + r * py) for px, py in _outline(shape)], fill=255)
    if shape == "ring":
        hole = RING_HOLE * r
        pen.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
    return mask


def draw_creature(creature: Creature, edge: int) -> Image.Image:
    """Return the creature as an RGBA picture of `edge` x `edge` pixels, standing on the lower edge."""
    figure = Image.new("RGBA", (edge, edge))
    pen = ImageDraw.Draw(figure)
    unit = edge / 100
    outline = round(2.5 * unit)

    def box(x: float, y: float, radius_x: float, radius_y: float) -> list[float]:
        return [(x - radius_x) * unit, (y - radius_y) * unit, (x + radius_x) * unit, (y + radius_y) * unit]

    for side in (-1, 1):
        if creature.antennae:
            pen.line([(50 + 8 * side) * unit, 34 * unit, (50 + 20 * side) * unit, 12 * unit], fill=INK, width=round(3 * unit))
            pen.ellipse(box(50 + 20 * side, 11, 7, 7), fill=creature.tips, outline=INK, width=outline)
        pen.ellipse(box(50 + 14 * side, 91, 11, 6.5), fill=creature.trim, outline=INK, width=outline)
        pen.ellipse(box(50 + 31 * side, 63, 7, 10), fill=creature.body, outline=INK, width=outline)

    body = Image.new("RGB", (edge, edge), creature.body)
    if creature.bands:
        brush = ImageDraw.Draw(body)
        for y in (64, 78):
            brush.rectangle([0, y * unit, edge, (y + 7) * unit], fill=creature.trim)
    torso = Image.new("L", (edge, edge))
    ImageDraw.Draw(torso).ellipse(box(50, 58, 28, 33), fill=255)
    figure.paste(body, (0, 0), torso)
    pen.ellipse(box(50, 58, 28, 33), outline=INK, width=outline)
    radius = {1: 13.5, 2: 9.0, 3: 7.0}[creature.eyes]
    for index in range(creature.eyes):
        x = 50 + (index - (creature.eyes - 1) / 2) * 2 * radius
        pen.ellipse(box(x, 46, radius, radius), fill=WHITE, outline=INK, width=outline)
        pen.ellipse(box(x + 0.1 * radius, 46, 0.45 * radius, 0.45 * radius), fill=INK)
    return figure


def _outline(shape: str) -> list[Point]:
    """Return the corners of `shape` in the unit circle, y pointing down."""
    if shape in _POLYGONS:
        return _POLYGONS[shape]
    turns = [2 * math.pi * index / 64 for index in range(64)]
    if shape == "heart":
        return [
            (
                16 * math.sin(t) ** 3 / 17,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 15.5,
            )
            for t in turns
        ]
    return [(math.cos(t), math.sin(t)) for t in turns]


def _star() -> list[Point]:
    radii = [(1.0, 0.42)[index % 2] for index in range(10)]
    return [(r * math.sin(math.pi * index / 5), -r * math.cos(math.pi * index / 5)) for index, r in enumerate(radii)]


def _cross(arm: float = 0.33, end: float = 0.95) -> list[Point]:
    quarter = [(-arm, -end), (arm, -end), (arm, -arm)]
    corners = list(quarter)
    for _ in range(3):
        quarter = [(-y, x) for x, y in quarter]
        corners += quarter
    return corners


_POLYGONS: dict[str, list[Point]] = {
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "star": _star(),
    "cross": _cross(),
}
