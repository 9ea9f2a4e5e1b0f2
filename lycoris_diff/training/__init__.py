"""Training of adapters from pictures, on top of accelerate."""

from .config import DreamBoothConfig
from .dreambooth import train_dreambooth
from .loading import load_trained
from .report import TrainReport, TrainStep

__all__ = ["DreamBoothConfig", "TrainReport", "TrainStep", "load_trained", "train_dreambooth"]
