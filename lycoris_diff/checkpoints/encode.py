"""From the neutral form to the tensors of a file: one table of algorithms for every way of spelling them.

What stands in a table is written so that the readers of that spelling agree about it; what does not is refused with the
reason below. The tables are the inverse of what the reader knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Entry
from .rewrite import miss_as_lora, portable_lokr, with_strength_one, without_core

Tensors = dict[str, Tensor]
#: canonical shape of the weight, None when it is not known
Shape = Sequence[int] | None
Encoder = Callable[[Entry, Shape], Tensors]

#: row of a table for a change of the bias beside a LoRA, where it is spelled differently
_BIAS = "bias"
_REASONS = {
    "SHIRA": "SHiRA's single entries have no place in it",
    "OFT": "rotations of the input have no place in it",
    "MISS": "MiSS has no place in it",
    "COMBINED": "a sum of adapters has no place in it",
}


def encode(entries: Sequence[Entry], shape: Shape, table: Mapping[str, Encoder], target: str) -> Tensors:
    """Tensors of one weight by the end of their names, in the file's spelling.

    Args:
        entries: algorithms on the weight. Beside another algorithm only a change of the bias alone can be told apart in a
            file.
        shape: of the weight.
        table: of the spelling.
        target: name of the format, for messages.

    Raises:
        CheckpointError: the format cannot say it, with what to do.
    """
    main = [e for e in entries if not _only_bias(e)]
    if len(main) > 1:
        names = " and ".join(e.algorithm for e in main)
        raise CheckpointError(f'{names} on one weight: readers of {target} files use one of them only; write format "peft"')
    out: Tensors = {}
    for entry in entries:
        kind = _BIAS if main and _only_bias(entry) and _BIAS in table else entry.algorithm
        if kind not in table:
            reason = _REASONS.get(entry.algorithm, f"{entry.algorithm} has no place in it")
            known = ", ".join(sorted(table.keys() - {_BIAS}))
            raise CheckpointError(f'format {target!r} cannot say it: {reason} (it knows {known}); write format "peft"')
        encoded = table[kind](entry, shape)
        if encoded.keys() & out.keys():
            raise CheckpointError(f"two changes of one bias; readers of {target} files use one of them only")
        out |= encoded
    return {k: v.contiguous() for k, v in out.items()}


def _only_bias(entry: Entry) -> bool:
    return entry.algorithm == "FULL" and entry.tensors.keys() == {"diff_b"}


def _axes(entry: Entry, shape: Shape, factor: str = "") -> int:
    """Number of kernel axes, from the layer's shape or else from a factor that has them."""
    return max(len(shape) - 2, 0) if shape is not None else max(entry.tensors[factor].dim() - 2, 0) if factor else 0


def _alpha(entry: Entry, rank: int) -> Tensor:
    """Alpha in float32, whatever the factors' dtype: half precision would round it."""
    return torch.tensor(entry.scale * rank, dtype=torch.float32)


def _visible(entry: Entry) -> Entry:
    """An entry whose strength an alpha can say: some readers take an alpha of zero for the rank."""
    return entry if entry.scale else with_strength_one(entry)


def _wide(t: Tensor, axes: int) -> Tensor:
    """A matrix as a 1x1 convolution with so many kernel axes."""
    return t if t.dim() > 2 else t.reshape(*t.shape, *[1] * axes)


def _dora(entry: Entry, name: str, axes: int) -> Tensors:
    """The magnitude as kohya's readers tell its axis: ``(out, 1, ...)`` or ``(1, in, 1, ...)``."""
    if name not in entry.tensors:
        return {}
    size = entry.tensors[name].numel()
    row = (size, 1) if entry.options.get("dora_axis", "out") == "out" else (1, size)
    return {"dora_scale": entry.tensors[name].reshape(*row, *[1] * axes)}


# --- kohya's and LyCORIS' spelling -------------------------------------------------------------------------------------------
def _lora(entry: Entry, shape: Shape) -> Tensors:
    axes = _axes(entry, shape, "lora_A.weight")
    entry = _visible(entry if axes == 2 else without_core(entry))
    t, rank = entry.tensors, entry.tensors["lora_A.weight"].shape[0]
    out = {"lora_up.weight": _wide(t["lora_B.weight"], axes), "lora_down.weight": _wide(t["lora_A.weight"], axes)}
    if "lora_mid.weight" in t:
        out["lora_mid.weight"] = t["lora_mid.weight"]
    return out | {"alpha": _alpha(entry, rank)} | _dora(entry, "lora_magnitude_vector", axes)


