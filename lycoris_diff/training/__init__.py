"""Training of adapters from pictures, on top of accelerate."""

from .config import DreamBoothConfig
from .dreambooth import plan_dreambooth, train_dreambooth
from .loading import load_trained
from .plan import TrainPlan
from .report import TrainReport, TrainStep

__all__ = [
    "DreamBoothConfig",
    "TrainPlan",
    "TrainReport",
    "TrainStep",
    "load_trained",
    "plan_dreambooth",
    "train_dreambooth",
]
