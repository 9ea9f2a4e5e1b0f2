#!/usr/bin/env python3
"""Time and memory of whole models with adapters, against the frozen base model, PEFT and LyCORIS.

For every model, set of targets and algorithm all contenders run interleaved in one process over the same base weights: in each
round everyone takes one training step (forward, backward with the gradient to the input, AdamW) and one forward under
`no_grad`, in an order that rotates and is reversed in every other round. Reported are medians of the ratios to the frozen
base of the same round with 95 % bootstrap intervals; one wider than +-3 % is marked "?". Ours is measured until it is not, at
most in `--most-rounds`, peers in `--rounds`. A peer whose step is more than a quarter away from ours after five rounds is
measured no longer. Peak memory is that of a process of its own (`--memory`).

    python scripts/benchmark.py --models sd15-32 --targets attention --memory
    python scripts/benchmark.py --device cuda --dtypes float32 bfloat16
    python scripts/benchmark.py --json docs/benchmarks.json --chart docs/images/benchmarks.png --markdown docs/benchmarks.md

The last one renews the section of the document. Rows that the JSON file holds are not measured again, so that an interrupted
call goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from benchmark_models import CONTENDERS, WORKLOADS, Contender, make
from benchmarking import ALGORITHMS, MIB, Ratio, machine, markdown_table, order, prepare_process, write_section
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

MARKERS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")
TITLE = "## Whole models"
ADAPTED = [name for name in CONTENDERS if name != "base"]
WARMUP = 2
FORWARDS = 15  # rounds with a forward pass of its own
FIRST = 5  # rounds after which a peer this far from us is judged: nothing that follows could change who is ahead
FAR = 1.25
#: what is aimed at, by model, targets and algorithm: time of a step, and MiB kept for backward, beyond the base's
TARGETS: dict[tuple[str, str, str], tuple[float | None, float | None]] = {
    ("sd15-32", "attention", "lora"): (1.05, None),
    ("sd15-32", "attention", "lokr"): (1.08, 120),
    ("sd15-32", "attention", "lokr-f8-full"): (1.10, 120),
    ("sd15-32", "attention", "loha"): (1.35, 200),
    ("sd15-32", "attention", "miss"): (1.04, None),
    ("sd15-32", "attention", "shira"): (1.15, None),
    ("sd15-32", "attention", "dora"): (1.30, None),
    ("sd15-32", "conv", "lokr"): (1.25, 160),
    ("sd15-32", "conv", "loha"): (1.50, 200),
}


@dataclass(frozen=True)
class Case:
    """What a row of the table is about."""

    model: str
    targets: str
    algorithm: str
    dtype: str
    device: str

    def contender(self, name: str) -> Contender | None:
        """Return one contender over the case's shared weights, or None if it has no such algorithm there."""
        return make(name, self.model, ALGORITHMS[self.algorithm], self.targets, getattr(torch, self.dtype), self.device)

    def call(self) -> dict[str, Tensor]:
        """Return the input of a step."""
        torch.manual_seed(1)
        return WORKLOADS[self.model].call(getattr(torch, self.dtype), self.device)


@dataclass(frozen=True)
class Row:
    """What was measured; everything but `base_seconds` by contender.

    Attributes:
        case: of what.
        rounds: how many were measured of the base and ours.
        parameters: trained ones.
        base_seconds: of the frozen base's step, median.
        step: of the training step to the base's.
        forward: of the forward to the base's.
        saved: bytes kept for backward beyond the base's.
        peak: bytes of the process' (or the device's) highest memory beyond the base's; empty if not measured.
    """

    case: Case
    rounds: int
    parameters: dict[str, int]
    base_seconds: float
    step: dict[str, Ratio]
    forward: dict[str, Ratio]
    saved: dict[str, int]
    peak: dict[str, int]


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
    rows = earlier(options.json, options.device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join((case.model, case.targets, case.algorithm, case.dtype)))
            if case not in rows:
                rows[case] = measure(case, options.contenders, options.rounds, options.most_rounds)
                keep(rows, options)
            if options.memory and not rows[case].peak:
                rows[case] = replace(rows[case], peak=peaks(case, options.contenders))
                keep(rows, options)
            progress.advance(task)
    report_rows(sorted(rows.values(), key=rank), options)


