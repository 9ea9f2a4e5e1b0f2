"""From the tensors found under one module's name to its entries: which algorithm, how strong, what adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.config import AdapterConfig
from ..adapters.registry import ADAPTERS
from ..errors import CheckpointError
from .alpha import SCALED, Claim, Notes, Strength, TrainingArgs, compare, resolve, scalar
from .checkpoint import Entry
from .drafts import Draft, Hints
from .factors import DECODERS, sparse
from .lowrank import glora_is_old
from .safety import computable

#: factors that show an algorithm; a group of suffixes without any of them only adds to another one
_SHOWN_BY = {
    "lora": ("up", "down", "mid"),
    "ia3": ("on_input", "ia3_weight"),
    "full": ("diff",),
}
#: tensors that keep their type
_RAW_ROLES = ("shira_indices", "shira_gaps", "bias_indices", "bias_size", "scaled")


@dataclass
class Found:
    """Everything a file holds under one module's name.

    Attributes:
        tensors: group of suffixes -> role -> tensor.
        keys: the file's names by group and role.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)

    def keys_of(self, groups: Iterable[str]) -> list[str]:
        """The file's names of the tensors of some groups."""
        wanted = set(groups)
        return [key for (group, _), key in self.keys.items() if group in wanted]


@dataclass(frozen=True)
class Reading:
    """What holds for a whole file.

    Attributes:
        notes: where choices and conflicts go.
        args: of the training run.
        hints: for the decoders.
        zero_is_rank: an alpha of 0 means the rank.
    """

    notes: Notes
    args: TrainingArgs = field(default_factory=TrainingArgs)
    hints: Hints = field(default_factory=Hints)
    zero_is_rank: bool = True


@dataclass(frozen=True)
class LayerConfig:
    """What a config (PEFT's, or the one diffusers writes into the metadata) says of one layer.

    Attributes:
        config: with patterns resolved.
        source: "config" or "metadata".
    """

    config: AdapterConfig
    source: str


def decode(found: Found, reading: Reading, name: str, layer: LayerConfig | None = None) -> tuple[list[Entry], dict[str, str]]:
    """Entries of one module.

    Args:
        found: its tensors.
        reading: what holds for the file.
        name: of the module, for notes.
        layer: its config.

    Returns:
        Entries whose changes add up, and the tensors that could not be used with the reason. A module of which a needed
        tensor is unusable has no entries and is listed whole.
    """
    try:
        return _decode(found, reading, name, layer)
    except CheckpointError as error:
        return [], dict.fromkeys(found.keys.values(), str(error))


def _decode(found: Found, reading: Reading, name: str, layer: LayerConfig | None) -> tuple[list[Entry], dict[str, str]]:
    groups = {group: _floating(found, group) for group in found.tensors if group != "shared"}
    shared = found.tensors.get("shared", {})
    main, unused = _choose(found, groups, name, reading.notes)
    if main is None and not any(g in groups for g in ("full", "sparse")):
        reason = "there is no factor of an adapter beside it; " + (
            "a parameter that was trained in full replaces the base model's, which an adapter cannot say"
            if {"dense", "ia3"} & groups.keys()
            else "the module's other tensors are missing"
        )
        return [], dict.fromkeys(found.keys.values(), reason)
    claims = _claims(shared, layer)
    entries: list[Entry] = []
    strength = Strength(1.0, None, "none")
    if main is not None:
        alpha = next((c.value for c in claims if c.source == "tensor" and not c.is_strength), None)
        hints = replace(reading.hints, config=None if layer is None else layer.config, alpha=alpha)
        draft = DECODERS[main](groups[main], hints)
        strength = _strength_of(draft, claims, reading, name, layer)
        if draft.remark:
            reading.notes.add(draft.remark, name)
        _decompose(draft, shared, layer)
        entries.append(Entry(draft.algorithm, draft.tensors, strength.scale, draft.rank, *strength[1:], draft.options))
    elif shared.keys() - {"alpha"}:
        raise CheckpointError(f"{', '.join(sorted(shared))} without factors of an adapter to go with")
    more, left = _additions(found, groups, main, strength, entries)
    return entries + more, unused | left


# --- which algorithm -------------------------------------------------------------------------------------------------------
def _floating(found: Found, group: str) -> dict[str, Tensor]:
    """A group's tensors, values as floats that torch can compute with."""
    out = {}
    for role, value in found.tensors[group].items():
        if not value.numel() and role != "scaled":  # a mark
            raise CheckpointError(f"{found.keys[group, role]} has shape {tuple(value.shape)}, which holds nothing")
        if role not in _RAW_ROLES:
            value = computable(value) if value.is_floating_point() else value.to(torch.float32)
        out[role] = value
    return out


