#!/usr/bin/env python3
"""Time and memory of one adapted layer, against its frozen base layer, PEFT and LyCORIS.

For every layer case and algorithm all contenders run interleaved in one process: in each round everyone takes one
training step (forward, and backward with the gradient to the input, over frozen weights) and one forward under
``no_grad``, in an order that rotates from round to round and is reversed in every other one. Reported are medians and
quartiles of the ratios to the base layer of the same round, and the bytes kept for backward beyond the base layer's.
Where the target of ours lies within the quartiles after ``--rounds``, ``--most-rounds`` are measured.

    python scripts/benchmark_layers.py                                      # everything, some ten minutes on two cores
    python scripts/benchmark_layers.py --cases 1280x1280 --algos lokr loha  # a part
    python scripts/benchmark_layers.py --markdown docs/benchmarks.md        # also renew the table in the document
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import compress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lycoris
import peft
import torch
from benchmarking import (
    ALGORITHMS,
    MIB,
    Algorithm,
    fill_factors,
    machine,
    markdown_table,
    order,
    prepare_process,
    saved_bytes,
    write_section,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lycoris_diff

TURN = 0.06  # seconds of base layer steps that a contender runs in a row: a model calls the same code for many layers too
BEGIN, END = "<!-- benchmark_layers: begin -->", "<!-- benchmark_layers: end -->"

# ------------------------------------------------------------------------------------------------ cases and algorithms


@dataclass(frozen=True)
class Case:
    """A frozen layer and its input: a Linear on ``size`` tokens, or a 3x3 Conv2d on a ``size`` x ``size`` image."""

    kind: str
    inp: int
    out: int
    size: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.inp}x{self.out}@{self.size}"

    @property
    def width(self) -> int:
        return min(self.inp, self.out)

    def layer(self) -> nn.Module:
        layer = nn.Linear(self.inp, self.out) if self.kind == "linear" else nn.Conv2d(self.inp, self.out, 3, padding=1)
        return layer.requires_grad_(False)

    def input(self) -> Tensor:
        shape = (1, self.size, self.inp) if self.kind == "linear" else (1, self.inp, self.size, self.size)
        return torch.randn(shape, requires_grad=True)


CASES = [
    Case("linear", 320, 320, 4096),
    Case("linear", 1280, 1280, 1024),
    Case("linear", 1280, 1280, 256),
    Case("linear", 5120, 1280, 256),
    Case("linear", 1280, 5120, 256),
    Case("linear", 1280, 10240, 256),
    Case("conv", 320, 320, 64),
    Case("conv", 1280, 1280, 16),
]


LYCORIS = {"LoraConfig": "LoConModule", "LoKrConfig": "LokrModule", "LoHaConfig": "LohaModule"}

# --------------------------------------------------------------------------------------------------------- contenders


class Contender:
    """An adapted layer, with the module that owns the adapter's tensors where that is another one."""

    def __init__(self, layer: nn.Module, adapter: nn.Module | None = None):
        self.layer = layer
        self.owners = nn.ModuleList([layer, *filter(None, [adapter])])
        self.trainable = fill_factors(self.owners)
        self.parameters = sum(p.numel() for p in self.trainable)

    def times(self, x: Tensor, gradient: Tensor, steps: int = 1) -> tuple[float, float]:
        """Mean seconds of a training step and of a forward without gradients; clearing them is not measured."""
        step = forward = 0.0
        for _ in range(steps):
            for tensor in (x, *self.trainable):
                tensor.grad = None
            start = time.perf_counter()
            self.layer(x).backward(gradient)
            step += time.perf_counter() - start
        with torch.no_grad():
            for _ in range(steps):
                start = time.perf_counter()
                self.layer(x)
                forward += time.perf_counter() - start
        return step / steps, forward / steps


