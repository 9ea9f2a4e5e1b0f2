"""What a run depends on besides its settings: random numbers, trained tensors, and whether a checkpoint is of the same run."""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model import AdapterModel
from .checkpointing import Checkpoints

__all__ = [
    "MAY_DIFFER",
    "Checkpoints",
    "check_same_run",
    "go_on_randomly",
    "named_trained",
    "put_trained_tensors",
    "random_state_kept",
    "rng_state",
    "set_rng_state",
    "trained_tensors",
]

#: settings that may differ between a checkpoint and the run that continues it: they do not change what a step does
#: (pictures in a batch are compared for all processes together)
MAY_DIFFER = frozenset(
    {
        *("max_train_steps", "output_dir", "instance_data_dir", "class_data_dir", "cache_dir", "sample_batch_size"),
        "train_batch_size",
        *("gradient_checkpointing", "compile", "on_nonfinite", "resume", "trackers"),
        *("preview_prompts", "preview_every", "preview_steps", "preview_guidance", "preview_seed"),
        *("checkpoint_every", "checkpoint_limit", "name", "formats", "save_dtype", "push_to_hub"),
    }
)


def rng_state() -> dict[str, Any]:
    """Return the state of the global random generators of Python, numpy and torch (CPU and all CUDA devices).

    Plain values and tensors only, so that it survives `torch.load(weights_only=True)`.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned. With another number of CUDA devices, it warns and sets those that are in both.

    Raises:
        CheckpointError: it is no state of these generators; none is changed then.
    """
    before = rng_state()
    try:
        _set_rng(state)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        _set_rng(before)
        raise CheckpointError(f"not a state of the random generators: {error}") from error
    devices, saved = len(before["cuda"]), len(state["cuda"])
    if devices != saved:
        warnings.warn(
            f"the random state is of {saved} CUDA devices, here are {devices}: dropout will not be the same", stacklevel=2
        )


def go_on_randomly(states: Sequence[Mapping[str, Any]], index: int, count: int, seed: str) -> None:
    """Put back the random state of process `index` of `count`; of another number of processes it gets a new one, of `seed`.

    Raises:
        CheckpointError: as `set_rng_state`.
    """
    if count == len(states):
        set_rng_state(states[index])
        return
    warnings.warn(
        f"the checkpoint is of {len(states)} processes, here are {count}: pictures, noise and noise levels are the same, "
        "dropout will not be",
        stacklevel=2,
    )
    torch.manual_seed(zlib.crc32(f"{seed} {index}".encode()))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random generators back at the end, whatever was drawn from them or seeded inside."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _set_rng(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, value in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(value, device)


def named_trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters by name; the wrapper of `get_peft_model` is left out of the names."""
    inner = model.get_base_model() if isinstance(model, AdapterModel) else model
    yield from ((name, parameter) for name, parameter in inner.named_parameters() if parameter.requires_grad)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies, on the CPU, of what training has made: trained parameters, and the buffers beside them in their modules.

    Buffers matter where they say what a parameter means, as SHiRA's positions do.
    """
    return {name: tensor.detach().cpu().clone() for name, tensor in _live(model).items()}


def put_trained_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write what `trained_tensors` returned into a model with the same adapters.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the model is unchanged then.
    """
    live = _live(model)
    if live.keys() != tensors.keys():
        missing, unknown = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
        raise CheckpointError(
            f"the checkpoint does not fit the model: it lacks {_some(missing)}, and has {_some(unknown)} too many; "
            "continue with the adapters that the run began with"
        )
    for name, tensor in live.items():
        saved = tensors[name]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name!r} has shape {tuple(saved.shape)} and {saved.dtype} in the checkpoint, "
                f"{tuple(tensor.shape)} and {tensor.dtype} in the model; continue with the adapters that the run began with"
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the run that is to continue it.

    Args:
        saved: what `Checkpoints.load` returned, or the part of it that is compared.
        now: plain values by name, which have to be equal in `saved`, such as digests of the data set and the base model.
            Below `"settings"`: a `DreamBoothConfig.to_dict()`, of which the entries in `MAY_DIFFER` are not compared.

    Raises:
        CheckpointError: naming everything that differs, with both values.
    """
    then, here = _flat({name: saved[name] for name in now if name in saved}), _flat(now)
    differing = [name for name in dict.fromkeys((*then, *here)) if then.get(name, _ABSENT) != here.get(name, _ABSENT)]
    if differing:
        lines = [f"  {name}: {then.get(name, _ABSENT)!r} then, {here.get(name, _ABSENT)!r} now" for name in differing]
        raise CheckpointError(
            "the checkpoint is of another run; use its settings and data, or start anew without resume. These differ:\n"
            + "\n".join(lines)
        )


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names with dots, tuples as lists; without the settings that may differ, whose names lose the leading "settings"."""
    settings = {k: v for k, v in values.get("settings", {}).items() if k not in MAY_DIFFER}
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                add(f"{name}.{key}" if name else str(key), item)
        else:
            flat[name] = _as_lists(value)

    add("", settings)
    for name, value in values.items():
        if name != "settings":
            add(name, value)
    return flat


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _live(model: nn.Module) -> dict[str, Tensor]:
    inner = model.get_base_model() if isinstance(model, AdapterModel) else model
    found: dict[str, Tensor] = dict(named_trained(model))
    for path in {name.rpartition(".")[0] for name in found}:
        module = inner.get_submodule(path)
        skipped = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            if name not in skipped:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _some(names: list[str], count: int = 3) -> str:
    if not names:
        return "nothing"
    return ", ".join(repr(name) for name in names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
