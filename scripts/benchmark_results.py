"""What the whole-model benchmark measures and keeps: cases, rows, series of a machine; its tables and its chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from benchmark_models import CONTENDERS, WORKLOADS, Contender, make
from benchmarking import ALGORITHMS, MIB, Ratio, markdown_table, write_section
from rich.console import Console
from rich.table import Table
from torch import Tensor

MARKERS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")
TITLE = "## Whole models"
ADAPTED = [name for name in CONTENDERS if name != "base"]
FIRST = 5  # rounds after which a peer this far from us is judged: nothing that follows could change who is ahead
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

    @property
    def label(self) -> str:
        """The model, and the dtype where it is not the usual one."""
        return self.model if self.dtype == "float32" else f"{self.model} {self.dtype}"

    def contender(self, name: str, weights: Path | None = None) -> Contender | None:
        """Return one contender over the case's shared weights, or None if it has no such algorithm there."""
        dtype = getattr(torch, self.dtype)
        return make(name, self.model, ALGORITHMS[self.algorithm], self.targets, dtype, self.device, weights)

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
        forward: of a forward of inference to the base's, nobody training.
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


@dataclass(frozen=True)
class Series:
    """Everything that was measured on one machine.

    Attributes:
        machine: what the numbers depend on.
        rows: by case.
    """

    machine: dict[str, str]
    rows: dict[Case, Row]

    @property
    def table(self) -> list[Row]:
        """The rows in the table's order."""
        return sorted(self.rows.values(), key=rank)


def keep(series: list[Series], path: Path | None) -> None:
    """Write what was measured so far: hours of work are kept if the rest is interrupted."""
    if path:
        path.write_text("[\n" + ",\n".join(map(as_json, series)) + "\n]\n", encoding="utf-8")


def as_json(one: Series) -> str:
    """Return a machine's results as JSON, a line a row."""
    rows = ",\n".join(json.dumps(asdict(row)) for row in one.table)
    return f'{{"machine": {json.dumps(one.machine)}, "rows": [\n{rows}\n]}}'


def earlier(path: Path | None) -> list[Series]:
    """Return what earlier calls left in the file."""
    if path is None or not path.exists():
        return []
    plain = json.loads(path.read_text(encoding="utf-8"))
    return [Series(one["machine"], {row.case: row for row in map(read_row, one["rows"])}) for one in plain]


def read_row(values: Mapping[str, Any]) -> Row:
    """Return the row of which these are the fields, as JSON has them."""
    ratios = {key: {name: Ratio(**ratio) for name, ratio in values[key].items()} for key in ("step", "forward")}
    return Row(**{**values, "case": Case(**values["case"]), **ratios})


def rank(row: Row) -> tuple[int, ...]:
    """Return the place of a row in the table."""
    case, workload = row.case, WORKLOADS[row.case.model]
    places = [list(WORKLOADS).index(case.model), list(workload.targets).index(case.targets)]
    return (*places, ["float32", "bfloat16"].index(case.dtype), list(ALGORITHMS).index(case.algorithm))


# ------------------------------------------------------------------------------------------------------------- report


def report(series: list[Series], chart: Path | None, document: Path | None) -> None:
    """Print the last series, this machine's; write the document's section and the chart, of all, where they are asked for."""
    shown = [header in ON_SCREEN for header in HEADERS]
    table = Table(*compress(HEADERS, shown), title="One training step, relative to the frozen base model")
    for row in series[-1].table:
        table.add_row(*compress(cells(row), shown))
    Console().print(table)
    if chart:
        from benchmark_chart import step_chart

        step_chart(panels(series), chart)
    if document:
        write_section(document, MARKERS, TITLE, markdown(series))


HEADERS = ["model", "targets", "algorithm", "parameters", "base s", *[f"{name} x" for name in ADAPTED]]
HEADERS += [
    "target",
    "met",
    "ours forward x",
    *[f"{name} saved MiB" for name in ADAPTED],
    *[f"{name} peak MiB" for name in ("ours", "PEFT")],
]


ON_SCREEN = {"model", "targets", "algorithm", "ours x", "PEFT x", "LyCORIS bypass x", "target", "met"}


def cells(row: Row) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    case = row.case
    return [
        case.label,
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


def panels(series: list[Series]) -> dict[str, dict[str, dict[str, dict[str, Ratio]]]]:
    """Return the steps' ratios by machine, by what is common to several rows, and by algorithm."""
    found: dict[str, dict[str, dict[str, dict[str, Ratio]]]] = {}
    for one in series:
        for row in one.table:
            machine = found.setdefault(one.machine.get("device", one.machine["CPU"]), {})
            case = row.case
            machine.setdefault(f"{case.model}, {case.targets}, {case.dtype}", {})[case.algorithm] = row.step
    return found


def markdown(series: list[Series]) -> str:
    """Return the section of the document: how to read the tables; every machine and its table."""
    return "\n".join(
        [
            "`x`: time relative to the frozen base model in the same rounds (95 % interval); `?`: the interval is wider",
            "than 3 % on a side, inconclusive. A step is forward, backward and AdamW; a forward is one of inference, with",
            "nothing to be trained. Saved MiB are kept for backward, peak MiB is the highest memory of a process of its own,",
            "both beyond the base model's.",
            f"A peer more than a quarter slower or faster than we are after {FIRST} rounds was measured in these only.",
            *(line for one in series if one.rows for line in ("", *lines(one))),
        ]
    )


def lines(one: Series) -> list[str]:
    """Return a machine and its table."""
    rounds = [row.rounds for row in one.table]
    return [
        *(f"- {name}: {value}" for name, value in one.machine.items()),
        f"- {min(rounds)} to {max(rounds)} interleaved rounds",
        "",
        markdown_table(HEADERS, map(cells, one.table)),
    ]
