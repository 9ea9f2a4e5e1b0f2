"""Pictures with captions that the tiny base model is trained on: one thing of one colour on one background."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from .figures import INK, SHAPES, WHITE, Colour, Creature, draw_creature, shape_mask

OVERSAMPLING = 4
CREATURE = "creature"
CREATURE_SIZE = 1.3  # its figure is thin and has details
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 216, 50),
    "green": (52, 158, 72),
    "blue": (40, 84, 200),
    "purple": (126, 58, 170),
    "pink": (246, 140, 184),
    "white": (248, 248, 248),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (20, 20, 24),
    "gray": (128, 128, 132),
    "brown": (120, 74, 40),
    "teal": (24, 140, 140),
    "yellow": COLOURS["yellow"],
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "white": COLOURS["white"],
}
#: diameter of the thing over the picture's edge, from and to
SIZES: dict[str, tuple[float, float]] = {"small": (0.34, 0.42), "": (0.46, 0.60), "big": (0.64, 0.76)}
#: words, and where the thing may stand as parts of the room it has: from and to, rightwards and downwards
PLACES: dict[str, tuple[str, tuple[float, float], tuple[float, float]]] = {
    "": ("", (-0.25, 0.25), (-0.25, 0.25)),
    "left": (" on the left", (-1.0, -0.75), (-0.25, 0.25)),
    "right": (" on the right", (0.75, 1.0), (-0.25, 0.25)),
    "top": (" at the top", (-0.25, 0.25), (-1.0, -0.75)),
    "bottom": (" at the bottom", (-0.25, 0.25), (0.75, 1.0)),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, by the names of the tables above; `shape` is one of `SHAPES` or `CREATURE`."""

    shape: str
    colour: str
    background: str
    size: str = ""
    place: str = ""

    def caption(self) -> str:
        """Return the scene in words, for example "a big red circle on the left on a blue background"."""
        return caption(self.shape, self.colour, self.background, self.size, self.place)

    @property
    def held_out(self) -> bool:
        """Whether this union of shape, colour and background is kept out of training: one in eight."""
        numbers = SHAPES.index(self.shape) if self.shape in SHAPES else 0
        numbers += 3 * list(COLOURS).index(self.colour) + 5 * list(BACKGROUNDS).index(self.background)
        return self.shape in SHAPES and numbers % 8 == 0


def caption(shape: str, colour: str = "", background: str = "", size: str = "", place: str = "") -> str:
    """Return a scene in words; what is empty is left out."""
    thing = " ".join(filter(None, (size, colour, shape)))
    article = "an" if thing[0] in "aeiou" else "a"
    behind = f" on a {background} background" if background else ""
    return f"{article} {thing}{PLACES[place][0]}{behind}"


def random_scene(rng: random.Random, shape: str | None = None, held_out: bool = False) -> Scene:
    """Draw a scene whose thing and background differ in colour.

    Args:
        rng: the source of chance.
        shape: one of `SHAPES` or `CREATURE`; None draws a creature in one of five cases, else any shape.
        held_out: whether the scene must be one that training never shows, or one that it may show.
    """
    while True:
        thing = shape or (CREATURE if rng.random() < 0.2 and not held_out else rng.choice(SHAPES))
        background = rng.choice(list(BACKGROUNDS))
        colour = rng.choice([name for name in COLOURS if name != background])
        scene = Scene(thing, colour, background, rng.choice(list(SIZES)), rng.choice(list(PLACES)))
        if scene.held_out == held_out:
            return scene


def random_caption(scene: Scene, rng: random.Random) -> str:
    """Return the scene in words of which some may be missing, so that the model learns every part by itself."""
    colour = scene.colour if rng.random() < 0.9 else ""
    background = scene.background if rng.random() < 0.85 else ""
    size = scene.size if rng.random() < 0.9 else ""
    place = scene.place if rng.random() < 0.9 else ""
    return caption(scene.shape, colour, background, size, place)


def draw_scene(scene: Scene, rng: random.Random, edge: int = 64, creature: Creature | None = None) -> Image.Image:
    """Draw a scene; `rng` chooses the exact shades, size, place and, of a creature, its looks.

    Args:
        scene: what to draw.
        rng: the source of chance.
        edge: of the square RGB picture in pixels.
        creature: the creature to draw in place of the scene's thing.
    """
    large = edge * OVERSAMPLING
    magnified = CREATURE_SIZE if scene.shape == CREATURE else 1.0
    radius = magnified * rng.uniform(*SIZES[scene.size]) / 2
    _, across, down = PLACES[scene.place]
    x = 0.5 + (0.5 - radius) * rng.uniform(*across)
    y = 0.5 + (0.5 - radius) * rng.uniform(*down)
    picture = Image.new("RGB", (large, large), _shade(BACKGROUNDS[scene.background], rng))
    if creature is None and scene.shape == CREATURE:
        creature = _random_creature(_shade(COLOURS[scene.colour], rng), rng)
    if creature is None:
        colour = Image.new("RGB", picture.size, _shade(COLOURS[scene.colour], rng))
        picture.paste(colour, (0, 0), shape_mask(scene.shape, large, (x, y), radius))
    else:
        figure = draw_creature(creature, round(2 * radius * large))
        picture.paste(figure, (round((x - radius) * large), round((y - radius) * large)), figure)
    return picture.resize((edge, edge), Image.Resampling.BOX)


def _random_creature(body: Colour, rng: random.Random) -> Creature:
    trim = rng.choice([body, INK, WHITE])
    return Creature(body, trim, trim, eyes=rng.randint(1, 3), antennae=rng.random() < 0.5)


def _shade(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, channel + rng.randint(-6, 6))) for channel in colour)
    return red, green, blue
