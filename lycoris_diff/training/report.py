"""What a training run tells while it runs and when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
class TrainReport:
    """The outcome of `train_dreambooth`.

    Attributes:
        losses: training loss of every optimizer step.
        held_out_before: loss on fixed noise and timesteps before the first step.
        held_out_after: the same after the last step.
        seconds_per_step: wall-clock time of an optimizer step, on average.
        parameters: trained values by component.
        bytes: size of the adapter's weight files on disk by component.
        paths: directory of the saved adapter by component.
        images: how many pictures were trained on.
    """

    losses: list[float]
    held_out_before: float
    held_out_after: float
    seconds_per_step: float
    parameters: dict[str, int]
    bytes: dict[str, int]
    paths: dict[str, Path]
    images: int

    @property
    def improved(self) -> bool:
        """Whether the held-out loss fell."""
        return self.held_out_after < self.held_out_before

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        plain = dict(self.__dict__)
        plain["paths"] = {component: str(path) for component, path in self.paths.items()}
        return plain | {"improved": self.improved}
