"""PEFT's layers and ours in one model.

PEFT wraps layers it recognises by their class and unwraps down to the innermost ``base_layer``. So ours always stand innermost,
inside PEFT's, and step aside while PEFT or diffusers rebuild a model: for the length of such a call every layer of ours is
replaced by its base layer, merged ones taken out, and afterwards put around the same base layer again, wherever that is now.

Models and pipelines that carry our adapters get the methods below as attributes of their own; they go with the last adapter.
PEFT is not imported here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..bookkeeping import adapted_layers
from ..errors import AdapterError
from ..injection import replace_modules
from ..layers.layer import AdaptedLayer
from .components import adapter_names, models_of
from .offload import regroup

#: methods of diffusers' and transformers' models in which PEFT rebuilds or writes into layers
MODEL_METHODS = (
    "load_lora_adapter", "unload_lora", "add_adapter", "load_adapter", "delete_adapters", "delete_adapter", "fuse_lora",
    "unfuse_lora", "fuse_qkv_projections",
)  # fmt: skip
#: those among them that cannot go on without our layers
_REFUSED = ("fuse_qkv_projections",)
#: the same of pipelines
PIPELINE_METHODS = ("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "delete_adapters")


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no layers of ours and none of our adapters in its weights."""
    layers = [layer for _, layer in adapted_layers(model)]
    merged = {layer: layer.held for layer in layers if layer.held}
    for layer in layers:
        layer.unmerge()
    replace_modules(model, {layer: layer.base_layer for layer in layers})
    try:
        yield
    finally:
        replace_modules(model, {layer.base_layer: layer for layer in layers})
        for layer, names in merged.items():
            layer.merge(names)
        if layers:
            regroup({"": model})


@contextmanager
def all_aside(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """`aside` for several models."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(aside(model))
        yield


def guard(owner: Any, methods: tuple[str, ...]) -> None:
    """Have methods of a model or pipeline run with our layers aside."""
    for name in methods:
        original = getattr(type(owner), name, None)
        if original is not None and name not in vars(owner):
            vars(owner)[name] = types.MethodType(_wrapped(original), owner)


def unguard(owner: Any, methods: tuple[str, ...]) -> None:
    """Take the methods of `guard` away."""
    for name in methods:
        found = vars(owner).get(name)
        if getattr(getattr(found, "__func__", None), "_steps_aside", False):
            del vars(owner)[name]


def has_peft(models: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT has put adapters into one of the models."""
    return any(getattr(m, "peft_config", None) and not isinstance(m, AdaptedLayer) for m in models.values())


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # asked for anew: a copy of the pipeline has models of its own
        models = {"": self} if isinstance(self, nn.Module) else models_of(self)
        name = kwargs.get("adapter_name")
        if original.__name__.startswith("load_lora") and name in adapter_names(models):
            raise AdapterError(f"adapter name {name!r} is taken; delete_adapter() the one that has it, or choose another name")
        with all_aside(models):
            return original(self, *args, **kwargs)

    method._steps_aside = True  # type: ignore[attr-defined]
    return method if original.__name__ not in _REFUSED else _refused(method)


def _refused(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AdapterError(
            f"{original.__name__} copies weights without their adapters, which would have no effect; write them in for good "
            "with merge_adapters() first, or unload them"
        )

    return method
