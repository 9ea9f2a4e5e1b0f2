"""Tables of `lycoris-diff train`: what a run will do, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..training import TrainReport
    from ..training.plan import TrainPlan
    from ..training.settings import TrainSettings
    from ..training.sizing import SizeChoice


def print_plan(plan: TrainPlan, settings: TrainSettings) -> None:
    """Print what a run would do."""
    from ..training.optimizers import describe_optimizer

    console = Console()
    modules = Table(title=f"{escape(settings.model)}: what will be trained")
    for column, justify in (
        ("component", "left"),
        ("part", "left"),
        ("modules", "right"),
        ("parameters", "right"),
        ("size", "right"),
    ):
        modules.add_column(column, justify=justify)  # type: ignore[arg-type]
    for component in dict.fromkeys(row.component for row in plan.rows):
        rows = [row for row in plan.rows if row.component == component]
        for row in rows:
            modules.add_row(component, row.role, f"{row.modules:,}", f"{row.parameters:,}", size_text(row.bytes))
        modules.add_section()
    modules.add_row("together", "", f"{sum(r.modules for r in plan.rows):,}", f"{plan.parameters:,}", "")
    console.print(modules)

    facts = Table(show_header=False)
    for part in plan.settings:
        knob = f", {part.label} {part.value}{' (some modules have another)' if part.varies else ''}" if part.label else ""
        facts.add_row(part.component, f"{part.algorithm.lower()}{knob}")
    if plan.size is not None:
        facts.add_row("size asked for", _size_choice(plan.size))
    for file in plan.files:
        if file.tensors:
            name = f"{file.component}/{file.name}" if file.component else file.name
            facts.add_row(escape(name), f"{file.bytes:,} bytes ({size_text(file.bytes)}), {file.format}")
    for name, value in _memory(plan):
        facts.add_row(name, value)
    facts.add_row("optimizer", escape(describe_optimizer(settings.config)))
    rounds = "" if plan.rounds is None else f", every picture {plan.rounds:,.1f} times"
    facts.add_row("steps", f"{plan.steps:,}: {plan.samples:,} pictures{rounds}")
    if plan.seconds is not None:
        facts.add_row("time", f"{time_text(plan.seconds)}, {plan.seconds / plan.steps:.3f} s a step")
    console.print(facts)
    _print_list(console, "Warnings", plan.warnings)


def print_report(report: TrainReport, settings: TrainSettings) -> None:
    """Print what came of a run."""
    console = Console()
    table = Table(title=escape(f"{settings.config.adapter_file.stem}: trained on {settings.model}"), show_header=False)
    for component, parameters in report.parameters.items():
        algorithm = settings.config.adapters[component].peft_name.lower()
        table.add_row(component, f"{algorithm}, {parameters:,} parameters")
    if report.size is not None:
        table.add_row("size asked for", _size_choice(report.size))
    table.add_section()
    classes = f", {report.class_images} of the class ({report.generated} generated)" if report.class_images else ""
    table.add_row("pictures", f"{report.images}{classes}")
    resumed = f", from step {report.resumed_from} on" if report.resumed_from else ""
    table.add_row("steps", f"{settings.config.max_train_steps}{resumed}, {report.seconds_per_step:.3f} s each")
    change = f"  ({report.held_out_after / report.held_out_before - 1:+.1%})" if report.held_out_before else ""
    table.add_row("held-out loss", f"{report.held_out_before:.4f} before, {report.held_out_after:.4f} after{change}")
    table.add_section()
    for name, path in report.paths.items():
        written = f" ({size_text(report.bytes[name])})" if name in report.bytes else ""
        table.add_row(name, escape(f"{path}{written}"))
    if report.previews:
        table.add_row("previews", escape(f"{len(report.previews)} in {report.previews[-1].parent}"))
    if report.uploaded:
        table.add_row("uploaded", escape(report.uploaded))
    console.print(table)
    _print_list(console, "Pictures left out", [f"{skipped.name}: {skipped.reason}" for skipped in report.skipped_pictures])
    _print_list(console, "Steps left out", [f"{skipped.step}: {skipped.reason}" for skipped in report.skipped_steps])
    _print_list(console, "Warnings", report.warnings)


def size_text(size: int) -> str:
    """Bytes for people: "640 bytes", "1.5 KiB", "12.3 MiB"."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{size} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def time_text(seconds: float) -> str:
    """Seconds for people: "42 s", "5 min 3 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _memory(plan: TrainPlan) -> list[tuple[str, str]]:
    memory = plan.memory
    parts = {
        "weights": memory.weights,
        "adapters": memory.adapters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "average": memory.ema or None,
        "activations": memory.activations,
    }
    text = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size is not None)
    unknown = [name for name in ("optimizer", "activations") if getattr(memory, name) is None]
    total = f"{size_text(memory.total)}: " if memory.total is not None else f"without {' and '.join(unknown)}: "
    rows = [("memory", escape(total + text))]
    if memory.peak is not None:
        rows.append(("memory, measured", f"{size_text(memory.peak)} at most"))
    return rows


def _size_choice(size: SizeChoice) -> str:
    values = sorted({value for _, value in size.knob.values()})
    bytes_text = "" if size.bytes is None else f", {size.bytes:,} bytes"
    others = ", ".join(
        f"{size.label} {other.value} has {other.parameters:,}" + ("" if other.bytes is None else f" ({other.bytes:,} bytes)")
        for other in size.alternatives
    )
    chosen = f"{size.label} {', '.join(map(str, values))}: {size.parameters:,} parameters{bytes_text}"
    return f"{chosen}; {others}" if others else chosen


def _print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"[bold]{title}[/bold] ({len(lines)})")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False)
