"""One batch of pictures with other adapters for each."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import AdapterError
from ..per_sample import samples_with
from .components import models_of


@contextlib.contextmanager
def adapters_per_sample(pipe: Any, adapter_names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Inside, every picture of one batch is drawn with adapters of its own, at the weights that are set.

    Each comes out as in a batch of its own, to float rounding; adapters need not be active. The base model runs once for all.

    Args:
        pipe: a pipeline with adapters; call it with a list of as many prompts.
        adapter_names: for every picture an adapter's name, several names, or None for the base model alone.

    Raises:
        AdapterError: as `lycoris_diff.per_sample.samples_with`: no entries, an unknown name, fused adapters, adapters with
            whole modules of their own; inside also a call for another number of pictures, and one with
            ``num_images_per_prompt`` above 1 where text encoders have adapters.
    """
    with samples_with(list(models_of(pipe).values()), adapter_names), _pictures_counted(pipe, len(adapter_names)):
        yield


@contextlib.contextmanager
def _pictures_counted(pipe: Any, count: int) -> Iterator[None]:
    """Inside, the pipeline refuses calls for another number of pictures: its models see batches, not what these are made of."""
    cls = type(pipe)
    if not isinstance(pipe, DiffusionPipeline):
        yield
        return

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(cls.__call__).bind(self, *args, **kwargs)
        given.apply_defaults()
        prompt, embeds = given.arguments.get("prompt"), given.arguments.get("prompt_embeds")
        prompts = 1 if isinstance(prompt, str) else len(prompt) if prompt is not None else 0 if embeds is None else len(embeds)
        each = given.arguments.get("num_images_per_prompt") or given.arguments.get("num_videos_per_prompt") or 1
        if prompts and prompts * each != count:
            raise AdapterError(
                f"adapters were given for {count} pictures, and {prompts * each} are to be drawn ({prompts} prompts, {each} of "
                "each); expected an entry for every picture"
            )
        return cls.__call__(self, *args, **kwargs)

    pipe.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__})
    try:
        yield
    finally:
        pipe.__class__ = cls
