"""Training pictures from a directory."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import AdapterError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what Pillow raises


def find_images(directory: str | PathLike[str]) -> list[Path]:
    """Return the picture files directly in `directory`, sorted by name; hidden files are skipped.

    Raises:
        OSError: `directory` is absent or not a directory.
        AdapterError: there is no picture in it.
    """
    folder = Path(directory)
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        endings = ", ".join(IMAGE_SUFFIXES)
        raise AdapterError(f"no pictures in {str(folder)!r}; put files there that end in {endings}")
    return paths


def read_images(directory: str | PathLike[str], resolution: int) -> torch.Tensor:
    """Read every picture in `directory`, turned upright, scaled and cut around the centre to a square.

    Transparent parts become white.

    Args:
        directory: where the pictures are.
        resolution: edge of the squares in pixels.

    Returns:
        float32 of shape `(pictures, 3, resolution, resolution)` with values from -1 to 1, sorted by file name.

    Raises:
        OSError: `directory` is absent or not a directory.
        AdapterError: there is no picture, or some cannot be decoded; the message names each of them.
    """
    pictures: list[torch.Tensor] = []
    broken: list[str] = []
    paths = find_images(directory)
    for path in paths:
        try:
            pictures.append(_read_image(path, resolution))
        except UNREADABLE as error:
            broken.append(f"{path.name} ({error})")
    if broken:
        raise AdapterError(
            f"{len(broken)} of {len(paths)} pictures in {str(directory)!r} cannot be read: {'; '.join(broken)}. "
            "Repair them or take them away."
        )
    return torch.stack(pictures)


def _read_image(path: Path, resolution: int) -> torch.Tensor:
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    picture = Image.alpha_composite(white, upright).convert("RGB")
    square = ImageOps.fit(picture, (resolution, resolution), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1.0
