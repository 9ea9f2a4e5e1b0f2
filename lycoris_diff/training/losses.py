"""The denoising loss of Stable Diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin
from torch import nn

from ..errors import AdapterError
from .batches import Batch

PREDICTION_TYPES = ("epsilon", "v_prediction")


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """Return the noise schedule that the pipeline's own `scheduler` was made for.

    Raises:
        AdapterError: its prediction type has no loss here.
    """
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise AdapterError(f"the scheduler's prediction_type is {prediction_type!r}; expected one of {list(PREDICTION_TYPES)}")
    return DDPMScheduler.from_config(scheduler.config)


def denoising_loss(unet: nn.Module, scheduler: DDPMScheduler, batch: Batch, text: torch.Tensor) -> torch.Tensor:
    """Mean squared error of what `unet` predicts for noised latents, as a float32 scalar.

    The target is the noise ("epsilon") or the velocity ("v_prediction"), whichever the scheduler says.

    Args:
        unet: called as diffusers' `UNet2DConditionModel`.
        scheduler: adds the noise.
        batch: latents, noise and timesteps, on the device of `unet`.
        text: the prompt's hidden states `(1 or batch, tokens, width)`, in the dtype in which `unet` is to be fed.
    """
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    else:
        target = batch.noise
    hidden = text.expand(len(noisy), -1, -1)
    prediction = unet(noisy.to(text.dtype), batch.timesteps, encoder_hidden_states=hidden).sample
    return F.mse_loss(prediction.float(), target.float())
