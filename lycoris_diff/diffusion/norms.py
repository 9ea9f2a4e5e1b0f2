"""Size of an adapter's change of a weight, from its factors: the Frobenius norm, without building the change where a Gram
matrix of the factors has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.combined import Combined
from ..execution.engine import cast
from ..execution.geometry import Geometry
from ..functional import loha, lora

#: a LoHa of larger rank is estimated from this many rows where the weight has more entries
SAMPLED_ROWS, SAMPLE_ABOVE = 64, 250_000

Norm = Callable[[Adapter, Mapping[str, Tensor], Geometry], "Tensor | None"]


def change_norm(adapter: Adapter, weight: Tensor | None = None) -> float | None:
    """Frobenius norm of an adapter's change of the weight as trained, in float32 or better.

    Args:
        adapter: at any strength; the strength as trained counts.
        weight: unmodified canonical base weight; read only by adapters whose change depends on it.

    Returns:
        The norm; infinite or NaN when the change is not finite. None when it depends on a weight that is not given.
    """
    if isinstance(adapter, Combined):
        return _dense(adapter, weight)
    geometry, square = adapter.geometry, None
    short = _SQUARES.get(adapter.config.peft_name)
    with torch.no_grad():
        if short is not None and not adapter.depends_on_weight:
            f = cast(adapter.exact_factors(), torch.float32)
            square = short(adapter, f, geometry)
        elif adapter.decomposed and weight is not None:
            square = _dora_rows(adapter, weight)
    if square is None:
        return _dense(adapter, weight)
    scale = 1.0 if adapter.depends_on_weight else abs(adapter.scaling)
    return scale * float(square.clamp_min(0).sqrt())


def _dense(adapter: Adapter, weight: Tensor | None) -> float | None:
    """By building the change, which a strength of its own must not hide."""
    if weight is None and adapter.depends_on_weight:
        return None
    held = adapter.get_strength()
    adapter.set_strength(1.0)
    try:
        with torch.no_grad():
            work = torch.promote_types(adapter.strength.dtype, torch.float32)
            factors = [(part, cast(f, work)) for part, f in adapter.members(exact=True)]
            device = adapter.strength.device
            base = torch.zeros(adapter.geometry.shape, dtype=work, device=device) if weight is None else weight.to(device, work)
            total = torch.zeros_like(base)
            for part, f in factors:
                total = part.add_change(total, base, f)
            return float(torch.linalg.vector_norm(total))
    finally:
        adapter.set_strength(held)


def gram_square(up: Tensor, down: Tensor) -> Tensor:
    """``||up @ down||^2`` of ``(m, r)`` and ``(r, n)`` from two r x r matrices."""
    return ((up.T @ up) * (down @ down.T)).sum()


def _lora(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    up, down = f["lora_B.weight"].flatten(1), f["lora_A.weight"].flatten(1)
    if "lora_mid.weight" not in f:
        return gram_square(up, down)
    return _core_square(up.T @ up, f["lora_mid.weight"].flatten(2), down @ down.T)


def _core_square(out_gram: Tensor, core: Tensor, in_gram: Tensor) -> Tensor:
    """``sum_k tr(G_out C_k G_in C_k^T)`` for a core ``(p, q, taps)``."""
    inside = torch.einsum("pu,uvk,vq->pqk", out_gram, core, in_gram)
    return (inside * core).sum()


def _loha(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor | None:
    """The product is one of rank r^2, which pays for small ranks; large ones are estimated from evenly spaced rows."""
    if "hada_t1" in f:
        return None
    (out, rank), columns = f["hada_w1_a"].shape, geometry.columns
    rows = torch.arange(out)
    if rank**3 * (out + columns) <= 2 * out * columns:
        up = loha.khatri_rao(f["hada_w1_a"].T, f["hada_w2_a"].T).T
        return gram_square(up, loha.khatri_rao(f["hada_w1_b"], f["hada_w2_b"]))
    if out * columns > SAMPLE_ABOVE:
        rows = torch.linspace(0, out - 1, SAMPLED_ROWS).round().long()
    first, second = f["hada_w1_a"][rows] @ f["hada_w1_b"], f["hada_w2_a"][rows] @ f["hada_w2_b"]
    return (first * second).square().sum() * (out / rows.numel())


def _lokr(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor | None:
    rows = getattr(adapter.config, "rows", None)
    if rows is None:
        return _first_square(f) * _second_square(f, geometry)
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" in f:
        w2 = f["lokr_w2"].flatten(1)
    elif "lokr_t2" in f:
        core = f["lokr_t2"].flatten(2)
        w2 = lora.tucker(core, f["lokr_w2_a"].T, f["lokr_w2_b"]).flatten(1)
    else:
        w2 = f["lokr_w2_a"] @ f["lokr_w2_b"]
    squares = w1.square().sum(1)[:, None] * w2.square().sum(1)
    return squares.flatten().narrow(0, *rows).sum()


def _first_square(f: Mapping[str, Tensor]) -> Tensor:
    return f["lokr_w1"].square().sum() if "lokr_w1" in f else gram_square(f["lokr_w1_a"], f["lokr_w1_b"])


def _second_square(f: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    if "lokr_w2" in f:
        return f["lokr_w2"].square().sum()
    a, b = f["lokr_w2_a"], f["lokr_w2_b"]
    if "lokr_t2" not in f:
        return gram_square(a, b)
    return _core_square(a @ a.T, f["lokr_t2"].flatten(2), b @ b.T)


def _miss(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    r, s = f["miss_block"].shape[:2]
    block = f["miss_block"].reshape(r, s, -1)  # (r, s, taps)
    repeats = torch.full((r,), geometry.inp // r, dtype=block.dtype, device=block.device)
    repeats[: geometry.inp % r] += 1
    return (block.square().sum((1, 2)) * repeats).sum() * (geometry.out // s)


def _shira(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor | None:
    indices = f["shira_indices"].long()
    flat = indices[0] * geometry.columns + indices[1]
    if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()) and flat.unique().numel() < flat.numel():
        return None  # repeated positions add up
    return f["shira_weight"].square().sum()


def _full(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    return torch.stack([t.square().sum() for t in f.values()]).sum()


#: squared norm before the scale, by algorithm; None where the change has to be built
_SQUARES: dict[str, Norm] = {
    "LORA": _lora, "LOHA": _loha, "LOKR": _lokr, "MISS": _miss, "SHIRA": _shira, "FULL": _full, "NORM": _full,
}  # fmt: skip


def _dora_rows(adapter: Adapter, weight: Tensor) -> Tensor | None:
    """DoRA on the output axis, ``c_i (w_i + d_i) - w_i`` for every row, from products the algorithm has without its change."""
    if adapter.config.dora_axis != "out":  # type: ignore[attr-defined]
        return None
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    f = cast(adapter.inputs(exact=True), work.dtype)
    statistics = adapter.row_statistics(work, f)
    if statistics is None:
        return None
    inner, squares = statistics
    own = work.flatten(1).square().sum(1)
    adapted = (own + 2 * inner + squares).clamp_min(torch.finfo(work.dtype).tiny)
    factor = f[adapter.magnitude_name].reshape(-1) / adapted.sqrt()
    return (factor.square() * adapted - 2 * factor * (own + inner) + own).sum()
