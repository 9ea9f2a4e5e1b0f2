"""Small community files for the tiny pipelines, with the change of every weight computed apart in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

#: kohya's prefixes of the components of every family
PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
Changes = dict[str, dict[str, Tensor]]


def random(*shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(*shape) * scale


def lora(out: int, inp: int, kernel: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    r, alpha = 3, 2.0
    down, up = random(r, inp, *kernel), random(out, r, *[1] * len(kernel))
    delta = up.double().flatten(1) @ down.double().flatten(1) * (alpha / r)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}, delta.view(out, inp, *kernel)


def lokr(out: int, inp: int, kernel: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    w1, w2 = random(2, 2), random(out // 2, inp // 2, *kernel)
    delta = torch.kron(w1.double().view(2, 2, *[1] * len(kernel)), w2.double())
    # the strength of a LoKr with both halves full is 1, whatever its alpha says
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, delta


def loha(out: int, inp: int, kernel: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    r, alpha, columns = 2, 1.0, inp * int(torch.tensor(kernel).prod()) if kernel else inp
    a1, b1, a2, b2 = random(out, r), random(r, columns), random(out, r), random(r, columns)
    delta = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) * (alpha / r)
    names = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a1, b1, a2, b2)))
    return {**names, "alpha": torch.tensor(alpha)}, delta.view(out, inp, *kernel)


def full(out: int, inp: int, kernel: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    diff = random(out, inp, *kernel, scale=0.1)
    return {"diff": diff}, diff.double()


MAKERS: dict[str, Callable[..., tuple[dict[str, Tensor], Tensor]]] = {"lora": lora, "lokr": lokr, "loha": loha, "full": full}


def even_layers(model: nn.Module, take: Callable[[str], bool] = lambda path: True) -> dict[str, nn.Module]:
    """Linear and convolution layers both of whose sides are even, by path."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and take(p)}
    return {p: m for p, m in layers.items() if not any(n % 2 for n in m.weight.shape[:2])}


def make_file(
    path: Path,
    pipe: Any,
    algorithm: str = "lokr",
    components: Iterable[str] = ("unet",),
    take: Callable[[str], bool] = lambda path: True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    metadata: dict[str, str] | None = None,
) -> Changes:
    """Write a kohya file for many layers of a pipeline; return the change of every weight in float64."""
    tensors: dict[str, Tensor] = {}
    changes: Changes = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component in components:
            for name, layer in even_layers(getattr(pipe, component), take).items():
                out, inp, *kernel = layer.weight.shape
                factors, delta = MAKERS[algorithm](out, inp, tuple(kernel))
                stem = PREFIXES[component] + community(component, name).replace(".", "_")
                changes.setdefault(component, {})[name] = delta * scale
                first = next(k for k in factors if k != "alpha")
                factors[first] = factors[first] * scale
                tensors |= {f"{stem}.{k}": v.to(dtype or v.dtype) for k, v in factors.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata or {})
    return changes


def community(component: str, name: str) -> str:
    """A module's path as community files have it: CLIP's below ``text_model``."""
    clip = component.startswith("text_encoder") and name.startswith("encoder.")
    return f"text_model.{name}" if clip else name


def with_changes(pipe: Any, *weighted: tuple[Changes, float | Callable[[str, str], float]]) -> Any:
    """A copy of a pipeline with changes written into its weights."""
    changed = copy.deepcopy(pipe)
    for changes, weight in weighted:
        for component, layers in changes.items():
            for name, delta in layers.items():
                value = weight(component, name) if callable(weight) else weight
                target = getattr(changed, component).get_submodule(name).weight
                with torch.no_grad():
                    target.copy_((target.double() + value * delta).to(target.dtype))
    return changed
