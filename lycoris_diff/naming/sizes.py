"""The size of the weight that an adapter's factors make, told from their shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
#: rows and columns of the flattened weight, None for what the factors do not tell
Size = tuple[int | None, int | None]


def factor_size(algorithm: str, tensors: Mapping[str, Tensor]) -> Size:
    """Rows and columns of the flattened weight that factors make.

    Args:
        algorithm: name in the registry of adapters.
        tensors: an entry's factors; shapes that contradict each other are not noticed here.

    Returns:
        None for what cannot be told.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        return _SIZES[algorithm](shapes) if algorithm in _SIZES else (None, None)
    except (KeyError, IndexError):
        return None, None


def _lora(s: Shapes) -> Size:
    return s["lora_B.weight"][0], prod(s["lora_A.weight"][1:]) * prod(s.get("lora_mid.weight", ())[2:])


def _loha(s: Shapes) -> Size:
    if "hada_t1" in s:
        return s["hada_w1_a"][1], prod(s["hada_w1_b"][1:]) * prod(s["hada_t1"][2:])
    return s["hada_w1_a"][0], prod(s["hada_w1_b"][1:])


def _lokr(s: Shapes) -> Size:
    left = s["lokr_w1"] if "lokr_w1" in s else (s["lokr_w1_a"][0], s["lokr_w1_b"][1])
    if "lokr_w2" in s:
        right = (s["lokr_w2"][0], prod(s["lokr_w2"][1:]))
    elif "lokr_t2" in s:
        right = (s["lokr_w2_a"][1], prod(s["lokr_w2_b"][1:]) * prod(s["lokr_t2"][2:]))
    else:
        right = (s["lokr_w2_a"][0], prod(s["lokr_w2_b"][1:]))
    return left[0] * right[0], left[1] * right[1]


def _glora(s: Shapes) -> Size:
    return s["glora_b1"][0], prod(s["glora_b2"][1:]) * prod(s.get("glora_bm", ())[2:])


def _full(s: Shapes) -> Size:
    return (s["diff"][0], prod(s["diff"][1:])) if "diff" in s else (s["diff_b"][0], None)


def _norm(s: Shapes) -> Size:
    return next(iter(s.values()))[0], None


def _miss(s: Shapes) -> Size:
    # with three axes blocks of rows, with two one column a row, or fewer for the "mini" layout
    shape = s["miss_block"]
    return (shape[0] * shape[1] if len(shape) == 3 else None), None


def _tlora(s: Shapes) -> Size:
    return s["p_layer"][0], prod(s["q_layer"][1:])


def _rotation(s: Shapes) -> Size:
    return s["oft_blocks"][-3] * s["oft_blocks"][-1], None


_SIZES: dict[str, Callable[[Shapes], Size]] = {
    "LORA": _lora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "GLORA": _glora,
    "FULL": _full,
    "NORM": _norm,
    "MISS": _miss,
    "TLORA": _tlora,
    "DIAG_OFT": _rotation,
    "LYCORIS_BOFT": _rotation,
}
