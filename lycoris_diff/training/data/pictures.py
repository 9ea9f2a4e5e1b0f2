"""Pictures in a folder, each with its caption, its mask and how often it is shown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path

from PIL import UnidentifiedImageError

from ...errors import AdapterError
from .captions import METADATA_NAME, Note, read_metadata, read_sidecar
from .reading import UNREADABLE, decode_mask, decode_picture

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# up to four digits: a folder named after a day is not one of these
_KOHYA_FOLDER = re.compile(r"(\d{1,4})_(.*)")
_LISTED = 10


@dataclass(frozen=True)
class Picture:
    """A training picture.

    Attributes:
        path: the file.
        caption: the prompt that it is trained with.
        size: width and height in pixels, turned upright as its EXIF data says.
        mask: the file of its mask; None where everything counts.
        repeats: how often it is shown in one round.
        digest: sha256 of the file's bytes in hexadecimal; with a mask, sha256 of both files' sha256.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    mask: Path | None
    repeats: int
    digest: str


@dataclass(frozen=True)
class Skipped:
    """Something in the folder that is not trained with, and why; `name` is relative to the folder."""

    name: str
    reason: str


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a run and what was left out, both sorted by name."""

    pictures: tuple[Picture, ...]
    skipped: tuple[Skipped, ...]

    @property
    def digest(self) -> str:
        """sha256 of all that training takes from the folder: contents, captions and repeats, in the order of the names.

        Neither where the folder is nor in which order the file system lists it matters.
        """
        parts = [[picture.digest, picture.caption, picture.repeats] for picture in self.pictures]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Folder:
    path: Path
    repeats: int
    words: str | None  # what the folder's name says is in the pictures


def find_pictures(directory: str | PathLike[str], prompt: str | None, repeats: int = 1, masked: bool = False) -> PictureSet:
    """Find the pictures in a folder; each is decoded once, so that what is found can be read.

    A picture's caption is the first of these that is there:

    1. `NAME.txt` beside it,
    2. `text`, `caption` or `prompt` in the line of `metadata.jsonl` that has its `file_name`,
    3. `prompt`,
    4. the words of its sub-directory's name.

    Sub-directories are read when they are named like `10_some words`: their pictures are shown 10 times in a round. `repeats`
    in `metadata.jsonl` goes before that; the argument is for all others. Hidden files are passed over. Pictures that cannot
    be decoded, and whatever else looks as if it was meant for training, are listed in `skipped`.

    Args:
        directory: the folder.
        prompt: caption of pictures without one of their own; None requires captions.
        repeats: how often a picture is shown in one round.
        masked: whether to look for masks, `NAME.mask.png`. These files are never pictures themselves.

    Raises:
        OSError: `directory` is absent or not a directory.
        AdapterError: there is no picture or none can be decoded; some have no caption; a caption or `metadata.jsonl` cannot be
            understood; a mask cannot be decoded or has another size than its picture; `masked`, and there is no mask at all.
    """
    root = Path(directory)
    skipped: list[Skipped] = []
    folders = _folders(root, repeats, skipped)
    found = sorted(
        ((path, folder) for folder in folders for path in picture_files(folder.path)), key=lambda item: _name(item[0], root)
    )
    notes: dict[Path, Note] = {}
    for folder in folders:
        notes |= read_metadata(folder.path)
    skipped += _unmatched(root, folders, {path for path, _ in found}, notes, masked)

    pictures: list[Picture] = []
    without: list[str] = []
    for path, folder in found:
        try:
            data = path.read_bytes()
            size = decode_picture(BytesIO(data)).size
        except UNREADABLE as error:
            skipped.append(Skipped(_name(path, root), _reason(error)))
            continue
        note = notes.get(path, Note())
        captions = (read_sidecar(path), note.caption, prompt, folder.words)
        caption = next((text for text in captions if text is not None), None)
        if caption is None:
            without.append(_name(path, root))
            continue
        digest = hashlib.sha256(data)
        mask = _mask_of(path) if masked and _mask_of(path).is_file() else None
        if mask is not None:
            digest = hashlib.sha256(digest.digest() + _mask_digest(mask, size))
        pictures.append(Picture(path, caption, size, mask, note.repeats or folder.repeats, digest.hexdigest()))

    if without:
        raise AdapterError(
            f"{len(without)} pictures in {str(root)!r} have no caption: {_list(without)}; write NAME.txt beside each, "
            f"a line for each in {METADATA_NAME}, or give a prompt for all (instance_prompt)"
        )
    if not pictures:
        message = f"no pictures in {str(root)!r} that can be read; put files there that end in {', '.join(IMAGE_SUFFIXES)}"
        reasons = _list([f"{item.name} ({item.reason})" for item in skipped])
        raise AdapterError(f"{message}. Left out: {reasons}" if skipped else message)
    if masked and not any(picture.mask for picture in pictures):
        raise AdapterError(
            f"no picture in {str(root)!r} has a mask; put NAME.mask.png beside pictures, white where the loss counts, "
            "or turn masked_loss off"
        )
    return PictureSet(tuple(pictures), tuple(sorted(skipped, key=lambda item: item.name)))


def all_picture_files(root: Path) -> list[Path]:
    """Return the files that `find_pictures` tries, in `root` and in sub-directories named like `10_some words`.

    Raises:
        OSError: `root` is absent or not a directory.
    """
    return [path for folder in _folders(root, 1, []) for path in picture_files(folder.path)]


def count_picture_files(root: Path | None) -> int:
    """Return how many files `all_picture_files` finds; none where there is no directory."""
    return len(all_picture_files(root)) if root is not None and root.is_dir() else 0


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files directly in `folder`, sorted by path; hidden files and masks are left out.

    Raises:
        OSError: `folder` is absent or not a directory.
    """
    return [path for path in _image_files(folder) if not _is_mask(path)]


