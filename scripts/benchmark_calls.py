#!/usr/bin/env python3
"""Microseconds of calls: layers so small that arithmetic and memory cost nothing, in training and in inference.

    python scripts/benchmark_calls.py --markdown docs/performance.md    # renew the table in the document

What is measured is the processor time of this process' one thread, the smallest of many short turns: what others do on the
machine adds to a turn and never takes away.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
from benchmarking import ALGORITHMS, fill_factors, machine, markdown_table, prepare_process, write_section
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lycoris_diff
from lycoris_diff.layers import frozen, light

MARKERS = ("<!-- calls: begin -->", "<!-- calls: end -->")
TITLE = "## Calls"
WIDTH, TOKENS = 64, 4
TURN, TURNS = 15, 300


def fastest(do: Callable[[], object]) -> float:
    """Return the microseconds of one call in the fastest turn."""
    for _ in range(50):
        do()
    best = float("inf")
    for _ in range(TURNS):
        start = time.process_time()
        for _ in range(TURN):
            do()
        best = min(best, (time.process_time() - start) / TURN)
    return 1e6 * best


def layer_of(library: str, algorithm: str) -> nn.Module:
    """Return a frozen layer, with an adapter of a library unless it is the base."""
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}).requires_grad_(False)
    chosen = ALGORITHMS[algorithm]
    if library == "ours":
        lycoris_diff.inject_adapter(holder, chosen.config_of(lycoris_diff, ["layer"], False, chosen.ours))
    elif library == "PEFT":
        peft.inject_adapter_in_model(chosen.config_of(peft, ["layer"], False, chosen.peft), holder)
    fill_factors(holder)
    return holder["layer"]


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Forward and backward; gradients are forgotten."""
    layer(x).backward(gradient)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


@torch.no_grad()
def forward(layer: nn.Module, x: Tensor) -> None:
    """Forward alone."""
    layer(x)


def measure(algorithm: str) -> list[float]:
    """Return microseconds under `HEADERS`."""
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    gradient = torch.randn(1, TOKENS, WIDTH)
    base, ours, theirs = (layer_of(name, algorithm) for name in ("base", "ours", "PEFT"))
    found = [fastest(partial(step, each, x, gradient)) for each in (base, ours, theirs)]
    ours.plans.clear()
    limits = light.SMALL, light.LITTLE
    light.SMALL = light.LITTLE = 0
    found.insert(2, fastest(partial(step, ours, x, gradient)))
    light.SMALL, light.LITTLE = limits
    found += [fastest(partial(forward, each, x)) for each in (base, ours, theirs)]
    fixed = ours.requires_grad_(False).eval()
    frozen.forget(fixed)
    found.insert(6, fastest(partial(forward, fixed, x)))
    return found


HEADERS = ("step: base", "ours", "ours, fused", "PEFT", "forward: base", "ours", "ours, frozen", "PEFT")


def main() -> None:
    """Measure, print, and write the document's section where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["lora", "lokr", "loha", "miss", "shira", "dora"], choices=ALGORITHMS)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the section of this document")
    options = parser.parse_args()
    prepare_process(threads=1)
    rows = [[name, *(f"{value:.0f}" for value in measure(name))] for name in options.algos]
    table = Table("algorithm", *HEADERS, title=f"Microseconds, {WIDTH} x {WIDTH}, {TOKENS} tokens")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if options.markdown:
        note = f"Microseconds, {WIDTH} x {WIDTH} with {TOKENS} tokens, one thread, {machine()['CPU']}."
        write_section(options.markdown, MARKERS, TITLE, f"{note}\n\n{markdown_table(['algorithm', *HEADERS], rows)}")


if __name__ == "__main__":
    main()
