"""What a training run tells while it runs and when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.pictures import Skipped
    from .sizing import SizeChoice


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step, given to `on_step`.

    Attributes:
        step: number of the step, from 1.
        total: steps of the whole run.
        loss: mean training loss over the step's forward passes.
    """

    step: int
    total: int
    loss: float


@dataclass(frozen=True)
class SkippedStep:
    """A step whose loss or gradient was not finite, and which changed nothing.

    Attributes:
        step: its number.
        reason: what was not finite, and where it began.
    """

    step: int
    reason: str


@dataclass(frozen=True)
class TrainReport:
    """The outcome of `train_dreambooth`.

    Attributes:
        losses: training loss of every optimizer step that was taken.
        held_out_before: loss on fixed noise and timesteps before the first step.
        held_out_after: the same after the last step, with the weights that are saved.
        seconds_per_step: wall-clock time of an optimizer step, on average, previews and checkpoints left out.
        parameters: trained values by component.
        bytes: size of the written adapter files by name.
        paths: what was written: `"kohya"` (the file), a directory a component, `"card"`, `"settings"`.
        images: how many pictures of the subject were trained on.
        skipped_pictures: files that could not be used, with the reason.
        class_images: how many pictures of the class stood beside them.
        generated: how many of those were made by this run.
        resumed_from: the step after which this run went on; 0 for a fresh one.
        skipped_steps: steps that changed nothing.
        previews: pictures drawn during training.
        size: what `target_params` or `target_size` chose.
        uploaded: address of the repository the output went to.
        warnings: what the settings deserve to be asked about.
    """

    losses: list[float]
    held_out_before: float
    held_out_after: float
    seconds_per_step: float
    parameters: dict[str, int]
    bytes: dict[str, int]
    paths: dict[str, Path]
    images: int
    skipped_pictures: tuple[Skipped, ...] = ()
    class_images: int = 0
    generated: int = 0
    resumed_from: int = 0
    skipped_steps: tuple[SkippedStep, ...] = ()
    previews: list[Path] = field(default_factory=list)
    size: SizeChoice | None = None
    uploaded: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        """Whether the held-out loss fell."""
        return self.held_out_after < self.held_out_before

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["paths"] = {name: str(path) for name, path in self.paths.items()}
        plain["previews"] = [str(path) for path in self.previews]
        plain["skipped_pictures"] = [vars(skipped) for skipped in self.skipped_pictures]
        plain["skipped_steps"] = [vars(skipped) for skipped in self.skipped_steps]
        plain["size"] = self.size.to_dict() if self.size else None
        return plain | {"improved": self.improved}
