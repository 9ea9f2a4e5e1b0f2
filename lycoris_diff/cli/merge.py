"""`lycoris-diff merge`: a pipeline with adapters written into its weights for good."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..errors import AdapterError
from ..merging import RequantizeReport
from .pipelines import add_pipeline_arguments, load_adapters, load_pipeline, show, summary
from .quiet import quiet_libraries

DESCRIPTION = """\
Writes adapters into the weights of a pipeline and saves it as a diffusers directory, which needs neither this library nor
the adapter files any more. Sums are formed in float32 and rounded once; a result that is not finite is refused. The
directory appears whole or not at all."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "merge",
        help="write adapters into a pipeline's weights and save it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pipeline_arguments(parser, adapter_required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; must be empty or absent")
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round quantized weights anew by their own scheme, which loses part of the change, and say how much; without it "
        "they are refused",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge and save; return 0."""
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"--out: {out} exists and is not an empty directory; choose another")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with quiet_libraries(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        from ..diffusion import merge_adapters

        task = progress.add_task("loading the pipeline", total=None)
        pipe = load_pipeline(args.model, args.dtype)
        progress.update(task, description="loading adapters")
        reports = load_adapters(pipe, args.adapter, strict=not args.no_strict)
        progress.update(task, description="merging")
        lost: list[RequantizeReport] = []
        modules = merge_adapters(
            pipe,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            requantize=lost.append if args.requantize else False,
        )
        progress.update(task, description="saving", total=None)
        save_whole(pipe, out)
    if args.json:
        values = {"out": str(out), "modules": modules, "adapters": [summary(r) for r in reports]}
        values |= {"requantized": lost[0].to_dict()} if lost else {}
        print(json.dumps(values, indent=2))
    else:
        show(reports)
        print(f"{modules} modules changed; the pipeline is in {out}")
        for report in lost:
            print(report)
    return 0


def save_whole(pipe: Any, out: Path) -> None:
    """Save a pipeline to a directory that appears only when it is complete.

    Raises:
        OSError: the directory cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:  # which names the temporary directory
        raise type(error)(error.errno, error.strerror, str(out)) from error
    try:
        pipe.save_pretrained(temporary / "pipeline", safe_serialization=True)
        if out.is_dir():
            out.rmdir()
        os.replace(temporary / "pipeline", out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
