"""What the denoiser learns to predict: noise, velocity or flow, and how noise levels are drawn and weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..errors import AdapterError, ConfigError

PREDICTIONS = ("epsilon", "v_prediction")
LOGIT_NORMAL, UNIFORM = "logit_normal", "uniform"


@dataclass(frozen=True)
class Diffusion:
    """Training target of models with a variance-preserving schedule, as Stable Diffusion 1.x, 2.x and XL.

    Attributes:
        scheduler: holds the schedule and whether the noise or the velocity (arXiv 2202.00512) is predicted.
        min_snr_gamma: weighs noise levels by min(SNR, gamma) (arXiv 2303.09556); None weighs them evenly.
    """

    scheduler: DDPMScheduler
    min_snr_gamma: float | None = None

    def timesteps(self, positions: torch.Tensor) -> torch.Tensor:
        """Return timesteps for `positions` in [0, 1), both of shape `(batch,)`; every timestep is equally likely."""
        return (positions * self.scheduler.config.num_train_timesteps).long()

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noised latents, of their shape."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what is to be predicted from them."""
        if self.scheduler.config.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of every sample's loss, shape `(batch,)`; None weighs all alike."""
        if self.min_snr_gamma is None:
            return None
        signal = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = signal / (1 - signal)
        if self.scheduler.config.prediction_type == "v_prediction":
            return snr.clamp(max=self.min_snr_gamma) / (snr + 1)
        return (self.min_snr_gamma / snr).clamp(max=1)  # where the SNR is 0, the limit: 1


@dataclass(frozen=True)
class Flow:
    """Training target of rectified-flow models, as Stable Diffusion 3 and Flux (arXiv 2403.03206).

    Attributes:
        scheduler: holds the noise levels, with the shift that does not depend on a picture's size.
        density: of noise levels before the shift: `LOGIT_NORMAL`, their logits are normally distributed, or `UNIFORM`.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    density: str = LOGIT_NORMAL

    def timesteps(self, positions: torch.Tensor) -> torch.Tensor:
        """Return timesteps for `positions` in [0, 1), both of shape `(batch,)`; greater positions have less noise."""
        if self.density == LOGIT_NORMAL:
            positions = torch.special.ndtri(positions.clamp(1e-6, 1 - 1e-6)).sigmoid()
        index = (positions * self.scheduler.config.num_train_timesteps).long()
        return self.scheduler.timesteps.to(positions.device)[index]

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return latents on the straight line from themselves to the noise."""
        sigma = (timesteps / self.scheduler.config.num_train_timesteps).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the direction from the latents to the noise."""
        return noise - latents

    def weights(self, timesteps: torch.Tensor) -> None:
        """Weigh all samples alike: the timesteps' density does the weighing."""
        return None


Objective = Diffusion | Flow


def objective_of(scheduler: SchedulerMixin | Any, min_snr_gamma: float | None = None, density: str = LOGIT_NORMAL) -> Objective:
    """Return what a pipeline with this scheduler is trained to predict.

    Args:
        scheduler: of the pipeline.
        min_snr_gamma: see `Diffusion`.
        density: see `Flow`.

    Raises:
        AdapterError: the scheduler, or its prediction type, has no loss here.
        ConfigError: `min_snr_gamma` together with flow matching.
    """
    if "FlowMatch" in type(scheduler).__name__:
        if min_snr_gamma is not None:
            raise ConfigError("min_snr_gamma has no meaning for this model, which is trained by flow matching; leave it out")
        return Flow(FlowMatchEulerDiscreteScheduler.from_config(scheduler.config), density)
    if type(scheduler).__name__.startswith("EDM"):
        raise AdapterError(
            f"the scheduler is {type(scheduler).__name__}: models whose latents and answers are scaled by the noise level "
            "(arXiv 2206.00364) cannot be trained; expected one that predicts noise, velocity or flow"
        )
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise AdapterError(f"the scheduler's prediction_type is {prediction_type!r}; expected one of {list(PREDICTIONS)}")
    return Diffusion(DDPMScheduler.from_config(scheduler.config), min_snr_gamma)
