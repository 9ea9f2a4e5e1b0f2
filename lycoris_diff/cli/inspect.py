"""`lycoris-diff inspect`: what an adapter file holds, block by block."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import AdapterError
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from ..checkpoints.inspect import Block, InspectReport

DESCRIPTION = """\
Reads an adapter file or a PEFT directory of any community format and prints what it holds: the algorithm, ranks and
strengths of every block with the place the strength comes from, the size of each block's change (the Frobenius norm, as
trained), the base model it seems to be for, who seems to have written it, and whatever cannot be used. Nothing in the file
is executed, and pickles are refused."""

BAR = 28
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LONGEST_LIST = 12


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="what an adapter file holds",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help=".safetensors file or PEFT directory")
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="sd15, sdxl, flux ... or a pipeline's directory (default: guessed from names and shapes)",
    )
    parser.add_argument("--plot", metavar="PNG", type=picture_name, help="draw the blocks' norms into this picture")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    parser.set_defaults(run=run)


def picture_name(text: str) -> str:
    """A path that ends in .png."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return text


def run(args: argparse.Namespace) -> int:
    """Inspect a file and return 0."""
    errors = Console(stderr=True)
    with quiet_libraries(), errors.status(f"reading {escape(args.file)}"):
        from ..checkpoints.inspect import inspect_checkpoint

        report = inspect_checkpoint(args.file, args.base_model)
    if args.plot:
        if not any(block.norm is not None and math.isfinite(block.norm) for block in report.blocks):
            raise AdapterError(
                f"{args.file}: no block has a norm to draw: the changes depend on the base model's weights, or are not finite"
            )
        with quiet_libraries():  # the fonts and colours come with the tiny pipeline, whose libraries have remarks
            norm_chart(report.blocks, f"{Path(args.file).name}: norm of the change by block").save(args.plot)
    if args.json:
        print(json.dumps(report.to_dict() | ({"plot": args.plot} if args.plot else {}), indent=2, allow_nan=False))
    else:
        print_report(report, Console())
        if args.plot:
            Console().print(f"chart: {args.plot}", markup=False)
    return 0


def print_report(report: InspectReport, console: Console) -> None:
    """Three tables: the file, its blocks, and what is wrong with it."""
    summary = Table(show_header=False, title=escape(Path(report.path).name))
    for name, value in _facts(report):
        summary.add_row(name, escape(value))
    console.print(summary)

    blocks = Table()
    blocks.add_column("block", no_wrap=True)
    blocks.add_column("n", justify="right")
    for column in ("algorithm", "rank", "alpha"):
        blocks.add_column(column)
    blocks.add_column("norm", justify="right", no_wrap=True)
    room = max(6, min(BAR, console.width - 84))
    blocks.add_column("", min_width=room, no_wrap=True)
    most = max((b.norm for b in report.blocks if b.norm is not None and math.isfinite(b.norm)), default=0.0)
    last = ""
    for block in report.blocks:
        if block.component != last:
            blocks.add_section()
            blocks.add_row(f"[bold]{escape(block.component)}[/bold]", str(report.modules[block.component]))
        alphas = " ".join(text for text in (_values(block.alphas), f"({', '.join(block.alpha_sources)})") if text)
        texts = (", ".join(block.algorithms), _values(block.ranks), alphas)
        blocks.add_row(escape(block.name), str(block.modules), *texts, _norm(block.norm), _bar(block.norm, most, room))
        last = block.component
    console.print(blocks)

    if any(b.norm is None for b in report.blocks):
        console.print("?: the change depends on the base model's weights (for MiSS, on the size of its layers)")
    for title, found in _troubles(report):
        console.print(f"[bold]{title}[/bold] ({len(found)})")
        for line in found[:_LONGEST_LIST]:
            console.print(f"  {line}", markup=False, highlight=False)
        if len(found) > _LONGEST_LIST:
            console.print(f"  and {len(found) - _LONGEST_LIST} more; --json lists all")


def _facts(report: InspectReport) -> list[tuple[str, str]]:
    title = report.metadata.get("modelspec.title") or report.metadata.get("ss_output_name", "")
    rows = [
        ("title", title[:200]),
        ("size", f"{report.bytes / 2**20:,.2f} MiB, {report.parameters:,} values, {_counts(report.dtypes)}"),
        ("format", report.dialect),
        ("trainer", report.trainer or "unknown"),
        ("base model", report.base_model or "unknown"),
        ("algorithms", _counts(report.algorithms)),
        ("modules", _counts(report.modules)),
    ]
    return [row for row in rows if row[1]]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _troubles(report: InspectReport) -> list[tuple[str, list[str]]]:
    groups = {
        "not understood": report.unknown,
        "no such module": {k: v and f"nearest is {v}" for k, v in report.unmatched.items()},
        "wrong shape": report.wrong_shape,
        "left out for another name": report.conflicts,
    }
    found = [(title, [f"{k}: {v}" if v else k for k, v in rows.items()]) for title, rows in groups.items() if rows]
    notes = [("no adapter", report.extras), ("notes", report.notes)]
    return found + [(title, lines) for title, lines in notes if lines]


def _values(values: Sequence[float]) -> str:
    """A few numbers, or the range of many."""
    if len(values) > 4:
        return f"{values[0]:g} to {values[-1]:g}"
    return ", ".join(f"{v:g}" for v in values)


def _norm(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _bar(value: float | None, most: float, room: int) -> str:
    eighths = round(8 * room * value / most) if value and most and math.isfinite(value) else 0
    whole, part = divmod(eighths, 8)
    return "█" * whole + _EIGHTHS[part].strip()


# --- the picture --------------------------------------------------------------------------------------------------------------
def norm_chart(blocks: Sequence[Block], title: str, width: int = 1100) -> Image.Image:
    """Horizontal bars, one a block that has a norm, in the order of the model."""
    from PIL import Image, ImageDraw, ImageFont

    from ..tiny.charts import INK, LINE, MUTED, PAPER, RULE, SCALE, ticks

    def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(size * SCALE)

    drawn = [(f"{b.component}  {b.name}", b.norm) for b in blocks if b.norm is not None and math.isfinite(b.norm)]
    row, top, left, right = 22, 64, 380, width - 90
    height = top + row * len(drawn) + 52
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(canvas)
    most = max(norm for _, norm in drawn) or 1.0
    pen.text((20 * SCALE, 18 * SCALE), title, fill=INK, font=font(20))
    bottom = top + row * len(drawn)
    for mark in ticks(0.0, most):
        x = (left + (right - left) * mark / most) * SCALE
        pen.line([(x, top * SCALE), (x, bottom * SCALE)], fill=RULE, width=SCALE)
        pen.text((x, (bottom + 8) * SCALE), f"{mark:g}", fill=MUTED, font=font(13), anchor="mt")
    for number, (name, norm) in enumerate(drawn):
        y = top + row * number + row / 2
        end = left + (right - left) * norm / most
        pen.rectangle([left * SCALE, (y - 7) * SCALE, max(end, left + 1) * SCALE, (y + 7) * SCALE], fill=LINE)
        pen.text(((left - 10) * SCALE, y * SCALE), name[-52:], fill=MUTED, font=font(13), anchor="rm")
        pen.text(((end + 8) * SCALE, y * SCALE), f"{norm:.3g}", fill=INK, font=font(13), anchor="lm")
    label = "Frobenius norm of the change, as trained"
    pen.text(((left + right) / 2 * SCALE, (height - 14) * SCALE), label, fill=MUTED, font=font(13), anchor="mm")
    return canvas.resize((width, height), Image.Resampling.LANCZOS)
