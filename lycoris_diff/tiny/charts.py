"""Charts and picture grids for the demo, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CAPTION_LINE, CAPTION_LINES = 14, 3
CAPTION_HEIGHT = CAPTION_LINE * CAPTION_LINES + 6
SCALE = 2  # everything is drawn twice as large and reduced, which smooths the edges
INK, MUTED, RULE, PAPER = "#20242c", "#6b7280", "#e3e6eb", "#ffffff"
FAINT, LINE, BEFORE, AFTER = "#a9c4ea", "#1f5fbf", "#c2541b", "#1c8a4d"


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Return the centred moving average of `values`; the window (default: a tenth of them) is cut off at both ends."""
    half = max(1, (window or len(values) // 10) // 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in windows]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round numbers (steps of 1, 2 or 5 times a power of ten) from `low` to `high`, inclusive."""
    raw = max(high - low, 1e-12) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def loss_chart(
    losses: Sequence[float],
    before: float,
    after: float,
    title: str = "Training loss",
    size: tuple[int, int] = (960, 540),
) -> Image.Image:
    """Draw the loss of every step, its moving average, and the held-out loss before and after as level lines.

    Args:
        losses: one finite value a step, at least one.
        before, after: held-out loss before the first and after the last step.
        title: heading.
        size: width and height in pixels.
    """
    canvas = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = (edge * SCALE for edge in (96, 92, size[0] - 108, size[1] - 68))
    everything = [*losses, before, after]
    margin = 0.06 * (max(everything) - min(everything) or 1.0)
    low, high = min(everything) - margin, max(everything) + margin

    def x_of(step: float) -> float:
        return left + (right - left) * (step - 1) / max(len(losses) - 1, 1)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    marks = ticks(low, high, count=8)
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 4
    for value in marks:
        pen.line([(left, y_of(value)), (right, y_of(value))], fill=RULE, width=SCALE)
        pen.text((left - 10 * SCALE, y_of(value)), f"{value:.{decimals}f}", fill=MUTED, font=_font(14), anchor="rm")
    for step in sorted({1, *(round(value) for value in ticks(1, len(losses)) if value >= 1)}):
        pen.line([(x_of(step), bottom), (x_of(step), bottom + 5 * SCALE)], fill=MUTED, width=SCALE)
        pen.text((x_of(step), bottom + 10 * SCALE), str(step), fill=MUTED, font=_font(14), anchor="mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=MUTED, width=SCALE)

    dot = 2 * SCALE
    for step, value in enumerate(losses, start=1):
        pen.ellipse([x_of(step) - dot, y_of(value) - dot, x_of(step) + dot, y_of(value) + dot], fill=FAINT)
    average = [(x_of(step), y_of(value)) for step, value in enumerate(smooth(losses), start=1)]
    if len(average) > 1:
        pen.line(average, fill=LINE, width=3 * SCALE, joint="curve")

    labels = _spread(y_of(before), y_of(after), 34 * SCALE)
    for value, y, name, colour in ((before, labels[0], "before", BEFORE), (after, labels[1], "after", AFTER)):
        _dashes(pen, left, right, y_of(value), colour)
        pen.text((right + 12 * SCALE, y), f"{name}\n{value:.4f}", fill=colour, font=_font(14), anchor="lm")

    pen.text((left, 22 * SCALE), title, fill=INK, font=_font(22))
    x = float(left)
    for name, colour in (("one step", FAINT), ("moving average", LINE), ("held-out loss (dashed)", MUTED)):
        pen.ellipse([x, 63 * SCALE, x + 10 * SCALE, 73 * SCALE], fill=colour)
        pen.text((x + 16 * SCALE, 68 * SCALE), name, fill=MUTED, font=_font(14), anchor="lm")
        x += 32 * SCALE + pen.textlength(name, font=_font(14))
    pen.text(((left + right) / 2, (size[1] - 22) * SCALE), "optimizer step", fill=MUTED, font=_font(14), anchor="mm")
    label = Image.new("RGB", (round(bottom - top), 24 * SCALE), PAPER)
    centre = (label.width / 2, label.height / 2)
    ImageDraw.Draw(label).text(centre, "loss (mean squared error)", fill=MUTED, font=_font(14), anchor="mm")
    canvas.paste(label.transpose(Image.Transpose.ROTATE_90), (14 * SCALE, round(top)))
    return canvas.resize(size, Image.Resampling.LANCZOS)


def picture_rows(rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[str]]], title: str, cell: int = 144) -> Image.Image:
    """Lay out rows of pictures under a title.

    Args:
        rows: of each a label, the pictures, and a caption under every picture; without captions they need no room.
        title: heading.
        cell: width and height at which pictures are shown, in pixels.
    """
    gap, head, label_height = 10, 60, 30
    columns = max(len(pictures) for _, pictures, _ in rows)
    lines = [max((len(_wrapped(caption, cell)) for caption in captions), default=0) for _, _, captions in rows]
    heights = [label_height + cell + gap + (6 + CAPTION_LINE * count if count else 0) for count in lines]
    canvas = _Canvas(4 * gap + columns * (cell + gap) - gap, head + sum(heights) + gap)
    canvas.text(2 * gap, 18, title, 22, INK)
    top = head
    for (label, pictures, captions), height in zip(rows, heights, strict=True):
        canvas.text(2 * gap, top + 6, label, 14, INK)
        for column, picture in enumerate(pictures):
            x = 2 * gap + column * (cell + gap)
            canvas.picture(x, top + label_height, picture, cell)
            if captions:
                canvas.caption(x, top + label_height + cell, captions[column], cell)
        top += height
    return canvas.image()


def picture_sheet(
    cells: Sequence[tuple[Image.Image, str, bool]], title: str, columns: int = 10, cell: int = 128
) -> Image.Image:
    """Lay out pictures in a grid, each over its caption; what is wrong gets a frame and a caption in another colour.

    Args:
        cells: picture, caption and whether the picture is right.
        title: heading.
        columns: pictures in a row.
        cell: width and height at which pictures are shown, in pixels.
    """
    gap, head = 10, 52
    rows = -(-len(cells) // columns)
    canvas = _Canvas(3 * gap + columns * (cell + gap), head + rows * (cell + CAPTION_HEIGHT + gap) + gap)
    canvas.text(2 * gap, 14, title, 18, INK)
    for index, (picture, caption, right) in enumerate(cells):
        x = 2 * gap + index % columns * (cell + gap)
        y = head + index // columns * (cell + CAPTION_HEIGHT + gap)
        if not right:
            canvas.box(x - 4, y - 4, x + cell + 3, y + cell + 3, BEFORE)
        canvas.picture(x, y, picture, cell)
        canvas.caption(x, y + cell, caption, cell, MUTED if right else BEFORE)
    return canvas.image()


class _Canvas:
    """Smooth text beside pictures whose pixels stay as they are."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.drawn = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.pen = ImageDraw.Draw(self.drawn)
        self.pictures: list[tuple[int, int, Image.Image]] = []

    def text(self, x: float, y: float, text: str, size: int, colour: str) -> None:
        self.pen.text((x * SCALE, y * SCALE), text, fill=colour, font=_font(size))

    def caption(self, x: float, y: float, text: str, width: int, colour: str = MUTED) -> None:
        for row, line in enumerate(_wrapped(text, width)):
            self.text(x, y + 4 + CAPTION_LINE * row, line, 11, colour)

    def box(self, left: int, top: int, right: int, bottom: int, colour: str) -> None:
        self.pen.rectangle([left * SCALE, top * SCALE, right * SCALE, bottom * SCALE], fill=colour)

    def picture(self, x: int, y: int, picture: Image.Image, edge: int) -> None:
        self.pictures.append((x, y, picture.convert("RGB").resize((edge, edge), Image.Resampling.NEAREST)))

    def image(self) -> Image.Image:
        canvas = self.drawn.resize(self.size, Image.Resampling.LANCZOS)
        for x, y, picture in self.pictures:
            canvas.paste(picture, (x, y))
        return canvas


def _wrapped(text: str, width: int) -> list[str]:
    """Break a caption at spaces into at most `CAPTION_LINES` lines."""
    font = _font(11)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width * SCALE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:CAPTION_LINES]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def _spread(first: float, second: float, distance: float) -> tuple[float, float]:
    """Move two label positions apart, symmetrically, until they are `distance` away from each other."""
    push = max(0.0, distance - abs(first - second)) / 2
    return (first - push, second + push) if first <= second else (first + push, second - push)


def _dashes(pen: ImageDraw.ImageDraw, left: float, right: float, y: float, colour: str) -> None:
    dash = 9 * SCALE
    x = left
    while x < right:
        pen.line([(x, y), (min(x + dash, right), y)], fill=colour, width=2 * SCALE)
        x += 2 * dash
