"""What decoders of an algorithm's factors share: the result, what they may go by besides shapes, and checks of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from ..adapters.config import AdapterConfig
from ..errors import CheckpointError

Roles = Mapping[str, Tensor]


@dataclass
class Draft:
    """Factors of one algorithm, without their strength.

    Attributes:
        algorithm, tensors, rank, options: as in `Entry`.
        out: output rows of the weight. columns: input channels times kernel taps; both 0 when they do not matter.
        channels: input channels, 0 when the factors do not tell.
        axes: axes of the weight, 0 when the factors do not tell.
        has_kernel: it is for a convolution with more than one tap, as far as the factors tell.
        remark: a choice that the report should mention.
    """

    algorithm: str
    tensors: dict[str, Tensor]
    rank: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    out: int = 0
    columns: int = 0
    channels: int = 0
    axes: int = 0
    has_kernel: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Hints:
    """What other parts of a file say about a module.

    Attributes:
        old_glora: the file's other modules have GLoRA's factors in the old order; None when none of them tells.
        config: of the layer, None without one.
        sig_type, use_data_init: T-LoRA's start, from the metadata.
        alpha: of the module, None without one.
    """

    old_glora: bool | None = None
    config: AdapterConfig | None = None
    sig_type: str | None = None
    use_data_init: bool = True
    alpha: float | None = None


# --- shapes ----------------------------------------------------------------------------------------------------------------
def need(t: Roles, algorithm: str, *roles: str) -> list[Tensor]:
    """Factors that must be there.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for role in roles:
        if role not in t:
            raise CheckpointError(f"{algorithm}: factor {role!r} is missing; found {', '.join(sorted(t))}")
    return [t[role] for role in roles]


def matrix(value: Tensor, what: str) -> Tensor:
    """A factor without the axes of size one that some writers append."""
    if value.dim() < 2 or prod(value.shape[2:]) != 1:
        raise CheckpointError(f"{what} has shape {tuple(value.shape)}; expected two axes, further ones of size one")
    return value.reshape(value.shape[:2])


def flat(value: Tensor, what: str) -> Tensor:
    """A factor with its kernel axes folded into its columns."""
    if value.dim() < 2:
        raise CheckpointError(f"{what} has shape {tuple(value.shape)}; expected at least two axes")
    return value.flatten(1)


def core(value: Tensor, rank: int, what: str) -> Tensor:
    """A Tucker core; one with a single kernel axis gets the second axis that PEFT's files have."""
    if not 3 <= value.dim() <= 5 or tuple(value.shape[:2]) != (rank, rank):
        raise CheckpointError(f"{what} has shape {tuple(value.shape)}; expected ({rank}, {rank}, *kernel)")
    return value.unsqueeze(-1) if value.dim() == 3 else value


def same(algorithm: str, what: str, *sizes: int) -> int:
    """The size that several factors share.

    Raises:
        CheckpointError: they differ.
    """
    if len(set(sizes)) > 1:
        raise CheckpointError(f"{algorithm}: the factors' {what}s differ: {', '.join(map(str, sizes))}")
    return sizes[0]


def trailing(value: Tensor, axes: int) -> Tensor:
    """A factor with axes of size one appended."""
    return value.reshape(*value.shape, *(1,) * (axes - value.dim()))


def from_config(config: AdapterConfig | None, algorithm: str, *names: str) -> dict[str, Any]:
    """Options that no tensor tells, where a config of the algorithm sets them to something else than usual."""
    if config is None or config.peft_name != algorithm:
        return {}
    usual = type(config)()
    return {name: value for name in names if (value := getattr(config, name)) != getattr(usual, name)}


def vector(value: Tensor, what: str) -> Tensor:
    """A factor with a single axis, axes of size one dropped."""
    if value.numel() != max(value.shape, default=0):
        raise CheckpointError(f"{what} has shape {tuple(value.shape)}; expected one axis, others of size one")
    return value.reshape(-1)
