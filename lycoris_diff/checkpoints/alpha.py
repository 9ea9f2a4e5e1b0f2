"""The trained strength of a module: one resolver for all formats, from an ordered list of what a file says.

A PEFT config decides for its directory. Elsewhere the module's own tensors come first (``scale`` before ``alpha``), then
the metadata that diffusers writes; with none of them the strength is 1. What a trainer's metadata says beside that is
compared and, where it differs, noted; no reader goes by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError

#: half precision rounds alphas by up to 0.4 %
_TOLERANCE = 0.01
#: alpha / rank beyond this is no trainer's choice, but has one effect in all readers
_HUGE = 1000.0
#: algorithms whose strength is alpha / rank; all others have none, or use alpha for something else
SCALED = frozenset({"LORA", "LOHA", "LOKR", "GLORA", "TLORA"})


class Claim(NamedTuple):
    """What one source says.

    Attributes:
        source: "config", "tensor" or "metadata".
        value: alpha, to be divided by the rank, or the strength itself.
        is_strength: it is the strength itself.
        alpha: the alpha behind a strength, None when there is none.
    """

    source: str
    value: float
    is_strength: bool = False
    alpha: float | None = None


class Strength(NamedTuple):
    """The outcome: what `Entry` keeps of it."""

    scale: float
    alpha: float | None
    source: str


@dataclass
class Notes:
    """Remarks on a file; the same remark on many modules is one line."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, module: str = "") -> None:
        """Remember a remark, on a module or on the whole file."""
        modules = self.found.setdefault(text, [])
        if module:
            modules.append(module)

    def lines(self) -> list[str]:
        """All remarks, with the number of modules and the first of them."""
        return [text + (f" ({len(m)} modules, first {m[0]!r})" if m else "") for text, m in self.found.items()]


def resolve(
    algorithm: str,
    rank: int,
    claims: Sequence[Claim],
    notes: Notes,
    module: str = "",
    zero_is_rank: bool = True,
    both_full: bool = False,
) -> Strength:
    """The strength of a module as trained.

    Args:
        algorithm: name in the registry of adapters.
        rank: of the factors, by which an alpha is divided.
        claims: sources in the order of precedence; the first decides, the others are compared with it.
        notes: where conflicts and choices go.
        module: name for the notes.
        zero_is_rank: an alpha of 0 means the rank (kohya, LyCORIS) instead of nothing at all.
        both_full: a LoKr without low-rank halves: an alpha in a tensor means nothing, whatever it is, since trainers write the
            rank, a placeholder or infinity.

    Raises:
        CheckpointError: the deciding value is not finite.
    """
    if algorithm not in SCALED:
        said = next((c.value for c in claims if not c.is_strength), None)
        return Strength(1.0, said, "none" if said is None else "ignored")
    if both_full:
        ignored = next((c.value for c in claims if not c.is_strength), None)
        claims = [c for c in claims if c.is_strength]
        if not claims:
            return Strength(1.0, ignored, "default" if ignored is None else "ignored")
    if not claims:
        return Strength(1.0, None, "default")
    first = claims[0]
    if not math.isfinite(first.value):
        raise CheckpointError(f"{'strength' if first.is_strength else 'alpha'} is {first.value}; expected a finite number")
    scale = _strength(first, rank, zero_is_rank)
    if first.value == 0 and not first.is_strength:
        meaning = f"the rank, as the trainers of such files mean it: strength {scale:g}" if zero_is_rank else "no effect at all"
        notes.add(f"an alpha of 0 is read as {meaning}", module)
    if abs(scale) > _HUGE:
        notes.add(f"alpha {first.value:g} over rank {rank} is a strength of {scale:g}; such a file is probably damaged", module)
    for other in claims[1:]:
        theirs = _strength(other, rank, zero_is_rank)
        if not _close(scale, theirs):
            notes.add(
                f"{first.source} and {other.source} disagree about the strength, {scale:g} and {theirs:g}; the first counts",
                module,
            )
    return Strength(scale, first.alpha if first.is_strength else first.value, first.source)


