"""The whole-model benchmark in short, for the README: Stable Diffusion 1.5's training step, one line an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmark_results import Row, Series
from benchmarking import MIB, markdown_table, write_section

MARKERS = ("<!-- cost: begin -->", "<!-- cost: end -->")
TITLE = "## What training costs"
HEADERS = ["adapter", "lycoris_diff", "PEFT", "LyCORIS", "MiB kept: lycoris_diff", "PEFT", "LyCORIS"]
LYCORIS = ("LyCORIS", "LyCORIS bypass")
#: what is shown, and its name for people
SHOWN = {
    ("attention", "lora"): "LoRA",
    ("attention", "dora"): "DoRA",
    ("attention", "lokr"): "LoKr",
    ("attention", "lokr-f8-full"): "LoKr, full second factor",
    ("attention", "loha"): "LoHa",
    ("attention", "miss"): "MiSS",
    ("attention", "shira"): "SHiRA",
    ("attention", "oft"): "OFT",
    ("conv", "lokr"): "LoKr, convolutions too",
    ("conv", "loha"): "LoHa, convolutions too",
}


def write_summary(series: Sequence[Series], document: Path) -> None:
    """Renew the section of the document."""
    write_section(document, MARKERS, TITLE, summary(series))


def summary(series: Sequence[Series]) -> str:
    """Return the table of the machine on which most of it was measured, of equal ones the last; it says which."""
    found: dict[tuple[str, str], Row] = {}
    machine: dict[str, str] = {}
    for one in series:
        rows = {(row.case.targets, row.case.algorithm): row for row in one.table if _is_shown(row)}
        if rows and _times(rows.values()) >= _times(found.values()):
            found, machine = rows, one.machine
    lines = [cells(name, found[key]) for key, name in SHOWN.items() if key in found]
    device = machine.get("device", f"{machine.get('CPU')}, cores: {machine.get('cores')}")
    return f"Measured on {device}; {machine.get('versions')}.\n\n{markdown_table(HEADERS, lines)}"


def cells(name: str, row: Row) -> list[str]:
    """Return one line: steps relative to the frozen model's, of LyCORIS the faster mode, and what is kept for backward."""
    modes = [mode for mode in LYCORIS if mode in row.step]
    best = min(modes, key=lambda mode: row.step[mode].median, default="")
    contenders = ("ours", "PEFT", best)
    steps = [f"{row.step[c].median:.2f}" if c in row.step else "-" for c in contenders]
    kept = [f"{row.saved[c] / MIB:.0f}" if c in row.saved else "-" for c in contenders]
    fastest = min(step for step in steps if step != "-")
    return [name, *(f"**{step}**" if step == fastest else step for step in steps), *kept]


def _times(rows: Iterable[Row]) -> int:
    return sum(len(row.step) for row in rows)


def _is_shown(row: Row) -> bool:
    case = row.case
    return case.model == "sd15-32" and case.dtype == "float32" and (case.targets, case.algorithm) in SHOWN
