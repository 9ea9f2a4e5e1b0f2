#!/usr/bin/env python3
"""Seconds of what is done with an adapter beside training it: attach, save, load, switch, fuse, unfuse; and of a fused forward.

    python scripts/benchmark_operations.py --models sd15-32 --json operations.json --markdown docs/benchmarks.md

Two libraries do each operation on copies of one model that share its weights, in turn, `--rounds` times; reported are medians.
PEFT's names are ours, so both run the same lines. The fused forward is given relative to the base model's in the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from benchmark_models import WORKLOADS, base_model, shared
from benchmarking import ALGORITHMS, Ratio, fill_factors, machine, markdown_table, order, prepare_process, write_section
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import lycoris_diff

MARKERS = ("<!-- operations: begin -->", "<!-- operations: end -->")
TITLE = "## Operations"
PACKAGES = {"ours": lycoris_diff, "PEFT": peft}
OPERATIONS = ("attach", "save", "load", "switch", "fuse", "unfuse")
DEFAULT = ["lora", "lokr", "loha", "miss", "shira", "dora"]


@dataclass(frozen=True)
class Row:
    """Medians of one model and algorithm, by library.

    Attributes:
        model, targets, algorithm: of what.
        seconds: by library and operation.
        fused: a forward of the fused model to the base's.
    """

    model: str
    targets: str
    algorithm: str
    seconds: dict[str, dict[str, float]]
    fused: dict[str, Ratio]


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for and report it."""
    options = parse(arguments)
    prepare_process(options.threads)
    cases = [
        (model, targets, algorithm)
        for model in options.models
        for targets in WORKLOADS[model].targets
        if targets in options.targets
        for algorithm in options.algos
    ]
    console, rows = Console(), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join(case))
            rows.append(measure(*case, options.rounds))
            progress.advance(task)
            if options.json:
                report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table(*HEADERS, title="Seconds: ours / PEFT")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    if options.markdown:
        write_section(options.markdown, MARKERS, TITLE, markdown(rows, options.rounds))


# -------------------------------------------------------------------------------------------------------- measurement


def measure(model: str, targets: str, algorithm: str, rounds: int) -> Row:
    """Run the operations of both libraries in turn."""
    chosen, workload = ALGORITHMS[algorithm], WORKLOADS[model]
    conv = targets == "conv"
    packages = {name: package for name, package in PACKAGES.items() if name == "ours" or chosen.conv or not conv}
    base = base_model(model, torch.float32, "cpu")
    call = workload.call(torch.float32, "cpu")
    seconds: dict[str, dict[str, list[float]]] = {name: {key: [] for key in OPERATIONS} for name in packages}
    forwards: dict[str, list[float]] = {name: [] for name in ("base", *packages)}
    for index in range(rounds + 1):  # one to warm up
        for name in order(list(packages), index):
            fields = chosen.ours if name == "ours" else chosen.peft
            config = chosen.config_of(packages[name], list(workload.targets[targets]), True, fields)
            clock = once(packages[name], base, config, call)
            if index:
                forwards[name].append(clock["forward"])
                for key in OPERATIONS:
                    seconds[name][key].append(clock[key])
        with torch.no_grad():
            start = time.perf_counter()
            base(**call)
            if index:
                forwards["base"].append(time.perf_counter() - start)
    medians = {name: {key: statistics.median(times) for key, times in values.items()} for name, values in seconds.items()}
    fused = {name: Ratio.of(forwards[name], forwards["base"]) for name in packages}
    return Row(model, targets, algorithm, medians, fused)


def once(package: Any, base: nn.Module, config: Any, call: dict[str, Any]) -> dict[str, float]:
    """Do every operation once; return the seconds of each, and of a forward of the fused model."""
    clock: dict[str, float] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = do()
        clock[name] = time.perf_counter() - start
        return result

    gc.collect()
    bare = shared(base)
    model = timed("attach", lambda: package.get_peft_model(bare, config))
    fill_factors(model)
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: model.save_pretrained(folder))
        bare = shared(base)
        model = timed("load", lambda: package.PeftModel.from_pretrained(bare, folder))
        model.load_adapter(folder, "other")
    with torch.no_grad():
        timed("switch", lambda: model.set_adapter("other"))
        timed("fuse", model.merge_adapter)
        timed("forward", lambda: model(**call))
        timed("unfuse", model.unmerge_adapter)
    return clock


# ------------------------------------------------------------------------------------------------------------- report

HEADERS = ["model", "targets", "algorithm", *OPERATIONS, "fused forward x"]


def cells(row: Row) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    times = [" / ".join(f"{values[name]:.3g}" for values in row.seconds.values()) for name in OPERATIONS]
    return [row.model, row.targets, row.algorithm, *times, " / ".join(map(str, row.fused.values()))]


def markdown(rows: list[Row], rounds: int) -> str:
    """Return the section of the document: machine, how to read the table, the table."""
    return "\n".join(
        [
            *(f"- {name}: {value}" for name, value in machine().items()),
            f"- {rounds} interleaved rounds",
            "",
            "Seconds, ours / PEFT (one number: PEFT does not have it there), medians. *Attach* builds a fresh adapter, *save*",
            "and *load* use PEFT's directory format, *switch* activates another loaded adapter, *fuse* adds it to the weights",
            "(ours keeps what it takes to give back the very same weights), *unfuse* takes it out again. *Fused forward x*:",
            "time of the fused model's forward relative to the base model's, median (95 % interval); `?`: wider than 3 % on",
            "a side.",
            "",
            markdown_table(HEADERS, map(cells, rows)),
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd15-32"], choices=WORKLOADS)
    sets = sorted({name for workload in WORKLOADS.values() for name in workload.targets})
    parser.add_argument("--targets", nargs="+", default=sets, choices=sets)
    parser.add_argument("--algos", nargs="+", default=DEFAULT, choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, after every row")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the section of this document")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
