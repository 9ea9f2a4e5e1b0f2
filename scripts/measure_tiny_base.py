#!/usr/bin/env python3
"""How well the embedded base model draws what it is asked for, read from its pixels (`lycoris_diff.tiny.measure`).

Draws 200 captions of scenes whose union of shape, colour and background training never showed, each from noise of its own,
and reads background, colour and shape from the pictures.

    python scripts/measure_tiny_base.py                             # the committed weights; three minutes on two cores
    python scripts/measure_tiny_base.py --weights OUT/tiny_base.safetensors
    python scripts/measure_tiny_base.py --document docs/tiny.md     # also renew the document's tables and its picture

The exit code is 0 only if every bar is met.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import Progress

from lycoris_diff.tiny.charts import picture_sheet
from lycoris_diff.tiny.measure import GUIDANCE, PARTS, STEPS, SceneScores, draw_prompts, held_out_pairs, measure_scenes
from lycoris_diff.tiny.pipeline import COMPONENTS, WEIGHTS, build_pipeline, load_weights

BEGIN, END = "<!-- measure_tiny_base: begin -->", "<!-- measure_tiny_base: end -->"
BARS = {"background": 0.90, "colour": 0.90, "shape": 0.80}
TIME_BAR = 1.5  # seconds
SIZE_BAR = 16e6  # bytes
SAMPLES = 40  # pictures on the sheet
TITLES = {"background": "background colour", "colour": "object colour", "shape": "shape"}


def main() -> None:
    """Measure, print, and renew the document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: those in the package")
    parser.add_argument("--count", type=int, default=200, help="pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="guidance scale (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and the noise (default: %(default)s)")
    parser.add_argument("--document", type=Path, help="renew the section between the markers, and images/tiny-samples.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = build_pipeline()
    load_weights(pipe, args.weights)
    scores = measure(pipe, args)
    seconds = time_of_picture(pipe, args)
    report = markdown(scores, seconds, args)
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if args.document:
        renew(args.document, report)
        sheet = args.document.parent / "images" / "tiny-samples.png"
        sheet.parent.mkdir(exist_ok=True)
        samples(scores).save(sheet, optimize=True)
    raise SystemExit(0 if all(scores.rate(part).share >= bar for part, bar in BARS.items()) and seconds < TIME_BAR else 1)


def measure(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> SceneScores:
    """Draw and read all pairs, with a progress bar."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("pictures", total=args.count)
        return measure_scenes(
            pipe,
            held_out_pairs(args.count, args.seed),
            args.steps,
            args.guidance,
            args.batch,
            lambda done, _: progress.update(task, completed=done),
        )


def time_of_picture(pipe: StableDiffusionPipeline, args: argparse.Namespace, rounds: int = 5) -> float:
    """Return the seconds that one picture takes, drawn alone; the median of some after one to warm up."""
    seconds = []
    for seed in range(rounds + 1):
        start = time.perf_counter()
        draw_prompts(pipe, ["a red circle on a blue background"], [seed], args.steps, args.guidance)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[rounds // 2]


def markdown(scores: SceneScores, seconds: float, args: argparse.Namespace) -> str:
    """Return all that was measured as Markdown."""
    size = args.weights.stat().st_size
    total = len(scores.pairs)
    lines = [
        f"{total} captions, {args.steps} sampling steps (DDIM), guidance scale {args.guidance:g}; 95 % intervals are Wilson's.",
        "",
        "| | measured | 95 % interval | bar | |",
        "|---|---:|---:|---:|---|",
    ]
    for part, bar in BARS.items():
        rate = scores.rate(part)
        low, high = rate.interval()
        verdict = _verdict(rate.share >= bar, f"{100 * (bar - rate.share):.1f} points short")
        lines.append(f"| {TITLES[part]} right | {rate.share:.1%} | {low:.1%} to {high:.1%} | ≥ {bar:.0%} | {verdict} |")
    everything = scores.rate()
    low, high = everything.interval()
    lines.append(f"| all three right | {everything.share:.1%} | {low:.1%} to {high:.1%} | | |")
    verdict = _verdict(seconds < TIME_BAR, f"{seconds - TIME_BAR:.2f} s over")
    lines.append(f"| one picture, alone | {seconds:.2f} s | | < {TIME_BAR} s | {verdict} |")
    lines.append(f"| one of {args.batch} drawn at once | {scores.seconds:.2f} s | | | |")
    verdict = _verdict(size < SIZE_BAR, f"{(size - SIZE_BAR) / 1e6:.1f} MB over")
    lines.append(f"| file with all weights, float16 | {size / 1e6:.1f} MB | | < {SIZE_BAR / 1e6:.0f} MB | {verdict} |")
    lines += ["", "Right by what was asked for:", ""]
    for part in PARTS:
        words = ", ".join(f"{name} {rate.right}/{rate.total}" for name, rate in scores.by_name(part).items())
        lines.append(f"- {TITLES[part]}: {words}")
    lines += ["", "Mistakes, what was asked for and what was drawn:", ""]
    for part in PARTS:
        pairs = [f"{asked} → {drawn or 'nothing clear'} {count}" for (asked, drawn), count in scores.mistakes(part).items()]
        lines.append(f"- {TITLES[part]}: {', '.join(pairs) or 'none'}")
    lines += [
        "",
        f"Measured on {args.threads} threads of {_processor()}, torch {version('torch')}, diffusers {version('diffusers')}, "
        f"{_parameters():.1f} million parameters.",
    ]
    return "\n".join(lines)


def samples(scores: SceneScores) -> object:
    """Return the sheet of the first pictures, in the order in which they were drawn."""
    cells = []
    for (scene, _), picture, reading in list(zip(scores.pairs, scores.pictures, scores.readings, strict=True))[:SAMPLES]:
        right = reading.agrees(scene)
        seen = "" if right else f" [{reading.colour} {reading.shape or '?'} on {reading.background}]"
        cells.append((picture, scene.caption() + seen, right))
    title = f"The first {len(cells)} of {len(scores.pairs)} held-out captions; orange: read as something else"
    return picture_sheet(cells, title)


def renew(document: Path, report: str) -> None:
    """Put `report` between the document's markers."""
    text = document.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{document} has no {BEGIN} ... {END}")
    document.write_text(pattern.sub(lambda _: f"{BEGIN}\n{report}\n{END}", text), encoding="utf-8")


def _verdict(met: bool, otherwise: str) -> str:
    return "met" if met else f"missed: {otherwise}"


def _parameters() -> float:
    pipe = build_pipeline()
    return sum(parameter.numel() for name in COMPONENTS for parameter in getattr(pipe, name).parameters()) / 1e6


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
