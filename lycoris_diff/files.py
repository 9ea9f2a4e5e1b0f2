"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``, local or from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapters.config import AdapterConfig
from .adapters.registry import ADAPTERS
from .bookkeeping import check_new_name, set_active, state_of
from .errors import AdapterError, CheckpointError
from .injection import attach
from .peft_format import compact_state_dict, config_from_dict, config_to_dict, get_peft_model_state_dict, read_adapters

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: what diffusers and SimpleTuner call an adapter file
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
MAX_JSON = 2**24


def save_adapter_directory(
    base: nn.Module,
    name: str,
    directory: str | os.PathLike[str],
    compact: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one adapter; each file appears whole or not at all.

    Raises:
        AdapterError: no such adapter, one from a community file, or ``state_dict`` lacks its tensors.
    """
    tensors = get_peft_model_state_dict(base, state_dict, name)
    state = state_of(base)
    assert state is not None
    config = state.configs[name]
    if config.peft_name not in ADAPTERS:
        raise AdapterError(f"adapter {name!r} comes from a file and has no config of one kind; use save_adapter(pipe, ...)")
    if compact:
        tensors = compact_state_dict(base, tensors, name)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_to_dict(config, base, name, compact), indent=2, sort_keys=True)
    ready = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(folder / WEIGHTS_NAME) as weights, replacing(folder / CONFIG_NAME) as settings:
        save_file(ready, weights, metadata={"format": "pt"})
        Path(settings).write_text(text + "\n", encoding="utf-8")


def load_adapter_directory(
    base: nn.Module,
    source: str | os.PathLike[str],
    name: str,
    is_trainable: bool,
    config: AdapterConfig | None,
    autocast: bool,
    **hub: Any,
) -> AdapterConfig:
    """Read a directory, check it against the model, then attach it as the active adapter.

    Raises:
        CheckpointError: it does not fit or is damaged; OSError: it cannot be opened. The model is unchanged then.
    """
    check_new_name(base, name)
    config_path, weights_path = locate_files(source, need_config=config is None, **hub)
    if config is None:
        config = read_config(config_path)
    tensors = read_tensors(weights_path)
    try:
        adapters, saved, biases = read_adapters(base, config, tensors, is_trainable, autocast)
    except CheckpointError as error:
        raise CheckpointError(f"{weights_path}: {error}") from error
    config.inference_mode = not is_trainable
    attach(base, config, name, adapters, saved)
    set_active(base, [name])
    with torch.no_grad():
        for path, values in saved.items():
            copy: Any = base.get_submodule(path).get_submodule("modules_to_save").get_submodule(name)
            copy.load_state_dict(values)
        state = state_of(base)
        if biases and state is not None and state.biases is not None:
            for key, parameter in state.biases.parameters(base).items():
                parameter.copy_(biases.get(key, biases.get(key.replace(".base_layer.", "."), parameter)))
    if not is_trainable:
        base.eval()
    return config


def read_config(path: str | os.PathLike[str]) -> AdapterConfig:
    """A config file.

    Raises:
        CheckpointError: it is not JSON, or not a config this library can use.
    """
    return config_from_dict(read_json(path), os.fspath(path))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_JSON` bytes.

    Raises:
        CheckpointError: it is larger, not JSON, or no object. OSError: it cannot be opened.
    """
    text = os.fspath(path)
    size = os.stat(path).st_size
    if size > MAX_JSON:
        raise CheckpointError(f"{text} has {size:,} bytes; a config has at most {MAX_JSON:,}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{text} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{text} holds a {type(values).__name__}; expected an object with the fields of a config")
    return values


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, every one finite.

    Raises:
        CheckpointError: damaged, empty or not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error
    if not tensors:
        raise CheckpointError(f"{os.fspath(path)} holds no tensors")
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise CheckpointError(f"{os.fspath(path)}: tensor {key!r} holds NaN or infinite values")
    return tensors


def locate_files(source: str | os.PathLike[str], need_config: bool = True, **hub: Any) -> tuple[Path, Path]:
    """Config and weights of a local directory or a Hub repository.

    Args:
        source: directory or ``"owner/name"``.
        need_config: the config must exist.
        **hub: ``subfolder`` and the arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: a directory lacks a file. OSError: the Hub has no such repository or file.
    """
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(source) / subfolder
    if folder.is_dir():
        config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        for path in (config, weights) if need_config else (weights,):
            if not path.is_file():
                pickle = (folder / "adapter_model.bin").is_file()
                hint = "; adapter_model.bin is a pickle and is not read, re-save it as safetensors" if pickle else ""
                raise FileNotFoundError(f"{folder} has no {path.name}{hint}")
        return config, weights
    if Path(source).is_absolute() or os.fspath(source).startswith("."):
        raise FileNotFoundError(f"no such directory: {folder}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    def download(file: str) -> Path:
        try:
            return Path(hf_hub_download(os.fspath(source), file, subfolder=subfolder or None, **hub))
        except HFValidationError as error:
            raise FileNotFoundError(f"no such directory, and no name of a Hub repository: {os.fspath(source)}") from error

    return download(CONFIG_NAME) if need_config else Path(CONFIG_NAME), download(WEIGHTS_NAME)


class replacing:
    """A temporary file beside the target that takes its place when the block ends well, and vanishes otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> str:
        try:
            handle, self.temporary = tempfile.mkstemp(prefix=f".{self.target.name}.", dir=self.target.parent)
        except OSError as error:  # which names the temporary file
            raise type(error)(error.errno, error.strerror, os.fspath(self.target)) from error
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            os.unlink(self.temporary)
            return
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self.temporary, 0o666 & ~mask)
        os.replace(self.temporary, self.target)
