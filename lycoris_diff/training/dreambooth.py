"""DreamBooth training of adapters on a Stable Diffusion 1.x or 2.x pipeline, on top of accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from ..errors import AdapterError
from ..systems import get_peft_model
from .batches import Batch, held_out_batches, training_batches
from .config import COMPONENTS, DreamBoothConfig
from .images import read_images
from .latents import LatentCache, encode_latents
from .losses import denoising_loss, training_scheduler
from .report import TrainReport, TrainStep

WEIGHTS_FILE = "adapter_model.safetensors"


def train_dreambooth(
    pipe: DiffusionPipeline,
    config: DreamBoothConfig,
    on_step: Callable[[TrainStep], None] | None = None,
) -> TrainReport:
    """Teach the pipeline a subject from a directory of pictures, and save the adapters.

    The components named in `config.adapters` are wrapped (`pipe.unet = get_peft_model(pipe.unet, ...)`), trained and
    saved to `config.output_dir / component` in PEFT's format. They stay on the pipeline afterwards, in evaluation
    mode. When anything fails, the pipeline has its own components back. torch's global random state is not changed.

    Args:
        pipe: a pipeline with `unet`, `vae`, one `text_encoder` and its `tokenizer`; moved to accelerate's device.
        config: see `DreamBoothConfig`.
        on_step: called after every optimizer step, on every process; it may raise to stop.

    Raises:
        AdapterError: a setting, picture or pipeline that cannot be used, before anything is changed; or a loss that
            is not finite, while training.
        OSError: the pictures cannot be opened, or the output directory cannot be written.
    """
    config.validate()
    _check_pipeline(pipe)
    scheduler = training_scheduler(pipe.scheduler)
    images = read_images(config.instance_data_dir, config.resolution)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = _make_accelerator(config)
    pipe.to(accelerator.device)
    dtype = pipe.unet.dtype
    cache = encode_latents(pipe.vae, images)
    with _forked_rng(config.seed), _adapters_on(pipe, config.adapters), _prepared(pipe, config, accelerator) as models:
        tokens = _tokenize(pipe, config.instance_prompt)
        run = _Run(accelerator, scheduler, config, cache, models, tokens, dtype)
        before = run.held_out_loss()
        losses, seconds = run.train(on_step)
        after = run.held_out_loss()
        paths = {component: Path(config.output_dir) / component for component in config.adapters}
        if accelerator.is_main_process:
            for component, path in paths.items():
                getattr(pipe, component).save_pretrained(path)
        accelerator.wait_for_everyone()
    return TrainReport(
        losses=losses,
        held_out_before=before,
        held_out_after=after,
        seconds_per_step=seconds / len(losses),
        parameters={component: getattr(pipe, component).get_nb_trainable_parameters()[0] for component in paths},
        bytes={component: (path / WEIGHTS_FILE).stat().st_size for component, path in paths.items()},
        paths=paths,
        images=len(images),
    )


@dataclass
class _Run:
    """The loop's state: the prepared components and what they are fed (`dtype` is the base UNet's)."""

    accelerator: Accelerator
    scheduler: DDPMScheduler
    config: DreamBoothConfig
    cache: LatentCache
    models: dict[str, nn.Module]
    tokens: torch.Tensor
    dtype: torch.dtype

    def train(self, on_step: Callable[[TrainStep], None] | None) -> tuple[list[float], float]:
        """Take all optimizer steps; return the loss of each and the seconds they took together."""
        config, accelerator = self.config, self.accelerator
        trained = [self.models[component] for component in config.adapters]
        groups: list[dict[str, Any]] = [
            {"params": _trainable(self.models[component]), "lr": config.learning_rate_of(component)}
            for component in config.adapters
        ]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = accelerator.prepare(torch.optim.AdamW(groups, weight_decay=config.weight_decay))
        generator = torch.Generator().manual_seed(config.seed + accelerator.process_index)
        batches = training_batches(self.cache, self._timesteps, config.train_batch_size, generator)
        losses: list[float] = []
        self._set_training(True)
        start = time.perf_counter()
        for step in range(1, config.max_train_steps + 1):
            total = 0.0
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(*trained):
                    loss = self._loss(next(batches))
                    accelerator.backward(loss)
                    total += _finite(loss.item(), f"training loss of step {step}")
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(total / config.gradient_accumulation_steps)
            if on_step is not None:
                on_step(TrainStep(step, config.max_train_steps, losses[-1]))
        return losses, time.perf_counter() - start

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss over the same noise and timesteps at every call, in evaluation mode."""
        config = self.config
        seed = config.seed + 1_000_003  # far from the seeds of training
        batches = held_out_batches(self.cache, self._timesteps, config.held_out_samples, config.train_batch_size, seed)
        self._set_training(False)
        total = sum(self._loss(batch).item() * len(batch.latents) for batch in batches)
        return _finite(total / config.held_out_samples, "held-out loss")

    @property
    def _timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def _loss(self, batch: Batch) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text_encoder" in self.config.adapters):
            text = self.models["text_encoder"](self.tokens)[0]
        batch = batch.to(self.accelerator.device)
        return denoising_loss(self.models["unet"], self.scheduler, batch, text.to(self.dtype))

    def _set_training(self, mode: bool) -> None:
        for component in self.config.adapters:
            self.models[component].train(mode)


