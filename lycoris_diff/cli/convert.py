"""`lycoris-diff convert`: an adapter file, or a folder of them, from one community format to another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..checkpoints.convert import ConvertReport

#: as lycoris_diff.checkpoints.formats; named here so that --help needs no torch
FORMATS = ("kohya", "lycoris", "peft", "diffusers", "comfyui", "ai-toolkit", "onetrainer")
DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}

DESCRIPTION = """\
Converts an adapter file or a PEFT directory of any community format into another format, so that its own readers load it
with the same change of every weight. A folder is converted file by file into another folder. What the format cannot say is
refused with the reason, and nothing is written then. Unknown metadata and embedded tensors are kept.

  kohya       sd-scripts, A1111, ComfyUI       peft        a directory for PEFT
  lycoris     LyCORIS' wrapper, ComfyUI        diffusers   load_lora_weights
  comfyui     dotted native names              ai-toolkit, onetrainer"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "convert",
        help="an adapter file, or a folder of them, into another format",
        description=DESCRIPTION,
        epilog="The exit code is 1 if any file was refused.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help=".safetensors file, PEFT directory, or a folder of these")
    parser.add_argument("target", metavar="OUT", help="file to write; a directory for peft and for folders")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="sd15, sdxl, flux ... or a pipeline's directory (default: guessed from names and shapes)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the factors (default: as they are)")
    parser.add_argument("--partial", action="store_true", help="leave out what cannot be read or placed instead of refusing")
    parser.add_argument("--overwrite", action="store_true", help="OUT may be IN itself")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0 if everything was written, else 1."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with quiet_libraries(), Progress(*columns, console=errors, transient=True) as progress:
        import torch

        from ..checkpoints.convert import convert_checkpoint

        files = progress.add_task("files", total=None, visible=False)
        modules = progress.add_task("reading", total=None)

        def on_file(number: int, total: int, path: str) -> None:
            progress.update(files, completed=number, total=total, visible=total > 1)
            progress.reset(modules, description=escape(Path(path).name), total=None)

        report = convert_checkpoint(
            args.source,
            args.target,
            args.format,
            base_model=args.base_model,
            dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else None,
            strict=not args.partial,
            overwrite=args.overwrite,
            on_file=on_file,
            progress=lambda done, total: progress.update(modules, completed=done, total=total),
        )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, Console())
    refused = sum(bool(f.error) for f in report.files)
    if refused and not args.json:
        errors.print(f"{refused} of {len(report.files)} files were refused.", style="bold red")
    return 1 if refused else 0


def print_report(report: ConvertReport, console: Console) -> None:
    """One row a file, then what was noted."""
    table = Table(title=f"to {report.format}")
    for column in ("file", "from", "base model", "algorithms"):
        table.add_column(column, overflow="fold")
    for column in ("modules", "MiB"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in report.files:
        algorithms = ", ".join(f"{name} {count}" for name, count in row.algorithms.items())
        figures = (str(sum(row.modules.values())), f"{row.bytes / 2**20:.2f}")
        name, base = Path(row.source).name, Path(row.base_model).name
        result = "[red]refused[/red]" if row.error else "written"
        table.add_row(escape(name), row.dialect, escape(base), algorithms, *figures, result)
    console.print(table)
    for row in report.files:
        for line in [row.error or f"written to {row.target}", *row.notes]:
            console.print(f"{Path(row.source).name}: {line}", markup=False, highlight=False, soft_wrap=True)