def _base(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    return Contender(layer)


def _ours(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    holder = nn.ModuleDict({"layer": layer})
    lycoris_diff.inject_adapter(holder, algorithm.config_of(lycoris_diff, ["layer"], case.kind == "conv", algorithm.ours))
    return Contender(holder["layer"])


def _peft(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    holder = nn.ModuleDict({"layer": layer})
    peft.inject_adapter_in_model(algorithm.config_of(peft, ["layer"], case.kind == "conv", algorithm.peft), holder)
    return Contender(holder["layer"])


def _lycoris(layer: nn.Module, case: Case, algorithm: Algorithm, bypass: bool = False) -> Contender | None:
    if algorithm.config not in LYCORIS or (bypass and "weight_decompose" in algorithm.lycoris):
        return None
    fields = {"lora_dim": algorithm.fields["r"], "use_tucker": algorithm.tucker, **algorithm.lycoris}
    adapter = getattr(lycoris, LYCORIS[algorithm.config])("layer", layer, bypass_mode=bypass, **fields)
    adapter.apply_to()
    return Contender(layer, adapter)


CONTENDERS: dict[str, Callable[[nn.Module, Case, Algorithm], Contender | None]] = {
    "base": _base,
    "ours": _ours,
    "PEFT": _peft,
    "LyCORIS": _lycoris,
    "LyCORIS bypass": partial(_lycoris, bypass=True),
}
ADAPTED = [name for name in CONTENDERS if name != "base"]


def make_contenders(case: Case, algorithm: Algorithm) -> dict[str, Contender]:
    """Everyone who has this algorithm on this layer, over the same base weights and with equally many parameters."""
    original, contenders = case.layer(), {}
    for name, make in CONTENDERS.items():
        layer = case.layer()
        layer.weight, layer.bias = original.weight, original.bias
        if contender := make(layer, case, algorithm):
            contenders[name] = contender
    sizes = {name: contenders[name].parameters for name in ADAPTED if name in contenders}
    if len(set(sizes.values())) != 1:
        raise RuntimeError(f"{case}: the contenders are not equally large: {sizes}")
    return contenders


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)

    @classmethod
    def ratio(cls, values: list[float], base: list[float]) -> Spread:
        return cls.of(v / b for v, b in zip(values, base))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """What was measured for one case and algorithm; ratios to the base and bytes beyond it by contender."""

    case: Case
    algorithm: str
    parameters: int
    input_bytes: int
    base_ms: Spread
    step: dict[str, Spread]
    forward: dict[str, Spread]
    saved: dict[str, int]
    to_peft: Spread

    @property
    def target(self) -> Target | None:
        """The one that this case has with this algorithm."""
        return next((t for t in TARGETS if self.algorithm in t.algorithms and t.holds(self.case)), None)


def measure(case: Case, name: str, rounds: int, most_rounds: int, warmup: int) -> Row:
    """Run all contenders for one case and algorithm."""
    torch.manual_seed(0)
    contenders = make_contenders(case, ALGORITHMS[name])
    x = case.input()
    gradient = torch.randn_like(contenders["base"].layer(x))
    times: dict[str, list[tuple[float, float]]] = {c: [] for c in contenders}
    steps = max(1, round(TURN / min(contenders["base"].times(x, gradient)[0] for _ in range(5))))
    saved = {name: saved_bytes(c.owners, partial(c.layer, x)) for name, c in contenders.items()}
    others = [c for c in ADAPTED if c in contenders]

    def after(total: int) -> Row:
        for index in range(len(times["base"]), warmup + total):
            for c in order(list(contenders), index):
                times[c].append(contenders[c].times(x, gradient, steps))
        trained, forwards = ({c: [pair[i] for pair in pairs[warmup:]] for c, pairs in times.items()} for i in range(2))
        return Row(
            case,
            name,
            contenders["ours"].parameters,
            x.nbytes,
            Spread.of(1e3 * t for t in trained["base"]),
            {c: Spread.ratio(trained[c], trained["base"]) for c in others},
            {c: Spread.ratio(forwards[c], forwards["base"]) for c in others},
            {c: saved[c] - saved["base"] for c in others},
            Spread.ratio(trained["ours"], trained["PEFT"]),
        )

    row = after(rounds)
    return after(most_rounds) if row.target and row.target.is_near(row) else row


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """Longest step of some algorithms on some cases, relative to the base layer's and to PEFT's."""

    algorithms: tuple[str, ...]
    holds: Callable[[Case], bool]
    base: float
    peft: float = math.inf

    def __str__(self) -> str:
        return f"{self.base:.2f}" + (f", {self.peft:.2f} of PEFT" if self.peft < math.inf else "")

    def met(self, row: Row) -> bool:
        return row.step["ours"].median <= self.base and row.to_peft.median <= self.peft

    def is_near(self, row: Row) -> bool:
        """Whether it lies within the quartiles."""
        step, to_peft = row.step["ours"], row.to_peft
        return step.low <= self.base <= step.high or to_peft.low <= self.peft <= to_peft.high


TARGETS = [
    Target(("lokr", "loha"), lambda c: c.kind == "linear" and c.width >= 1280 and c.size >= 1024, 1.25, 0.45),
    Target(("lokr", "loha"), lambda c: c.kind == "linear" and c.width >= 1280, 1.30, 0.45),
    Target(("lokr", "loha"), lambda c: c.kind == "linear", 1.80),
    Target(("lokr", "loha"), lambda c: c.kind == "conv" and c.width >= 1280, 1.10),
    Target(("lokr", "loha"), lambda c: c.kind == "conv", 1.25),
    Target(("lora", "miss"), lambda c: c.width >= 1280, 1.12),
    Target(("shira",), lambda c: True, 1.45),
    Target(("dora",), lambda c: True, 1.40),
]  # the first that fits counts
SAVED_BEYOND_INPUT = 2 * MIB

# ------------------------------------------------------------------------------------------------------------- report

HEADERS = ["case", "algorithm", "base ms", *[f"{c} x" for c in ADAPTED], "ours / PEFT", "target", "met"]
HEADERS += ["ours forward x", "PEFT forward x", "ours saved MiB", "PEFT saved MiB", "saved target", "saved met"]
ON_SCREEN = {"case", "algorithm", "ours x", "PEFT x", "LyCORIS bypass x", "target", "met", "saved met"}


def cells(row: Row) -> list[str]:
    """One line of the table, under ``HEADERS``."""
    target = row.target
    allowed = row.input_bytes + SAVED_BEYOND_INPUT
    return [
        str(row.case),
        row.algorithm,
        f"{row.base_ms.median:.1f}",
        *[str(row.step.get(c, "-")) for c in ADAPTED],
        f"{row.to_peft.median:.2f}",
        *((str(target), _yes(target.met(row))) if target else ("-", "-")),
        *[f"{row.forward[c].median:.2f}" for c in ("ours", "PEFT")],
        *[f"{row.saved[c] / MIB:.1f}" for c in ("ours", "PEFT")],
        f"{allowed / MIB:.1f}",
        _yes(row.saved["ours"] <= allowed),
    ]


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def markdown(rows: list[Row], rounds: int, most_rounds: int) -> str:
    """The section of the document: machine, how to read the table, the table."""
    lines = [
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- float32, {rounds} interleaved rounds, {most_rounds} where the target lies within the quartiles of these",
        "- `make bench` renews this section",
        "",
        "`x`: time of a training step relative to the frozen base layer alone, median (quartiles) of the ratios within",
        f"a round, where a contender's turn has as many steps as the base layer does in {1e3 * TURN:.0f} ms; `forward x`: the",
        "same under `no_grad`, median. Saved MiB are kept for backward beyond what the base layer keeps; their target is",
        "the layer's input plus 2 MiB. Convolutions are 3x3, LoKr and LoHa have a Tucker core there.",
        "",
        markdown_table(HEADERS, map(cells, rows)),
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--most-rounds", type=int, default=45, help="of what is near its target (default 45)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default 3)")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains a text")
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in this document")
    options = parser.parse_args(arguments)
    options.most_rounds = max(options.rounds, options.most_rounds)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for and report it."""
    options = parse(arguments)
    prepare_process(options.threads)
    cases = [case for case in CASES if any(text in str(case) for text in options.cases)]
    runs = [(c, a) for c in cases for a in options.algos if ALGORITHMS[a].conv or c.kind == "linear"]
    console, rows = Console(), []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(runs))
        for case, algorithm in runs:
            progress.update(task, description=f"{case} {algorithm}")
            rows.append(measure(case, algorithm, options.rounds, options.most_rounds, options.warmup))
            progress.advance(task)
    shown = [h in ON_SCREEN for h in HEADERS]
    table = Table(*compress(HEADERS, shown), title="One training step, relative to the frozen base layer")
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*(cell.replace("**no**", "[red]no[/red]") for cell in compress(cells(row), shown)))
    console.print(table)
    if options.json:
        report = {"machine": machine(), "rounds": [options.rounds, options.most_rounds], "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        write_section(options.markdown, (BEGIN, END), "## Single layers", markdown(rows, options.rounds, options.most_rounds))


if __name__ == "__main__":
    main()
