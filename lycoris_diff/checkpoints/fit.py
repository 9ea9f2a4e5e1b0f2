"""Whether an entry's factors make up a layer's weight, and the shapes in which that layer's adapter wants them.

Sizes are compared before anything is multiplied or allocated: a file cannot ask for a large product. Axes of size one that
some writers add and others drop do not matter; everything else must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..errors import AdapterError, CheckpointError
from ..functional import oft
from ..naming.index import Site
from .build import algorithm, config_of, geometry_from_shape
from .checkpoint import Entry
from .slices import CORES, MAGNITUDES

#: factor -> its axes: ``o`` and ``i`` are the layer's, ``k`` stands for its kernel axes, ``1`` for as many ones, ``k+`` for
#: those of a core (two at least), ``ik`` and ``dk`` for columns with the taps; other letters are sizes of the factors' own
Pattern = Mapping[str, str]

_W1: tuple[Pattern, ...] = ({"lokr_w1": "a c"}, {"lokr_w1_b": "s c", "lokr_w1_a": "a s"})
_W2: tuple[Pattern, ...] = (
    {"lokr_w2": "b d k"},
    {"lokr_w2_b": "r dk", "lokr_w2_a": "b r"},
    {"lokr_w2_b": "r d", "lokr_w2_a": "r b", "lokr_t2": "r r k+"},
)
_HADA = {"hada_w1_b": "r ik", "hada_w1_a": "o r", "hada_w2_b": "r ik", "hada_w2_a": "o r"}
_HADA_CORE = {"hada_w1_b": "r i", "hada_w1_a": "r o", "hada_w2_b": "r i", "hada_w2_a": "r o"}
_GLORA = {"glora_a1": "i r", "glora_a2": "r i", "glora_b1": "o r"}
_BLOCKS = {"DIAG_OFT": "n q q", "LYCORIS_BOFT": "m n q q"}

#: sets of factors an algorithm may consist of; the factor that tells the rank comes first
PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "LORA": (
        {"lora_A.weight": "r i k", "lora_B.weight": "o r 1"},
        {"lora_A.weight": "r i 1", "lora_mid.weight": "r r k", "lora_B.weight": "o r 1"},
    ),
    "LOHA": (_HADA, _HADA_CORE | {"hada_t1": "r r k+", "hada_t2": "r r k+"}),
    "LOKR": tuple({**w1, **w2} for w1 in _W1 for w2 in _W2),
    "GLORA": (_GLORA | {"glora_b2": "r i k"}, _GLORA | {"glora_b2": "r i", "glora_bm": "r r k"}),
    "IA3": ({"ia3_weight": "x"},),
    "FULL": ({"diff": "o i k"}, {"diff_b": "o"}, {"diff": "o i k", "diff_b": "o"}),
    "NORM": ({"w_norm": "o"}, {"w_norm": "o", "b_norm": "o"}),
    **{name: ({"oft_blocks": axes}, {"oft_blocks": axes, "rescale": "o u 1"}) for name, axes in _BLOCKS.items()},
    "OFT": ({"oft_R.weight": "n t"},),
    "MISS": ({"miss_block": "r x k"},),
    "TLORA": ({"q_layer": "r i", "p_layer": "o r", "lambda_layer": "u r"},),
}
#: a window may be within a block this many times as high
_LARGEST_BLOCK = 256
_MISS_BAT: tuple[Pattern, ...] = ({"miss_block": "n r r"},)


def fit_entry(entry: Entry, site: Site, axis: str = "") -> Entry:
    """The entry with its factors in the shapes that the layer's adapter takes.

    Args:
        entry: as read; not changed.
        site: the layer.
        axis: DoRA's axis in the file's other modules, for square layers whose magnitude does not tell.

    Raises:
        CheckpointError: factors are missing, or do not make up the layer's weight.
    """
    if site.is_norm:
        return _fit_norm(entry, site)
    if entry.algorithm == "NORM":
        raise CheckpointError(f"NORM is for normalisation layers; the layer is {site.kind} with a weight of shape {site.shape}")
    if entry.algorithm not in PATTERNS:
        return _fit_by_adapter(entry, site)
    if entry.algorithm == "GLORA" and not _fits(entry, site):
        other = _other_order(entry)
        entry = other if _fits(other, site) else entry
    fitted = _fit_factors(entry, site)
    return _fit_magnitude(fitted, site, axis)


def dora_axis(entry: Entry, site: Site) -> str:
    """DoRA's axis as far as the size of the magnitude tells: "out", "in", or "" (no magnitude, or a square layer)."""
    sizes = {entry.tensors[m].numel() for m in MAGNITUDES if m in entry.tensors}
    rows, columns = sizes == {site.shape[0]}, len(site.shape) > 1 and sizes == {site.shape[1]}
    return "" if rows == columns else "out" if rows else "in"