def scalar(value: Tensor, what: str) -> float:
    """The number in a tensor of any type with one element, whatever its axes.

    Raises:
        CheckpointError: it has more or fewer elements.
    """
    if value.numel() != 1:
        raise CheckpointError(f"{what} has shape {tuple(value.shape)}; expected a single number")
    return float(value.item())


def _strength(claim: Claim, rank: int, zero_is_rank: bool) -> float:
    if claim.is_strength:
        return claim.value
    return 1.0 if claim.value == 0 and zero_is_rank else claim.value / rank


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


# --- what trainers say about their run -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainingArgs:
    """Settings of the training run from the metadata, None where it does not say.

    Attributes:
        alpha, dim: of linear layers. conv_alpha, conv_dim: of convolutions with a kernel.
        rs_lora: strengths were alpha / sqrt(rank).
        dylora_block: ranks in a block of DyLoRA, 0 for other algorithms.
        sig_type, use_data_init: of T-LoRA.
    """

    alpha: float | None = None
    dim: float | None = None
    conv_alpha: float | None = None
    conv_dim: float | None = None
    rs_lora: bool = False
    dylora_block: int = 0
    sig_type: str | None = None
    use_data_init: bool = True


def training_args(metadata: Mapping[str, str]) -> TrainingArgs:
    """What sd-scripts, musubi-tuner, LyCORIS and SimpleTuner write about a run; unreadable values count as unsaid."""
    args = {**json_object(metadata.get("lycoris_config", "")), **json_object(metadata.get("ss_network_args", ""))}
    alpha, dim = _number(metadata.get("ss_network_alpha")), _number(metadata.get("ss_network_dim"))
    return TrainingArgs(
        alpha=_number(args.get("linear_alpha")) if alpha is None else alpha,
        dim=_number(args.get("linear_dim")) if dim is None else dim,
        conv_alpha=_number(args.get("conv_alpha")),
        conv_dim=_number(args.get("conv_dim")),
        rs_lora=_truth(args.get("rs_lora", False)),
        dylora_block=int(_number(args.get("block_size")) or 4) if str(args.get("algo")).lower() == "dylora" else 0,
        sig_type=str(args["sig_type"]) if args.get("sig_type") else None,
        use_data_init=_truth(args.get("use_data_init", True)),
    )


def compare(
    args: TrainingArgs, algorithm: str, rank: int, has_kernel: bool, found: Strength, notes: Notes, module: str
) -> None:
    """Note where a module's strength is not what the run's settings make of its rank."""
    alpha, dim = (args.conv_alpha, args.conv_dim) if has_kernel else (args.alpha, args.dim)
    if algorithm == "GLORA" and args.rs_lora:
        notes.add("GLoRA trained with rs_lora: the file has lost a factor sqrt(rank); raise the weight by it", module)
    elif algorithm == "LOKR" and found.source == "ignored" and args.rs_lora:
        notes.add("LoKr with full halves trained with rs_lora: its file may have lost a factor sqrt(rank)", module)
    if algorithm == "LORA" and args.dylora_block > 1:
        size = args.dylora_block
        notes.add(
            f"LyCORIS trains DyLoRA {size} times as strong as its files are read, by everybody; raise the weight by it", module
        )
    if not alpha or not dim or dim != rank or found.source not in ("tensor", "default"):
        return
    # rs_lora is folded into the alpha that is stored
    expected = {alpha / rank, alpha / math.sqrt(rank)} if args.rs_lora else {alpha / rank}
    if not any(_close(found.scale, e) for e in expected):
        ours = (
            "there is no alpha tensor, so 1 counts"
            if found.source == "default"
            else f"the alpha tensor's {found.scale:g} counts"
        )
        notes.add(f"the metadata's alpha {alpha:g} and rank {rank} mean a strength of {min(expected):g}; {ours}", module)


def json_object(text: str) -> dict[str, Any]:
    """An object from JSON text, empty for anything else."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _truth(value: object) -> bool:
    return str(value).strip().lower() not in ("false", "0", "none", "")
