"""Which of the processes that train together this is."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Return accelerate's view of the processes, the same before an `Accelerator` is made as after.

    `accelerate launch --cpu` says so in an environment variable that `Accelerator` reads and `PartialState` does not; whoever
    comes first decides, and the processes would not know of each other.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