def _loha(entry: Entry, shape: Shape) -> Tensors:
    cored = "hada_t1" in entry.tensors
    axes = _axes(entry, shape, "hada_t1" if cored else "")
    entry = _visible(without_core(entry) if cored and axes != 2 else entry)
    factors = {k: v for k, v in entry.tensors.items() if k != "dora_scale"}
    return factors | {"alpha": _alpha(entry, factors["hada_w1_b"].shape[0])} | _dora(entry, "dora_scale", axes)


def _lokr(entry: Entry, shape: Shape) -> Tensors:
    if entry.options.get("rows") is not None:
        raise CheckpointError(
            "LOKR on a window of its product's rows, a share of a fused projection, is known to no other reader; write the "
            'format that keeps the projection fused ("kohya" or "comfyui"), or "peft"'
        )
    entry = _visible(portable_lokr(entry, shape))
    factors = {k: v for k, v in entry.tensors.items() if k != "dora_scale"}
    axes = _axes(entry, shape, "lokr_w2" if "lokr_w2" in factors else "")
    if "lokr_w2" in factors:
        factors["lokr_w2"] = _wide(factors["lokr_w2"], axes)
    rank = next((factors[k].shape[0] for k in ("lokr_w2_b", "lokr_w1_b") if k in factors), max(entry.rank, 1))
    return factors | {"alpha": _alpha(entry, rank)} | _dora(entry, "dora_scale", axes)


def _glora(entry: Entry, shape: Shape) -> Tensors:
    t = without_core(entry).tensors
    axes = _axes(entry, shape, "glora_b2")
    names = {"a1.weight": "glora_a1", "a2.weight": "glora_a2", "b1.weight": "glora_b1", "b2.weight": "glora_b2"}
    out = {short: _wide(t[name], axes) for short, name in names.items()}
    return out | {"alpha": _alpha(entry, out["a2.weight"].shape[0])}


def _ia3(entry: Entry, shape: Shape) -> Tensors:
    axes, weight = _axes(entry, shape), entry.tensors["ia3_weight"].flatten()
    on_input = torch.tensor(int(bool(entry.options.get("on_input"))))
    return {"weight": weight.reshape(1, -1, *[1] * axes) if axes else weight, "on_input": on_input}


def _dense(entry: Entry, shape: Shape) -> Tensors:
    return dict(entry.tensors)


def _rotation(entry: Entry, shape: Shape) -> Tensors:
    limit = float(entry.options.get("constraint") or 0.0)
    return {**entry.tensors, "alpha": torch.tensor(limit, dtype=torch.float32)}


def _tlora(entry: Entry, shape: Shape) -> Tensors:
    kind = entry.options.get("sig_type", "principal")
    if kind != "principal":
        raise CheckpointError(
            f'T-LoRA started from the {kind!r} singular vectors, which a file does not tell; write format "peft"'
        )
    t, axes = entry.tensors, _axes(entry, shape)
    names = {"q_layer.weight": _wide(t["q_layer"], axes), "p_layer.weight": _wide(t["p_layer"], axes)}
    return names | {"lambda_layer": t["lambda_layer"], "alpha": _alpha(entry, t["q_layer"].shape[0])}


KOHYA: dict[str, Encoder] = {
    "LORA": _lora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "GLORA": _glora,
    "IA3": _ia3,
    "FULL": _dense,
    "NORM": _dense,
    "DIAG_OFT": _rotation,
    "LYCORIS_BOFT": _rotation,
    "TLORA": _tlora,
    "MISS": lambda entry, shape: _lora(miss_as_lora(entry, shape), shape),
}


# --- PEFT's spelling in files of other projects -------------------------------------------------------------------------------
def _lora_pair(entry: Entry, shape: Shape) -> tuple[Entry, Tensors]:
    """Strength 1, so that nobody has to know an alpha."""
    entry = with_strength_one(without_core(entry))
    axes = _axes(entry, shape, "lora_A.weight")
    return entry, {name: _wide(entry.tensors[name], axes) for name in ("lora_A.weight", "lora_B.weight")}


def _lora_diffusers(entry: Entry, shape: Shape) -> Tensors:
    entry, out = _lora_pair(entry, shape)
    magnitude = entry.tensors.get("lora_magnitude_vector")
    if magnitude is None:
        return out
    if entry.options.get("dora_axis", "out") != "out":
        raise CheckpointError('DoRA of the input axis is not known to PEFT and diffusers; write format "kohya"')
    return out | {"lora_magnitude_vector.weight": magnitude}


