"""Tensors kept on disk by content, safe against interruption and several writers."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import AdapterError
from ...files import replacing

ABANDONED = 24 * 3600  # seconds after which a temporary file is taken for one of a killed process
SAMPLES = 4096  # values of a tensor that `model_digest` reads
STRIDE = 2654435761  # a prime near 2**32 / golden ratio: its multiples modulo any size spread evenly over rows and columns
ORIGIN = ("architectures", "dtype", "torch_dtype", "transformers_version")  # settings that say how a model was saved or loaded


class DiskCache:
    """Named tensors by key, one safetensors file a key.

    Files appear whole or not at all, and carry a checksum: one that is cut short, altered or of another key counts as absent.
    Any number of processes may read and write at once; of two that write a key, the last wins.

    Args:
        directory: made if absent. Temporary files that killed processes left there are removed after a day.

    Raises:
        OSError: `directory` cannot be made or read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory, ".*.safetensors.*")

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of `key` on the CPU, each with memory of its own; None where there are none.

        A damaged file gives None and a warning that names it.

        Raises:
            AdapterError: `key` is not one of `key_of`. OSError: the file is there and cannot be read.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            tensors = load(data)
            damage = None if _note_of(data) == _checksum(key, tensors) else "the checksum is wrong"
        except (safetensors.SafetensorError, ValueError) as error:
            damage = str(error)
        if damage is None:
            return tensors
        warnings.warn(f"{path} is damaged and will be made anew: {damage}", stacklevel=2)
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` (any shapes and dtypes) as those of `key`, in place of earlier ones.

        Raises:
            AdapterError: `key` is not one of `key_of`, or a tensor holds NaN or infinite values.
            OSError: the file cannot be written; what was there before stays.
        """
        path = self._path(key)
        for name, tensor in tensors.items():
            values = tensor.float() if tensor.itemsize == 1 else tensor  # torch tests no 8-bit floats
            if tensor.is_floating_point() and not bool(values.isfinite().all()):
                raise AdapterError(f"tensor {name!r} for {path} holds NaN or infinite values; it is not kept")
        ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        data = save(ready, metadata={"checksum": _checksum(key, ready)})
        with replacing(path) as temporary:
            Path(temporary).write_bytes(data)

    def _path(self, key: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise AdapterError(f"{key!r} is not a key of the cache; make one with key_of(...)")
        return self.directory / f"{key}.safetensors"


def key_of(*parts: str | int | float) -> str:
    """Return the SHA-256 of `parts` as 64 hex digits; parts of different types, or cut differently, give another one.

    Raises:
        AdapterError: a part is neither text nor a number.
    """
    for part in parts:
        if type(part) not in (str, int, float):
            raise AdapterError(f"{part!r} is a {type(part).__name__}; a key is made of str, int and float")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@torch.no_grad()
def model_digest(module: nn.Module) -> str:
    """Return a digest of what `module` computes: class, config, and every parameter's and buffer's name, dtype and values.

    Of a tensor with more than 4096 values only as many are read, spread over it: less than a millisecond a tensor, of any size.
    Training, merging an adapter or casting changes values everywhere and is noticed; a change of a few values may not be.

    Raises:
        AdapterError: a tensor has no values, because it is on the meta device.
    """
    digest = hashlib.sha256(json.dumps([type(module).__qualname__, _config_of(module)], sort_keys=True, default=str).encode())
    for name, tensor in _tensors_of(module):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(_samples(tensor)))
    return digest.hexdigest()


def remove_abandoned(directory: Path, pattern: str) -> None:
    """Remove the files in `directory` that match `pattern` and were last written more than a day ago."""
    for path in directory.glob(pattern):
        try:
            if path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()
        except FileNotFoundError:  # another process was first
            continue


def _note_of(data: bytes) -> str | None:
    """The checksum in the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("checksum")


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    checksum = zlib.crc32(key.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), checksum)
        checksum = zlib.crc32(_bytes(tensor), checksum)
    return f"{checksum:08x}"


def _bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any dtype on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _config_of(module: nn.Module) -> dict[str, Any]:
    """Settings of a diffusers or transformers model, without what saving and loading changes."""
    config = getattr(module, "config", None) or {}
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in settings.items() if not (name.startswith("_") or name in ORIGIN)}


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # buffers that are not saved count as well: an adapter's strength is one
    found = {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict(keep_vars=True)}
    for name, value in sorted(found.items()):
        yield from _plain_parts(name, value)


def _plain_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside a quantized one; anything else in a state dict as the bytes of its text."""
    if not isinstance(value, Tensor):
        yield name, torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8)
    elif hasattr(type(value), "__tensor_flatten__") and not type(value).__module__.startswith("torch."):
        packed: Any = value
        for part in packed.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{name}.{part}", getattr(value, part))
    elif value.is_meta:
        raise AdapterError(f"tensor {name!r} is on the meta device and has no values; load the model, or take its offload off")
    else:
        yield name, value.detach()


def _samples(tensor: Tensor) -> Tensor:
    """Up to `SAMPLES` values of a tensor, flat, on the CPU."""
    flat = tensor.reshape(-1)
    if len(flat) > SAMPLES:
        positions = torch.arange(SAMPLES) * STRIDE % len(flat)
        flat = flat[positions.to(flat.device)]
    return flat.cpu()
