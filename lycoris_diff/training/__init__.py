"""Training of adapters from pictures, on top of accelerate."""

from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.dreambooth import train_dreambooth
from lycoris_diff.training.loading import load_trained
from lycoris_diff.training.report import TrainReport, TrainStep

__all__ = ["DreamBoothConfig", "TrainReport", "TrainStep", "load_trained", "train_dreambooth"]