def _lokr_peft(entry: Entry, shape: Shape) -> Tensors:
    """Strength 1 in every layout; no alpha."""
    if _axes(entry, shape):
        raise CheckpointError('LOKR on a convolution is misread by diffusers; write format "comfyui"')
    if "dora_scale" in entry.tensors:
        raise CheckpointError('LOKR with DoRA is not known to diffusers; write format "comfyui"')
    _lokr(entry, shape)  # for its refusals
    return with_strength_one(portable_lokr(entry, shape)).tensors


def _lora_encoder(entry: Entry, shape: Shape) -> Tensors:
    """In text encoders, the names by which diffusers recognises modules of every kind."""
    names = {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"}
    return {names.get(k, k): v for k, v in _lora_diffusers(entry, shape).items()}


def _lora_bias(entry: Entry, shape: Shape) -> Tensors:
    """A bias of the second LoRA layer, which passes through the strength of 1."""
    return {"lora_B.bias": entry.tensors["diff_b"]}


DIFFUSERS: dict[str, Encoder] = {
    _BIAS: _lora_bias,
    "LORA": _lora_diffusers,
    "MISS": lambda entry, shape: _lora_diffusers(miss_as_lora(entry, shape), shape),
}
DIFFUSERS_ENCODER: dict[str, Encoder] = {
    "LORA": _lora_encoder,
    "MISS": lambda entry, shape: _lora_encoder(miss_as_lora(entry, shape), shape),
}
DIFFUSERS_LOKR: dict[str, Encoder] = {"LOKR": _lokr_peft}


# --- ai-toolkit ---------------------------------------------------------------------------------------------------------------
def _lora_ai_toolkit(entry: Entry, shape: Shape) -> Tensors:
    entry, out = _lora_pair(entry, shape)
    magnitude = entry.tensors.get("lora_magnitude_vector")
    if magnitude is None:
        return out
    if entry.options.get("dora_axis", "out") != "out" or _axes(entry, shape):
        raise CheckpointError('ai-toolkit knows DoRA on the output axis of linear layers only; write format "kohya"')
    return out | {"magnitude": magnitude.flatten()}


def _lokr_rank_alpha(entry: Entry, shape: Shape) -> Tensors:
    """Alpha is the rank in all of these files."""
    return _lokr(with_strength_one(entry), shape)


AI_TOOLKIT: dict[str, Encoder] = {
    "LORA": _lora_ai_toolkit,
    "LOKR": _lokr_rank_alpha,
    "FULL": _dense,
    "MISS": lambda entry, shape: _lora_ai_toolkit(miss_as_lora(entry, shape), shape),
}


def _lora_ai_toolkit_kohya(entry: Entry, shape: Shape) -> Tensors:
    """Kohya's names of the factors, ai-toolkit's of the magnitude."""
    out = _lora_ai_toolkit(entry, shape)
    out = {"lora_up.weight": out.pop("lora_B.weight"), "lora_down.weight": out.pop("lora_A.weight"), **out}
    return out | {"alpha": torch.tensor(float(out["lora_down.weight"].shape[0]))}


AI_TOOLKIT_KOHYA: dict[str, Encoder] = {
    **{k: KOHYA[k] for k in ("LOKR", "FULL")},
    "LORA": _lora_ai_toolkit_kohya,
    "MISS": lambda entry, shape: _lora_ai_toolkit_kohya(miss_as_lora(entry, shape), shape),
}


# --- OneTrainer ---------------------------------------------------------------------------------------------------------------
def _loha_onetrainer(entry: Entry, shape: Shape) -> Tensors:
    """On convolutions the factors are convolutions' weights themselves."""
    out = _loha(without_core(entry), shape)
    axes = _axes(entry, shape)
    if not axes or shape is None:
        return out
    for half in "12":
        out[f"hada_w{half}_a"] = _wide(out[f"hada_w{half}_a"], axes)
        out[f"hada_w{half}_b"] = out[f"hada_w{half}_b"].reshape(-1, *shape[1:])
    return out


def _oft(entry: Entry, shape: Shape) -> Tensors:
    if not entry.options.get("use_cayley_neumann", True) or entry.options.get("num_cayley_neumann_terms", 5) != 5:
        raise CheckpointError('OneTrainer turns by a series of five terms, this adapter does not; write format "peft"')
    marker = {"oft_R.scaled_oft": torch.tensor(True)} if entry.options.get("scaled") else {}
    return {"oft_R.weight": entry.tensors["oft_R.weight"], **marker}


ONETRAINER: dict[str, Encoder] = {
    **{k: KOHYA[k] for k in ("LOKR", "MISS")},
    "LORA": lambda entry, shape: _lora(without_core(entry), shape),
    "LOHA": _loha_onetrainer,
    "OFT": _oft,
}
