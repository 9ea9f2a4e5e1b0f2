"""Several processes that train together: who this one is, gradients of all of them, frozen weights shared among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast, get_int_from_env, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..errors import ConfigError
from ..model import AdapterModel

WAIT = timedelta(hours=6)  # for the first process, which draws class pictures and previews and encodes everything
MESSAGE = 2**24  # numbers that are sent at once: adapters of most sizes, and no second copy of a whole model's gradients


def process_state() -> PartialState:
    """Return accelerate's view of the processes, the same before an `Accelerator` is made as after.

    `accelerate launch --cpu` says so in an environment variable that `Accelerator` reads and `PartialState` does not; whoever
    comes first decides, and the processes would not know of each other.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=WAIT)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean of all processes' gradients, in one message where they are as few as adapters' are.

    One process' parameter without a gradient counts as zero if another one has it, as where an adapter is dropped in some of
    them; without any it stays without.
    """
    if accelerator.num_processes == 1:
        return
    for group in _messages(parameters):
        there = torch.tensor([float(p.grad is not None) for p in group], device=accelerator.device)
        flat = torch.cat([*[(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group], there])
        mean: Any = accelerator.reduce(flat, "mean")
        *values, anywhere = mean.split([*[p.numel() for p in group], len(group)])
        for parameter, value, found in zip(group, values, anywhere.tolist()):
            parameter.grad = value.view_as(parameter).to(parameter.dtype) if found else None


@torch.no_grad()
def share_values(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the first one's values: initial ones that are drawn at random may differ between devices."""
    if accelerator.num_processes == 1:
        return
    for group in _messages(parameters):
        flat: Any = broadcast(torch.cat([p.reshape(-1) for p in group]))
        for parameter, value in zip(group, flat.split([p.numel() for p in group])):
            parameter.copy_(value.view_as(parameter))


def _messages(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in groups that are sent at once."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and size + parameter.numel() > MESSAGE:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel()
    if group:
        yield group


def sharding(accelerator: Accelerator) -> Any:
    """Return accelerate's FSDP plugin where its configuration asks for that, else None. Accelerate heeds it on GPUs only."""
    if accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if getattr(accelerator.state, "fsdp_plugin", None) is None:
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return accelerator.state.fsdp_plugin
    return None


def check_processes(accelerator: Accelerator, previews: Sequence[str]) -> None:
    """Refuse launches that would not train what they ask for, before anything is changed.

    Raises:
        ConfigError: processes that do not know of each other, DeepSpeed, FSDP's first version, or settings of the second one
            that cannot be used here.
    """
    launched = get_int_from_env(["WORLD_SIZE"], 1)
    if accelerator.num_processes == 1 < launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate has each train alone, into one output_dir: no accelerator "
            "was found; for processes on the CPU launch with `accelerate launch --cpu`"
        )
    plugin, kind = sharding(accelerator), accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP") or (plugin is not None and plugin.fsdp_version != 2):
        asked = kind if plugin is None else "FSDP of fsdp_version 1"
        raise ConfigError(
            f"accelerate's configuration asks for {asked}; adapters train on one or several processes, or with FSDP of "
            "fsdp_version 2, which shards the frozen weights (docs/scaling.md has configurations)"
        )
    if plugin is None:
        return
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading is on: all processes but the first would load empty weights; set it to false"
        )
    if previews:
        raise ConfigError("preview_prompts: one process draws previews, and with FSDP none has the whole model; leave it empty")


def move(pipe: Any, denoiser: str, accelerator: Accelerator) -> None:
    """Move a pipeline to the accelerator's device; with FSDP without the denoiser, which follows part by part as it is cut."""
    if sharding(accelerator) is None:
        pipe.to(accelerator.device)
        return
    for name, component in pipe.components.items():
        if name != denoiser and isinstance(component, nn.Module):
            component.to(accelerator.device)


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> None:
    """Shard what is frozen by FSDP2 (`torch.distributed.fsdp.fully_shard`), as accelerate's configuration says.

    What is trained stays whole on every process, with plain gradients, optimizer states and files: only frozen weights are
    large. Shards are the classes that the configuration names, else those that the model says not to split, and the rest.
    """
    inner: Any = model.get_base_model() if isinstance(model, AdapterModel) else model
    plugin = sharding(accelerator)
    names = plugin.transformer_cls_names_to_wrap or getattr(inner, "_no_split_modules", None) or ()
    whole = {parameter for parameter in inner.parameters() if parameter.requires_grad}
    settings: dict[str, Any] = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "ignored_params": whole,
    }
    for parameter in whole:  # `fully_shard` moves the others
        parameter.data = parameter.data.to(accelerator.device)
    for module in reversed(list(inner.modules())):  # children first
        if type(module).__name__ in names or module is inner:
            fully_shard(module, **settings)
