"""What a DreamBooth run can be told, checked before anything is loaded or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..adapters.config import AdapterConfig
from ..errors import ConfigError

PRECISIONS = ("no", "fp16", "bf16")
FORMATS = ("kohya", "peft")
ADAPTER = "default"  # name of the trained adapter on every component
NONFINITE = ("stop", "skip")
SAVE_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}

_COUNTS = (
    "resolution",
    "bucket_step",
    "repeats",
    "num_class_images",
    "sample_batch_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "held_out_samples",
    "preview_steps",
)
_COUNTS_OR_NONE = ("preview_every", "checkpoint_every", "checkpoint_limit", "target_params")
_NUMBERS = ("learning_rate", "max_grad_norm", "prior_loss_weight", "noise_offset")
_NUMBERS_OR_NONE = ("min_snr_gamma", "preview_guidance")


@dataclass
class DreamBoothConfig:
    """Settings of `train_dreambooth`.

    Attributes:
        instance_data_dir: directory with pictures of the subject, with or without captions.
        instance_prompt: the prompt of every picture that has no caption of its own; None requires captions.
        output_dir: where everything that the run writes goes.
        adapters: adapter config by component, for example `{"unet": LoKrConfig(r=8), "text_encoder": LoraConfig(r=4)}`.

        resolution: edge of the training pictures in pixels; of pictures in buckets the edge of a square of the same area.
        aspect_buckets: sort pictures by aspect ratio instead of cutting squares.
        bucket_step: edges of buckets are multiples of it, in pixels.
        bucket_upscale: False never enlarges a picture: it goes into the largest bucket of its shape that it covers.
        repeats: how often a picture is shown in one round.
        random_flip: mirror pictures in half of the cases.
        caption_dropout: part of the samples trained with an empty prompt.
        masked_loss: weigh the loss by masks: `NAME.mask.png` beside a picture, white where the loss counts.
        cache_dir: latents and prompts are kept here, by content; None takes `output_dir/cache`.

        class_prompt: what prior preservation keeps: the class without the subject's word. None turns it off, unless
            `class_data_dir` holds pictures with captions.
        class_data_dir: pictures of the class; missing ones are generated from `class_prompt`. None takes
            `output_dir/class`.
        num_class_images: how many there have to be.
        prior_loss_weight: of the class pictures' loss beside the subject's.
        sample_batch_size: class pictures generated at once.

        train_batch_size: pictures of the subject in one forward pass, on each process; as many of the class are added.
        gradient_accumulation_steps: forward passes for one optimizer step.
        max_train_steps: optimizer steps.
        learning_rate: of every component that `learning_rates` does not name.
        learning_rates: learning rate by component.
        optimizer: import path of an optimizer class, or one of the short names in `optimizers.OPTIMIZERS`.
        optimizer_args: further arguments of its constructor.
        lr_scheduler: a name that `diffusers.optimization.get_scheduler` knows.
        lr_warmup_steps: optimizer steps over which the learning rate rises from 0.
        lr_scheduler_args: further arguments: `num_cycles`, `power`, `step_rules`.
        max_grad_norm: gradients of all adapters together are clipped to this norm; 0 turns clipping off.
        min_snr_gamma: weighs noise levels by min(SNR, gamma) (arXiv 2303.09556); None weighs them evenly.
        noise_offset: strength of a constant a channel in the noise, which teaches very dark and very bright pictures.
        ema_decay: the saved weights are this exponential moving average; None saves the last ones.
        mixed_precision: "no", "fp16" or "bf16", as accelerate names them; adapters stay in float32.
        gradient_checkpointing: recompute activations in backward: less memory, more time.
        compile: run the denoiser through `torch.compile`.
        seed: of the adapters' initial values, the order of pictures, noise, timesteps and dropout.
        on_nonfinite: "stop" at a loss or gradient that is not finite, or "skip" the step.

        target_params: choose rank or factor so that the adapters have about this many parameters.
        target_size: the same for the size of the adapter file, for example "10MB".

        preview_prompts: prompts drawn during training; empty draws nothing.
        preview_every: optimizer steps between previews; None draws them at the end only.
        preview_steps: sampling steps.
        preview_guidance: guidance scale; None takes the pipeline's.
        preview_seed: of the previews' noise.
        checkpoint_every: optimizer steps between checkpoints; None writes one only when the run is interrupted.
        checkpoint_limit: how many checkpoints are kept; None keeps all.
        resume: "latest" continues the newest checkpoint in `output_dir`, a path that one; None starts anew.
        trackers: accelerate's names of trackers; None takes tensorboard where it is installed, an empty list none.
        held_out_samples: how many fixed pairs of noise and timestep the held-out loss is taken over.

        name: of the adapter file and of the model card; None takes the name of `output_dir`.
        formats: "kohya" (one file), "peft" (one directory a component).
        save_dtype: of the files, for example "float16"; None keeps the trained precision.
        push_to_hub: repository that the output is uploaded to; None uploads nothing.
    """

    instance_data_dir: str | PathLike[str]
    output_dir: str | PathLike[str]
    instance_prompt: str | None = None
    adapters: Mapping[str, AdapterConfig] = field(default_factory=dict)

    resolution: int = 512
    aspect_buckets: bool = False
    bucket_step: int = 64
    bucket_upscale: bool = True
    repeats: int = 1
    random_flip: bool = False
    caption_dropout: float = 0.0
    masked_loss: bool = False
    cache_dir: str | PathLike[str] | None = None

    class_prompt: str | None = None
    class_data_dir: str | PathLike[str] | None = None
    num_class_images: int = 100
    prior_loss_weight: float = 1.0
    sample_batch_size: int = 4

    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 500
    learning_rate: float = 1e-4
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    optimizer: str = "adamw"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    ema_decay: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    on_nonfinite: str = "stop"

    target_params: int | None = None
    target_size: str | None = None

    preview_prompts: Sequence[str] = ()
    preview_every: int | None = None
    preview_steps: int = 25
    preview_guidance: float | None = None
    preview_seed: int = 0
    checkpoint_every: int | None = None
    checkpoint_limit: int | None = None
    resume: str | None = None
    trackers: Sequence[str] | None = None
    held_out_samples: int = 16

    name: str | None = None
    formats: Sequence[str] = FORMATS
    save_dtype: str | None = None
    push_to_hub: str | None = None

    @property
    def output(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @property
    def adapter_file(self) -> Path:
        """The kohya file that the run writes."""
        return self.output / f"{self.name or self.output.resolve().name}.safetensors"

    @property
    def cache(self) -> Path:
        """Where latents and prompts are kept."""
        return Path(self.cache_dir) if self.cache_dir is not None else self.output / "cache"

    @property
    def class_pictures(self) -> Path | None:
        """Where the class pictures are; None without prior preservation."""
        if self.class_data_dir is not None:
            return Path(self.class_data_dir)
        return self.output / "class" if self.class_prompt is not None else None

    @property
    def torch_save_dtype(self) -> torch.dtype | None:
        """`save_dtype` as torch has it; None keeps the trained precision."""
        return None if self.save_dtype is None else SAVE_DTYPES[self.save_dtype]

    def learning_rate_of(self, component: str) -> float:
        """Return the learning rate of `component`."""
        return self.learning_rates.get(component, self.learning_rate)

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot be used with any model."""
        if not self.adapters:
            raise ConfigError('adapters is empty; give an adapter config for a component, for example {"unet": LoKrConfig()}')
        for component, config in self.adapters.items():
            if not isinstance(config, AdapterConfig):
                raise ConfigError(f"adapters[{component!r}] is {config!r}; expected an adapter config such as LoKrConfig()")
            config.check()
        for name in (*_COUNTS, *_COUNTS_OR_NONE):
            value = getattr(self, name)
            if value is None and name in _COUNTS_OR_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name in (*_NUMBERS, *_NUMBERS_OR_NONE):
            value = getattr(self, name)
            if not (value is None and name in _NUMBERS_OR_NONE):
                _check_number(name, value)
        for component, value in self.learning_rates.items():
            if component not in self.adapters:
                raise ConfigError(f"learning_rates names {component!r}, which has no adapter; expected {list(self.adapters)}")
            _check_number(f"learning_rates[{component!r}]", value)
        _check_number("caption_dropout", self.caption_dropout)
        if self.caption_dropout > 1:
            raise ConfigError(f"caption_dropout is {self.caption_dropout!r}; expected a number from 0 to 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay!r}; expected a number from 0 to below 1, such as 0.999")
        if isinstance(self.lr_warmup_steps, bool) or not isinstance(self.lr_warmup_steps, int) or self.lr_warmup_steps < 0:
            raise ConfigError(f"lr_warmup_steps is {self.lr_warmup_steps!r}; expected a whole number of at least 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed!r}; expected a whole number from 0 to {2**32 - 1}")
        if self.mixed_precision not in PRECISIONS:
            raise ConfigError(f"mixed_precision is {self.mixed_precision!r}; expected one of {list(PRECISIONS)}")
        if self.on_nonfinite not in NONFINITE:
            raise ConfigError(f"on_nonfinite is {self.on_nonfinite!r}; expected one of {list(NONFINITE)}")
        if isinstance(self.formats, str) or not self.formats or set(self.formats) - set(FORMATS):
            raise ConfigError(f"formats is {self.formats!r}; expected some of {list(FORMATS)}")
        if self.save_dtype is not None and self.save_dtype not in SAVE_DTYPES:
            raise ConfigError(f"save_dtype is {self.save_dtype!r}; expected one of {list(SAVE_DTYPES)} or None")
        if isinstance(self.preview_prompts, str):
            raise ConfigError(f"preview_prompts is {self.preview_prompts!r}; expected a list of prompts")
        if self.target_params is not None and self.target_size is not None:
            raise ConfigError("target_params and target_size both say the size; give one of them")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values; adapter configs become dictionaries with their algorithm as `"type"`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("instance_data_dir", "output_dir", "cache_dir", "class_data_dir"):
            plain[name] = None if plain[name] is None else str(plain[name])
        plain["adapters"] = {name: adapter_to_dict(config) for name, config in self.adapters.items()}
        for name in ("learning_rates", "optimizer_args", "lr_scheduler_args"):
            plain[name] = dict(plain[name])
        for name in ("preview_prompts", "trackers", "formats"):
            plain[name] = None if plain[name] is None else list(plain[name])
        return plain


def adapter_to_dict(config: AdapterConfig) -> dict[str, Any]:
    """Return an adapter config's algorithm as `"type"` (PEFT's name in lower case) and the fields not at their default."""
    default = type(config)().to_dict()
    own = {name: value for name, value in config.to_dict().items() if value != default[name]}
    return {"type": config.peft_name.lower(), **own}


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} is {value!r}; expected a finite number of at least 0")
