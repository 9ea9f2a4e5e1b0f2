"""Pictures drawn while training, by the call that people make afterwards; nothing of the training notices."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from ..errors import AdapterError
from ..files import replacing
from .config import DreamBoothConfig
from .state import random_state_kept

_NAME = re.compile(r"step-(\d+)-(\d+)\.png")
#: edges of previews are a multiple of this many pixels, which every family's pipeline takes as they are
_EDGE_STEP = 16
_ABSENT = object()


def draw_previews(pipe: Any, config: DreamBoothConfig, folder: str | Path, step: int) -> list[Path]:
    """Draw every preview prompt with the adapters as they are now, through the pipeline's own call.

    A picture equals what a fresh pipeline draws with the adapter's file and the same arguments: `prompt`,
    `num_inference_steps=config.preview_steps`, edges of `config.resolution`, `generator=torch.Generator().manual_seed(
    config.preview_seed)` and, where it is set, `guidance_scale=config.preview_guidance`. So accelerate's autocast and
    `torch.compile` are off meanwhile. Parts that training has put on another device than the denoiser come back for as
    long as it takes. Pictures are drawn one at a time.

    Whatever happens, the pipeline is as it was afterwards: its scheduler, devices and training flags, and the random state of
    torch, numpy and Python.

    Args:
        pipe: the pipeline that is trained.
        config: its previews' settings.
        folder: where the pictures go, `step-000100-00.png` and so on; made if absent.
        step: optimizer steps taken, for the names.

    Returns:
        The files, in the order of the prompts; none without prompts.

    Raises:
        AdapterError: the pipeline has no denoiser. OSError: the folder cannot be written. Whatever the pipeline raises.
    """
    if not config.preview_prompts:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    with random_state_kept(), as_for_inference(pipe):
        for index, prompt in enumerate(config.preview_prompts):
            path = Path(folder) / preview_name(step, index)
            _write(_draw(pipe, config, prompt), path, _parameters(config, prompt))
            paths.append(path)
    return paths


def preview_name(step: int, index: int) -> str:
    """Name of the picture of prompt number `index` (from 0) after `step` steps."""
    return f"step-{step:06d}-{index:02d}.png"


def parse_preview_name(name: str) -> tuple[int, int] | None:
    """Step and number of the prompt of a preview's file name; None for other names."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def _draw(pipe: Any, config: DreamBoothConfig, prompt: str) -> Image.Image:
    edge = max(config.resolution // _EDGE_STEP * _EDGE_STEP, _EDGE_STEP)
    arguments: dict[str, Any] = {"num_inference_steps": config.preview_steps, "height": edge, "width": edge}
    if config.preview_guidance is not None:
        arguments["guidance_scale"] = config.preview_guidance
    generator = torch.Generator().manual_seed(config.preview_seed)  # on the CPU: the same noise on every device
    return pipe(prompt, generator=generator, **arguments).images[0]


def _parameters(config: DreamBoothConfig, prompt: str) -> str:
    """What user interfaces show of a PNG: the prompt, and below it how it was drawn."""
    guidance = "" if config.preview_guidance is None else f", CFG scale: {config.preview_guidance:g}"
    return f"{prompt}\nSteps: {config.preview_steps}{guidance}, Seed: {config.preview_seed}"


def _write(picture: Image.Image, path: Path, parameters: str) -> None:
    text = PngInfo()
    text.add_text("parameters", parameters)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=text)


# --- the pipeline as people use it ---------------------------------------------------------------------------------------
@contextmanager
def as_for_inference(pipe: Any) -> Iterator[None]:
    """Inside, a pipeline that is being trained answers as a fresh one would; afterwards it is as it was.

    Raises:
        AdapterError: the pipeline has no denoiser.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    device = _device_of(_denoiser(pipe, parts))
    with ExitStack() as stack:
        stack.callback(_release_memory)
        _evaluating(parts, stack)
        for part in parts.values():
            _plain_call(part, stack)
        _replaced(stack, pipe, "scheduler", copy.deepcopy(pipe.scheduler))
        bar = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        _replaced(stack, pipe, "_progress_bar_config", bar)
        if not any(hasattr(part, "_hf_hook") for part in parts.values()):  # else offloading sees to it
            _gathered(parts, device, stack)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _denoiser(pipe: Any, parts: Mapping[str, nn.Module]) -> nn.Module:
    for name in ("unet", "transformer"):
        if name in parts:
            return parts[name]
    raise AdapterError(f"{type(pipe).__name__} has no unet or transformer to draw previews with; it has {sorted(parts)}")


def _device_of(part: nn.Module) -> torch.device:
    return next((p.device for p in part.parameters()), torch.device("cpu"))


def _evaluating(parts: Mapping[str, nn.Module], stack: ExitStack) -> None:
    """Evaluation mode; every module's own flag comes back, since parts may be in different modes."""
    modules = [module for part in parts.values() for module in part.modules()]
    for module, training in [(module, module.training) for module in modules]:
        stack.callback(setattr, module, "training", training)
        module.training = False


def _plain_call(part: nn.Module, stack: ExitStack) -> None:
    """The part's forward pass without what accelerate (autocast) and torch.compile have put around it."""
    if "_original_forward" in vars(part):
        _replaced(stack, part, "forward", vars(part)["_original_forward"])
    for module in part.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            _replaced(stack, module, "_compiled_call_impl", None)


def _gathered(parts: Mapping[str, nn.Module], device: torch.device, stack: ExitStack) -> None:
    """All parts on one device."""
    for part in parts.values():
        home = _device_of(part)
        if home != device:
            stack.callback(part.to, home)
            part.to(device)


def _replaced(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Another value of an attribute; at the end the old one comes back, or goes where the object had none of its own."""
    before = vars(owner).get(name, _ABSENT)
    if before is _ABSENT:
        stack.callback(vars(owner).pop, name, None)
    else:
        stack.callback(vars(owner).__setitem__, name, before)
    vars(owner)[name] = value


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
