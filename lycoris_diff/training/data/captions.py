"""What is written about pictures: a text file beside one, or a line of metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterError

METADATA_NAME = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")

_EXAMPLE = '{"file_name": "a.png", "text": "a photo of ..."}'


@dataclass(frozen=True)
class Note:
    """What a line of `metadata.jsonl` says about a picture."""

    caption: str | None = None
    repeats: int | None = None


def read_sidecar(picture: Path) -> str | None:
    """Read the caption in `NAME.txt` beside a picture; None where there is no such file.

    Raises:
        AdapterError: the file is empty or not in UTF-8.
    """
    path = picture.with_suffix(".txt")
    return _one_line(_read_text(path), repr(str(path))) if path.is_file() else None


def read_metadata(folder: Path) -> dict[Path, Note]:
    """Read `metadata.jsonl` in a folder, by the path of the picture; empty where there is no such file.

    Every line is an object with `file_name`, relative to the folder; `text`, `caption` or `prompt`; and, if wanted, `repeats`.

    Raises:
        AdapterError: a line is not such an object, a caption is empty, or a picture is described twice.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return {}
    notes: dict[Path, Note] = {}
    # not splitlines(): strings in JSON may hold other line separators
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise AdapterError(f"{where} is not JSON ({error}); every line is an object like {_EXAMPLE}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise AdapterError(f"{where} has no file_name; every line is an object like {_EXAMPLE}")
        picture = folder / entry["file_name"]
        if picture in notes:
            raise AdapterError(f"{where} describes {entry['file_name']!r} again; keep one line for each picture")
        notes[picture] = Note(_caption_of(entry, where), _repeats_of(entry, where))
    return notes


def _caption_of(entry: Mapping[str, Any], where: str) -> str | None:
    for field in CAPTION_FIELDS:
        value = entry.get(field)
        if isinstance(value, str):
            return _one_line(value, f"{field} in {where}")
        if value is not None:
            raise AdapterError(f"{field} in {where} is {value!r}; expected a text")
    return None


def _repeats_of(entry: Mapping[str, Any], where: str) -> int | None:
    value = entry.get("repeats")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise AdapterError(f"repeats in {where} is {value!r}; expected a whole number of at least 1")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{str(path)!r} is not in UTF-8 ({error}); save it as UTF-8") from error


def _one_line(text: str, where: str) -> str:
    caption = " ".join(text.split())
    if not caption:
        # more likely a slip than a wish: caption_dropout is there for empty prompts
        raise AdapterError(
            f"the caption is empty: {where}; write one, or take it away and give a prompt for all (instance_prompt)"
        )
    return caption
