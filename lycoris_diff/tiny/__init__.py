"""The embedded base model: a Stable Diffusion 1.x pipeline in miniature, and pictures to train it on."""

from .pipeline import build_pipeline, load_pipeline, save_pipeline
from .subject import draw_subject, draw_subject_images

__all__ = ["build_pipeline", "draw_subject", "draw_subject_images", "load_pipeline", "save_pipeline"]
