#!/usr/bin/env python3
"""Time and memory of one adapted layer, against its frozen base layer, PEFT and LyCORIS.

For every layer case and algorithm all contenders run interleaved in one process: in each round everyone takes one
training step (forward, and backward with the gradient to the input, over frozen weights) and one forward under
``no_grad``, in an order that rotates from round to round and is reversed in every other one. Reported are medians and
quartiles of the ratios to the base layer of the same round, and the bytes kept for backward beyond the base layer's.

    python scripts/benchmark_layers.py                                      # everything, some ten minutes on two cores
    python scripts/benchmark_layers.py --cases 1280x1280 --algos lokr loha  # a part
    python scripts/benchmark_layers.py --markdown docs/benchmarks.md        # also renew the table in the document
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain, compress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lycoris
import peft
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lycoris_diff

MIB = 2**20
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


@dataclass(frozen=True)
class Algorithm:
    """One algorithm at one size: config class and fields, by the names that PEFT and we share, and what differs."""

    config: str
    fields: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    lycoris: Mapping[str, Any] = field(default_factory=dict)
    conv: bool = False
    tucker: bool = False

    def config_of(self, package: Any, case: Case, more: Mapping[str, Any]) -> Any:
        core = {"use_effective_conv2d": True} if self.tucker and case.kind == "conv" else {}
        return getattr(package, self.config)(target_modules=["layer"], **{**self.fields, **core, **more})


FULL = {"ours": {"full_matrix": True}, "peft": {"r": 100_000}, "lycoris": {"factor": 8, "full_matrix": True}}
ALGORITHMS = {
    "lora": Algorithm("LoraConfig", {"r": 8}, conv=True),
    "lokr": Algorithm("LoKrConfig", {"r": 8}, conv=True, tucker=True),
    "lokr-f8-full": Algorithm("LoKrConfig", {"r": 8, "decompose_factor": 8}, **FULL),
    "loha": Algorithm("LoHaConfig", {"r": 8}, conv=True, tucker=True),
    "loha-r4": Algorithm("LoHaConfig", {"r": 4}),
    "miss": Algorithm("MissConfig", {"r": 8}),
    "shira": Algorithm("ShiraConfig", {"r": 8, "random_seed": 0}),
    "dora": Algorithm("LoraConfig", {"r": 8, "use_dora": True}, lycoris={"weight_decompose": True}, conv=True),
}
LYCORIS = {"LoraConfig": "LoConModule", "LoKrConfig": "LokrModule", "LoHaConfig": "LohaModule"}

# --------------------------------------------------------------------------------------------------------- contenders


class Contender:
    """An adapted layer, with the module that owns the adapter's tensors where that is another one."""

    def __init__(self, layer: nn.Module, adapter: nn.Module | None = None):
        self.layer = layer
        self.owners = nn.ModuleList([layer, *filter(None, [adapter])])
        self.trainable = [p for p in self.owners.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self.trainable)
        with torch.no_grad():  # every factor non-zero; DoRA's magnitudes stay the norms they start from
            for name, p in self.owners.named_parameters():
                if p.requires_grad and not re.search("magnitude|dora_scale", name):
                    p.normal_(std=0.02)

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

    def saved_bytes(self, x: Tensor) -> int:
        """Bytes of the distinct storages that a forward keeps for backward, parameters and buffers left out."""
        tensors = chain(self.owners.parameters(), self.owners.buffers())
        owned = {address for tensor in tensors for address, _ in _storages(tensor)}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved.update(_storages(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.layer(x)
        del output  # alive until here, so that no address is given out twice
        return sum(size for address, size in saved.items() if address not in owned)


def _storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Address and bytes of the storage of a tensor, or of both storages of a sparse one."""
    for part in (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,):
        yield part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()


def _base(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    return Contender(layer)


def _ours(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    holder = nn.ModuleDict({"layer": layer})
    lycoris_diff.inject_adapter(holder, algorithm.config_of(lycoris_diff, case, algorithm.ours))
    return Contender(holder["layer"])


def _peft(layer: nn.Module, case: Case, algorithm: Algorithm) -> Contender:
    holder = nn.ModuleDict({"layer": layer})
    peft.inject_adapter_in_model(algorithm.config_of(peft, case, algorithm.peft), holder)
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


def measure(case: Case, name: str, rounds: int, warmup: int) -> Row:
    """Run all contenders for one case and algorithm."""
    torch.manual_seed(0)
    contenders = make_contenders(case, ALGORITHMS[name])
    x = case.input()
    gradient = torch.randn_like(contenders["base"].layer(x))
    times: dict[str, list[tuple[float, float]]] = {c: [] for c in contenders}
    steps = max(1, round(TURN / min(contenders["base"].times(x, gradient)[0] for _ in range(5))))
    for index in range(warmup + rounds):
        for c in _order(list(contenders), index):
            times[c].append(contenders[c].times(x, gradient, steps))
    trained, forwards = ({c: [pair[i] for pair in pairs[warmup:]] for c, pairs in times.items()} for i in range(2))
    saved = {c: contender.saved_bytes(x) for c, contender in contenders.items()}
    others = [c for c in ADAPTED if c in contenders]
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


def _order(names: list[str], index: int) -> list[str]:
    """Rotated by one more in each round and reversed in every other, so that nobody always follows the same one."""
    turn = index % len(names)
    rotated = names[turn:] + names[:turn]
    return rotated[:: -1 if index % 2 else 1]


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
    target = next((t for t in TARGETS if row.algorithm in t.algorithms and t.holds(row.case)), None)
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


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return {
        "CPU": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "versions": f"torch {torch.__version__}, PEFT {version('peft')}, LyCORIS {version('lycoris-lora')}",
    }


def markdown(rows: list[Row], rounds: int) -> str:
    """The section of the document: machine, how to read the table, the table."""
    table = [HEADERS, ["---"] * len(HEADERS), *map(cells, rows)]
    lines = [
        *(f"- {name}: {value}" for name, value in machine().items()),
        f"- float32, {rounds} interleaved rounds; `make bench` renews this section",
        "",
        "`x`: time of a training step relative to the frozen base layer alone, median (quartiles) of the ratios within",
        f"a round, where a contender's turn has as many steps as the base layer does in {1e3 * TURN:.0f} ms; `forward x`: the",
        "same under `no_grad`, median. Saved MiB are kept for backward beyond what the base layer keeps; their target is",
        "the layer's input plus 2 MiB. Convolutions are 3x3, LoKr and LoHa have a Tucker core there.",
        "",
        *("| " + " | ".join(line) + " |" for line in table),
    ]
    return "\n".join(lines)


def write_section(path: Path, text: str) -> None:
    """Put the text between the markers of the document, which is created or extended where they are missing."""
    document = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if BEGIN not in document:
        document = f"{document.rstrip()}\n\n## Single layers\n\n{BEGIN}\n{END}\n"
    head, _, rest = document.partition(BEGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default 3)")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains a text")
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in this document")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for and report it."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peers'
    logging.disable(logging.WARNING)
    cases = [case for case in CASES if any(text in str(case) for text in options.cases)]
    runs = [(c, a) for c in cases for a in options.algos if ALGORITHMS[a].conv or c.kind == "linear"]
    console, rows = Console(), []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(runs))
        for case, algorithm in runs:
            progress.update(task, description=f"{case} {algorithm}")
            rows.append(measure(case, algorithm, options.rounds, options.warmup))
            progress.advance(task)
    shown = [h in ON_SCREEN for h in HEADERS]
    table = Table(*compress(HEADERS, shown), title="One training step, relative to the frozen base layer")
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*(cell.replace("**no**", "[red]no[/red]") for cell in compress(cells(row), shown)))
    console.print(table)
    if options.json:
        report = {"machine": machine(), "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        write_section(options.markdown, markdown(rows, options.rounds))


if __name__ == "__main__":
    main()
