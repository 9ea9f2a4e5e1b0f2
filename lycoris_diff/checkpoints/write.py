"""Writing a Checkpoint in any format; every file appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import CONFIG_NAME, WEIGHTS_NAME, replacing
from ..naming import NameIndex
from .checkpoint import Checkpoint, Entry
from .compose import Progress, compose, indexes_of, provisional_indexes
from .formats import Format, format_named
from .metadata import file_metadata, kept_metadata, kohya_hashes
from .peft_directory import EXTRAS_NAME, check_known, peft_directory

#: extra tensors without meaning, which a format that takes no extras may drop
_MEANINGLESS = ("position_ids",)


@dataclass
class WriteReport:
    """What was written.

    Attributes:
        path: file or directory.
        format: its format.
        files: every file written.
        modules: component -> number of modules.
        algorithms: algorithm -> number of weights, as written.
        tensors: number of tensors.
        bytes: size of the tensors' files.
        notes: what was rewritten or left out, in words.
    """

    path: str
    format: str
    files: list[str] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    algorithms: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


def write_checkpoint(
    ckpt: Checkpoint,
    path: str | os.PathLike[str],
    format: str = "kohya",
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    indexes: Mapping[str, NameIndex] | None = None,
) -> WriteReport:
    """Write an adapter so that the readers of a format load it.

    Args:
        ckpt: what is written; weights keep their change to within the rounding of float32, or of ``dtype``.
        path: a ``.safetensors`` file; for ``"peft"`` a directory, with one sub-directory a component where there are several.
        format: "kohya", "lycoris", "peft", "diffusers", "comfyui", "ai-toolkit" or "onetrainer".
        base_model: whose modules the paths are, when the checkpoint does not say; a name or a pipeline's directory.
        dtype: of the factors; None keeps the file's.
        metadata: goes over the metadata that the checkpoint brought along.
        progress: called with the number of modules done and of all.
        indexes: names of the components' modules, where these are at hand (`lycoris_diff.naming.index_model`); instead of the
            base model's.

    Raises:
        CheckpointError: the format cannot say something, with what to do; nothing has been written then. OSError: the place
            cannot be written to.
    """
    target = format_named(format)
    ckpt = replace(ckpt, components=_filled(ckpt), base_model=base_model or ckpt.base_model)
    if not ckpt.components:
        raise CheckpointError("the checkpoint holds no adapter; an empty file is not written")
    for modules in ckpt.components.values():
        check_known(modules)
    _check_metadata(metadata)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"dtype is {dtype!r}; expected a floating type such as torch.float16")
    names = indexes or indexes_of(ckpt) or provisional_indexes(ckpt, target)
    _check_paths(ckpt, names)
    report = WriteReport(os.fspath(path), format, modules={c: len(m) for c, m in ckpt.components.items()})
    if target.name == "peft":
        _write_directory(ckpt, Path(path), names, dtype, metadata, report)
    else:
        _write_file(ckpt, Path(path), target, names, dtype, metadata, report, progress)
    return report


def _filled(ckpt: Checkpoint) -> dict[str, dict[str, list[Entry]]]:
    """Components and modules that there is something on."""
    found = {c: {path: list(entries) for path, entries in m.items() if entries} for c, m in ckpt.components.items()}
    return {c: m for c, m in found.items() if m}


def _check_metadata(metadata: Mapping[str, str] | None) -> None:
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"metadata {key!r} is {value!r}; files hold text only, pass str(value)")


def _check_paths(ckpt: Checkpoint, indexes: Mapping[str, NameIndex]) -> None:
    for component, modules in ckpt.components.items():
        known = indexes[component].sites if component in indexes else {}
        strange = next((path for path in modules if path not in known), None)
        if strange is not None:
            raise CheckpointError(
                f"{component} of base model {ckpt.base_model!r} has no module {strange!r}; read the file with the base model "
                "that it was made for"
            )


# --- one file -----------------------------------------------------------------------------------------------------------------
def _write_file(
    ckpt: Checkpoint,
    path: Path,
    target: Format,
    indexes: Mapping[str, NameIndex],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    report: WriteReport,
    progress: Progress | None,
) -> None:
    if path.suffix != ".safetensors" or path.is_dir():
        raise CheckpointError(f"{path} is no file name of format {target.name!r}; expected one that ends in .safetensors")
    composed = compose(ckpt, target, indexes, progress)
    tensors = _as_dtype(composed.tensors, dtype) | _extras(ckpt, target, report)
    algorithms = [a for found in composed.written.values() for a in found]
    header = file_metadata(ckpt, algorithms, path.stem, metadata, target.kohya_metadata)
    ready = _ready(tensors)
    if target.kohya_metadata:
        header |= kohya_hashes(ready, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(ready, temporary, metadata=header)
    report.notes += composed.notes + _rewritten(ckpt, target)
    _count(report, path, algorithms, len(ready))


def _extras(ckpt: Checkpoint, target: Format, report: WriteReport) -> dict[str, Tensor]:
    if target.extras or not ckpt.extras:
        return ckpt.extras
    kept = [name for name in ckpt.extras if not name.endswith(_MEANINGLESS)]
    if kept:
        raise CheckpointError(
            f"{len(kept)} tensors are no adapter (first {kept[0]!r}), which readers of format {target.name!r} refuse; write "
            'format "kohya", or take them out first'
        )
    report.notes.append(
        f"{len(ckpt.extras)} tensors without meaning are left out, since readers of {target.name!r} refuse them"
    )
    return {}


def _rewritten(ckpt: Checkpoint, target: Format) -> list[str]:
    miss = sum(e.algorithm == "MISS" for m in ckpt.components.values() for entries in m.values() for e in entries)
    return [f"MiSS on {miss} modules is written as the LoRA that it is, with the same change of the weights"] if miss else []


def _as_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Factors in another dtype; alphas and what is no float stay.

    Raises:
        CheckpointError: a finite value is beyond the dtype's range, or all values of a tensor below it.
    """
    if dtype is None:
        return tensors
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        keep = name.rpartition(".")[2] == "alpha" or not value.is_floating_point() or value.dtype == dtype
        out[name] = value if keep else value.to(dtype)
        if keep or not value.numel():
            continue
        finite = value.double().nan_to_num(0.0, 0.0, 0.0)
        most = float(finite.abs().max())
        if most > torch.finfo(dtype).max:  # which some dtypes keep as infinity, others as their largest value
            raise CheckpointError(f"{name} holds values up to {most:g}, too large for {dtype}; write another dtype")
        if most and not out[name].float().any():
            raise CheckpointError(f"{name} holds values up to {most:g}, all of them zero in {dtype}; write another dtype")
    return out


