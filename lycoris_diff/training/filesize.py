"""Exact sizes of an adapter's files before it is trained: the library's own writers, run on tensors without values."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapters.config import AdapterConfig
from ..bookkeeping import state_of
from ..checkpoints.compose import compose
from ..checkpoints.formats import format_named
from ..checkpoints.metadata import file_metadata
from ..diffusion.components import inner_model
from ..diffusion.planning import base_model_of
from ..diffusion.saving import checkpoint_of
from ..files import CONFIG_NAME, WEIGHTS_NAME
from ..injection import inject_adapter, unwrap
from ..naming import BASES, index_model
from ..peft_format import config_to_dict, get_peft_model_state_dict
from .config import ADAPTER

#: safetensors' order of a file's tensors: the last of these first, then by name
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
#: lengths of what kohya's readers find a file by; the values need the trained tensors
_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x" + "0" * 64}


@dataclass(frozen=True)
class FileSize:
    """One file that saving will write.

    Attributes:
        format: "kohya" or "peft".
        component: the component it belongs to; "" for a file of all.
        name: of the file.
        tensors: how many it holds; 0 for a config.
        bytes: its exact size.
    """

    format: str
    component: str
    name: str
    tensors: int
    bytes: int


def predict_files(
    models: Mapping[str, nn.Module],
    configs: Mapping[str, AdapterConfig],
    formats: Sequence[str] = ("kohya", "peft"),
    title: str = "adapter",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[FileSize]:
    """Return what saving newly made adapters will write, without making them; the models are only looked at.

    Factors are float32 (float64 on float64 bases), as `get_peft_model` makes them. Exact for every algorithm, with one
    exception: the kohya file of a fused projection (Flux, SD3) assumes that the parts' trained factors differ.

    Args:
        models: all components of the pipeline that can take adapters, by name; meta tensors will do.
        configs: adapter by component.
        formats: "kohya": one file `title.safetensors`; "peft": one directory a component.
        title: of the kohya file, whose header holds it.
        dtype: that saving casts floating-point factors to; None keeps the trained one.
        metadata: what saving adds to the kohya file's header; only the lengths count.

    Raises:
        AdapterError: an adapter does not fit its model, or a format cannot say it.
    """
    blank = blank_adapters(models, configs)
    return [file for format in formats for file in files_of(blank, format, title, dtype, metadata)]


def files_of(
    blank: Mapping[str, nn.Module],
    format: str,
    title: str = "adapter",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[FileSize]:
    """Return the files of one format for the models that `blank_adapters` made; arguments as for `predict_files`.

    Raises:
        AdapterError: the format cannot say an adapter.
    """
    if format == "peft":
        return [
            file for name, model in blank.items() if state_of(model) is not None for file in _peft_files(name, model, dtype)
        ]
    return [_single_file(blank, format, title, dtype, metadata)]


def blank_adapters(models: Mapping[str, nn.Module], configs: Mapping[str, AdapterConfig]) -> dict[str, nn.Module]:
    """Return copies of base models on the meta device, with a new adapter on each that has a config.

    Raises:
        AdapterError: as `inject_adapter`.
    """
    blank = {component: without_values(model) for component, model in models.items()}
    for component, config in configs.items():
        inject_adapter(blank[component], config, ADAPTER, low_cpu_mem_usage=True)
    return blank


def without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters, every tensor on the meta device; takes no memory for weights."""
    model = inner_model(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    found = copy.deepcopy(model, memo)
    if state_of(found) is not None:
        unwrap(found)
    return found


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size of the safetensors file that holds `tensors`, which may be on the meta device.

    The header is compact JSON in UTF-8, padded with spaces to a multiple of 8; its length stands in the 8 bytes before it.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    rank = {dtype: place for place, dtype in enumerate(_DTYPES)}
    start = 0
    for name in sorted(tensors, key=lambda n: (-rank[tensors[n].dtype], n)):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + (length + 7) // 8 * 8 + start


def peft_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model's PEFT directory, of the adapter called "default", as they will be stored."""
    return _cast(get_peft_model_state_dict(model, adapter_name=ADAPTER), dtype)


def _peft_files(component: str, model: nn.Module, dtype: torch.dtype | None) -> list[FileSize]:
    state = state_of(model)
    assert state is not None
    tensors = peft_tensors(model, dtype)
    text = json.dumps(config_to_dict(state.configs[ADAPTER], model, ADAPTER), indent=2, sort_keys=True) + "\n"
    return [
        FileSize("peft", component, WEIGHTS_NAME, len(tensors), safetensors_bytes(tensors, {"format": "pt"})),
        FileSize("peft", component, CONFIG_NAME, 0, len(text.encode())),
    ]


def _single_file(
    models: Mapping[str, nn.Module],
    format: str,
    title: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> FileSize:
    """What `save_adapter` writes for a pipeline of these models."""
    target = format_named(format)
    with _WithoutValues(), torch.device("meta"):
        checkpoint = checkpoint_of(SimpleNamespace(components=dict(models)), ADAPTER)
        indexes = {component: index_model(model, component) for component, model in models.items()}
        known = base_model_of(indexes)
        checkpoint = replace(checkpoint, base_model=known if known in BASES else "")
        composed = compose(checkpoint, target, indexes)
    algorithms = [name for found in composed.written.values() for name in found]
    header = file_metadata(checkpoint, algorithms, title, metadata, target.kohya_metadata)
    if target.kohya_metadata:
        header |= _HASHES
    tensors = _cast(composed.tensors, dtype)
    return FileSize(format, "", f"{title}.safetensors", len(tensors), safetensors_bytes(tensors, header))


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Floats in another dtype; alphas stay, as in `write_checkpoint`."""
    keep = {n for n, t in tensors.items() if dtype is None or not t.is_floating_point() or n.rpartition(".")[2] == "alpha"}
    return {n: t if n in keep else t.to(dtype) for n, t in tensors.items()}


class _WithoutValues(TorchFunctionMode):
    """Lets the writer run on meta tensors: answers what it asks about values as trained tensors would.

    No two trained tensors are equal and none is zero. The writer compares a product with its rounding to choose between
    half precision and float32; new factors are float32 or wider, where both choices are the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return False
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