# --- factors ------------------------------------------------------------------------------------------------------------------
def _fit_factors(entry: Entry, site: Site) -> Entry:
    pattern = _pattern(entry)
    out, inp, *kernel = site.shape
    sizes = {"o": out, "i": inp, "u": 1}
    tensors = dict(entry.tensors)
    for name, axes in pattern.items():
        tensors[name] = _shaped(name, entry.tensors[name], axes, sizes, tuple(kernel))
    problem = _RULES.get(entry.algorithm, lambda e, n, s: "")(entry, sizes, site)
    if problem:
        raise CheckpointError(f"{entry.algorithm}: {problem}")
    options = dict(entry.options)
    if any(core in tensors for core in CORES):
        if prod(kernel) == 1:
            raise CheckpointError(
                f"{entry.algorithm} has a core, and the layer with a weight of shape {site.shape} has no kernel"
            )
        options["use_effective_conv2d"] = True
    if entry.algorithm == "MISS" and options.get("init_weights") == "mini" and sizes["x"] == out:
        options = {k: v for k, v in options.items() if k != "mini_r"} | {"init_weights": True}
    return replace(entry, tensors=tensors, options=options, rank=sizes.get("r", sizes.get("s", entry.rank)))


def _pattern(entry: Entry) -> Pattern:
    """The set of factors that an entry has.

    Raises:
        CheckpointError: factors too few or too many.
    """
    bat = entry.algorithm == "MISS" and entry.options.get("init_weights") == "bat"
    patterns = _MISS_BAT if bat else PATTERNS[entry.algorithm]
    names = set(entry.tensors) - set(MAGNITUDES)
    for pattern in patterns:
        if pattern.keys() == names:
            return pattern
    nearest = max(patterns, key=lambda p: len(p.keys() & names) - len(p.keys() - names))
    missing, extra = sorted(nearest.keys() - names), sorted(names - nearest.keys())
    fault = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} does not belong to it"
    raise CheckpointError(f"{entry.algorithm}: {fault}; found {', '.join(sorted(names)) or 'nothing'}")


