"""What the subcommands that use a pipeline share: arguments, loading, and how a report is shown."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from ..errors import AdapterError
from ..files import read_json

if TYPE_CHECKING:
    from ..diffusion import LoadReport

TINY = "tiny"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class AdapterArgument(NamedTuple):
    """``FILE[:WEIGHT]``: where an adapter is, and its weight or its weights by component or pattern."""

    source: str
    weight: float | dict[str, float]


def adapter_argument(text: str) -> AdapterArgument:
    """Parse ``FILE``, ``FILE:0.8`` or ``FILE:unet=1,text_encoder=0.5``; without a weight it is 1, as of a path that exists."""
    source, _, tail = text.rpartition(":")
    if text and Path(text).exists():
        return AdapterArgument(text, 1.0)
    if source and _NUMBER.fullmatch(tail):
        return AdapterArgument(source, float(tail))
    pairs = [part.partition("=") for part in tail.split(",")]
    if source and all(key and sign and _NUMBER.fullmatch(value) for key, sign, value in pairs):
        return AdapterArgument(source, {key: float(value) for key, _, value in pairs})
    if not text:
        raise argparse.ArgumentTypeError("expected FILE or FILE:WEIGHT")
    return AdapterArgument(text, 1.0)


def add_pipeline_arguments(parser: argparse.ArgumentParser, adapter_required: bool) -> None:
    """Add ``--model``, ``--adapter`` and how to load them."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help=f"diffusers directory or Hub repository, or {TINY!r} for the built-in one"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        required=adapter_required,
        type=adapter_argument,
        metavar="FILE[:WEIGHT]",
        help="adapter file, PEFT directory or Hub repository; the weight may name parts: unet=1,text_encoder=0.5. Repeatable",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="precision")
    parser.add_argument("--no-strict", action="store_true", help="load what fits of a file that does not fit in everything")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def load_pipeline(model: str, dtype: str, revision: str | None = None, variant: str | None = None) -> Any:
    """The pipeline behind ``--model``; `revision` and `variant` are those of a Hub repository's weights.

    Raises:
        AdapterError: no diffusers pipeline, or one that diffusers does not understand. OSError: nothing of this name opens.
    """
    import torch
    from diffusers import DiffusionPipeline

    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if model == TINY:
        from ..tiny import load_pipeline as load_tiny

        pipe = load_tiny()
        return pipe if wanted is None else pipe.to(wanted)
    path = Path(model)
    if path.exists() and not (path / "model_index.json").is_file():
        raise AdapterError(f"{model} is no diffusers pipeline: it has no model_index.json; convert single files with diffusers")
    given = {"torch_dtype": wanted, "revision": revision, "variant": variant}
    arguments = {name: value for name, value in given.items() if value is not None} | _left_out(path)
    try:
        return DiffusionPipeline.from_pretrained(model, **arguments)
    except (ValueError, AttributeError, ImportError) as error:
        raise AdapterError(f"--model: {model} cannot be loaded: {error}") from error


def _left_out(path: Path) -> dict[str, None]:
    """Text encoders that a saved pipeline is without, as Stable Diffusion 3 without T5; diffusers wants to be told of them."""
    file = path / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    parts = {name: value for name, value in index.items() if name.startswith(("text_encoder", "tokenizer"))}
    return {name: None for name, value in parts.items() if value == [None, None]}


def load_adapters(pipe: Any, adapters: list[AdapterArgument], strict: bool) -> list[LoadReport]:
    """Load adapters under names made from their files' names.

    Raises:
        AdapterError, OSError: as `load_adapter`.
    """
    from torch.nn import ModuleDict

    from ..bookkeeping import BASE
    from ..diffusion import load_adapter

    reports: list[LoadReport] = []
    for adapter in adapters:
        stem = re.sub(r"\W+", "_", Path(adapter.source).stem) or "adapter"
        stem += "_" if hasattr(ModuleDict(), stem) or stem == BASE else ""  # "train.safetensors"
        taken = {r.adapter_name for r in reports}
        name = next(n for i in range(len(adapters) + 1) if (n := f"{stem}_{i}" if i else stem) not in taken)
        reports.append(load_adapter(pipe, adapter.source, name, adapter.weight, strict=strict))
    return reports


def summary(report: LoadReport) -> dict[str, Any]:
    """A report as plain values, modules counted instead of listed."""
    return {k: v for k, v in report.to_dict().items() if k != "matched"}


def show(reports: list[LoadReport]) -> None:
    """Print reports for people."""
    console = Console(highlight=False)
    for report in reports:
        console.print(str(report), markup=False)