def keep(rows: Mapping[Case, Row], options: argparse.Namespace) -> None:
    """Write what was measured so far: hours of work are kept if the rest is interrupted."""
    if options.json:
        report = {"machine": machine(options.device), "rows": [asdict(row) for row in rows.values()]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def earlier(path: Path | None, device: str) -> dict[Case, Row]:
    """Return the rows that an earlier call left in the file, by case; they are not measured again."""
    if path is None or not path.exists():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["machine"] != machine(device):
        raise SystemExit(f"{path} holds rows of another machine, {report['machine']}; give another file or delete it")
    rows: dict[Case, Row] = {}
    for values in report["rows"]:
        case = Case(**values["case"])
        ratios = {key: {name: Ratio(**ratio) for name, ratio in values[key].items()} for key in ("step", "forward")}
        rows[case] = Row(**{**values, "case": case, **ratios})
    return rows


def rank(row: Row) -> tuple[int, ...]:
    """Return the place of a row in the table."""
    case, workload = row.case, WORKLOADS[row.case.model]
    places = [list(WORKLOADS).index(case.model), list(workload.targets).index(case.targets)]
    return (*places, ["float32", "bfloat16"].index(case.dtype), list(ALGORITHMS).index(case.algorithm))


def report_rows(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the table; write the document's section and the chart where they are asked for."""
    table = Table(*HEADERS, title="One training step, relative to the frozen base model")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if options.chart:
        from benchmark_chart import step_chart

        step_chart(panels(rows), options.chart)
    if options.markdown:
        write_section(options.markdown, MARKERS, TITLE, markdown(rows, options.device))


# -------------------------------------------------------------------------------------------------------- measurement


def measure(case: Case, names: list[str], rounds: int, most_rounds: int) -> Row:
    """Run the contenders of one case for `rounds`, and ours until its interval is narrow, at most for `most_rounds`."""
    contenders = {name: contender for name in ("base", *names) if (contender := case.contender(name)) is not None}
    others = [name for name in contenders if name != "base"]
    sizes = {name: contenders[name].parameters for name in others}
    if len(set(sizes.values())) > 1:
        raise RuntimeError(f"{case}: the contenders are not equally large: {sizes}")
    call = case.call()
    with torch.no_grad():
        gradient = torch.randn_like(contenders["base"].forward(call))
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    forwards: dict[str, list[float]] = {name: [] for name in contenders}
    running = list(contenders)
    for index in range(WARMUP + most_rounds):
        for name in order(running, index):
            step, forward = times(contenders[name], call, gradient, case.device, index < WARMUP + FORWARDS)
            if index >= WARMUP:
                steps[name].append(step)
                forwards[name] += [] if forward is None else [forward]
        done = index + 1 - WARMUP
        if done == FIRST and "ours" in contenders:
            running = [name for name in running if name == "base" or not far(steps[name], steps["ours"])]
        if done >= rounds:
            judged = "ours" if "ours" in running else others[0]
            running = ["base", judged]
            if Ratio.of(steps[judged], steps["base"]).conclusive:
                break
    saved = {name: contender.saved_bytes(call) for name, contender in contenders.items()}
    return Row(
        case,
        len(steps["base"]),
        sizes,
        statistics.median(steps["base"]),
        {name: Ratio.of(steps[name], steps["base"]) for name in others},
        {name: Ratio.of(forwards[name], forwards["base"]) for name in others},
        {name: saved[name] - saved["base"] for name in others},
        {},
    )


def far(values: list[float], ours: list[float]) -> bool:
    """Whether a peer's steps are so much slower or faster than ours that more rounds would tell nothing."""
    ratio = Ratio.of(values, ours)
    return ratio.low > FAR or ratio.high < 1 / FAR


def times(
    contender: Contender, call: Mapping[str, Tensor], gradient: Tensor, device: str, forward: bool
) -> tuple[float, float | None]:
    """Return the seconds of a training step and, if asked for, of a forward without gradients; clearing is not measured."""
    contender.clear(call)
    start = now(device)
    contender.step(call, gradient)
    middle = now(device)
    if not forward:
        return middle - start, None
    with torch.no_grad():
        contender.forward(call)
    return middle - start, now(device) - middle


def now(device: str) -> float:
    """Return the time in seconds, after everything that was started on the device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


# ------------------------------------------------------------------------------------------------------------- report

HEADERS = ["model", "targets", "algorithm", "parameters", "base s", *[f"{name} x" for name in ADAPTED]]
HEADERS += [
    "target",
    "met",
    "ours forward x",
    *[f"{name} saved MiB" for name in ADAPTED],
    *[f"{name} peak MiB" for name in ("ours", "PEFT")],
]


def cells(row: Row) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    case = row.case
    return [
        case.model if case.dtype == "float32" else f"{case.model} {case.dtype}",
        case.targets,
        case.algorithm,
        f"{next(iter(row.parameters.values()), 0):,}",
        f"{row.base_seconds:.2f}",
        *[str(row.step.get(name, "-")) for name in ADAPTED],
        *verdict(row),
        str(row.forward.get("ours", "-")),
        *[_mib(row.saved, name) for name in ADAPTED],
        *[_mib(row.peak, name) for name in ("ours", "PEFT")],
    ]


def verdict(row: Row) -> tuple[str, str]:
    """Return the row's targets and whether ours meets them."""
    step, saved = TARGETS.get((row.case.model, row.case.targets, row.case.algorithm), (None, None))
    found, kept = row.step.get("ours"), row.saved.get("ours")
    asked = [f"{step:.2f}"] if step else []
    asked += [f"{saved} MiB"] if saved else []
    if not asked or found is None or kept is None:
        return ", ".join(asked) or "-", "-"
    met = (step is None or found.median <= step) and (saved is None or kept <= saved * MIB)
    return ", ".join(asked), "yes" if met else "**no**"


def _mib(values: dict[str, int], name: str) -> str:
    return f"{values[name] / MIB:.0f}" if name in values else "-"


def panels(rows: list[Row]) -> dict[str, dict[str, dict[str, Ratio]]]:
    """Return the steps' ratios by what is common to several rows, and by algorithm."""
    found: dict[str, dict[str, dict[str, Ratio]]] = {}
    for row in rows:
        case = row.case
        found.setdefault(f"{case.model}, {case.targets}, {case.dtype} ({case.device})", {})[case.algorithm] = row.step
    return found


def markdown(rows: list[Row], device: str) -> str:
    """Return the section of the document: machine, how to read the table, the table."""
    return "\n".join(
        [
            *(f"- {name}: {value}" for name, value in machine(device).items()),
            f"- {min(row.rounds for row in rows)} to {max(row.rounds for row in rows)} interleaved rounds",
            "",
            "`x`: time relative to the frozen base model, median (95 % interval) of the ratios within a round; `?`: the",
            "interval is wider than 3 % on a side, inconclusive. A step is forward, backward and AdamW. Saved MiB are kept for",
            "backward, peak MiB is the highest memory of a process of its own, both beyond the base model's.",
            f"A peer more than a quarter slower or faster than we are after {FIRST} rounds was measured in these only.",
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
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the steps' ratios as a PNG")
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
