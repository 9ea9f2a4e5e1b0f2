"""Converting files and folders of files from one format to another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, CheckpointError
from ..files import CONFIG_NAME
from ..naming import COMPONENTS
from .checkpoint import Checkpoint
from .compose import Progress
from .formats import format_named
from .inspect import broken_modules
from .peft_directory import EXTRAS_NAME
from .read import read_checkpoint
from .whole import read_whole
from .write import WriteReport, write_checkpoint


@dataclass
class Converted:
    """One file of a conversion.

    Attributes:
        source, target: paths.
        error: why it was refused, "" when it was written.
        dialect, base_model: as read.
        modules: component -> number of modules.
        algorithms: algorithm -> number of weights.
        bytes: size of the new file.
        seconds: it took.
        notes: choices and rewritings, in words.
    """

    source: str
    target: str
    error: str = ""
    dialect: str = ""
    base_model: str = ""
    modules: dict[str, int] = field(default_factory=dict)
    algorithms: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class ConvertReport:
    """What a conversion did.

    Attributes:
        format: written.
        files: one a file.
    """

    format: str
    files: list[Converted] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every file was written."""
        return not any(f.error for f in self.files)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"ok": self.ok, **asdict(self)}


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = "kohya",
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    overwrite: bool = False,
    on_file: Callable[[int, int, str], None] | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a file, a PEFT directory, or every file of a folder.

    Args:
        src: what is read. In a folder these are all ``.safetensors`` files and PEFT directories at any depth.
        dst: what is written; for a folder a folder, in which names and depth stay.
        format: see `write_checkpoint`.
        base_model: None guesses it from names and shapes.
        dtype: of the factors; None keeps the file's.
        strict: refuse a file of which a tensor cannot be read or placed; otherwise the rest is converted and noted.
        overwrite: ``dst`` may be ``src``.
        on_file: called before every file with its number, how many there are, and its path.
        progress: called with the number of modules done and of all of a file.

    Returns:
        One row a file. In a folder a refused file is a row with its error, and the others are converted.

    Raises:
        CheckpointError: a single file is refused, a folder holds no adapter, or ``dst`` is ``src``; nothing has been written
            then. OSError: a path cannot be opened or written to.
    """
    format_named(format)
    source, target = Path(src), Path(dst)
    jobs = _jobs(source, target, format)
    for job, out in jobs:
        if not overwrite and _same(job, out):
            raise CheckpointError(
                f"{out} is the file that is read; write to another place, or pass overwrite=True (--overwrite)"
            )
    report = ConvertReport(format)
    for number, (job, out) in enumerate(jobs):
        if on_file is not None:
            on_file(number, len(jobs), os.fspath(job))
        row = Converted(os.fspath(job), os.fspath(out))
        report.files.append(row)
        started = time.perf_counter()
        try:
            _convert(job, out, format, base_model, dtype, strict, row, progress)
        except (AdapterError, OSError) as error:
            if job == source:
                raise
            row.error = str(error)
        row.seconds = round(time.perf_counter() - started, 3)
    return report


def _convert(
    source: Path,
    target: Path,
    format: str,
    base_model: str | None,
    dtype: torch.dtype | None,
    strict: bool,
    row: Converted,
    progress: Progress | None,
) -> None:
    ckpt, indexes = read_checkpoint(source, base_model), None
    if ckpt.wrong_shape and ckpt.base_model:
        whole = read_whole(source, ckpt.base_model, format_named(format))
        ckpt, indexes = whole or (ckpt, None)
    row.dialect, row.base_model, row.notes = ckpt.dialect, ckpt.base_model, list(ckpt.notes)
    lost = losses(ckpt)
    if lost and strict:
        more = f"; and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise CheckpointError(
            f"{source}: {len(lost)} names cannot be converted: {'; '.join(lost[:5])}{more}. Give the right base model, or "
            "convert the rest with strict=False (--partial)"
        )
    row.notes += [f"left out: {text}" for text in lost]
    bad = broken_modules(ckpt)
    if bad:
        row.notes.append(f"{len(bad)} modules hold NaN or infinite values, as before; first {bad[0]}")
    written: WriteReport = write_checkpoint(ckpt, target, format, dtype=dtype, progress=progress, indexes=indexes)
    row.modules, row.algorithms, row.bytes = written.modules, written.algorithms, written.bytes
    row.notes += written.notes


def losses(ckpt: Checkpoint) -> list[str]:
    """Everything of a file that a new one would lack, with the reason."""
    lost = [f"{name} ({why})" for found in (ckpt.unknown, ckpt.wrong_shape) for name, why in found.items()]
    lost += [f"{name} (no module has this name{near and f'; nearest is {near}'})" for name, near in ckpt.unmatched.items()]
    return lost


# --- files and folders --------------------------------------------------------------------------------------------------------
def _jobs(source: Path, target: Path, format: str) -> list[tuple[Path, Path]]:
    """What to read and where to write it."""
    if not source.exists():
        raise FileNotFoundError(f"no such file or directory: {source}")
    if source.is_file() or _is_adapter(source):
        into = target.is_dir() and source.is_file() and format != "peft"
        return [(source, target / f"{source.stem}.safetensors" if into else target)]
    found = _adapters(source, target)
    if not found:
        raise CheckpointError(f"{source} holds no .safetensors file and no PEFT directory")
    if target.is_file():
        raise CheckpointError(f"{target} is a file; a folder is converted into a folder")
    jobs = [(path, _place(target / path.relative_to(source), path.is_dir(), format)) for path in found]
    names = [out for _, out in jobs]
    twice = next((out for out in names if names.count(out) > 1), None)
    if twice is not None:
        raise CheckpointError(f"two files of {source} would become {twice}; rename one of them")
    return jobs


def _is_adapter(folder: Path) -> bool:
    """A PEFT directory, or one of PEFT directories named as components."""
    return (folder / CONFIG_NAME).is_file() or any((folder / name / CONFIG_NAME).is_file() for name in COMPONENTS)


def _adapters(folder: Path, target: Path) -> list[Path]:
    """Files and PEFT directories below a folder, in order; links to folders are not followed, ``target`` is left out."""
    found: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            if not child.is_symlink() and child.resolve() != target.resolve():
                found += [child] if _is_adapter(child) else _adapters(child, target)
        elif child.suffix == ".safetensors" and not child.name.startswith(".") and child.name != EXTRAS_NAME:
            found.append(child)
    return found


def _place(path: Path, is_directory: bool, format: str) -> Path:
    bare = path if is_directory else path.with_suffix("")
    return bare if format == "peft" else bare.with_name(f"{bare.name}.safetensors")


def _same(source: Path, target: Path) -> bool:
    return target.exists() and source.samefile(target)
