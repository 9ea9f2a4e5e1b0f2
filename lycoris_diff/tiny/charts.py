"""Charts and picture grids for the demo, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

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


def picture_rows(rows: Sequence[tuple[str, Sequence[Image.Image]]], title: str, cell: int = 160) -> Image.Image:
    """Lay out labelled rows of pictures under a title; each picture is shown `cell` pixels wide and high."""
    gap, label_height, head = 10, 30, 60
    columns = max(len(pictures) for _, pictures in rows)
    width = 4 * gap + columns * (cell + gap) - gap
    height = head + len(rows) * (label_height + cell + gap) + gap
    canvas = Image.new("RGB", (width, height), PAPER)
    text = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(text)
    pen.text((2 * gap * SCALE, 18 * SCALE), title, fill=INK, font=_font(22))
    tops = [head + index * (label_height + cell + gap) for index in range(len(rows))]
    for top, (label, _) in zip(tops, rows, strict=True):
        pen.text((2 * gap * SCALE, (top + 6) * SCALE), label, fill=MUTED, font=_font(14))
    canvas.paste(text.resize(canvas.size, Image.Resampling.LANCZOS))
    for top, (_, pictures) in zip(tops, rows, strict=True):
        for column, picture in enumerate(pictures):
            shown = picture.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(shown, (2 * gap + column * (cell + gap), top + label_height))
    return canvas


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
