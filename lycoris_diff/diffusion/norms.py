"""How large the changes of live adapters are, DoRA's and those that depend on the base weight among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.combined import Combined
from ..execution.engine import cast
from ..execution.geometry import Geometry
from ..functional import norms

#: a LoHa of larger rank is estimated from this many rows where the weight has more entries
SAMPLED_ROWS, SAMPLE_ABOVE = 64, 250_000

Norm = Callable[[Adapter, Mapping[str, Tensor], Geometry], Tensor]


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


def _loha(adapter: Adapter, f: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    return norms.loha(f, SAMPLED_ROWS if geometry.out * geometry.columns > SAMPLE_ABOVE else 0)


#: squared norm before the scale, by algorithm
_SQUARES: dict[str, Norm] = {
    "LORA": lambda adapter, f, geometry: norms.lora(f),
    "LOHA": _loha,
    "LOKR": lambda adapter, f, geometry: norms.lokr(f, getattr(adapter.config, "rows", None)),
    "MISS": lambda adapter, f, geometry: norms.miss(f, geometry.out, geometry.inp),
    "SHIRA": lambda adapter, f, geometry: norms.shira(f),
    "FULL": lambda adapter, f, geometry: norms.dense(f),
    "NORM": lambda adapter, f, geometry: norms.dense(f),
}


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