def _choose(found: Found, groups: dict[str, dict[str, Tensor]], name: str, notes: Notes) -> tuple[str | None, dict[str, str]]:
    """The algorithm that counts, and the tensors of all others with the reason."""
    shown = [g for g in DECODERS if g in groups and (g not in _SHOWN_BY or any(r in groups[g] for r in _SHOWN_BY[g]))]
    unused: dict[str, str] = {}
    if len(shown) > 1:
        first, *others = shown
        notes.add(f"{' and '.join(shown)} on the same module; {first} counts, as in LyCORIS (ComfyUI takes another one)", name)
        unused = dict.fromkeys(found.keys_of(others), f"the module has a {first} adapter as well, and no program adds them up")
        if "diff_b" in groups.get("full", {}):  # a bias is another parameter
            unused.pop(found.keys["full", "diff_b"], None)
    if "ia3" in groups and "ia3" not in shown and shown:
        unused |= dict.fromkeys(
            found.keys_of(["ia3"]), "a weight that was trained in full beside an adapter on the same module"
        )
    return (shown[0] if shown else None), unused


def file_hints(modules: Iterable[Found], args: TrainingArgs) -> Hints:
    """What modules whose layout is plain tell about those whose layout is not."""
    orders = set()
    for found in modules:
        if "glora" in found.tensors:
            try:
                orders.add(glora_is_old(found.tensors["glora"]))
            except CheckpointError:
                continue
    told = orders - {None}
    return Hints(
        old_glora=told.pop() if len(told) == 1 else None,
        sig_type=args.sig_type,
        use_data_init=args.use_data_init,
    )


# --- how strong ------------------------------------------------------------------------------------------------------------
def _claims(shared: dict[str, Tensor], layer: LayerConfig | None) -> list[Claim]:
    """What is said about the strength, in the order of precedence."""
    tensors = [Claim("tensor", scalar(shared[k], repr(k)), k == "scale") for k in ("scale", "alpha") if k in shared]
    if layer is None:
        return tensors
    config = [Claim(layer.source, layer.config.scaling(), True, getattr(layer.config, "alpha", None))]
    return config + tensors if layer.source == "config" else tensors + config


def _strength_of(draft: Draft, claims: Sequence[Claim], reading: Reading, name: str, layer: LayerConfig | None) -> Strength:
    both_full = draft.algorithm == "LOKR" and not draft.rank
    if layer is not None and (fault := _contradiction(draft, layer.config)):
        if layer.source == "config" or len(claims) < 2:
            raise CheckpointError(fault)
        reading.notes.add(f"{fault}; the tensors count", name)
        claims = [c for c in claims if c.source != layer.source]
    if draft.algorithm in ("DIAG_OFT", "LYCORIS_BOFT"):
        # its alpha is a limit on the rotation
        source = "none" if not claims else claims[0].source
        return Strength(1.0, draft.options["constraint"] if claims else None, source)
    found = resolve(draft.algorithm, draft.rank, claims, reading.notes, name, reading.zero_is_rank, both_full)
    if draft.algorithm in SCALED:
        compare(reading.args, draft.algorithm, draft.rank, draft.has_kernel, found, reading.notes, name)
    return found


def _contradiction(draft: Draft, config: AdapterConfig) -> str:
    """How factors contradict the config, "" when they do not."""
    if config.peft_name and config.peft_name != draft.algorithm:
        return f"the tensors are {draft.algorithm}, the config says {config.peft_name}"
    if draft.rank and draft.algorithm in (*SCALED, "MISS") and config.r != draft.rank:
        return f"the factors have rank {draft.rank}, the config says r={config.r}"
    return ""


# --- DoRA ------------------------------------------------------------------------------------------------------------------
def _decompose(draft: Draft, shared: dict[str, Tensor], layer: LayerConfig | None) -> None:
    """Add the magnitude to a draft."""
    magnitudes = [shared[k] for k in ("dora_scale", "magnitude") if k in shared]
    if not magnitudes:
        if layer is not None and getattr(layer.config, "weight_decompose", False):
            raise CheckpointError("the config says DoRA, but there is no magnitude")
        return
    name = ADAPTERS[draft.algorithm].magnitude_name
    if len(magnitudes) > 1 or not name:
        fault = "two magnitudes" if len(magnitudes) > 1 else f"a DoRA magnitude beside {draft.algorithm}"
        raise CheckpointError(f"{fault}; no program writes that")
    value = magnitudes[0] if magnitudes[0].is_floating_point() else magnitudes[0].float()
    axis = _axis(value, draft, "dora_scale" in shared)
    draft.options |= {"weight_decompose": True, "dora_axis": axis}
    draft.tensors[name] = _magnitude(value, draft, axis)


