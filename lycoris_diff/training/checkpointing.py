"""Checkpoints on disk: complete or absent, whatever kills the process that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_json

STATE_NAME = "training_state.pt"
INFO_NAME = "state.json"
FORMAT = 1
LATEST = "latest"

_NAME = re.compile(r"checkpoint-(\d+)")
_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)


class Checkpoints:
    """The checkpoints of one run: `directory/checkpoint-000100/` and so on, the number being the optimizer steps taken.

    A checkpoint is written beside its place, flushed to disk and then renamed, so under its name it is complete, wherever the
    process dies. Each counts how many were written before it; the newest is the one written last, whatever its step.
    In a distributed run one process saves.

    Args:
        directory: made by the first save.
        limit: how many are kept; None keeps all.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int | None = None) -> None:
        self.directory = Path(directory)
        self.limit = limit

    def save(self, step: int, state: Mapping[str, Any], export: Callable[[Path], None] | None = None) -> Path:
        """Write a checkpoint, replacing one of the same step; then remove the oldest ones over the limit.

        Args:
            step: optimizer steps taken.
            state: plain values and tensors in dictionaries and lists; what `load` could not read is refused here.
            export: called with the unfinished directory to write more files into it, such as the adapter itself.

        Returns:
            Its directory.

        Raises:
            CheckpointError: `state` holds something that is neither plain nor a tensor.
            OSError: it cannot be written. The checkpoints before are untouched then.
        """
        check_plain(state, "state")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.clean()
        place = self.place_of(step)
        order = 1 + max((self._order(path) for path in self._named()), default=0)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=self.directory))
        try:
            torch.save({**state, "step": step}, unfinished / STATE_NAME)
            if export is not None:
                export(unfinished)
            sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in _files(unfinished)}
            info = {"format": FORMAT, "step": step, "order": order, "sha256": _digest(unfinished / STATE_NAME), "files": sizes}
            (unfinished / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
            for path in (*_files(unfinished), *_folders(unfinished)):
                _flush(path)
            os.chmod(unfinished, 0o777 & ~_umask())
            self._put(unfinished, place)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may have its place already
            raise
        self._drop_oldest(place)
        return place

    def place_of(self, step: int) -> Path:
        """Return the directory that a checkpoint of this step has."""
        return self.directory / f"checkpoint-{step:06d}"

    def find(self, resume: str | os.PathLike[str]) -> Path:
        """Return the directory of the checkpoint that `resume` names.

        Args:
            resume: `"latest"` is the newest complete one, and damaged newer ones are warned about; otherwise a directory, or
                the name of one in `self.directory`.

        Raises:
            FileNotFoundError: no such directory.
            CheckpointError: it is no complete checkpoint, or there is none at all.
        """
        self.clean()
        if os.fspath(resume) != LATEST:
            path = next((p for p in (Path(resume), self.directory / resume) if p.is_dir()), None)
            if path is None:
                raise FileNotFoundError(f"no checkpoint {os.fspath(resume)!r}; {self._inventory()}")
            if not (path / INFO_NAME).is_file():
                raise CheckpointError(f"{path} has no {INFO_NAME}, so it is not a complete checkpoint; {self._inventory()}")
            _read_info(path)
            return path
        found: list[tuple[int, Path]] = []
        damaged: list[str] = []
        for path in self._named():
            try:
                found.append((_read_info(path)["order"], path))
            except (CheckpointError, OSError) as error:
                damaged.append(str(error))
        if not found:
            reasons = "".join(f"\n  {reason}" for reason in damaged)
            raise CheckpointError(f"nothing to resume: {self._inventory()}; leave resume out to start anew{reasons}")
        newest = max(found)[1]
        if damaged:
            warnings.warn(f"continuing from {newest}; damaged: {'; '.join(damaged)}", stacklevel=2)
        return newest

    def load(self, path: Path) -> dict[str, Any]:
        """Return the state saved in a checkpoint's directory, tensors on the CPU, with its `"step"`.

        Raises:
            CheckpointError: the checkpoint is damaged; the message names the file. OSError: it cannot be opened.
        """
        info = _read_info(path)
        file = path / STATE_NAME
        if _digest(file) != info["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content is not what was saved; resume from another checkpoint")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} is not a training state: {error}") from error
        if not isinstance(state, dict) or state.get("step") != info["step"]:
            raise CheckpointError(f"{file} does not belong to {path / INFO_NAME}, which says step {info['step']}")
        return state

    def clean(self) -> None:
        """Remove what a killed process left: half checkpoints, and those that were being removed or replaced."""
        for path in self.directory.glob(".checkpoint-*"):
            name, _, ending = path.name[1:].rpartition(".")
            with suppress(FileNotFoundError):  # another process of the run was faster
                if ending == "replaced" and not (self.directory / name).exists():
                    os.rename(path, self.directory / name)
                elif ending in ("replaced", "partial"):
                    shutil.rmtree(path)

    def _put(self, unfinished: Path, place: Path) -> None:
        """Rename; a directory that has the name already makes room for as long as that takes."""
        aside = self.directory / f".{place.name}.replaced"
        if place.exists():
            os.rename(place, aside)
        os.rename(unfinished, place)
        _flush(self.directory)
        if aside.exists():
            shutil.rmtree(aside)

    def _drop_oldest(self, newest: Path) -> None:
        if self.limit is None:
            return
        others = sorted((path for path in self._named() if path != newest), key=self._order)
        for path in others[: max(len(others) + 1 - self.limit, 0)]:
            gone = path.with_name(f".{path.name}.removed.partial")  # or a kill in the middle would leave a damaged one
            os.rename(path, gone)
            shutil.rmtree(gone)

    def _named(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())

    @staticmethod
    def _order(path: Path) -> int:
        """When it was written, among the others; damaged ones count as oldest."""
        try:
            return _read_info(path)["order"]
        except (CheckpointError, OSError):
            return 0

    def _inventory(self) -> str:
        names = [path.name for path in self._named()]
        return f"{self.directory} has {', '.join(names) if names else 'no checkpoints'}"


def check_plain(value: Any, where: str) -> None:
    """Check that a state survives `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: naming the first value that is neither plain nor a tensor.
    """
    if type(value) is Tensor or type(value) is nn.Parameter or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise CheckpointError(f"{where} has the key {key!r}; expected text or a number")
            check_plain(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}.{index}")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{where} is a {kind}, which a checkpoint cannot hold; expected tensors and plain values")


def _read_info(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint's `state.json`.

    Raises:
        CheckpointError: it is damaged or of a newer version, or a file it lists is missing or has another size.
    """
    file = path / INFO_NAME
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    info = read_json(file)
    if info.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {info.get('format')!r}; this version of lycoris_diff reads {FORMAT}")
    kinds = {"step": int, "order": int, "sha256": str, "files": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind)]
    if wrong or STATE_NAME not in info["files"]:
        raise CheckpointError(f"{file} is damaged: {', '.join(wrong) or STATE_NAME} is missing or of another kind")
    # what else was exported is not needed to continue, and may be moved away
    state, size = path / STATE_NAME, info["files"][STATE_NAME]
    if not state.is_file():
        raise CheckpointError(f"{state} is missing")
    if state.stat().st_size != size:
        raise CheckpointError(f"{state} is damaged: it has {state.stat().st_size:,} bytes, {size:,} were saved")
    return info


def _digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _folders(folder: Path) -> Iterator[Path]:
    """With `folder` itself, inner ones first."""
    yield from (path for path in sorted(folder.rglob("*"), reverse=True) if path.is_dir())
    yield folder


def _flush(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