def _folders(root: Path, repeats: int, skipped: list[Skipped]) -> list[_Folder]:
    """The folder itself and kohya's sub-directories; others with pictures in them are added to `skipped`."""
    folders = [_Folder(root, repeats, None)]
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        match = _KOHYA_FOLDER.fullmatch(path.name)
        if match and int(match[1]):
            folders.append(_Folder(path, int(match[1]), match[2].strip() or None))
        elif picture_files(path):
            reason = "its name says 0 repeats" if match else "only sub-directories named like '10_some words' are read"
            skipped.append(Skipped(path.name, reason))
    return folders


def _image_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _is_mask(path: Path) -> bool:
    return path.stem.lower().endswith(".mask")


def _mask_of(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}.mask.png")


def _unmatched(
    root: Path, folders: Sequence[_Folder], pictures: set[Path], notes: dict[Path, Note], masked: bool
) -> list[Skipped]:
    """Masks and lines of metadata.jsonl that no picture has: a slip in a name would otherwise pass unnoticed."""
    absent = f"named in {METADATA_NAME}, but there is no such picture"
    unmatched = [Skipped(_name(path, root), absent) for path in notes if path not in pictures]
    if masked:
        masks = {path for folder in folders for path in _image_files(folder.path) if _is_mask(path)}
        stray = masks - {_mask_of(path) for path in pictures}
        reason = "a mask of no picture; the mask of NAME.jpg is called NAME.mask.png"
        unmatched += [Skipped(_name(path, root), reason) for path in stray]
    return unmatched


def _mask_digest(path: Path, size: tuple[int, int]) -> bytes:
    try:
        data = path.read_bytes()
        mask = decode_mask(BytesIO(data))
    except UNREADABLE as error:
        raise AdapterError(f"mask {str(path)!r} cannot be read ({_reason(error)}); repair it or take it away") from error
    if mask.size != size:
        raise AdapterError(
            f"mask {str(path)!r} has {mask.width} x {mask.height} pixels, its picture has {size[0]} x {size[1]}; "
            "make the mask as large as the picture is when turned upright"
        )
    return hashlib.sha256(data).digest()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of a kind that Pillow cannot read"
    return str(error) or type(error).__name__


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
