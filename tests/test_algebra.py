"""Rows of adapters: whatever is sliced, exchanged or put together does to the rows what the whole did, in float64."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rebuild import change_weight

from lycoris_diff.checkpoints.algebra import fuse_modules, fuse_rows, row_count, swap_halves, take_rows
from lycoris_diff.checkpoints.build import adapter_of, entry_delta, geometry_from_shape
from lycoris_diff.checkpoints.checkpoint import Entry
from lycoris_diff.errors import CheckpointError

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# ------------------------------------------------------------------------------------------------- entries of every kind
class Maker:
    """Entries with random float64 factors for a weight (out, in, *k)."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.out, self.inp, *kernel = self.shape = shape
        self.kernel = tuple(kernel)
        self.taps = prod(kernel)
        self.ones = (1,) * len(kernel)
        self.random = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def weight(self) -> torch.Tensor:
        return self.tensor(*self.shape)

    def lora(self, r: int = 2, core: bool = False, dora: str = "", scale: float = 0.75) -> Entry:
        t = {"lora_A.weight": self.tensor(r, self.inp, *(self.ones if core else self.kernel))}
        if core:
            t["lora_mid.weight"] = self.tensor(r, r, *self.kernel)
        t["lora_B.weight"] = self.tensor(self.out, r, *self.ones)
        return self.finish("LORA", t, r, core, dora, scale)

    def loha(self, r: int = 2, core: bool = False, dora: str = "", scale: float = 0.75) -> Entry:
        t = {}
        for half in "12":
            t[f"hada_w{half}_a"] = self.tensor(r, self.out) if core else self.tensor(self.out, r)
            t[f"hada_w{half}_b"] = self.tensor(r, self.inp if core else self.inp * self.taps)
            if core:
                t[f"hada_t{half}"] = self.tensor(r, r, *self.kernel, *([1] if len(self.kernel) == 1 else []))
        return self.finish("LOHA", t, r, core, dora, scale)

    def lokr(self, a: int, layout: str = "full", c: int = 2, r: int = 2, dora: str = "", scale: float = 0.75) -> Entry:
        b, d = self.out // a, self.inp // c
        assert a * b == self.out and c * d == self.inp
        w1_low, w2 = layout.startswith("low both"), layout.rpartition(" ")[2]
        t = {"lokr_w1_a": self.tensor(a, r), "lokr_w1_b": self.tensor(r, c)} if w1_low else {"lokr_w1": self.tensor(a, c)}
        if w2 == "core":
            core = self.tensor(r, r, *self.kernel, *([1] if len(self.kernel) == 1 else []))
            t |= {"lokr_t2": core, "lokr_w2_a": self.tensor(r, b), "lokr_w2_b": self.tensor(r, d)}
        elif layout == "full":
            t["lokr_w2"] = self.tensor(b, d, *self.kernel)
        else:
            t |= {"lokr_w2_a": self.tensor(b, r), "lokr_w2_b": self.tensor(r, d * self.taps)}
        return self.finish("LOKR", t, r, w2 == "core", dora, scale)

    def finish(self, algorithm: str, t: dict, r: int, core: bool, dora: str, scale: float) -> Entry:
        options: dict = {"use_effective_conv2d": True} if core else {}
        if dora:
            options |= {"weight_decompose": True, "dora_axis": dora}
            count = self.out if dora == "out" else self.inp
            shape = (count, 1, *self.ones) if dora == "out" else (1, count, *self.ones)
            if algorithm == "LORA" and dora == "out":
                shape = (1, count, *self.ones) if self.kernel else (count,)
            name = "lora_magnitude_vector" if algorithm == "LORA" else "dora_scale"
            t[name] = 1 + self.tensor(*shape).abs()
        return Entry(algorithm, t, scale, r, scale * r, "tensor", options)

    def glora(self, r: int = 2, core: bool = False) -> Entry:
        t = {"glora_a1": self.tensor(self.inp, r), "glora_a2": self.tensor(r, self.inp), "glora_b1": self.tensor(self.out, r)}
        t["glora_b2"] = self.tensor(r, self.inp) if core else self.tensor(r, self.inp, *self.kernel)
        if core:
            t["glora_bm"] = self.tensor(r, r, *self.kernel)
        return Entry("GLORA", t, 0.5, r)

    def ia3(self, on_input: bool = False) -> Entry:
        return Entry("IA3", {"ia3_weight": self.tensor(self.inp if on_input else self.out)}, options={"on_input": on_input})

    def full(self, bias: bool = True, weight: bool = True) -> Entry:
        t = {"diff": self.tensor(*self.shape)} if weight else {}
        return Entry("FULL", t | ({"diff_b": self.tensor(self.out)} if bias else {}))

    def diag_oft(self, block: int, constraint: float = 0.0, rescale: bool = False) -> Entry:
        t = {"oft_blocks": 0.1 * self.tensor(self.out // block, block, block)}
        if rescale:
            t["rescale"] = 1 + 0.1 * self.tensor(self.out, 1, *self.ones)
        return Entry("DIAG_OFT", t, options={"constraint": constraint})

    def oft(self, block: int) -> Entry:
        return Entry("OFT", {"oft_R.weight": 0.1 * self.tensor(self.inp // block, block * (block - 1) // 2)})

    def miss(self, mode: object = True, r: int = 2, mini_r: int = 4) -> Entry:
        shape = {"bat": (self.out // r, r, r), "mini": (r, mini_r, *self.kernel)}.get(mode, (r, self.out, *self.kernel))
        options = {"init_weights": mode} | ({"mini_r": mini_r} if mode == "mini" else {})
        return Entry("MISS", {"miss_block": self.tensor(*shape)}, rank=r, options=options)

    def shira(self, count: int = 40) -> Entry:
        columns = self.inp * self.taps
        at = torch.randperm(self.out * columns, generator=self.random)[:count]
        return Entry(
            "SHIRA", {"shira_weight": self.tensor(len(at)), "shira_indices": torch.stack([at // columns, at % columns]).int()}
        )

    def tlora(self, r: int = 2) -> Entry:
        t = {"q_layer": self.tensor(r, self.inp), "p_layer": self.tensor(self.out, r), "lambda_layer": self.tensor(1, r)}
        return Entry("TLORA", t, 0.5, r, options={"sig_type": "principal"})


#: out = 24, in = 8; slices at 8 and 16
WEIGHTS = {
    "linear": (24, 8),
    "conv1d": (24, 8, 3),
    "conv2d 1x1": (24, 8, 1, 1),
    "conv2d": (24, 8, 3, 3),
    "conv3d": (24, 4, 1, 2, 2),
}
KINDS = {
    "lora": lambda m: m.lora(),
    "lora rows": lambda m: m.lora(dora="out"),
    "lora core": lambda m: m.lora(core=bool(m.kernel)),
    "loha": lambda m: m.loha(),
    "loha rows": lambda m: m.loha(dora="out"),
    "loha core": lambda m: m.loha(core=bool(m.kernel)),
    "lokr aligned": lambda m: m.lokr(6),
    "lokr across": lambda m: m.lokr(2),
    "lokr across low": lambda m: m.lokr(2, "low w2"),
    "lokr across both low": lambda m: m.lokr(4, "low both"),
    "lokr core": lambda m: m.lokr(2, "core" if m.kernel else "full"),
    "lokr rows": lambda m: m.lokr(2, dora="out"),
    "lokr one block": lambda m: m.lokr(1),
    "glora": lambda m: m.glora(),
    "glora core": lambda m: m.glora(core=bool(m.kernel)),
    "ia3 out": lambda m: m.ia3(),
    "ia3 in": lambda m: m.ia3(True),
    "full": lambda m: m.full(),
    "bias only": lambda m: m.full(weight=False),
    "diag oft": lambda m: m.diag_oft(4),
    "diag oft limited": lambda m: m.diag_oft(4, 0.01, True),
    "diag oft free": lambda m: m.diag_oft(4, 10.0),
    "miss": lambda m: m.miss(),
    "miss mini": lambda m: m.miss("mini"),
    "miss mini across": lambda m: m.miss("mini", mini_r=3),
    "shira": lambda m: m.shira(),
}
LINEAR_KINDS = {"miss bat": lambda m: m.miss("bat"), "oft": lambda m: m.oft(4)}
CASES = [(k, w) for k in KINDS for w in WEIGHTS] + [(k, "linear") for k in LINEAR_KINDS]


def make(kind: str, weight: str, seed: int = 0) -> tuple[Maker, Entry]:
    maker = Maker(WEIGHTS[weight], seed)
    return maker, (KINDS | LINEAR_KINDS)[kind](maker)


def assert_same(found, expected, *, tolerance: float = 1e-12) -> None:
    for f, e in zip(found, expected):
        assert f.shape == e.shape
        assert float((f - e).abs().max()) <= tolerance * max(1.0, float(e.abs().max()))


def size(entry: Entry) -> int:
    return sum(t.numel() for t in entry.tensors.values())


# ------------------------------------------------------------------------------------------------------------- slices
@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_rows_are_the_rows_of_the_whole(kind, weight):
    maker, entry = make(kind, weight)
    base, bias = maker.weight(), maker.tensor(24)
    before = {k: v.clone() for k, v in entry.tensors.items()}
    whole, whole_bias = change_weight(entry, base, bias)
    parts = []
    for start, stop in ((0, 8), (8, 16), (16, 24)):
        part = take_rows(entry, (start, stop), 24)
        parts.append(part)
        assert_same(change_weight(part, base[start:stop], bias[start:stop]), (whole[start:stop], whole_bias[start:stop]))
        assert size(part) <= (16 if kind == "miss mini across" else 1) * size(entry)
    assert all(torch.equal(v, before[k]) for k, v in entry.tensors.items())
    again = fuse_rows(parts, [8, 8, 8])
    assert_same(change_weight(again, base, bias), (whole, whole_bias))
    if kind not in ("diag oft limited", "diag oft free", "shira", "miss mini across"):
        assert again.options == entry.options and again.rank == entry.rank and again.alpha == entry.alpha
        assert set(again.tensors) == set(entry.tensors)
        assert all(torch.equal(v, entry.tensors[k]) for k, v in again.tensors.items())


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_halves_are_exchanged(kind, weight):
    maker, entry = make(kind, weight)
    base, bias = maker.weight(), maker.tensor(24)
    swapped = swap_halves(entry, 24)
    whole, whole_bias = change_weight(entry, base.roll(12, 0), bias.roll(12))
    assert_same(change_weight(swapped, base, bias), (whole.roll(12, 0), whole_bias.roll(12)))
    assert size(swapped) <= max(size(entry) * 1.6, 24 * maker.inp)
    back = swap_halves(swapped, 24)
    assert_same(change_weight(back, base, bias), change_weight(entry, base, bias))


UNSLICED = {
    "lora columns": lambda m: m.lora(dora="in"),
    "loha columns": lambda m: m.loha(dora="in"),
    "lokr columns": lambda m: m.lokr(3, dora="in"),
    "tlora": lambda m: m.tlora(),
}


@pytest.mark.parametrize("kind", UNSLICED)
def test_exchanging_halves_of_what_cannot_be_sliced(kind):
    maker = Maker((24, 8))
    entry = UNSLICED[kind](maker)
    base = maker.weight()
    whole, _ = change_weight(entry, base.roll(12, 0))
    assert_same(change_weight(swap_halves(entry, 24), base)[:1], [whole.roll(12, 0)], tolerance=1e-9)
    with pytest.raises(CheckpointError, match="fused"):
        take_rows(entry, (0, 8), 24)
    with pytest.raises(CheckpointError, match="own names"):
        fuse_rows([entry, entry], [24, 24])


SCALED = {  # the same divisibility as the projections of real models, rows divided by 48 or 16
    "flux qkv -1": ((192, 64), 12, (64, 64, 64)),
    "flux qkv 16": ((192, 64), 16, (64, 64, 64)),
    "flux qkv 12": ((192, 64), 6, (64, 64, 64)),
    "flux linear1 -1": ((448, 64), 14, (64, 64, 64, 256)),
    "flux linear1 16": ((448, 64), 16, (64, 64, 64, 256)),
    "lumina gqa": ((80, 48), 10, (48, 16, 16)),
    "odd": ((105, 12), 7, (35, 35, 35)),
    "odd across": ((105, 12), 15, (36, 34, 35)),
}


@pytest.mark.parametrize("layout", ["full", "low w2", "low both"])
@pytest.mark.parametrize("name", SCALED)
def test_lokr_of_fused_projections(name, layout):
    shape, a, sizes = SCALED[name]
    maker = Maker(shape)
    entry = maker.lokr(a, layout)
    base = torch.zeros(shape, dtype=torch.float64)
    whole, _ = change_weight(entry, base)
    start, parts = 0, []
    for count in sizes:
        part = take_rows(entry, (start, start + count), shape[0])
        parts.append(part)
        assert part.algorithm == "LOKR" and row_count(part) == count
        assert_same(change_weight(part, base[:count])[:1], [whole[start : start + count]])
        # what the library computes from it
        assert_same([entry_delta(part, (count, shape[1]))], [whole[start : start + count]])
        # the shared second half, and at most two more rows of the first than a share needs
        block = shape[0] // a
        first = part.tensors.get("lokr_w1", part.tensors.get("lokr_w1_a"))
        assert len(first) <= -(-count // block) + 1
        assert ("rows" in part.options) == bool(start % block or (start + count) % block)
        start += count
    again = fuse_rows(parts, sizes)
    assert "rows" not in again.options
    assert all(torch.equal(v, entry.tensors[k]) for k, v in again.tensors.items())


@given(st.data())
@quick
def test_any_boundaries(data):
    algorithm = data.draw(st.sampled_from(["lora", "loha", "lokr", "glora", "full", "ia3", "shira", "miss", "mini"]))
    a, b, c, d = (data.draw(st.integers(1, 6)) for _ in range(4))
    kernel = data.draw(st.sampled_from([(), (3,), (1, 1), (2, 3)]))
    maker = Maker((a * b, c * d, *kernel), data.draw(st.integers(0, 99)))
    rank, dora = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["", "out"]))
    core = bool(kernel) and prod(kernel) > 1 and data.draw(st.booleans())
    layout = data.draw(st.sampled_from(["full", "low w2", "low both", "core" if core else "full"]))
    entry = {
        "lora": lambda: maker.lora(rank, core, dora),
        "loha": lambda: maker.loha(rank, core, dora),
        "lokr": lambda: maker.lokr(a, layout, c, rank, dora),
        "glora": lambda: maker.glora(rank, core),
        "full": maker.full,
        "ia3": maker.ia3,
        "shira": lambda: maker.shira(rank * 5),
        "miss": lambda: maker.miss(r=min(rank, c * d)),
        "mini": lambda: maker.miss("mini", min(rank, c * d), b),
    }[algorithm]()
    cuts = sorted(data.draw(st.sets(st.integers(1, a * b - 1), max_size=4)) if a * b > 1 else [])
    bounds = [0, *cuts, a * b]
    base, bias = maker.weight(), maker.tensor(a * b)
    whole, whole_bias = change_weight(entry, base, bias)
    parts = []
    for start, stop in pairwise(bounds):
        parts.append(take_rows(entry, (start, stop), a * b))
        found = change_weight(parts[-1], base[start:stop], bias[start:stop])
        assert_same(found, (whole[start:stop], whole_bias[start:stop]))
    # a slice of a slice is a slice
    first, last = data.draw(st.integers(0, len(cuts))), None
    start, stop = bounds[first], bounds[first + 1]
    inner = data.draw(st.integers(start, stop - 1))
    last = data.draw(st.integers(inner + 1, stop))
    nested = take_rows(parts[first], (inner - start, last - start), stop - start)
    assert_same(change_weight(nested, base[inner:last], bias[inner:last]), (whole[inner:last], whole_bias[inner:last]))
    again = fuse_rows(parts, [stop - start for start, stop in pairwise(bounds)])
    assert_same(change_weight(again, base, bias), (whole, whole_bias))
    if algorithm not in ("shira", "mini"):
        assert size(again) == size(entry) and again.options == entry.options


@given(st.data())
@quick
def test_exchanging_halves_of_any_window(data):
    """Windows begin and end anywhere; only where no product of the same size exists is the change written out."""
    b, c = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    a = data.draw(st.integers(1, 6))
    maker = Maker((a * b, 2 * c, *data.draw(st.sampled_from([(), (2, 2)]))), data.draw(st.integers(0, 99)))
    entry = maker.lokr(a, data.draw(st.sampled_from(["full", "low w2", "core"] if maker.kernel else ["full", "low w2"])))
    start = data.draw(st.integers(0, a * b - 1))
    count = data.draw(st.integers(1, a * b - start))
    part = take_rows(entry, (start, start + count), a * b)
    if count % 2:
        with pytest.raises(CheckpointError, match="no two halves"):
            swap_halves(part, count)
        return
    base = maker.weight()[:count]
    whole, _ = change_weight(part, base.roll(count // 2, 0))
    swapped = swap_halves(part, count)
    assert_same(change_weight(swapped, base)[:1], [whole.roll(count // 2, 0)])
    if (start, count) == (0, a * b):
        assert swapped.algorithm == "LOKR"


@pytest.mark.parametrize("a", [2, 3, 5])
def test_swapped_lokr_stays_a_product(a):
    """Also with an odd number of blocks, and back again to the same factors."""
    maker = Maker((a * 4, 6))
    entry = maker.lokr(a, dora="out")
    swapped = swap_halves(entry, a * 4)
    assert swapped.algorithm == "LOKR" and ("rows" in swapped.options) == bool(a % 2)
    back = swap_halves(swapped, a * 4)
    assert "rows" not in back.options and all(torch.equal(v, entry.tensors[k]) for k, v in back.tensors.items())
    adapter_of(swapped, geometry_from_shape((a * 4, 6)), torch.float64)


def test_factors_that_serve_all_rows_are_shared():
    maker = Maker((24, 8))
    for entry, name in ((maker.lora(), "lora_A.weight"), (maker.loha(), "hada_w1_b"), (maker.lokr(2), "lokr_w2")):
        assert take_rows(entry, (8, 16), 24).tensors[name] is entry.tensors[name]
    whole = maker.lora()
    assert take_rows(whole, (0, 24), 24) is whole


# -------------------------------------------------------------------------------------------------- putting together
def own_parts(make_part, sizes=(8, 4, 12), width: int = 8) -> list[Entry]:
    return [make_part(Maker((n, width), seed)) for seed, n in enumerate(sizes)]


def check_fused(parts, sizes, width: int = 8) -> Entry:
    whole = fuse_rows(parts, sizes)
    maker = Maker((sum(sizes), width), 9)
    base, bias = maker.weight(), maker.tensor(sum(sizes))
    expected, start = [], 0
    for part, n in zip(parts, sizes):
        rows = slice(start, start + n)
        expected.append(change_weight(part, base[rows], bias[rows]) if part else (base[rows], bias[rows]))
        start += n
    assert_same(change_weight(whole, base, bias), [torch.cat(column) for column in zip(*expected)])
    return whole


SIZES = (8, 4, 12)


@pytest.mark.parametrize("dora", ["", "out"])
@pytest.mark.parametrize("name", ["lora", "loha"])
def test_low_rank_parts_become_blocks(name, dora):
    parts = own_parts(lambda m: getattr(m, name)(2 + m.out % 3, dora=dora, scale=m.out / 8))
    ranks = [p.rank for p in parts]
    whole = check_fused(parts, SIZES)
    assert whole.rank == sum(ranks) and whole.alpha == whole.scale * whole.rank
    # and come apart again with the ranks they had
    for part, start, n, r in zip(parts, (0, 8, 12), SIZES, ranks):
        again = take_rows(whole, (start, start + n), 24)
        assert again.rank == r and size(again) == size(part)
        base = Maker((n, 8), 3).weight()
        assert_same(change_weight(again, base)[:1], change_weight(part, base)[:1])


@pytest.mark.parametrize("name", ["lora", "loha"])
def test_cores_become_blocks(name):
    shapes = [(8, 4, 3, 3), (4, 4, 3, 3), (12, 4, 3, 3)]
    parts = [getattr(Maker(s, seed), name)(2, True) for seed, s in enumerate(shapes)]
    whole = fuse_rows(parts, SIZES)
    base = Maker((24, 4, 3, 3)).weight()
    pieces = [change_weight(p, base[a : a + n])[0] for p, a, n in zip(parts, (0, 8, 12), SIZES)]
    assert_same(change_weight(whole, base)[:1], [torch.cat(pieces)])


def test_only_what_is_shared_is_shared():
    """q and k out of one fused file, v trained apart: two sets of ranks, not three; an untrained part needs none."""
    maker = Maker((16, 8))
    both = maker.lora(3)
    other = Maker((8, 8), 5).lora(2)
    untrained = Maker((8, 8), 6).lora(4)
    untrained.tensors["lora_B.weight"].zero_()
    parts = [take_rows(both, (0, 8), 16), untrained, other, take_rows(both, (8, 16), 16)]
    assert check_fused(parts, [8, 8, 8, 8]).rank == 5
    dead = [Maker((8, 8), s).lora(4) for s in (1, 2)]
    for part in dead:
        part.tensors["lora_B.weight"].zero_()
    assert check_fused(dead, [8, 8]).rank == 4


@pytest.mark.parametrize(
    "make_part",
    [
        lambda m: m.lora(),
        lambda m: m.loha(),
        lambda m: m.lokr(m.out // 4),
        lambda m: m.full(),
        lambda m: m.full(weight=False),
        lambda m: m.ia3(),
        lambda m: m.diag_oft(2, rescale=True),
        lambda m: m.miss(),
        lambda m: m.miss("bat", r=2),
        lambda m: m.shira(6),
    ],
)
def test_modules_without_an_adapter_stay_as_they_are(make_part):
    for missing in range(3):
        parts = own_parts(make_part)
        if parts[0].algorithm == "LOKR":
            parts = [take_rows(Maker((24, 8)).lokr(6), r, 24) for r in ((0, 8), (8, 12), (12, 24))]
        parts[missing] = None
        check_fused(parts, SIZES)


@pytest.mark.parametrize("constraint", [0.0, 0.02, 5.0])
def test_rotations_with_limits_of_their_own(constraint):
    parts = own_parts(lambda m: m.diag_oft(2, constraint * (m.out > 4), m.out == 4))
    check_fused(parts, SIZES)


def test_repeated_blocks():
    same = [Maker((n, 8)).miss("mini", 2, 4) for n in SIZES]
    for part in same:
        part.tensors = same[0].tensors
    assert check_fused(same, SIZES).tensors["miss_block"].shape == (2, 4)
    check_fused(own_parts(lambda m: m.miss("mini", 2, 4)), SIZES)
    check_fused(own_parts(lambda m: m.miss("mini" if m.out == 4 else True, 2, 4)), SIZES)
    check_fused([same[0], None, same[2]], SIZES)


def test_biases_that_only_some_have():
    parts = own_parts(lambda m: m.full(bias=m.out > 4, weight=m.out != 8))
    assert set(check_fused(parts, SIZES).tensors) == {"diff", "diff_b"}


def test_strengths_are_made_equal():
    maker = Maker((24, 8))
    whole = maker.lokr(6)
    parts = [take_rows(whole, rows, 24) for rows in ((0, 8), (8, 12), (12, 24))]
    parts[1].scale, parts[2].scale = 0.1, 3.0
    check_fused(parts, SIZES)
    shira = own_parts(lambda m: m.shira(5))
    shira[1].scale = 2.0
    check_fused(shira, SIZES)


def test_several_algorithms_a_module():
    maker = Maker((24, 8))
    lora, bias = maker.lora(), maker.full(weight=False)
    modules = [[take_rows(e, rows, 24) for e in (lora, bias)] for rows in ((0, 8), (8, 16), (16, 24))]
    modules[1] = modules[1][:1]
    fused = fuse_modules(modules, [8, 8, 8])
    assert [e.algorithm for e in fused] == ["LORA", "FULL"]
    assert torch.equal(fused[0].tensors["lora_B.weight"], lora.tensors["lora_B.weight"])
    assert torch.equal(fused[1].tensors["diff_b"][8:16], torch.zeros(8, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda m: take_rows(m.lora(), (0, 8), 32), "24 output rows, the weight has 32"),
        (lambda m: take_rows(m.lora(), (8, 8), 24), "are not rows"),
        (lambda m: take_rows(m.lora(), (-1, 8), 24), "are not rows"),
        (lambda m: take_rows(m.lora(), (8, 25), 24), "are not rows"),
        (lambda m: take_rows(m.diag_oft(6), (0, 8), 24), "cut a block of 6 rows"),
        (lambda m: take_rows(m.miss("bat", 3), (0, 8), 24), "cut a block of 3 rows"),
        (lambda m: take_rows(Entry("LYCORIS_BOFT", {"oft_blocks": m.tensor(2, 6, 4, 4)}), (0, 8), 24), "butterfly"),
        (lambda m: swap_halves(Entry("LYCORIS_BOFT", {"oft_blocks": m.tensor(2, 6, 4, 4)}), 24), "butterfly"),
        (lambda m: swap_halves(m.diag_oft(8), 24), "cut a block of 8 rows"),
        (lambda m: take_rows(Entry("MINE", {"x": m.tensor(24)}), (0, 8), 24), "not known how"),
        (lambda m: fuse_rows([m.lora(), m.loha()], [24, 24]), "LOHA and LORA"),
        (lambda m: fuse_rows([m.lokr(2), m.lokr(2)], [24, 24]), "lokr_w2"),
        (lambda m: fuse_rows([take_rows(m.lokr(2), (0, 8), 24)] * 2, [8, 8]), "whole blocks of 12"),
        (lambda m: fuse_rows([m.lokr(2), None], [24, 8]), "whole blocks"),
        (lambda m: fuse_rows([m.glora(), m.glora()], [24, 24]), "glora_a1"),
        (lambda m: fuse_rows([m.glora(), None], [24, 24]), "also a module's"),
        (lambda m: fuse_rows([m.oft(4), None], [24, 24]), "also a module's"),
        (lambda m: fuse_rows([m.oft(4), m.oft(4)], [24, 24]), "oft_R"),
        (lambda m: fuse_rows([m.ia3(), m.ia3(True)], [24, 24]), "differ in on_input"),
        (lambda m: fuse_rows([m.lora(dora="out"), None], [24, 24]), "magnitude"),
        (lambda m: fuse_rows([m.lora(dora="out"), m.lora()], [24, 24]), "differ in"),
        (lambda m: fuse_rows([m.diag_oft(4), m.diag_oft(6)], [24, 24]), "do not make one tensor"),
        (lambda m: fuse_rows([m.diag_oft(4), None], [24, 6]), "blocks of 4"),
        (lambda m: fuse_rows([m.lora(), m.lora()], [24, 8]), "its module has 8"),
        (lambda m: fuse_rows([None, None], [24, 8]), "cannot be put together"),
    ],
)
def test_refused_with_the_reason(act, reason):
    with pytest.raises(CheckpointError, match=reason):
        act(Maker((24, 8)))


def test_half_precision_and_eight_bits():
    """Slices keep the file's bits; where a strength must move into a factor, it does so in float32."""
    maker = Maker((24, 8))
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        entry = maker.lora()
        entry.tensors = {k: v.to(dtype) for k, v in entry.tensors.items()}
        parts = [take_rows(entry, (k, k + 8), 24) for k in (0, 8, 16)]
        again = fuse_rows(parts, [8, 8, 8])
        same = [torch.equal(v.float(), entry.tensors[k].float()) and v.dtype == dtype for k, v in again.tensors.items()]
        assert all(same)
        parts[1].scale /= 3
        assert fuse_rows(parts, [8, 8, 8]).tensors["lora_B.weight"].dtype == torch.float32
        other = Maker((8, 8), 1).lora()
        other.tensors = {k: v.to(dtype) for k, v in other.tensors.items()}
        assert fuse_rows([take_rows(entry, (0, 8), 24), other], [8, 8]).tensors["lora_A.weight"].dtype == dtype
