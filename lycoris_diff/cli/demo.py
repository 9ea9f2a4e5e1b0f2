"""`lycoris-diff demo`: DreamBooth on the built-in base model, drawn, trained, saved, loaded and measured, offline."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .options import positive_int, seed_int
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..tiny.demo import DemoReport
    from ..training import TrainStep

ADAPTERS = (
    "lokr",
    "loha",
    "miss",
    "shira",
    "lora",
    "dora",
    "oft",
    "diag_oft",
    "boft",
    "glora",
    "tlora",
    "ia3",
    "norm",
    "full",
)
STEPS = 240

DESCRIPTION = """\
Teaches the built-in base model a creature that it has never seen, from five drawn pictures, by DreamBooth with prior
preservation: an adapter on UNet and text encoder is trained, saved, and loaded into the base model anew. pictures.png
shows prompts of the creature and other prompts before and after, loss.png the training. Both claims are measured in the
pixels: that the creature appears when it is asked for, and that other prompts still give what they ask for. The exit
code is 0 only if both hold. Nothing is downloaded; it takes about three minutes on two cores."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="teach the built-in base model a subject, and measure what it learned and kept",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", choices=ADAPTERS, default="lokr", help="algorithm (default: %(default)s)")
    parser.add_argument(
        "--out", default="demo-output", metavar="DIR", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=STEPS, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="seed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if the subject was learned and the rest kept, else 1."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with quiet_libraries(), Progress(*columns, TextColumn("{task.fields[loss]}"), console=errors) as progress:
        from ..tiny.demo import run_demo

        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int, loss: str = "") -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, loss="")
            progress.update(tasks[name], completed=done, total=total, loss=loss)

        def show_step(step: TrainStep) -> None:
            show(f"training {args.adapter}", step.step, step.total, f"loss {step.loss:.4f}")

        try:
            report = run_demo(args.adapter, args.out, args.steps, args.seed, on_step=show_step, on_stage=show)
        except BaseException:
            for task in tasks.values():
                progress.update(task, visible=False)  # leaves the error message alone on the screen
            raise
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)
    if not report.outcome.learned:
        errors.print("The subject was not learned; try more --steps.", style="bold red")
    if not report.outcome.kept:
        errors.print("Other prompts lost too much; try fewer --steps.", style="bold red")
    return 0 if report.succeeded else 1


def _print_report(report: DemoReport) -> None:
    training, outcome = report.training, report.outcome
    sizes = Table(title=f"{report.title} on the tiny base model: what was trained")
    sizes.add_column("component")
    sizes.add_column("parameters", justify="right")
    for component, parameters in training.parameters.items():
        sizes.add_row(component, f"{parameters:,}")
    sizes.add_section()
    sizes.add_row("together", f"{sum(training.parameters.values()):,}")

    measured = Table(title="what was measured in the pictures")
    for name in ("", "before", "after", ""):
        measured.add_column(name, justify="left" if not name else "right")
    measured.add_row(
        f'"{report.prompt}" looks like the subject\n(drawn pictures {outcome.subject_drawn:.2f}, after the autoencoder '
        f"{outcome.subject_coded:.2f})",
        f"{outcome.subject_before:.2f}",
        f"{outcome.subject_after:.2f}",
        "[green]learned[/]" if outcome.learned else "[red]not learned[/]",
    )
    measured.add_row(
        "other prompts: backgrounds, colours and shapes as asked",
        f"{outcome.others_before.right} of {outcome.others_before.total}",
        f"{outcome.others_after.right} of {outcome.others_after.total}",
        "[green]kept[/]" if outcome.kept else "[red]lost[/]",
    )
    measured.add_row("other prompts look like the subject", "", f"{outcome.others_subject:.2f}", "")
    measured.add_row("other prompts: mean change of a pixel, of 255", "", f"{outcome.others_distance:.1f}", "")
    change = training.held_out_after / training.held_out_before - 1
    measured.add_row(
        "loss on noise that training does not use",
        f"{training.held_out_before:.4f}",
        f"{training.held_out_after:.4f}",
        f"{change:+.0%}",
    )

    files = Table(show_header=False, title=f"{len(training.losses)} steps, {training.seconds_per_step:.2f} s each; written")
    for name, path in report.files.items():
        files.add_row(name, str(path))
    console = Console()
    for table in (sizes, measured, files):
        console.print(table)
