"""Reading safetensors files that nobody vouches for: everything the header promises is checked before memory is taken."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Entry

#: the JSON at the beginning of a file; the largest seen (tag statistics of big data sets) have a few megabytes
MAX_HEADER = 32 * 2**20
#: the largest real files (every layer of a large transformer, seven tensors each) have about ten thousand
MAX_TENSORS = 200_000
MAX_AXES = 8
#: values of a product of factors that is built before anybody knows the layer's size; halves of real weights have fewer
MAX_PRODUCT = 2**28

#: bytes an element takes; packed and complex types are missing on purpose
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_PICKLE_HINT = (
    "a pickle can run code when it is opened, so it is not read; convert it on a machine you can lose: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'file.safetensors')"
)
#: what pickles are called
PICKLE_SUFFIXES = (".pt", ".bin", ".ckpt", ".pth", ".pkl", ".pickle")
#: what other files begin with -> what they are
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a zip archive, as torch.save writes it; {_PICKLE_HINT}"),
    (b"GGUF", "a GGUF file; load adapters as safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"),
    (b"<!DOCTYPE", "a web page, probably an error message that was saved as the file; download it again"),
    (b"<html", "a web page, probably an error message that was saved as the file; download it again"),
    (b"{", "JSON text, probably an error message or the config; pass the .safetensors file or its directory"),
)
_PICKLE_MAGIC = re.compile(rb"\x80[\x01-\x05][\x00-\xff]")


class TensorInfo(NamedTuple):
    """What a header says of one tensor: name of the element type, shape, first byte and last + 1 in the body."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name, in the order of the file.
        metadata: text to text.
        size: bytes of the file before the body.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file, checked against the file's size; no tensor is touched.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is another kind of file, a pickle, damaged, or promises what it does not hold.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    total = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        _refuse_other_kinds(file, start)
        if len(start) < 8:
            raise CheckpointError(f"{file} has {total} bytes; a safetensors file has at least 8. Download or save it again")
        length = int.from_bytes(start[:8], "little")
        if length > total - 8:
            raise _damaged(file, f"the header claims {length} bytes, the file has {total}")
        if length > MAX_HEADER:
            raise _damaged(file, f"the header has {length} bytes, more than the {MAX_HEADER} that are read")
        stream.seek(8)
        raw = stream.read(length)
    values = _parse(file, raw)
    metadata = _metadata(file, values.pop("__metadata__", {}))
    if len(values) > MAX_TENSORS:
        raise _damaged(file, f"it lists {len(values)} tensors, more than the {MAX_TENSORS} that are read")
    tensors = {name: _tensor_info(file, name, value) for name, value in values.items()}
    _check_layout(file, tensors, total - 8 - length)
    return Header(tensors, metadata, 8 + length)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from the file and read when used, and metadata.

    8-bit floats become float16, which holds them exactly and which torch can compute with.

    Raises:
        FileNotFoundError, CheckpointError: as `read_header`; also when the file holds no tensors.
    """
    header = read_header(path)
    if not header.tensors:
        raise CheckpointError(f"{os.fspath(path)} holds no tensors")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return {name: computable(file.get_tensor(name)) for name in header.tensors}, header.metadata
    except (safetensors.SafetensorError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error


def expect_small(what: str, *sizes: int) -> None:
    """Refuse to build something of these sizes that a small file may ask for.

    Raises:
        CheckpointError: it would have more than `MAX_PRODUCT` values.
    """
    if prod(sizes) > MAX_PRODUCT:
        raise CheckpointError(f"{what} would have {prod(sizes)} values, more than the {MAX_PRODUCT} that any real one has")


def non_finite_factors(entry: Entry) -> list[str]:
    """Names of an entry's factors that hold NaN or infinite values."""
    return [name for name, value in entry.tensors.items() if value.is_floating_point() and not isfinite(extreme(value))]


def computable(value: Tensor) -> Tensor:
    """8-bit floats as float16, which holds them exactly; everything else as it is."""
    return value.to(torch.float16) if value.is_floating_point() and value.dtype.itemsize == 1 else value


def extreme(value: Tensor) -> float:
    """Largest magnitude, NaN where there is any, 0 for nothing; without a copy of the tensor."""
    if not value.numel():
        return 0.0
    low, high = torch.aminmax(value)
    return max(-float(low), float(high))


# --- parts of a header ---------------------------------------------------------------------------------------------------
def _refuse_other_kinds(file: Path, start: bytes) -> None:
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(f"{file} is a {file.suffix} file; {_PICKLE_HINT}")
    # the length of a header may happen to spell the same bytes
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return
    for magic, what in _MAGIC:
        if start.startswith(magic):
            raise CheckpointError(f"{file} is {what}")
    if _PICKLE_MAGIC.match(start):
        raise CheckpointError(f"{file} is a pickle; {_PICKLE_HINT}")


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice[:100]!r} occurs twice; readers disagree about which one counts")
        return found

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        for name in values:
            name.encode("utf-8")
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise _damaged(file, f"the header is not usable: {error}") from error
    if not isinstance(values, dict):
        raise _damaged(file, f"the header is a JSON {type(values).__name__}, expected an object")
    return values


def _metadata(file: Path, values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise _damaged(file, f"the metadata is a JSON {type(values).__name__}, expected an object of texts")
    for key, value in values.items():
        if not isinstance(value, str):
            raise _damaged(file, f"metadata {key[:100]!r} is a {type(value).__name__}, expected text")
    return values


def _tensor_info(file: Path, name: str, value: object) -> TensorInfo:
    def counts(numbers: object) -> tuple[int, ...] | None:
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            return None
        return tuple(numbers)

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"tensor {name[:100]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], counts(value["shape"]), counts(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise CheckpointError(f"{file}: tensor {name[:100]!r} has element type {dtype!r:.50}; read are {', '.join(_SIZES)}")
    if shape is None or len(shape) > MAX_AXES or offsets is None or len(offsets) != 2:
        raise _damaged(file, f"tensor {name[:100]!r} has shape {value['shape']!r:.100}, offsets {value['data_offsets']!r:.100}")
    promised = prod(shape) * _SIZES[dtype]
    if offsets[1] - offsets[0] != promised:
        raise _damaged(
            file, f"tensor {name[:100]!r} of shape {shape} and type {dtype} needs {promised} bytes, its place is {offsets}"
        )
    return TensorInfo(dtype, shape, (offsets[0], offsets[1]))


def _check_layout(file: Path, tensors: Mapping[str, TensorInfo], body: int) -> None:
    """Tensors must fill the body without gap and overlap."""
    place = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        start, stop = info.offsets
        if start != place:
            fault = "overlaps the tensor before it" if start < place else "leaves a gap before it"
            raise _damaged(file, f"tensor {name[:100]!r} starts at byte {start} and {fault}, which ends at {place}")
        place = stop
    if place != body:
        raise _damaged(file, f"its tensors take {place} bytes, the body has {body}")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file: {what}. Download or save it again")
