#!/usr/bin/env python3
"""Adapters on quantized linear layers: error, time, bytes, and what merging would lose, scheme by scheme.

    python scripts/measure_quantized.py                       # half a minute; needs torchao, bitsandbytes, or both
    python scripts/measure_quantized.py --document docs/quantized.md
    python scripts/measure_quantized.py --size 2048 --tokens 4096 --dtype bfloat16 --device cuda

Errors are the largest over the largest expected value, against a float64 layer of the numbers that the weight stands for plus
the change. Times are medians of a training step (forward, gradients of input and factors), relative to the frozen quantized
layer alone and to the unquantized layer alone. Bytes are of the weight with its scales. What merging loses is the relative
error of the change of the weight once it is rounded anew.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lycoris_diff import (
    DiagOFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RequantizeReport,
    ShiraConfig,
    get_peft_model,
)
from lycoris_diff.layers.rounded import packed_bytes

BEGIN, END = "<!-- measure_quantized: begin -->", "<!-- measure_quantized: end -->"
COLUMNS = [
    "scheme",
    "algorithm",
    "output error",
    "gradient error",
    "step x quantized",
    "step x plain",
    "bytes x plain",
    "lost by merging",
]
HERE = {"target_modules": ["0"]}
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=16, **HERE),
    "lora-dora": lambda: LoraConfig(r=16, use_dora=True, **HERE),
    "lokr": lambda: LoKrConfig(r=16, decompose_factor=8, **HERE),
    "loha": lambda: LoHaConfig(r=8, **HERE),
    "miss": lambda: MissConfig(r=32, **HERE),
    "shira": lambda: ShiraConfig(r=8, random_seed=0, **HERE),
    "oft": lambda: OFTConfig(oft_block_size=32, **HERE),
    "diag-oft": lambda: DiagOFTConfig(r=32, **HERE),
}


def schemes() -> dict[str, Callable[[nn.Sequential], None]]:
    """What the installed libraries can do to the first layer of a model, by name."""
    found: dict[str, Callable[[nn.Sequential], None]] = {}
    if importlib.util.find_spec("torchao"):
        import torchao.quantization as q

        found["torchao int8"] = lambda model: q.quantize_(model, q.Int8WeightOnlyConfig())
        int4 = q.IntxWeightOnlyConfig(torch.int4, granularity=q.PerGroup(32))
        found["torchao int4"] = lambda model: q.quantize_(model, int4)
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        def replace(model: nn.Sequential, make: Callable[[int, int], nn.Module]) -> None:
            layer: Any = model[0]
            packed = make(layer.in_features, layer.out_features)
            packed.load_state_dict(layer.state_dict())
            model[0] = packed.to(layer.weight.device)

        found["bnb nf4"] = lambda model: replace(
            model, lambda i, o: Linear4bit(i, o, compute_dtype=model[0].weight.dtype, quant_type="nf4")
        )
        found["bnb int8"] = lambda model: replace(model, lambda i, o: Linear8bitLt(i, o, has_fp16_weights=False))
    return found


def step(model: nn.Module, x: Tensor, seed: Tensor) -> Tensor:
    """One training step without the optimizer."""
    x.grad = None
    y: Tensor = model(x)
    y.backward(seed)
    return y


def ratios(models: list[nn.Module], x: Tensor, seed: Tensor, rounds: int) -> list[float]:
    """Time of the first model's step relative to every other's: medians of the ratios within a round, a step each in turn."""
    times: list[list[float]] = []
    for _ in range(rounds + 1):
        times.append([])
        for model in models:
            _wait(x)
            begun = time.perf_counter()
            step(model, x, seed)
            _wait(x)
            times[-1].append(time.perf_counter() - begun)
    return [statistics.median(one[0] / one[i] for one in times[1:]) for i in range(1, len(models))]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(models: list[nn.Module], algorithm: str, x: Tensor, seed: Tensor, rounds: int) -> list[str]:
    """Columns of an algorithm on the first of the frozen models: errors, times relative to all of them, what merging loses."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(models[0]), ALGORITHMS[algorithm]()).train()
    layer: Any = model.get_base_model()[0]
    with torch.no_grad():
        for name, parameter in layer.adapters.named_parameters():
            if "magnitude" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
        adapter = layer.adapter("default")
        values = layer.values().double()
        f = {k: v.double() if v.is_floating_point() else v for k, v in adapter.inputs().items()}
        weight = adapter.add_change(values.clone(), values, f)
        wanted = torch.nn.functional.linear(x.detach().double(), weight, layer.base_layer.bias.double())
        gradient = seed.double() @ weight
    y = step(model, x, seed)
    assert x.grad is not None
    errors = [_error(y, wanted), _error(x.grad, gradient)]
    quotients = ratios([model, *models], x, seed, rounds)
    reports: list[RequantizeReport] = []
    model.merge_adapter(requantize=reports.append)
    lost = f"{reports[0].worst[1]:.1%}"
    return [*(f"{e:.1e}" for e in errors), *(f"{q:.2f}" for q in quotients), "", lost]


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=768, help="channels in and out (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps a time (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--document", type=Path, help="renew the section between the markers")
    args = parser.parse_args()
    available = schemes()
    if not available:
        parser.error("neither torchao nor bitsandbytes is installed; pip install torchao bitsandbytes")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    plain = nn.Sequential(nn.Linear(args.size, args.size)).to(args.device, dtype).requires_grad_(False)
    x = torch.randn(args.tokens, args.size, device=args.device, dtype=dtype, requires_grad=True)
    seed = torch.randn(args.tokens, args.size, device=args.device, dtype=dtype)
    rows: list[list[str]] = []
    for scheme, quantize in available.items():
        base = copy.deepcopy(plain)
        quantize(base)
        base.requires_grad_(False).train()
        weight: Any = plain[0].weight
        share = packed_bytes(base[0].weight) / (weight.numel() * weight.element_size())
        (alone,) = ratios([base, plain], x, seed, args.rounds)
        rows.append([scheme, "(none)", "", "", "1.00", f"{alone:.2f}", f"{share:.3f}", ""])
        rows += [[scheme, name, *measure([base, plain], name, x, seed, args.rounds)] for name in ALGORITHMS]
    title = f"{args.size}x{args.size}, {args.tokens} tokens, {args.dtype}, {args.device}, torch {torch.__version__}"
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(*row, end_section=following is None or following[0] != row[0])
    Console().print(table)
    if args.document:
        renew(args.document, title, rows)


def renew(document: Path, title: str, rows: list[list[str]]) -> None:
    """Put the table between the document's markers."""
    lines = [f"`python scripts/measure_quantized.py --document {document.as_posix()}`: {title}", ""]
    lines += [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]]
    text = document.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{document} has no section between {BEGIN} and {END}; add the two lines")
    document.write_text("\n".join([head + BEGIN, *lines, END + tail]), encoding="utf-8")


if __name__ == "__main__":
    main()
