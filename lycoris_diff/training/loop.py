"""The training loop: optimizer steps, checkpoints, previews, and what to do when something is not finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import nn

from ..errors import AdapterError, CheckpointError
from .batches import Batch, held_out_batches
from .checkpointing import Checkpoints
from .components import trainable
from .config import DreamBoothConfig
from .families import Family
from .guard import check_finite_adapters, first_nonfinite_module, gradient_norm, nonfinite_gradients
from .interrupts import Interrupts
from .losses import dreambooth_loss, sample_losses
from .objective import Objective
from .optimizers import make_lr_scheduler, make_optimizer, optimizer_eval
from .prepare import Data, batches_of
from .previews import draw_previews
from .processes import average_gradients, share_values
from .record import PREVIEWS
from .report import SkippedStep, TrainStep
from .state import check_same_run, go_on_randomly, put_trained_tensors, rng_state, trained_tensors

HELD_OUT_SEED = 1_000_003  # added to the run's seed; far from the seeds of training
MOST_SKIPPED = 10  # steps in a row that may be skipped


class Loop:
    """A run's state and its steps.

    Attributes:
        step: optimizer steps taken.
        losses: of every step that changed something.
        skipped: the steps that did not.
        held_out_before: held-out loss before the first step.
        previews: pictures drawn, before an interruption too.
        seconds: time of the steps taken in this process.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective,
        config: DreamBoothConfig,
        data: Data,
        accelerator: Accelerator,
        models: Mapping[str, nn.Module],
        base_digest: str = "",
    ) -> None:
        self.family, self.objective, self.config, self.data = family, objective, config, data
        self.accelerator, self.models, self.base_digest = accelerator, models, base_digest
        self.adapted = {component: getattr(family.pipe, component) for component in config.adapters}
        self.batches = batches_of(family, objective, config, data, accelerator.process_index, accelerator.num_processes)
        groups: list[dict[str, Any]] = [
            {"params": trainable(model), "lr": config.learning_rate_of(component), "name": component}
            for component, model in self.adapted.items()
        ]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        share_values(self.parameters, accelerator)
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(config, groups))
        self.lr_scheduler = make_lr_scheduler(config, self.optimizer.optimizer)
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay is not None else None
        self.checkpoints = checkpoints_of(config)
        self.step = 0
        self.losses: list[float] = []
        self.skipped: list[SkippedStep] = []
        self.held_out_before = float("nan")
        self.previews: list[Path] = []
        self.seconds = 0.0

    # --- a run ---------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin anew, or go on from the checkpoint that the settings name.

        Raises:
            AdapterError: there is none, it is damaged, of another run, or of a later step than the last one.
        """
        if self.config.resume is None:
            self.held_out_before = self.held_out_loss()
            return
        path = self.checkpoints.find(self.config.resume)
        state = self.checkpoints.load(path)
        if state["step"] > self.config.max_train_steps:
            raise CheckpointError(
                f"{path} is of step {state['step']}, max_train_steps is {self.config.max_train_steps}; raise that, or resume "
                "from an earlier checkpoint"
            )
        self.load(state)

    def run(self, on_step: Callable[[TrainStep], None] | None = None) -> None:
        """Take the steps that are left.

        Raises:
            AdapterError: a loss or gradient that is not finite, unless such steps are skipped.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when a checkpoint has been written; the message names it.
        """
        config = self.config
        with Interrupts() as interrupts:
            while self.step < config.max_train_steps:
                began = time.perf_counter()
                loss = self.take_step()
                self.seconds += time.perf_counter() - began
                if loss is not None:
                    self.log(loss)
                    if on_step is not None:
                        on_step(TrainStep(self.step, config.max_train_steps, loss))
                last = self.step == config.max_train_steps
                if _due(config.preview_every, self.step) or (last and config.preview_prompts):
                    self.draw()
                stop = self._on_any_process(interrupts.requested) and not last
                if stop or _due(config.checkpoint_every, self.step):
                    path = self.save()
                    if stop:
                        raise KeyboardInterrupt(
                            f"stopped after step {self.step} of {config.max_train_steps}; {path} was written, "
                            'resume="latest" goes on from there'
                        )

    def take_step(self) -> float | None:
        """Take one optimizer step and return its loss, or None where it was skipped."""
        config, accelerator = self.config, self.accelerator
        parts = config.gradient_accumulation_steps
        trained = [self.models[component] for component in self.adapted]
        passes: list[tuple[Batch, torch.Tensor]] = []
        self.set_training(True)
        for part in range(parts):
            batch = self.batches.batch(self.step * parts + part).to(accelerator.device)
            with accelerator.accumulate(*trained):
                loss = self.loss(batch)
                accelerator.backward(loss)
            passes.append((batch, loss.detach()))
        average_gradients(self.parameters, accelerator)
        # the mean over all processes, so that all of them go the same way below
        mean: Any = accelerator.reduce(torch.stack([loss for _, loss in passes]).mean(), "mean")
        accelerator.unscale_gradients()
        norm = gradient_norm(self.parameters).to(mean)
        value, size = torch.stack([mean, norm]).tolist()
        reason = self._trouble(value, size, passes)
        if config.max_grad_norm and _is_finite(size):
            nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        if reason is None or accelerator.scaler is not None:  # which skips by itself and adapts its scale
            self.optimizer.step()
        if reason is None and self.optimizer.step_was_skipped:
            reason = f"step {self.step + 1}: the gradient overflows float16; the loss is scaled less from here on"
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.step += 1
        if reason is not None:
            self.skipped.append(SkippedStep(self.step, reason))
            steps = [skipped.step for skipped in self.skipped[-MOST_SKIPPED:]]
            if len(steps) == MOST_SKIPPED and steps[0] == self.step - MOST_SKIPPED + 1:
                raise AdapterError(f"the last {MOST_SKIPPED} steps were skipped; {reason}. {_ADVICE}")
            return None
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.losses.append(value)
        return value

    def _trouble(self, loss: float, norm: float, passes: Sequence[tuple[Batch, torch.Tensor]]) -> str | None:
        """What is not finite in a step, or None; raises where such a step ends the run."""
        finite = _is_finite(loss)
        if finite and (_is_finite(norm) or self.accelerator.scaler is not None):
            return None
        if finite:
            where = ", ".join(nonfinite_gradients(self.adapted)[:3])
            reason = f"step {self.step + 1}: the gradient is {norm}, of {where}"
        else:
            bad = next((batch for batch, part in passes if not _is_finite(part.item())), passes[-1][0])
            module = self._origin(lambda: self.loss(bad))
            where = f"; it begins in {module}" if module else ""
            reason = f"step {self.step + 1}: the training loss is {loss}{where}"
        if self.config.on_nonfinite == "stop":
            raise AdapterError(f"{reason}. {_ADVICE}")
        return reason

    def _origin(self, forward: Callable[[], Any]) -> str | None:
        """The module in which values stop being finite in a forward pass, run uncompiled: hooks do not run inside graphs."""
        models = self.models
        self.models = {name: model._modules.get("_orig_mod") or model for name, model in models.items()}
        try:
            return first_nonfinite_module(self.models, forward)
        finally:
            self.models = models

    def _on_any_process(self, wish: bool) -> bool:
        """Whether one of the processes wishes it: they have to stop after the same step."""
        if self.accelerator.num_processes == 1:
            return wish
        wishes: Any = self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device), "sum")
        return wishes.item() > 0

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, subject and class together."""
        losses = self.sample_losses(batch)
        weights = self.objective.weights(batch.timesteps)
        return dreambooth_loss(losses, weights, batch.instances, self.config.prior_loss_weight)

    def sample_losses(self, batch: Batch) -> torch.Tensor:
        """Return the squared error of every sample of a batch, `(batch,)`."""
        device, dtype = self.accelerator.device, self.family.dtype
        encoded = self.data.prompts.conditioning(self.models, batch.captions, device)
        conditioning = {name: _to(value, dtype) for name, value in (encoded | batch.sizes).items()}
        noisy = self.objective.noised(batch.latents, batch.noise, batch.timesteps)
        target = self.objective.target(batch.latents, batch.noise, batch.timesteps)
        prediction = self.family.predict(self.models[self.family.denoiser], noisy.to(dtype), batch.timesteps, conditioning)
        return sample_losses(prediction, target, batch.masks)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss over the same noise and noise levels at every call, with the weights that are saved.

        Raises:
            AdapterError: it is not finite.
        """
        config = self.config
        seed = config.seed + HELD_OUT_SEED
        batches = held_out_batches(
            self.family, self.objective, self.data.instances, config.held_out_samples, config.train_batch_size, seed
        )
        with self.saved_weights():
            total = sum(self.sample_losses(batch.to(self.accelerator.device)).sum().item() for batch in batches)
        if not _is_finite(total):
            module = self._origin(lambda: self.sample_losses(batches[0].to(self.accelerator.device)))
            raise AdapterError(f"the held-out loss is {total}{f'; it begins in {module}' if module else ''}. {_ADVICE}")
        return total / config.held_out_samples

    # --- around the steps ----------------------------------------------------------------------------------------------
    def set_training(self, mode: bool) -> None:
        """Switch dropout of the adapted components."""
        for component in self.adapted:
            self.models[component].train(mode)

    @contextmanager
    def saved_weights(self) -> Iterator[None]:
        """The weights that are saved and drawn with, in evaluation mode: averaged where the settings ask for it."""
        self.set_training(False)
        with optimizer_eval(self.optimizer.optimizer):
            if self.ema is None:
                yield
                return
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            try:
                yield
            finally:
                self.ema.restore(self.parameters)

    @property
    def preview_folder(self) -> Path:
        """Where previews go."""
        return self.config.output / PREVIEWS

    def draw(self) -> None:
        """Draw the previews of this step."""
        if self.config.preview_prompts and self.accelerator.is_main_process:
            with self.saved_weights():
                self.previews += draw_previews(self.family.pipe, self.config, self.preview_folder, self.step)
        self.accelerator.wait_for_everyone()

    def log(self, loss: float) -> None:
        """Tell the trackers about a step."""
        if self.accelerator.trackers:
            rates = {f"lr/{group.get('name', i)}": group["lr"] for i, group in enumerate(self.optimizer.param_groups)}
            self.accelerator.log({"loss": loss, **rates}, step=self.step)

    # --- checkpoints ---------------------------------------------------------------------------------------------------
    def save(self) -> Path:
        """Write a checkpoint, complete or not at all."""
        check_finite_adapters(self.adapted)

        def export(folder: Path) -> None:
            with self.saved_weights():
                for component, model in self.adapted.items():
                    model.save_pretrained(folder / component)

        state = self.state()  # on every process: each has random states of its own
        path = self.checkpoints.place_of(self.step)
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, state, export)
        self.accelerator.wait_for_everyone()
        return path

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "step": self.step,
            "losses": list(self.losses),
            "skipped": [vars(skipped) for skipped in self.skipped],
            "held_out_before": self.held_out_before,
            "adapters": {component: trained_tensors(model) for component, model in self.adapted.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "rng": gather_object([rng_state()]),
            "previews": [path.name for path in self.previews],
            **self.identity(),
        }

    def identity(self) -> dict[str, Any]:
        """Return what has to be the same in a run that goes on from a checkpoint."""
        return {
            "settings": self.config.to_dict(),
            "data": self.data.digest,
            "base": self.base_digest,
            "train_batch_size x processes": self.config.train_batch_size * self.accelerator.num_processes,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            AdapterError: it is of another run: other settings, data, base or modules.
        """
        check_same_run(state, self.identity())
        for component, model in self.adapted.items():
            put_trained_tensors(model, state["adapters"][component])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
        self.losses = list(state["losses"])
        self.skipped = [SkippedStep(**skipped) for skipped in state["skipped"]]
        self.held_out_before = state["held_out_before"]
        if list(state["settings"]["preview_prompts"]) == list(self.config.preview_prompts):  # else they show other prompts
            places = [self.preview_folder / name for name in state["previews"]]
            self.previews = [path for path in places if path.is_file()]
        place = self.accelerator.process_index, self.accelerator.num_processes
        go_on_randomly(state["rng"], *place, f"{self.config.seed} {self.step}")

    def finish(self) -> None:
        """Leave the weights that are to be saved in the adapters, in evaluation mode."""
        self.set_training(False)
        if hasattr(self.optimizer.optimizer, "eval"):
            self.optimizer.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)


def checkpoints_of(config: DreamBoothConfig) -> Checkpoints:
    """Return the checkpoints of a run."""
    return Checkpoints(config.output / "checkpoints", config.checkpoint_limit)


_ADVICE = "Lower the learning rate, or load the base in float32 and train with mixed_precision 'no' or 'bf16'"


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _is_finite(value: float) -> bool:
    return value - value == 0


def _to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value
