#!/usr/bin/env python3
"""What a training step with an adapter must cost: multiply-adds and memory traffic beyond the frozen model's; on meta tensors.

    python scripts/account.py --markdown docs/performance.md    # renew the table in the document

Counted are, for every adapted layer, the ways that the cost model picks for it: a factored form runs once forward, once
backward for its input and once for its factors (also where a product goes through the weight, which is less); a changed
weight is built twice and its gradient is one product of the weight's size. The frozen model's step is counted by torch's own
counter. The floor is what the ratio of the times would be if every multiply-add took the same time and memory were free;
traffic is what the adapter reads and writes of activations (or of weights, where it changes them), each pass counted once.
Not counted: DoRA's norms of the weight, OFT's rotation of it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from benchmark_models import WORKLOADS
from benchmarking import ALGORITHMS, markdown_table, write_section
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lycoris_diff
from lycoris_diff.bookkeeping import adapted_layers
from lycoris_diff.layers.choosing import weighed

MARKERS = ("<!-- account: begin -->", "<!-- account: end -->")
TITLE = "## Accounting"
BYTES = 4  # float32


@dataclass(frozen=True)
class Account:
    """Sums over a model's adapted layers.

    Attributes:
        beside, instead: how many layers run in which way.
        frozen: multiply-adds of the frozen model's step.
        extra: multiply-adds beyond those.
        traffic: bytes that the adapters read and write.
    """

    beside: int
    instead: int
    frozen: int
    extra: int
    traffic: int

    @property
    def floor(self) -> float:
        """Ratio of the steps if only multiply-adds took time."""
        return 1 + self.extra / self.frozen


def account(model: str, targets: str, algorithm: str) -> Account:
    """Count one algorithm on one workload."""
    workload = WORKLOADS[model]
    with torch.device("meta"):
        base = workload.make().requires_grad_(False)
    tokens, frozen = run_frozen(base, workload)
    chosen = ALGORITHMS[algorithm]
    config = chosen.config_of(lycoris_diff, list(workload.targets[targets]), targets == "conv", chosen.ours)
    lycoris_diff.inject_adapter(base, config, low_cpu_mem_usage=True)
    beside = instead = extra = traffic = 0
    for path, layer in adapted_layers(base):
        geometry, adapter = layer.geometry, layer.adapter("default")
        program = adapter.program(adapter.inputs())
        count, size = tokens[path], prod(geometry.shape)
        choice = weighed(adapter, program, count)
        if choice.mode == "beside" and program is not None:
            beside += 1
            extra += 3 * count * program.cost
            folds = choice.folded
            reads, writes = 5 - folds.forward - 2 * folds.backward, 4 - 2 * folds.forward
            traffic += BYTES * (
                count * (reads * geometry.inp + writes * geometry.out + 6 * program.width) + 2 * size * sum(folds)
            )
        else:
            instead += 1
            extra += count * (program.sampled_cost or 0) if choice.sampled and program is not None else count * size
            traffic += BYTES * (6 if choice.sampled else 12) * size
    return Account(beside, instead, frozen, extra, traffic)


def run_frozen(model: nn.Module, workload: object) -> tuple[dict[str, int], int]:
    """Return the tokens that every layer sees, by its path, and the multiply-adds of forward and backward."""
    tokens: dict[str, int] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def note(module, inputs, output, path=path):
                tokens[path] = output.numel() // module.weight.shape[0]

            hooks.append(module.register_forward_hook(note))
    call = workload.call(torch.float32, "meta")  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter:
        output = model(**call)
        output = output.sample if hasattr(output, "sample") else output
        output.sum().backward()
    for hook in hooks:
        hook.remove()
    return tokens, counter.get_total_flops() // 2


HEADERS = ("model", "targets", "algorithm", "beside / instead", "frozen GMAC", "extra GMAC", "floor", "traffic MiB")


def cells(model: str, targets: str, algorithm: str) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    found = account(model, targets, algorithm)
    numbers = [f"{found.frozen / 1e9:.0f}", f"{found.extra / 1e9:.1f}", f"{found.floor:.2f}", f"{found.traffic / 2**20:,.0f}"]
    return [model, targets, algorithm, f"{found.beside} / {found.instead}", *numbers]


def main(arguments: list[str] | None = None) -> None:
    """Count what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd15-32"], choices=WORKLOADS)
    parser.add_argument("--algos", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the section of this document")
    options = parser.parse_args(arguments)
    lines = [cells(model, t, a) for model in options.models for t in WORKLOADS[model].targets for a in options.algos]
    table = Table(*HEADERS, title="A training step, beyond the frozen model's")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    if options.markdown:
        write_section(options.markdown, MARKERS, TITLE, markdown_table(HEADERS, lines))


if __name__ == "__main__":
    main()
