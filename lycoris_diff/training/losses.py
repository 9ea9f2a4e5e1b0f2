"""The loss of a batch: squared errors of the subject's pictures and, beside them, of the class."""

from __future__ import annotations

import torch


def sample_losses(prediction: torch.Tensor, target: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of every sample, float32 of shape `(batch,)`.

    Args:
        prediction: of the denoiser, `(batch, ...)`.
        target: the same shape.
        masks: what counts, from 0 to 1, of a shape that broadcasts to the target's; the mean is taken over what counts.
    """
    errors = (prediction.float() - target.float()).square()
    if masks is None:
        return errors.flatten(1).mean(1)
    masks = masks.expand_as(errors)
    return (errors * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1e-6)


def dreambooth_loss(
    losses: torch.Tensor, weights: torch.Tensor | None, instances: int, prior_loss_weight: float
) -> torch.Tensor:
    """Mean over the subject's samples plus `prior_loss_weight` times the mean over the class's (arXiv 2208.12242).

    Args:
        losses: of every sample, `(batch,)`, the subject's first.
        weights: of every sample's noise level, or None.
        instances: how many of them show the subject; the others show the class.
        prior_loss_weight: of the class.
    """
    if weights is not None:
        losses = losses * weights
    loss = losses[:instances].mean()
    return loss if instances == len(losses) else loss + prior_loss_weight * losses[instances:].mean()
