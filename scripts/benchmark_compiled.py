#!/usr/bin/env python3
"""What `torch.compile` makes of a training step and of a forward with adapters: ours and PEFT's, eager and compiled.

    python scripts/benchmark_compiled.py --models sdxl-stack-512 --markdown docs/benchmarks.md
    python scripts/benchmark_compiled.py --device cuda --dtypes bfloat16

All contenders run interleaved in one process over the same base weights, `--rounds` times after the compilation; reported are
medians of the ratios to the eager frozen base of the same round. The compiled frozen base is the yardstick of the compiled
adapters: a part of what compiling brings is its own. The eager steps run our fused operations; compilers see the plain forms of
the same programs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark_models import WORKLOADS, Contender
from benchmark_results import Case
from benchmarking import ALGORITHMS, MIB, Ratio, machine, markdown_table, now, order, prepare_process, write_section
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

MARKERS = ("<!-- compiled: begin -->", "<!-- compiled: end -->")
TITLE = "## Compiled"
COMPILED = " compiled"
MEASURED = ("base" + COMPILED, "ours", "ours" + COMPILED, "PEFT", "PEFT" + COMPILED)
DEFAULT = ["lora", "lokr", "loha", "miss", "shira", "dora", "oft"]


@dataclass(frozen=True)
class Row:
    """What was measured of one case, by contender.

    Attributes:
        case: of what.
        base_seconds: of the eager frozen base's step, median.
        step, forward: to the eager base's.
        saved: bytes kept for backward beyond the eager base's.
        seconds: until our compiled model had done its first training step and its first forward.
    """

    case: Case
    base_seconds: float
    step: dict[str, Ratio]
    forward: dict[str, Ratio]
    saved: dict[str, int]
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for and report it."""
    options = parse(arguments)
    prepare_process(options.threads)
    cases = [
        Case(model, next(iter(WORKLOADS[model].targets)), algorithm, dtype, options.device)
        for model in options.models
        for dtype in options.dtypes
        for algorithm in options.algos
    ]
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join((case.model, case.algorithm, case.dtype)))
            rows.append(measure(case, options.rounds))
            progress.advance(task)
    table = Table(*HEADERS, title="Eager and compiled, relative to the eager frozen base model")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if options.markdown:
        write_section(options.markdown, MARKERS, TITLE, markdown(rows, options.device))


def measure(case: Case, rounds: int) -> Row:
    """Compile, and run all contenders in turn."""
    torch.compiler.reset()
    found = {name: contender for name in ("base", *MEASURED) if (contender := made(case, name)) is not None}
    call = case.call()
    with torch.no_grad():
        gradient = torch.randn_like(found["base"].forward(call))
    steps: dict[str, list[float]] = {name: [] for name in found}
    forwards: dict[str, list[float]] = {name: [] for name in found}
    started = {}
    for name, contender in found.items():
        start = time.perf_counter()
        times(contender, call, gradient, case.device)
        started[name] = time.perf_counter() - start
    for index in range(rounds):
        for name in order(list(found), index):
            step, forward = times(found[name], call, gradient, case.device)
            steps[name].append(step)
            forwards[name].append(forward)
    saved = {name: contender.saved_bytes(call) for name, contender in found.items()}
    return Row(
        case,
        statistics.median(steps["base"]),
        {name: Ratio.of(steps[name], steps["base"]) for name in found if name != "base"},
        {name: Ratio.of(forwards[name], forwards["base"]) for name in found if name != "base"},
        {name: saved[name] - saved["base"] for name in found if name != "base"},
        started["ours" + COMPILED],
    )


def times(contender: Contender, call: Mapping[str, Tensor], gradient: Tensor, device: str) -> tuple[float, float]:
    """Return the seconds of a training step and of a forward without gradients; clearing is not measured."""
    contender.clear(call)
    start = now(device)
    contender.step(call, gradient)
    middle = now(device)
    with torch.no_grad():
        contender.forward(call)
    return middle - start, now(device) - middle


def made(case: Case, name: str) -> Contender | None:
    """Return a contender, compiled if its name says so; None where the library does not have the algorithm."""
    contender = case.contender(name.removesuffix(COMPILED))
    if contender is not None and name.endswith(COMPILED):
        contender.model.compile()
    return contender


# ------------------------------------------------------------------------------------------------------------- report

HEADERS = ["model", "algorithm", "base s", *[f"{name} x" for name in MEASURED]]
HEADERS += ["ours forward x", f"ours{COMPILED} forward x", "ours saved MiB", f"ours{COMPILED} saved MiB", "compiling s"]


def cells(row: Row) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    compiled = "ours" + COMPILED
    return [
        row.case.label,
        row.case.algorithm,
        f"{row.base_seconds:.3f}",
        *[str(row.step.get(name, "-")) for name in MEASURED],
        *[str(row.forward[name]) for name in ("ours", compiled)],
        *[f"{row.saved[name] / MIB:.0f}" for name in ("ours", compiled)],
        f"{row.seconds:.0f}",
    ]


def markdown(rows: list[Row], device: str) -> str:
    """Return the section of the document: machine, how to read the table, the table."""
    return "\n".join(
        [
            *(f"- {name}: {value}" for name, value in machine(device).items()),
            f"- {rows[0].step['ours'].rounds} interleaved rounds",
            "",
            "`x`: time relative to the eager frozen base model, median (95 % interval) of the ratios within a round; `?`:",
            "wider than 3 % on a side. A step is forward, backward and AdamW (the optimizer is not compiled). Compare compiled",
            "adapters with the compiled base. *Compiling*: until our compiled model had done its first step and forward.",
            "",
            markdown_table(HEADERS, map(cells, rows)),
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sdxl-stack-512"], choices=WORKLOADS)
    parser.add_argument("--algos", nargs="+", default=DEFAULT, choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the section of this document")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