def _shaped(name: str, value: Tensor, axes: str, sizes: dict[str, int], kernel: tuple[int, ...]) -> Tensor:
    """A factor with the axes that a pattern gives it; sizes met for the first time are noted in ``sizes``."""
    heads = axes.split()
    core = kernel + (1,) * (2 - len(kernel)) if len(kernel) == 1 else kernel
    tail = {"k": kernel, "k+": core, "1": (1,) * len(kernel)}.get(heads[-1])
    if tail is not None:
        heads.pop()
    tail, taps, shape = tail or (), prod(kernel), tuple(value.shape)
    lead = _lead(shape, len(heads), tail, heads[-1].endswith("k"))
    found: list[int] = []
    for head, size in zip(heads, lead or ()):
        letter, folded = head[0], taps if head.endswith("k") else 1
        sizes.setdefault(letter, size // folded if size % folded == 0 else 0)
        if size != sizes[letter] * folded or not size:
            break
        found.append(size)
    if len(found) < len(heads):
        wanted = [str(sizes[h[0]] * (taps if h.endswith("k") else 1)) if sizes.get(h[0]) else h[0] for h in heads]
        raise CheckpointError(f"{name!r} has shape {shape}, expected ({', '.join([*wanted, *map(str, tail)])})")
    return value.reshape(*found, *tail)


def _lead(shape: tuple[int, ...], count: int, tail: tuple[int, ...], folded: bool) -> tuple[int, ...] | None:
    """Sizes of the first ``count`` axes; None when what follows them is not the tail."""
    if count == 1 and not tail:
        return (max(shape, default=1),) if prod(shape) == max(shape, default=1) else None
    lead, rest = shape[:count], shape[count:]
    if len(lead) < count:
        return None
    if folded:
        return (*lead[:-1], lead[-1] * prod(rest))
    if [n for n in rest if n != 1] == [n for n in tail if n != 1]:
        return lead
    if not rest and lead[-1] % prod(tail) == 0:  # a kernel folded into the columns
        return (*lead[:-1], lead[-1] // prod(tail))
    return None


# --- what the sizes must come to ----------------------------------------------------------------------------------------------
def _kronecker(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    a, b, c, d = n["a"], n["b"], n["c"], n["d"]
    if "s" in n and n.get("r", n["s"]) != n["s"]:
        return f"the halves have ranks {n['s']} and {n['r']}, expected the same"
    start, count = entry.options.get("rows") or (0, a * b)
    if c * d != n["i"] or count != n["o"]:
        return f"the product of ({a}, {c}) and ({b}, {d}) has {count} rows and {c * d} columns, the layer {n['o']} and {n['i']}"
    # no more rows than the window needs, or a small file could ask for a large product
    if not 0 <= start < b or -(-(start + count) // b) != a or b > _LARGEST_BLOCK * count:
        return f"rows {start} to {start + count} are not over the {a} blocks of {b} rows that hold them"
    return ""


def _scaling(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    if not entry.options.get("on_input"):
        return "" if n["x"] == n["o"] else f"{n['x']} factors for {n['o']} output channels"
    # a grouped convolution has several times as many input channels as its weight has columns
    whole = n["x"] % n["i"] == 0 if site.kind.startswith("Conv") else n["x"] == n["i"]
    return "" if whole else f"{n['x']} factors for {n['i']} input channels"


def _rotation(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    if n["n"] * n["q"] != n["o"]:
        return f"{n['n']} blocks of {n['q']} do not make up {n['o']} output rows"
    return "" if n["n"] % 2 ** (n.get("m", 1) - 1) == 0 else f"{n['m']} stages do not go into {n['n']} blocks"


def _triangles(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    size, columns = oft.triangle_size(n["t"]), prod(site.shape[1:])
    if size < 2:
        return f"{n['t']} entries a block are no triangle"
    fits = n["n"] * size == columns or (n["n"] == 1 and columns % size == 0)
    return "" if fits else f"{n['n']} blocks of {size} do not make up {columns} input columns"


def _shards(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    mode, r, out, columns = entry.options.get("init_weights", True), n["r"], n["o"], prod(site.shape[1:])
    if mode == "bat":
        return (
            ""
            if n["n"] * r == out and columns % r == 0
            else f"{n['n']} blocks of {r} do not divide a weight of {(out, columns)}"
        )
    if r > n["i"]:
        return f"a block of {r} input channels is larger than the layer's {n['i']}"
    if out % n["x"] if mode == "mini" else out != n["x"]:
        return f"a block of {n['x']} output channels does not make up the layer's {out}"
    return ""


def _unspread(entry: Entry, n: Mapping[str, int], site: Site) -> str:
    return "" if prod(site.shape[2:]) == 1 else f"T-LoRA knows layers without kernel; the weight has shape {site.shape}"


_RULES: dict[str, Callable[[Entry, Mapping[str, int], Site], str]] = {
    "LOKR": _kronecker,
    "IA3": _scaling,
    "DIAG_OFT": _rotation,
    "LYCORIS_BOFT": _rotation,
    "OFT": _triangles,
    "MISS": _shards,
    "TLORA": _unspread,
}


# --- special cases ------------------------------------------------------------------------------------------------------------
def _fits(entry: Entry, site: Site) -> bool:
    try:
        _fit_factors(entry, site)
    except CheckpointError:
        return False
    return True


def _other_order(entry: Entry) -> Entry:
    """GLoRA in the other order of factors (old LyCORIS versions'), its alpha over the rank that it has in this order."""
    swap = {"glora_a1": "glora_a2", "glora_a2": "glora_a1", "glora_b1": "glora_b2", "glora_b2": "glora_b1"}
    tensors = {swap.get(name, name): value for name, value in entry.tensors.items()}
    rank = tensors["glora_a2"].shape[0] if "glora_a2" in tensors and tensors["glora_a2"].dim() else 0
    scaled = entry.alpha is not None and entry.rank and rank and entry.alpha == entry.scale * entry.rank
    return replace(entry, tensors=tensors, rank=rank, scale=entry.scale * entry.rank / rank if scaled else entry.scale)


def _fit_norm(entry: Entry, site: Site) -> Entry:
    """Changes of a norm's weight and bias; ComfyUI's files call them as a layer's."""
    names = {"diff": "w_norm", "diff_b": "b_norm"} if entry.algorithm == "FULL" else {}
    if entry.algorithm not in ("NORM", "FULL"):
        raise CheckpointError(f"{entry.algorithm} is for layers that mix channels, not for {site.kind}")
    tensors = {names.get(k, k): v for k, v in entry.tensors.items()}
    if "w_norm" not in tensors and "b_norm" in tensors:
        tensors["w_norm"] = torch.zeros_like(tensors["b_norm"])
    bias = None if site.bias else tensors.pop("b_norm", None)
    if bias is not None and bool(bias.to(torch.float32).any()):
        raise CheckpointError(f"'b_norm' changes a bias, and the {site.kind} has none")
    norm = replace(entry, algorithm="NORM", tensors=tensors)
    sizes = {"o": site.shape[0]}
    return replace(norm, tensors={k: _shaped(k, tensors[k], axes, sizes, ()) for k, axes in _pattern(norm).items()})


def _fit_by_adapter(entry: Entry, site: Site) -> Entry:
    """Algorithms without a pattern: the adapter's own reading and checks."""
    cls, geometry = algorithm(entry), geometry_from_shape(site.shape)
    tensors = cls.decode(geometry, entry.tensors)
    try:
        cls.fits(geometry, config_of(entry), {k: tuple(v.shape) for k, v in tensors.items()})
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    return replace(entry, tensors=tensors)


def _fit_magnitude(entry: Entry, site: Site, axis: str) -> Entry:
    """DoRA's magnitude in the adapter's shape, and its axis.

    The size decides. On square layers it is what the reader found; a LoRA's magnitude for rows may have come without any
    sign of its axis, so there the file's other modules decide.
    """
    names = [m for m in MAGNITUDES if m in entry.tensors]
    if not names:
        return entry
    if names != [algorithm(entry).magnitude_name]:
        raise CheckpointError(f"{entry.algorithm}: {names[0]!r} does not belong to it")
    value, (out, inp, *kernel) = entry.tensors[names[0]], site.shape
    told = entry.options.get("dora_axis", "")
    if told == "out" and entry.algorithm == "LORA":
        told = axis or told
    found = dora_axis(entry, site) or told or axis or "out"
    count, ones = out if found == "out" else inp, (1,) * len(kernel)
    if value.numel() != count or count != max(value.shape, default=1):
        raise CheckpointError(
            f"{names[0]!r} has shape {tuple(value.shape)}, expected one value for each of {out} rows or {inp} columns"
        )
    shape = (count, 1, *ones) if found == "out" else (1, count, *ones)
    if entry.algorithm == "LORA" and found == "out":
        shape = (1, count, *ones) if kernel else (count,)
    options = entry.options | {"weight_decompose": True, "dora_axis": found}
    return replace(entry, tensors={**entry.tensors, names[0]: value.reshape(shape)}, options=options)
