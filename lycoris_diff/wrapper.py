"""A wrapper that passes for the model inside: its class for isinstance, its attributes, its forward signature."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any

from torch import nn

from .errors import AdapterError


class TransparentWrapper(nn.Module):
    """Holds a model as ``model``. Pipelines and trainers that look at class, attributes or signature see that model.

    Args:
        model: the model inside.

    Raises:
        AdapterError: it is no module, or a wrapper itself.
    """

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> TransparentWrapper:
        if model is None and cls.__dict__.get("_generated"):  # torch's DataParallel makes replicas without arguments
            return super().__new__(cls)
        if not isinstance(model, nn.Module):
            raise AdapterError(f"expected a torch module as the model, got {type(model).__name__}: {model!r}")
        return super().__new__(_with_signature(cls, type(model)))  # type: ignore[arg-type]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        # diffusers notes a component's class and library by its class and this
        self.__dict__["__module__"] = type(model).__module__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The inner model's class, so that isinstance checks hold; ``type()`` tells the truth."""
        model = self.__dict__.get("_modules", {}).get("model")
        return type(self) if model is None else type(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    def __reduce__(self) -> Any:
        wrapper = next(c for c in type(self).__mro__ if not c.__dict__.get("_generated"))
        return _rebuild, (wrapper, type(self.model)), self.__dict__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def _get_name(self) -> str:
        return type(self).__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the inner model returns."""
        return self._invoke(*args, **kwargs)

    def _invoke(self, *args: Any, **kwargs: Any) -> Any:
        """Run the inner model; subclasses may take arguments of their own out before."""
        return self.model(*args, **kwargs)


@functools.cache
def _with_signature(wrapper: type, base: Any) -> type:
    """Subclass of a wrapper whose forward shows the inner model's signature (trainers look at it)."""
    if wrapper.__dict__.get("_generated"):
        return wrapper

    def forward(self: TransparentWrapper, *args: Any, **kwargs: Any) -> Any:
        return self._invoke(*args, **kwargs)

    forward.__doc__ = base.forward.__doc__
    with contextlib.suppress(TypeError, ValueError):  # a builtin forward has no signature to show
        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    names = {"forward": forward, "_generated": True, "__doc__": wrapper.__doc__, "__module__": wrapper.__module__}
    return types.new_class(wrapper.__name__, (wrapper,), exec_body=lambda namespace: namespace.update(names))


def _rebuild(wrapper: type, base: type) -> TransparentWrapper:
    return nn.Module.__new__(_with_signature(wrapper, base))
