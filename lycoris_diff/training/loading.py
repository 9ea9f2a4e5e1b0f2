"""Trained adapters put onto a pipeline."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from ..errors import AdapterError
from ..files import CONFIG_NAME
from ..model import AdapterModel


def load_trained(
    pipe: DiffusionPipeline,
    directory: str | PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> list[str]:
    """Load what `train_dreambooth` saved: wraps every component of which `directory` has an adapter.

    Either all components get their adapter or, on an error, none does.

    Args:
        pipe: a pipeline with the base model that was trained on; its components must not be wrapped yet.
        directory: the `output_dir` of the training run, with a sub-directory a component.
        adapter_name: the name of the loaded adapter.
        is_trainable: False loads for inference, frozen.

    Returns:
        The names of the components that were wrapped.

    Raises:
        AdapterError: `directory` holds no component's adapter, or one does not fit the pipeline.
        OSError: a file cannot be opened.
    """
    folder = Path(directory)
    components = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    found = [component for component in components if (folder / component / CONFIG_NAME).is_file()]
    if not found:
        raise AdapterError(f"no trained adapter in {str(folder)!r}; expected a sub-directory {' or '.join(components)}")
    wrapped: list[str] = []
    try:
        for component in found:
            base = getattr(pipe, component)
            model = AdapterModel.from_pretrained(base, folder / component, adapter_name, is_trainable=is_trainable)
            setattr(pipe, component, model)
            wrapped.append(component)
    except (AdapterError, OSError):
        for component in wrapped:
            setattr(pipe, component, getattr(pipe, component).unload())
        raise
    return found
