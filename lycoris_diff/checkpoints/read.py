"""Reading a file with every name placed."""

from __future__ import annotations

import os
from pathlib import Path

from ..naming import known_base
from .checkpoint import Checkpoint
from .guess import guess_base
from .parse import read_raw
from .peft_directory import EXTRAS_NAME
from .place import place
from .safety import read_safetensors


def read_checkpoint(path: str | os.PathLike[str], base_model: str | None = None, dialect: str | None = None) -> Checkpoint:
    """A community file, a PEFT directory, or a directory with one PEFT directory a component, in the neutral form.

    Args:
        path: file or directory.
        base_model: name or pipeline directory (`lycoris_diff.naming.known_base`); None guesses it from names and shapes.
        dialect: naming scheme; None detects it from the content.

    Returns:
        Everything the file holds, with what could not be read or placed listed in ``unknown``, ``unmatched``,
        ``wrong_shape`` and ``conflicts``. Modules of an unknown base model keep their names as paths.

    Raises:
        CheckpointError: the file is damaged, hostile or holds no adapter, or there is no such base model or dialect.
        OSError: it cannot be opened.
    """
    indexes = known_base(base_model) if base_model else {}  # a wrong name is refused before a large file is read
    raw = read_raw(path, dialect)
    extras = Path(path) / EXTRAS_NAME
    if extras.is_file():
        raw.extras.update(read_safetensors(extras)[0])
    base = base_model or guess_base(raw)
    if not base:
        raw.notes.append("the base model is not known: modules go by the names of the file")
    return place(raw, indexes or (known_base(base) if base else {}), base)
