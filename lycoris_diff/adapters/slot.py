"""Slot: room for changing contents, of several algorithms and of ranks up to a limit, whose tensors stay the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import Adapter
from .combined import Combined, CombinedConfig
from .config import AdapterConfig

#: fields that every config has, that only matter in training, or that the factors' shapes tell
_COMMON = {f.name for f in fields(AdapterConfig)}
_TRAINING = {"alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "lora_dropout", "miss_dropout", "bias"}
_SIZES = {"oft_block_size"}
#: fields that choose factors' names and shapes, which are compared themselves
_SHAPING = {"use_effective_conv2d", "weight_decompose", "dora_axis", "decompose_both", "decompose_factor", "full_matrix"}
_SHAPING |= {"use_rslora", "random_seed", "mask_type", "fan_in_fan_out"}


def options_of(config: AdapterConfig) -> dict[str, Any]:
    """The fields of a config that say what its factors mean, where they are not the default."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _COMMON | _TRAINING | _SIZES}
    options = {k: v for k, v in own.items() if k in defaults and v != defaults[k]}
    if config.init_weights in ("bat", "mini"):
        options["init_weights"] = config.init_weights
    return options


@dataclass(init=False)
class SlotConfig(CombinedConfig):
    """Configuration of a slot: its parts, and 1 for those that hold something."""

    peft_name: ClassVar[str] = "SLOT"


class Slot(Combined):
    """Parts of fixed shapes that contents are copied into, padded with zeros, their strengths in tensors.

    All parts run in compiled code, empty ones with strength 0, so that new contents need no recompilation. Elsewhere only
    those that hold something run.
    """

    config_class = SlotConfig
    pinned = True

    @classmethod
    def around(cls, parts: Sequence[Adapter]) -> Slot:
        """An empty slot with these parts, which it takes copies of."""
        slot: Any = cls.of(SlotConfig(weights=[0.0] * len(parts)), dict(enumerate(parts)))
        slot.on = True
        for _, part in slot._parts():
            del part.scaling  # trained strengths differ between contents: a tensor instead of a number
            part.register_buffer("scaling", torch.ones_like(part.strength), persistent=False)
        slot.fill([])
        return slot

    on: bool

    def in_use(self) -> list[Adapter]:
        return [part for index, part in self._parts() if self.config.weights[index]]  # type: ignore[attr-defined]

    @property
    def idle(self) -> bool:
        return not self.on or super().idle or not any(self.config.weights)  # type: ignore[attr-defined]

    def switch(self, on: bool) -> None:
        self.on = on
        self.set_strength(self.get_strength())

    def set_strength(self, value: float) -> None:
        Adapter.set_strength(self, value)
        for index, part in self._parts():
            part.set_strength(value * self.config.weights[index] * getattr(self, "on", True))  # type: ignore[attr-defined]

    def members(self, exact: bool = False) -> list[tuple[Adapter, dict[str, Tensor]]]:
        found = super().members(exact)
        return found if torch.compiler.is_compiling() else [(part, f) for part, f in found if not part.idle]

    def places(self, contents: Sequence[Adapter]) -> list[int]:
        """Return the index of a part for every content.

        Raises:
            AdapterError: one has none.
        """
        free, found = dict(self._parts()), []
        for content in contents:
            index = next((i for i, part in free.items() if alike(part, content) and _holds(part, content)), None)
            if index is None:
                raise AdapterError(
                    f"there is no room for {_named(content)}; prepared: {', '.join(_named(p) for _, p in self._parts())}"
                )
            found.append(index)
            del free[index]
        return found

    @torch.no_grad()
    def fill(self, contents: Sequence[Adapter]) -> None:
        """Hold these adapters, and nothing else.

        Raises:
            AdapterError: there is no part for one of them; nothing has changed then.
        """
        found = dict(zip(self.places(contents), contents, strict=True))
        for index, part in self._parts():
            content = found.get(index)
            self.config.weights[index] = float(content is not None)  # type: ignore[attr-defined]
            _write(part, content)
        self.set_strength(self.get_strength())


def alike(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters differ in nothing but values and the sizes that padding evens out."""
    if type(one) is not type(other) or one.factor_shapes.keys() != other.factor_shapes.keys():
        return False
    theirs, ours = options_of(other.config), options_of(one.config)
    if {k: v for k, v in ours.items() if k not in _SHAPING} != {k: v for k, v in theirs.items() if k not in _SHAPING}:
        return False
    axes = one.rank_axes(one.factor_shapes)
    for name, shape in one.factor_shapes.items():
        pairs = enumerate(zip(shape, other.factor_shapes[name], strict=False))
        same = len(shape) == len(other.factor_shapes[name])
        if not same or any(a != b for axis, (a, b) in pairs if axis not in axes.get(name, ())):
            return False
    return True


def larger(part: Adapter, content: Adapter) -> Adapter:
    """An adapter of zeros in which both of two that are alike have room."""
    shapes = {name: _longest(shape, content.factor_shapes[name]) for name, shape in part.factor_shapes.items()}
    return blank(part, shapes)


def blank(like: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """An adapter of the same kind with factors of zeros, ready for inference.

    Raises:
        AdapterError: it keeps more of its contents than factors, so that they cannot be exchanged.
    """
    if type(like).settle is not Adapter.settle:
        raise AdapterError(f"{_named(like)} keeps more than its factors; it cannot be hot-swapped")
    config = copy.copy(like.config)
    with torch.device("meta"):
        adapter = type(like)(like.geometry, config, shapes)
    for name in shapes:
        value = like.get_tensor(name)
        adapter.add_factor(name, torch.zeros(shapes[name], dtype=value.dtype, device=value.device))
    adapter.register_buffer("strength", torch.ones_like(like.strength), persistent=False)
    adapter.requires_grad_(False)
    return adapter


def _longest(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(a, b) for a, b in zip(one, other, strict=True))


def _holds(part: Adapter, content: Adapter) -> bool:
    return all(_longest(shape, content.factor_shapes[name]) == tuple(shape) for name, shape in part.factor_shapes.items())


def _write(part: Adapter, content: Adapter | None) -> None:
    exact: dict[str, Tensor] = {}
    for name in part.factor_shapes:
        held = part.get_tensor(name)
        held.zero_()
        if content is not None:
            _corner(held, content.factor_shapes[name]).copy_(content.get_tensor(name))
            if name in content._exact:
                value = content._exact[name][0]
                exact[name] = value.new_zeros(held.shape)
                _corner(exact[name], value.shape).copy_(value)
    part.keep_exact(exact)
    scaling: Any = part.scaling
    scaling.fill_(0.0 if content is None else content.scaling)


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _named(adapter: Adapter) -> str:
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in adapter.factor_shapes.items())
    options = "".join(f", {k}={v!r}" for k, v in options_of(adapter.config).items() if k not in _SHAPING)
    return f"{type(adapter).__name__} ({shapes}{options})"
