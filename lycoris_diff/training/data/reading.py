"""Picture and mask files as tensors."""

from __future__ import annotations

from os import PathLike
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import AdapterError
from .buckets import Placement

#: what Pillow raises for files that it cannot read
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def decode_picture(file: str | PathLike[str] | BinaryIO) -> Image.Image:
    """Decode a whole file: its first frame, turned upright, transparent parts white, as 8-bit RGB.

    Raises:
        one of UNREADABLE: no picture, a damaged or truncated one, or one in 32-bit grey levels.
    """
    return _opaque(_decode(file), "white").convert("RGB")


def decode_mask(file: str | PathLike[str] | BinaryIO) -> Image.Image:
    """Decode a whole mask: turned upright, transparent parts black, as 8-bit grey levels.

    Raises:
        one of UNREADABLE: see `decode_picture`.
    """
    return _opaque(_decode(file), "black").convert("L")


def read_picture(path: str | PathLike[str], placement: Placement) -> Tensor:
    """Read the part of a picture that its placement trains, scaled with a Lanczos filter.

    Scaling and cutting are one operation on the exact part (`Placement.box`): the aspect ratio does not change at all.

    Returns:
        float32 of shape `(3, height, width)` of the bucket, from -1 to 1.

    Raises:
        AdapterError: the file cannot be read or has another size than the placement was made for.
    """
    try:
        picture = decode_picture(path)
    except UNREADABLE as error:
        raise AdapterError(f"picture {str(path)!r} cannot be read ({error}); repair it or take it away") from error
    _check_size(path, picture, placement)
    size = placement.bucket.width, placement.bucket.height
    scaled = picture.resize(size, Image.Resampling.LANCZOS, box=placement.box)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1.0


def read_mask(path: str | PathLike[str], placement: Placement, factor: int) -> Tensor:
    """Read a mask as weights of the latents: each is the mean of the mask over the pixels that the latent stands for.

    Args:
        path: a mask as large as its picture, white where the loss counts.
        placement: the picture's.
        factor: edge in pixels of what one latent stands for.

    Returns:
        float32 of shape `(1, height / factor, width / factor)` of the bucket, from 0 to 1.

    Raises:
        AdapterError: the file cannot be read or has another size than the placement was made for, or `factor` does not divide
            the bucket's edges.
    """
    width, height = placement.bucket.width, placement.bucket.height
    if width % factor or height % factor:
        raise AdapterError(f"a bucket of {width} x {height} pixels cannot be divided by {factor}, which the VAE needs")
    try:
        mask = decode_mask(path)
    except UNREADABLE as error:
        raise AdapterError(f"mask {str(path)!r} cannot be read ({error}); repair it or take it away") from error
    _check_size(path, mask, placement)
    # "F": means are kept as they are instead of rounded to 8 bits
    scaled = mask.convert("F").resize((width // factor, height // factor), Image.Resampling.BOX, box=placement.box)
    return (torch.from_numpy(np.array(scaled)) / 255.0).clamp(0.0, 1.0)[None]


def _decode(file: str | PathLike[str] | BinaryIO) -> Image.Image:
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255, which makes nearly everything white
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey levels (Pillow's mode {image.mode!r}) have no known range; save it with 8 or 16 bits")
    return image


def _opaque(image: Image.Image, background: str) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _check_size(path: str | PathLike[str], image: Image.Image, placement: Placement) -> None:
    if image.size != placement.original:
        width, height = placement.original
        raise AdapterError(
            f"{str(path)!r} has {image.width} x {image.height} pixels, {width} x {height} were expected; "
            "if it was changed during the run, start again"
        )
