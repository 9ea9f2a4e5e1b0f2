"""`lycoris-diff demo`: an adapter trained, saved, loaded and compared in about a minute, with nothing to download."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .options import positive_int, seed_int
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..tiny.demo import DemoReport

ADAPTERS = ("lokr", "loha", "miss", "shira", "lora")

DESCRIPTION = """\
Draws five pictures of one subject, trains an adapter on the UNet and the text encoder of a small built-in Stable
Diffusion pipeline, saves it, loads it into a fresh pipeline, and writes the pictures before and after and the loss
curve. Nothing is downloaded. The built-in pipeline has random weights, so its pictures are noise before and after;
what was learned shows in the loss. The exit code is 0 only if the loss on held-out noise fell."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="train, save and load an adapter on a built-in pipeline",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", choices=ADAPTERS, default="lokr", help="algorithm (default: %(default)s)")
    parser.add_argument(
        "--out", default="demo-output", metavar="DIR", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=120, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="seed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if the held-out loss fell, else 1."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with quiet_libraries(), one_thread(), Progress(*columns, TextColumn("{task.fields[loss]}"), console=errors) as progress:
        from ..tiny.demo import run_demo

        task = progress.add_task(f"training {args.adapter}", total=args.steps, loss="")
        try:
            report = run_demo(
                args.adapter,
                args.out,
                steps=args.steps,
                seed=args.seed,
                on_step=lambda step: progress.update(task, completed=step.step, loss=f"loss {step.loss:.4f}"),
            )
        except BaseException:
            progress.update(task, visible=False)  # leaves the error message alone on the screen
            raise
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    if report.training.improved:
        return 0
    errors.print("The held-out loss did not fall; try more --steps.", style="bold red")
    return 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: the tiny model's layers gain little from more, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _print_report(report: DemoReport) -> None:
    training = report.training
    table = Table(title=f"{report.title} on the tiny pipeline")
    table.add_column("component")
    table.add_column("trained parameters", justify="right")
    table.add_column("file size", justify="right")
    for component, parameters in training.parameters.items():
        table.add_row(component, f"{parameters:,}", f"{training.bytes[component] / 1024:,.0f} KiB")
    total = sum(training.parameters.values())
    table.add_section()
    table.add_row("together", f"{total:,}", f"{sum(training.bytes.values()) / 1024:,.0f} KiB")

    change = training.held_out_after / training.held_out_before - 1
    results = Table(show_header=False)
    results.add_row("held-out loss before", f"{training.held_out_before:.4f}")
    results.add_row("held-out loss after", f"{training.held_out_after:.4f}  ({change:+.0%})")
    results.add_row("steps", f"{len(training.losses)}, {training.seconds_per_step:.3f} s each")
    for name, path in report.files.items():
        results.add_row(name, str(path))
    console = Console()
    console.print(table)
    console.print(results)
