"""What a file holds, without a model: algorithms, ranks and strengths by block, and how large each change is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Entry
from .metadata import WORDS
from .norms import delta_norm
from .read import read_checkpoint
from .safety import non_finite_factors
from .slices import MAGNITUDES

#: a block is a path down to the number of the block, for UNets to that of the resnet or attention within it
_BLOCK = re.compile(r"(?P<block>.*?(?:\.|_)\d+(?:\.(?:attentions|resnets|upsamplers|downsamplers)\.\d+)?)(?:\.|_|$)")


@dataclass
class Block:
    """One block of a component.

    Attributes:
        component, name: where it is.
        modules: number of modules with an adapter.
        algorithms: LyCORIS' words for what is on them.
        ranks: all that occur, ascending.
        alphas: all that occur, ascending; as found in the file.
        alpha_sources: where the strengths come from.
        strengths: trained strengths that occur, ascending.
        norm: Frobenius norm of the whole block's change; None when it depends on the base weight.
    """

    component: str
    name: str
    modules: int = 0
    algorithms: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    alpha_sources: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    norm: float | None = None


@dataclass
class InspectReport:
    """A file at a glance.

    Attributes:
        path: of the file.
        bytes: its size.
        dialect: naming scheme.
        trainer: who seems to have written it, "" when nothing tells.
        base_model: the guess, "" when nothing fits.
        algorithms: LyCORIS' word -> number of modules.
        modules: component -> number of modules.
        dtypes: of the factors -> number of tensors.
        parameters: number of values in all factors.
        blocks: in the order of the model.
        extras: names of tensors that are no adapter.
        unknown, unmatched, wrong_shape, conflicts: what cannot be used, as in `Checkpoint`.
        notes: choices and warnings.
        metadata: of the file.
    """

    path: str
    bytes: int
    dialect: str
    trainer: str
    base_model: str
    algorithms: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    blocks: list[Block] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; numbers that JSON cannot say become text ("inf", "nan")."""
        return _plain(asdict(self))


def inspect_checkpoint(path: str | os.PathLike[str], base_model: str | None = None) -> InspectReport:
    """What a file or PEFT directory holds.

    Args:
        path: file or directory.
        base_model: None guesses it; without one that fits, modules go by the file's names.

    Raises:
        CheckpointError: the file is damaged, hostile or holds no adapter. OSError: it cannot be opened.
    """
    ckpt = read_checkpoint(path, base_model)
    report = InspectReport(
        os.fspath(path),
        _size(Path(path)),
        ckpt.dialect,
        ckpt.trainer,
        ckpt.base_model,
        modules={c: len(m) for c, m in ckpt.components.items()},
        extras=sorted(ckpt.extras),
        unknown=dict(ckpt.unknown),
        unmatched=dict(ckpt.unmatched),
        wrong_shape=dict(ckpt.wrong_shape),
        conflicts=dict(ckpt.conflicts),
        notes=list(ckpt.notes),
        metadata=dict(ckpt.metadata),
    )
    _describe(ckpt, report)
    return report


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _describe(ckpt: Checkpoint, report: InspectReport) -> None:
    bad = broken_modules(ckpt)
    if bad:
        report.notes.append(f"{len(bad)} modules hold NaN or infinite values, first {bad[0]}")
    for component, modules in ckpt.components.items():
        blocks: dict[str, list[list[Entry]]] = {}
        for path in sorted(modules, key=_order):
            blocks.setdefault(block_of(path), []).append(modules[path])
        report.blocks += [_block(component, name, listed) for name, listed in blocks.items()]
        for entry in (e for entries in modules.values() for e in entries):
            word = WORDS.get(entry.algorithm, entry.algorithm.lower())
            report.algorithms[word] = report.algorithms.get(word, 0) + 1
            for tensor in entry.tensors.values():
                dtype = str(tensor.dtype).removeprefix("torch.")
                report.dtypes[dtype] = report.dtypes.get(dtype, 0) + 1
                report.parameters += tensor.numel()


def _block(component: str, name: str, modules: list[list[Entry]]) -> Block:
    entries = [e for listed in modules for e in listed]
    norms = [n for listed in modules if (n := delta_norm(listed)) is not None]
    return Block(
        component,
        name,
        len(modules),
        _distinct(WORDS.get(e.algorithm, e.algorithm.lower()) + ("+dora" if _decomposed(e) else "") for e in entries),
        _distinct(e.rank for e in entries if e.rank),
        _distinct(e.alpha for e in entries if e.alpha is not None),
        _distinct(e.alpha_source for e in entries),
        _distinct(round(e.scale, 6) for e in entries),
        sum(n * n for n in norms) ** 0.5 if norms else None,
    )


def broken_modules(ckpt: Checkpoint) -> list[str]:
    """Modules with a factor that is not finite, as ``component.path``."""
    listed = ((f"{c}.{p}", entries) for c, modules in ckpt.components.items() for p, entries in modules.items())
    return [name for name, entries in listed if any(non_finite_factors(e) for e in entries)]


def _decomposed(entry: Entry) -> bool:
    return any(name in entry.tensors for name in MAGNITUDES)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values))


def block_of(path: str) -> str:
    """The block a module belongs to (``down_blocks.0.attentions.1``, ``transformer_blocks.7``), or its path outside of any."""
    found = _BLOCK.match(path)
    return found["block"] if found else path


def _order(path: str) -> list[Any]:
    """Numbers by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path) if part]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