def _check_pipeline(pipe: DiffusionPipeline) -> None:
    missing = [name for name in (*COMPONENTS, "vae", "tokenizer", "scheduler") if getattr(pipe, name, None) is None]
    if missing:
        raise AdapterError(f"{type(pipe).__name__} has no {', '.join(missing)}; expected a Stable Diffusion 1.x or 2.x one")
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise AdapterError(f"{type(pipe).__name__} has a second text encoder; expected a Stable Diffusion 1.x or 2.x one")


def _make_accelerator(config: DreamBoothConfig) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
    except ValueError as error:  # precision not available here, or another one already chosen in this process
        raise AdapterError(f"accelerate refuses mixed_precision={config.mixed_precision!r}: {error}") from error


@contextmanager
def _forked_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators for initial values and dropout, and put them back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _adapters_on(pipe: DiffusionPipeline, adapters: Mapping[str, Any]) -> Iterator[None]:
    """Wrap the pipeline's components; they are restored if the block, or the wrapping itself, raises."""
    wrapped: list[str] = []
    try:
        for component, adapter_config in adapters.items():
            setattr(pipe, component, get_peft_model(getattr(pipe, component), adapter_config))
            wrapped.append(component)
        yield
    except BaseException:
        for component in wrapped:
            setattr(pipe, component, getattr(pipe, component).unload())
        raise


@contextmanager
def _prepared(pipe: DiffusionPipeline, config: DreamBoothConfig, accelerator: Accelerator) -> Iterator[dict[str, nn.Module]]:
    """Give accelerate's versions of both components; afterwards the pipeline's own are plain again and in evaluation
    mode.

    A component without an adapter is frozen meanwhile.
    """
    models: dict[str, nn.Module] = {}
    thawed: list[nn.Parameter] = []
    try:
        for component in COMPONENTS:
            model = getattr(pipe, component)
            frozen = component not in config.adapters
            if frozen:
                thawed += _trainable(model)
                model.requires_grad_(False).eval()
            models[component] = accelerator.prepare_model(model, evaluation_mode=frozen)
        yield models
    finally:
        for model in models.values():
            plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
            vars(plain).pop("_is_accelerate_prepared", None)  # or a later run would skip preparing it
        accelerator.free_memory()
        for parameter in thawed:
            parameter.requires_grad_(True)


def _tokenize(pipe: DiffusionPipeline, prompt: str) -> torch.Tensor:
    """Return the prompt's token ids `(1, tokens)`, cut or padded as the pipeline does it."""
    tokenizer = pipe.tokenizer
    length = tokenizer.model_max_length
    encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(pipe.text_encoder.device)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise AdapterError(
            f"the {name} is {value}; lower the learning rate, "
            "or load the base in float32 and train with mixed_precision 'no' or 'bf16'"
        )
    return value