def _axis(value: Tensor, draft: Draft, by_shape: bool) -> str:
    """Whether a magnitude belongs to output rows or input columns: its shape decides, never the metadata."""
    shape, size = tuple(value.shape), value.numel()
    vector = size > 0 and size == max(shape, default=1)
    first = vector and (len(shape) < 2 or shape[0] == size)
    second = vector and len(shape) > 1 and shape[1] == size
    if size == draft.out and (first or (second and not by_shape)):
        return "out"
    taps_unknown = not draft.channels and len(shape) > 2
    if second and (draft.columns % size == 0 if taps_unknown else size == (draft.channels or draft.columns)):
        return "in"
    if second and size == draft.out:  # PEFT's layout for convolutions under another name
        return "out"
    raise CheckpointError(
        f"a DoRA magnitude of shape {shape} is neither one number for each of {draft.out} rows nor for each input channel"
    )


def _magnitude(value: Tensor, draft: Draft, axis: str) -> Tensor:
    axes = draft.axes or max(value.dim(), 2)
    ones = (1,) * (axes - 2)
    if axis == "in":
        return value.reshape(1, -1, *ones)
    if draft.algorithm == "LORA":
        return value.reshape(1, -1, *ones) if axes > 2 else value.reshape(-1)
    return value.reshape(-1, 1, *ones)


# --- what adds to it -------------------------------------------------------------------------------------------------------
def _additions(
    found: Found, groups: dict[str, dict[str, Tensor]], main: str | None, strength: Strength, entries: list[Entry]
) -> tuple[list[Entry], dict[str, str]]:
    """Biases and sparse remainders beside an algorithm."""
    more: list[Entry] = []
    left: dict[str, str] = {}
    biases = []
    if main != "full" and "diff_b" in groups.get("full", {}):
        biases.append(groups["full"]["diff_b"])
    if main == "lora" and "bias" in groups["lora"]:
        # the up layer's bias passes through the strength like its product
        biases.append(_scaled(groups["lora"]["bias"], strength.scale))
    if biases and main == "norm":
        left[found.keys["full", "diff_b"]] = "a change of the bias beside one of the whole norm"
    else:
        more += [Entry("FULL", {"diff_b": value.reshape(-1)}) for value in biases]
    if "sparse" in groups:
        more.append(_sparse_bias(groups["sparse"], entries))
    for role, value in groups.get("dense", {}).items():
        if main is None or value.dim() < 2:
            left[found.keys["dense", role]] = (
                "a bias that was trained in full replaces the base model's, which an adapter cannot say"
            )
        else:
            more.append(Entry("FULL", {"diff": _scaled(value, strength.scale)}))
    return more, left


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else value.to(torch.promote_types(value.dtype, torch.float32)) * scale


def _sparse_bias(t: dict[str, Tensor], entries: list[Entry]) -> Entry:
    """What LyCORIS' extraction could not put into low rank: single entries of the flattened weight, stored as int16."""
    missing = [r for r in ("bias_indices", "bias_values", "bias_size") if r not in t]
    if missing:
        raise CheckpointError(f"sparse bias: {missing[0]!r} is missing")
    indices, size = t["bias_indices"].to(torch.int64), [int(n) for n in t["bias_size"].reshape(-1).tolist()]
    if t["bias_indices"].dtype == torch.int16:  # columns beyond 32767 have wrapped around
        indices, size = indices & 0xFFFF, [n & 0xFFFF for n in size]
    own = next((tuple(e.tensors[k].flatten(1).shape) for e in entries for k in ("lora_A.weight",) if k in e.tensors), None)
    if len(size) != 2 or (own and "lora_mid.weight" not in entries[0].tensors and own[1] != size[1]):
        raise CheckpointError(
            f"sparse bias: 'bias_size' is {size}, the weight has {own[1] if own else 'other'} columns; 16 bits were too few"
        )
    draft = sparse(t["bias_values"], indices, "sparse bias: 'bias_values'", "sparse bias: 'bias_indices'")
    if int(indices[0].max()) >= size[0] or int(indices[1].max()) >= size[1]:
        raise CheckpointError(f"sparse bias: positions reach {indices.amax(1).tolist()}, its size is {size}")
    return Entry("SHIRA", draft.tensors)
