"""Every layout of the factors against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from readcases import check, normal, only, pair

from lycoris_diff.checkpoints.parse import raw_from_tensors
from lycoris_diff.errors import CheckpointError


def test_pointwise_lora_in_two_or_four_axes():
    b, a = normal(6, 3), normal(3, 8)
    want = (b @ a).reshape(6, 8, 1, 1)
    for up in (b, b[..., None, None]):
        for down in (a, a[..., None, None]):
            entries = check({"lora_up.weight": up, "lora_down.weight": down}, (6, 8, 1, 1), want)
            shapes = {t.dim() for t in entries[0].tensors.values()}
            assert len(shapes) == 1


def test_onetrainer_s_loha_in_four_axes():
    a1, a2, b1, b2 = normal(6, 2), normal(6, 2), normal(2, 8, 3, 3), normal(2, 8, 3, 3)
    want = ((a1 @ b1.flatten(1)) * (a2 @ b2.flatten(1))).reshape(6, 8, 3, 3)
    t = {"hada_w1_a": a1[..., None, None], "hada_w1_b": b1, "hada_w2_a": a2[..., None, None], "hada_w2_b": b2}
    check(t, (6, 8, 3, 3), want)


def test_lokr_factors_with_their_kernel_axes():
    w1, a, b = normal(2, 4), normal(3, 2), normal(2, 2, 3, 3)
    w2 = (a @ b.flatten(1)).reshape(3, 2, 3, 3)
    want = torch.einsum("ac,bdij->abcdij", w1, w2).reshape(6, 8, 3, 3)
    check({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, (6, 8, 3, 3), want)
    check({"lokr_w1": w1[..., None, None], "lokr_w2": w2}, (6, 8, 3, 3), want)


@pytest.mark.parametrize("trailing", [False, True])
def test_cores_of_conv1d_with_and_without_a_last_axis(trailing):
    """PEFT keeps (r, r, k, 1), LyCORIS (r, r, k)."""
    t2, w1, a, b = normal(2, 2, 3), normal(2, 2), normal(2, 3), normal(2, 4)
    w2 = torch.einsum("ijk,ip,jq->pqk", t2, a, b)
    want = torch.einsum("ac,bdk->abcdk", w1, w2).reshape(6, 8, 3)
    core = t2[..., None] if trailing else t2
    check({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}, (6, 8, 3), want)
    a, b = normal(2, 6), normal(2, 8)
    half = torch.einsum("ijk,ip,jq->pqk", t2, a, b)
    t = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": core, "hada_w2_a": a, "hada_w2_b": b, "hada_t2": core}
    check(t, (6, 8, 3), half * half)


@pytest.mark.parametrize("out, columns, rank", [(6, 8, 3), (8, 8, 3), (6, 8, 7), (4, 4, 4)])
def test_glora_in_both_orders(out, columns, rank):
    a1, a2, b1, b2 = normal(columns, rank), normal(rank, columns), normal(out, rank), normal(rank, columns)
    new = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    old = {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    want = lambda w: w @ a1 @ a2 + b1 @ b2
    check(new, (out, columns), want)
    if rank != out:
        check(old, (out, columns), want)


def test_an_ambiguous_glora_goes_by_the_rest_of_the_file():
    def old(name, out, columns, rank):
        shapes = {"a1": (rank, columns), "a2": (columns, rank), "b1": (rank, columns), "b2": (out, rank)}
        return {f"lora_unet_{name}.{k}.weight": normal(*s) for k, s in shapes.items()}

    square, plain = old("square", 4, 4, 4), old("plain", 6, 8, 2)
    raw = raw_from_tensors(square | plain)
    found = {m.name: m.entries[0].tensors for m in raw.modules}
    assert torch.equal(found["square"]["glora_a1"], square["lora_unet_square.a2.weight"])
    assert any("both orders" in n for n in raw.notes)
    alone = raw_from_tensors(square).modules[0].entries[0].tensors
    assert torch.equal(alone["glora_a1"], square["lora_unet_square.a1.weight"])


def test_glora_of_convolutions_and_its_core():
    a1, a2, b1, b2 = normal(8, 2, 1, 1), normal(2, 8, 1, 1), normal(6, 2, 1, 1), normal(2, 8, 3, 3)
    a = a1[..., 0, 0] @ a2[..., 0, 0]
    want = lambda w: torch.einsum("oikl,ij->ojkl", w, a) + torch.einsum("or,rikl->oikl", b1[..., 0, 0], b2)
    check({"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}, (6, 8, 3, 3), want)
    b2, bm = normal(2, 8, 1, 1), normal(2, 2, 3, 3)
    want = lambda w: torch.einsum("oikl,ij->ojkl", w, a) + torch.einsum("op,pqkl,qi->oikl", b1[..., 0, 0], bm, b2[..., 0, 0])
    check({"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "bm.weight": bm}, (6, 8, 3, 3), want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bool])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_flags_of_any_type(on_input, dtype):
    w = normal(1, 8, 1, 1) if on_input else normal(1, 6, 1, 1)
    shape = (1, 8, 1, 1) if on_input else (6, 1, 1, 1)
    check({"weight": w, "on_input": torch.tensor(on_input).to(dtype)}, (6, 8, 3, 3), lambda x: x * w.reshape(shape))


def test_a_weight_without_on_input_is_no_ia3():
    b, a = pair()
    raw = raw_from_tensors({"x.weight": normal(6), "y.lora_up.weight": b, "y.lora_down.weight": a})
    assert [m.name for m in raw.modules] == ["y"] and "trained in full" in raw.unknown["x.weight"]


def test_norms_and_full_weights():
    norm, b_norm = normal(6), normal(6)
    (entry,) = only({"w_norm": norm, "b_norm": b_norm})
    assert entry.algorithm == "NORM" and torch.equal(entry.tensors["b_norm"], b_norm)
    (entry,) = only({"w_norm": norm})
    assert set(entry.tensors) == {"w_norm"}
    (entry,) = only({"diff": norm, "diff_b": b_norm})  # as ai-toolkit spells it
    assert entry.algorithm == "NORM" and torch.equal(entry.tensors["w_norm"], norm)
    with pytest.raises(CheckpointError, match="'w_norm' is missing"):
        only({"b_norm": b_norm})
    diff = normal(6, 8, 3, 3)
    (entry,) = check({"diff": diff, "diff_b": b_norm}, (6, 8, 3, 3), diff)
    assert torch.equal(entry.tensors["diff_b"], b_norm)
    (entry,) = only({"diff_b": b_norm})
    assert entry.algorithm == "FULL" and set(entry.tensors) == {"diff_b"}


def test_biases_beside_lora():
    b, a, bias = normal(6, 2), normal(2, 8), normal(6)
    lora = {"lora_B.weight": b, "lora_A.weight": a, "alpha": torch.tensor(1.0)}
    entries = check(lora | {"lora_B.bias": bias}, (6, 8), b @ a / 2)
    assert torch.allclose(entries[1].tensors["diff_b"], bias / 2)  # it passes through the scale
    entries = check(lora | {"diff_b": bias}, (6, 8), b @ a / 2)
    assert torch.equal(entries[1].tensors["diff_b"], bias)
    dense = normal(6, 8)  # A1111 adds it before the scale
    check(lora | {"bias": dense}, (6, 8), (b @ a + dense) / 2)
    raw = raw_from_tensors({f"x.{k}": v for k, v in (lora | {"bias": bias}).items()})
    assert "trained in full" in raw.unknown["x.bias"] and len(raw.modules[0].entries) == 1


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_sparse_remainders_are_added(kernel):
    columns = 8 * (9 if kernel else 1)
    b, a = normal(6, 2, *[1] * len(kernel)), normal(2, 8, *kernel)
    dense = torch.zeros(6, columns, dtype=torch.float64)
    rows, places = torch.tensor([0, 3, 5]), torch.tensor([1, columns - 1, 0])
    dense[rows, places] = values = normal(3).half().double()
    t = {"lora_up.weight": b, "lora_down.weight": a, "alpha": torch.tensor([2.0])}
    t |= {"bias_indices": torch.stack([rows, places]).short(), "bias_values": values.half()}
    t |= {"bias_size": torch.tensor([6, columns]).short()}
    want = (b.flatten(1) @ a.flatten(1) + dense).reshape(6, 8, *kernel)
    entries = check(t, (6, 8, *kernel), want)
    assert [e.algorithm for e in entries] == ["LORA", "SHIRA"]


def test_16_bit_positions_that_wrapped_around():
    columns = 40_000
    b, a = normal(2, 1), normal(1, columns)
    dense = torch.zeros(2, columns, dtype=torch.float64)
    dense[1, 39_999] = 2.0
    t = {"lora_up.weight": b, "lora_down.weight": a, "bias_values": torch.tensor([2.0]).half()}
    wrap = lambda *n: torch.tensor(n).to(torch.int16)
    t |= {"bias_indices": torch.stack([wrap(1), wrap(39_999)]), "bias_size": wrap(2, columns)}
    check(t, (2, columns), b @ a + dense)
    with pytest.raises(CheckpointError, match="16 bits were too few"):
        only(t | {"lora_down.weight": normal(1, 70_000), "bias_size": wrap(2, 70_000)})


def test_old_dora_spellings_and_axes():
    b, a = normal(6, 2), normal(2, 8)
    lora = {"lora_up.weight": b, "lora_down.weight": a}
    rows = {"dora_scale": normal(6, 1)}, {"dora_scale": normal(6)}, {"magnitude": normal(6)}
    rows += {"lora_magnitude_vector": normal(6)}, {"lora_magnitude_vector.weight": normal(6)}, {"dora_scale": normal(1, 6)}
    for magnitude in rows:
        (entry,) = only(lora | magnitude)
        assert entry.options["dora_axis"] == "out" and entry.tensors["lora_magnitude_vector"].shape == (6,)
    (entry,) = only(lora | {"dora_scale": normal(1, 8)})
    assert entry.options["dora_axis"] == "in" and entry.tensors["lora_magnitude_vector"].shape == (1, 8)
    conv = {"lora_up.weight": normal(6, 2, 1, 1), "lora_down.weight": normal(2, 6, 3, 3)}  # square
    for shape, axis in (((6, 1, 1, 1), "out"), ((1, 6, 1, 1), "in")):
        (entry,) = only(conv | {"dora_scale": normal(*shape)})
        assert entry.options["dora_axis"] == axis and entry.tensors["lora_magnitude_vector"].shape == (1, 6, 1, 1)
    (entry,) = only(conv | {"lora_magnitude_vector": normal(1, 6, 1, 1)})  # PEFT has rows only
    assert entry.options["dora_axis"] == "out"
    for bad in (normal(7, 1), normal(8), normal(6, 8), normal(1, 5)):
        with pytest.raises(CheckpointError, match="DoRA magnitude of shape"):
            only(lora | {"dora_scale": bad})
    for other in (
        {"diff": normal(6, 8)},
        {"a1.weight": normal(8, 2), "a2.weight": normal(2, 8), "b1.weight": normal(6, 2), "b2.weight": normal(2, 8)},
    ):
        with pytest.raises(CheckpointError, match="no program writes"):
            only(other | {"dora_scale": normal(6, 1)})


def test_sd_scripts_oft_in_lists_of_blocks():
    """Flux: one list, or one for each share of a fused weight with a limit of its own; blocks of two sizes."""
    (entry,) = only({"oft_blocks.0": normal(4, 2, 2), "alpha": torch.tensor(0.1)})
    assert entry.tensors["oft_blocks"].shape == (4, 2, 2) and entry.options["constraint"] == pytest.approx(0.1)
    parts, alpha = [normal(4, 2, 2), 1e-3 * normal(4, 2, 2), normal(4, 4, 4)], 0.05
    t = {f"oft_blocks.{k}": p for k, p in enumerate(parts)} | {"alpha": torch.tensor(alpha, dtype=torch.float64)}

    def turned(weight):
        rows, start = [], 0
        for part in parts:
            size = part.shape[0] * part.shape[1]
            skew = part - part.mT
            skew = skew * min(1.0, alpha * size / float(skew.norm()))
            eye = torch.eye(part.shape[1], dtype=torch.float64)
            rotation = torch.block_diag(*((eye + skew) @ torch.linalg.inv(eye - skew)))
            rows.append(rotation.T @ weight[start : start + size])
            start += size
        return torch.cat(rows) - weight

    check(t, (32, 5), turned)


def test_oft_on_the_input():
    (entry,) = only({"oft_R.weight": normal(3, 6)})
    assert (entry.algorithm, entry.options["scaled"]) == ("OFT", False)
    for mark in (torch.tensor(True), torch.empty(0)):
        assert only({"oft_R.weight": normal(3, 6), "oft_R.scaled_oft": mark})[0].options["scaled"] is True
    with pytest.raises(CheckpointError, match=r"'oft_R' has shape \(3, 5\)"):
        only({"oft_R.weight": normal(3, 5)})


def test_miss_without_a_config():
    block = normal(3, 6)
    rows, columns = torch.arange(6), torch.arange(8)
    check({"miss_block": block}, (6, 8), block[columns % 3][:, rows % 6].T)
    check({"miss_block": block[:, :2]}, (6, 8), block[:, :2][columns % 3][:, rows % 2].T)
    bat = normal(3, 2, 2)

    def change(weight):
        pieces = weight.reshape(3, 2, 4, 2).transpose(1, 2)
        moved = torch.einsum("abij,ajk->abik", pieces, bat) + bat[:, None]
        return moved.transpose(1, 2).reshape(6, 8)

    check({"miss_block": bat}, (6, 8), change)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.int16])
def test_shira_positions_of_any_type(dtype):
    values, positions = normal(4), torch.tensor([[0, 1, 5, 5], [7, 0, 2, 2]])
    want = torch.zeros(6, 8, dtype=torch.float64).index_put(tuple(positions), values, accumulate=True)
    (entry,) = check({"shira_weight": values, "shira_indices": positions.to(dtype)}, (6, 8), want)
    assert entry.tensors["shira_indices"].dtype == torch.int32


def test_tlora_started_from_a_random_matrix_is_refused():
    t = {"q_layer.weight": normal(2, 8), "p_layer.weight": normal(6, 2), "lambda_layer": normal(1, 2)}
    assert only(t)[0].options == {"sig_type": "principal"}
    assert only(t, metadata={"lycoris_config": '{"sig_type": "last"}'})[0].options == {"sig_type": "last"}
    with pytest.raises(CheckpointError, match="random matrix"):
        only(t, metadata={"lycoris_config": '{"use_data_init": false}'})