def _ready(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors in host memory that share nothing, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        whole = value.untyped_storage().nbytes() == value.nbytes
        out[name] = value if whole and address not in seen else value.clone()
        seen.add(address)
    return out


def _count(report: WriteReport, path: Path, algorithms: list[str], tensors: int) -> None:
    report.files.append(os.fspath(path))
    report.tensors += tensors
    report.bytes += path.stat().st_size
    for name in algorithms:
        report.algorithms[name] = report.algorithms.get(name, 0) + 1


# --- PEFT's directories -------------------------------------------------------------------------------------------------------
def _write_directory(
    ckpt: Checkpoint,
    path: Path,
    indexes: Mapping[str, NameIndex],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    report: WriteReport,
) -> None:
    if path.suffix == ".safetensors" or (path.exists() and not path.is_dir()):
        raise CheckpointError(f'{path} is no name of a directory, which format "peft" writes')
    header = {**kept_metadata(ckpt), **(metadata or {}), "format": "pt"}
    # without a folder "text_encoder_2" might be taken for the first one
    several = len(ckpt.components) > 1 or any(component.startswith("text_encoder_") for component in ckpt.components)
    files: list[tuple[Path, dict[str, Tensor] | dict[str, Any]]] = []
    for component, modules in ckpt.components.items():
        content = peft_directory(modules, indexes[component])
        folder = path / component if several else path
        tensors = _as_dtype(content.tensors, dtype)
        files += [(folder / WEIGHTS_NAME, _ready(tensors)), (folder / CONFIG_NAME, content.config)]
        if content.gap:
            report.notes.append(f"PEFT itself cannot read {component}: {content.gap}; this library can")
    if ckpt.extras:
        files.append((path / EXTRAS_NAME, _ready(ckpt.extras)))
        report.notes.append(f"{len(ckpt.extras)} tensors that are no adapter are kept in {EXTRAS_NAME}")
    _check_leftovers(path, {file for file, _ in files})
    for file, _ in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for file, content_of in files:
            temporary = stack.enter_context(replacing(file))
            if file.suffix == ".json":
                Path(temporary).write_text(json.dumps(content_of, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            else:
                save_file(content_of, temporary, metadata=header)
    for file, content_of in files:
        if file.name == WEIGHTS_NAME:
            _count(report, file, [], len(content_of))
        else:
            report.files.append(os.fspath(file))
    for modules in ckpt.components.values():
        for entries in modules.values():
            for entry in entries:
                report.algorithms[entry.algorithm] = report.algorithms.get(entry.algorithm, 0) + 1


def _check_leftovers(path: Path, written: set[Path]) -> None:
    """What an earlier adapter left in a directory would be read together with the new one."""
    found = [*path.glob(f"*/{CONFIG_NAME}"), path / CONFIG_NAME, path / EXTRAS_NAME]
    left = next((file for file in found if file.is_file() and file not in written), None)
    if left is not None:
        raise CheckpointError(f"{path} holds {left.relative_to(path)} of another adapter; write to another directory")
