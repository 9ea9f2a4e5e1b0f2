#!/usr/bin/env python3
"""Time and memory of whole models with adapters, against the frozen base model, PEFT and LyCORIS.

For every model, set of targets and algorithm all contenders run over the same base weights: in each round everyone takes one
training step (forward, backward with the gradient to the input, AdamW), and afterwards one forward of inference, with nothing
to be trained; on a CPU all at once, in turns of a block of the model (`benchmark_turns.py`), in an order that rotates and is
reversed in every other round. Reported are ratios to the frozen base in the same rounds (`Ratio.of_turns`) with 95 % bootstrap
intervals; one wider than +-3 % is marked "?". Ours is measured until it is not, at most in `--most-rounds`, peers in
`--rounds`. A peer whose step is more than a quarter away from ours after five rounds is measured no longer; forwards of peers
are measured in five. Peak memory is that of a process of its own (`--memory`).

    python scripts/benchmark.py --models sd15-32 --targets attention --memory
    python scripts/benchmark.py --device cuda --dtypes float32 bfloat16
    make bench-models

The last one measures what is missing and renews tables, chart and README. Rows that the JSON file holds of this machine are not
measured again, so that an interrupted call goes on; those of other machines stay, in tables of their own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from benchmark_models import WORKLOADS
from benchmark_results import ADAPTED, FIRST, Case, Row, Series, earlier, keep, report
from benchmark_summary import write_summary
from benchmark_turns import Crew
from benchmarking import ALGORITHMS, Ratio, machine, order, prepare_process
from rich.console import Console
from rich.progress import Progress

WARMUP = 2
FAR = 1.25


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for and report it."""
    options = parse(arguments)
    prepare_process(options.threads, keep_memory=not options.peak_of)
    if options.peak_of:
        print(peak_bytes(Case(*options.peak_of[:-1]), options.peak_of[-1]))
        return
    cases = [
        Case(model, targets, algorithm, dtype, options.device)
        for model in options.models
        for targets in WORKLOADS[model].targets
        if targets in options.targets
        for dtype in options.dtypes
        for algorithm in options.algos
    ]
    here = machine(options.device)
    series = sorted(earlier(options.json), key=lambda one: one.machine == here)
    if not series or series[-1].machine != here:
        series.append(Series(here, {}))
    rows = series[-1].rows
    crew = Crew(["base", *options.contenders], options.threads)
    with crew, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join((case.model, case.targets, case.algorithm, case.dtype)))
            if case not in rows:
                rows[case] = measure(case, crew, options.rounds, options.most_rounds)
                keep(series, options.json)
            if options.memory and not rows[case].peak:
                rows[case] = replace(rows[case], peak=peaks(case, options.contenders))
                keep(series, options.json)
            progress.advance(task)
    report(series, options.chart, options.markdown)
    if options.readme:
        write_summary(series, options.readme)


# -------------------------------------------------------------------------------------------------------- measurement


def measure(case: Case, crew: Crew, rounds: int, most_rounds: int) -> Row:
    """Run the contenders of one case for `rounds`, and ours until its interval is narrow, at most for `most_rounds`."""
    sizes = crew.prepare(case)
    names = list(sizes)
    others = [name for name in names if name != "base"]
    if len({sizes[name] for name in others}) > 1:
        raise RuntimeError(f"{case}: the contenders are not equally large: {sizes}")
    steps: dict[str, list[list[float]]] = {name: [] for name in names}
    near = names
    for index in range(WARMUP + most_rounds):
        found = crew.step(order(near, index))
        if index < WARMUP:
            continue
        for name, turns in found.items():
            steps[name].append(turns)
        done = index + 1 - WARMUP
        if done == FIRST and "ours" in names:
            near = [name for name in near if name == "base" or not far(steps[name], steps["ours"])]
        if done >= rounds:
            judged = "ours" if "ours" in near else others[0]
            near = ["base", judged]
            if Ratio.of_turns(steps[judged], steps["base"]).conclusive:
                break
    saved = crew.saved_bytes(names)
    crew.freeze(names)
    forwards: dict[str, list[list[float]]] = {name: [] for name in names}
    for index in range(WARMUP + rounds):
        for name, turns in crew.forward(order(names if index < WARMUP + FIRST else near, index)).items():
            forwards[name] += [turns] if index >= WARMUP else []
    return Row(
        case,
        len(steps["base"]),
        {name: sizes[name] for name in others},
        sum(map(statistics.median, zip(*steps["base"], strict=True))),
        {name: Ratio.of_turns(steps[name], steps["base"]) for name in others},
        {name: Ratio.of_turns(forwards[name], forwards["base"]) for name in others},
        {name: saved[name] - saved["base"] for name in others},
        {},
    )


def far(values: list[list[float]], ours: list[list[float]]) -> bool:
    """Whether a peer's steps are so much slower or faster than ours that more rounds would tell nothing."""
    ratio = Ratio.of_turns(values, ours)
    return ratio.low > FAR or ratio.high < 1 / FAR


def peaks(case: Case, names: list[str]) -> dict[str, int]:
    """Return each contender's peak memory beyond the base's."""
    base = peak_in_child(case, "base")
    return {name: peak_in_child(case, name) - base for name in names if case.contender(name) is not None}


@cache
def peak_in_child(case: Case, name: str) -> int:
    """Return the peak of a process that does nothing but two steps of one contender."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--peak-of", *asdict(case).values(), name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_bytes(case: Case, name: str) -> int:
    """Return the highest memory of this process, or of the device, after two steps."""
    contender = case.contender(name)
    assert contender is not None
    call = case.call()
    for _ in range(2):
        contender.clear(call)
        output = contender.forward(call)
        output.backward(torch.ones_like(output))
        if contender.optimizer:
            contender.optimizer.step()
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated(case.device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage's maximum survives exec, this does not
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd15-32"], choices=WORKLOADS)
    sets = sorted({name for workload in WORKLOADS.values() for name in workload.targets})
    parser.add_argument("--targets", nargs="+", default=sets, choices=sets)
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--contenders", nargs="+", default=ADAPTED, choices=ADAPTED, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parser.add_argument("--most-rounds", type=int, default=40, help="of ours, until it is certain (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, a process a contender")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all numbers, written after every row; rows it holds are kept"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the section of this document")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="renew the short table of this document")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the steps' ratios as a PNG")
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
