"""Finding what is not finite: gradients, the module a bad value comes from, and weights before they are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..layers.layer import AdaptedLayer
from ..model import AdapterModel
from .state import named_trained, random_state_kept

SHOWN = 5


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together; nothing is clipped, which would spread a NaN to all of them."""
    norms = [torch.linalg.vector_norm(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def nonfinite_gradients(models: Mapping[str, nn.Module]) -> list[str]:
    """Return the trained parameters whose gradients hold NaN or infinite values, as `"component.path.to.parameter"`."""
    return [
        f"{component}.{name}"
        for component, model in models.items()
        for name, parameter in named_trained(model)
        if parameter.grad is not None and not _finite(parameter.grad)
    ]


def check_finite_adapters(models: Mapping[str, nn.Module]) -> None:
    """Check the trained parameters before they are saved.

    Raises:
        AdapterError: some hold NaN or infinite values; the message names the first ones.
    """
    found = [
        f"{component}.{name}"
        for component, model in models.items()
        for name, parameter in named_trained(model)
        if not _finite(parameter)
    ]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise AdapterError(
            f"not saved: NaN or infinite values in {', '.join(found[:SHOWN])}{more}; lower the learning rate, or train with "
            "mixed_precision 'no' or 'bf16', and continue from the last checkpoint"
        )


def first_nonfinite_module(models: Mapping[str, nn.Module], forward: Callable[[], Any]) -> str | None:
    """Run `forward` once more and return the module in which values stop being finite.

    That is the first to finish with finite inputs and an output that is not: the innermost one, or the layer with its adapters
    taken together. A weight that is not finite counts once its module is used. Runs without gradients; the random state
    afterwards is that before.

    Args:
        models: by component.
        forward: what the failed step called; dropout may draw other values than it did then.

    Returns:
        `"component.path.to.module"`; `"input of component"` where its own inputs are not finite already; None when all
        modules are clean: then it is the loss, or gradients only.
    """
    found: list[str] = []

    def watch_inputs(component: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not found and not _all_finite((args, kwargs)):
                found.append(f"input of {component}")

        return look

    def watch(name: str, deep: bool) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if found:
                return
            broken = not all(_finite(p) for p in module.parameters(recurse=deep))
            if broken or (not _all_finite(output) and _all_finite((args, kwargs))):
                found.append(name)

        return look

    handles = []
    try:
        for component, model in models.items():
            inner = model.get_base_model() if isinstance(model, AdapterModel) else model
            handles.append(inner.register_forward_pre_hook(watch_inputs(component), with_kwargs=True))
            for name, module, deep in _watched(component, inner):
                handles.append(module.register_forward_hook(watch(name, deep), with_kwargs=True))
        with torch.no_grad(), random_state_kept():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watched(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """All modules with their names; adapted layers as a whole, since a hook inside would change how they run."""
    whole = isinstance(module, AdaptedLayer)
    yield name, module, whole
    if not whole:
        for child, inner in module.named_children():
            yield from _watched(f"{name}.{child}", inner)


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return _finite(value) or _is_mask(value)
    if isinstance(value, Mapping):
        return all(_all_finite(item) for item in value.values())
    return all(_all_finite(item) for item in value) if isinstance(value, (list, tuple)) else True


def _is_mask(value: Tensor) -> bool:
    """Whether it is an additive attention mask: 0 where one may look, minus infinity elsewhere."""
    allowed = value == 0
    return bool(allowed.any()) and bool((allowed | torch.isneginf(value)).all())


def _finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; of quantized and integer tensors, which cannot hold such values, always."""
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.itemsize == 1:  # float8, which has no isfinite
        value = value.float()
    return bool(torch.isfinite(value).all())
