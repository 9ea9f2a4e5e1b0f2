"""The pipeline's components while they are trained: adapters on, frozen, prepared by accelerate, and plain again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ..adapters.config import AdapterConfig
from ..errors import AdapterError
from ..systems import get_peft_model
from .config import ADAPTER, DreamBoothConfig
from .families import Family
from .processes import shard_frozen, sharding
from .state import random_state_kept


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators for initial values and dropout; afterwards all global random states are those before."""
    with random_state_kept():
        torch.manual_seed(seed)
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On the CPU have several threads add up in one order, so that a run can be repeated to the bit.

    Where an operation has no such form torch only warns. Other devices are left as they are: there it costs much.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if device.type == "cpu" and not before[0]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def adapters_on(pipe: Any, adapters: Mapping[str, AdapterConfig], keep: bool = True) -> Iterator[None]:
    """Wrap the pipeline's components; they are restored if the block, or the wrapping itself, raises, or `keep` is not set."""
    wrapped: list[str] = []
    done = False
    try:
        for component, config in adapters.items():
            setattr(pipe, component, get_peft_model(getattr(pipe, component), config, ADAPTER))
            wrapped.append(component)
        yield
        done = True
    finally:
        for component in wrapped if not (done and keep) else ():
            setattr(pipe, component, getattr(pipe, component).unload())


@contextmanager
def prepared(family: Family, config: DreamBoothConfig, accelerator: Accelerator) -> Iterator[dict[str, nn.Module]]:
    """Give accelerate's versions of denoiser and text encoders; afterwards the pipeline's own are plain again and in
    evaluation mode.

    A component without an adapter is frozen meanwhile.
    """
    models: dict[str, nn.Module] = {}
    thawed: list[nn.Parameter] = []
    checkpointed: list[Any] = []
    try:
        for component in family.components:
            model = getattr(family.pipe, component)
            frozen = component not in config.adapters
            if frozen:
                thawed += trainable(model)
                model.requires_grad_(False).eval()
            # gradients of the text encoders pass through a denoiser that is frozen itself
            passed = not frozen or component == family.denoiser
            if passed and config.gradient_checkpointing and not model.is_gradient_checkpointing:
                _checkpointing(model, True)
                checkpointed.append(model)
            # no DistributedDataParallel: what is trained is small, and the loop averages its gradients
            models[component] = accelerator.prepare_model(model, evaluation_mode=True)
            if sharding(accelerator) is not None:
                shard_frozen(accelerator, models[component])
        if config.compile:
            models[family.denoiser] = cast(nn.Module, torch.compile(models[family.denoiser]))
        yield models
    finally:
        for model in models.values():
            plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False).eval()
            vars(plain).pop("_is_accelerate_prepared", None)  # or a later run would skip preparing it
        for model in checkpointed:
            _checkpointing(model, False)
        accelerator.free_memory()
        for parameter in thawed:
            parameter.requires_grad_(True)


def _checkpointing(model: Any, on: bool) -> None:
    """Switch recomputation of activations; diffusers and transformers name it differently."""
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
    elif hasattr(model, "gradient_checkpointing_enable"):
        # the reentrant kind, older versions' own choice, gives no gradients behind frozen embeddings
        kind = {"use_reentrant": False}
        model.gradient_checkpointing_enable(kind) if on else model.gradient_checkpointing_disable()
    else:
        raise AdapterError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing to false")
