"""Norms of changes from the factors alone, against the norm of the change built out."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, LAYERS, Holder, randomize
from torch import nn

from lycoris_diff import LoHaConfig, LoKrConfig, get_peft_model
from lycoris_diff.adapters.lokr import LoKr
from lycoris_diff.diffusion.norms import SAMPLE_ABOVE, change_norm
from lycoris_diff.execution.geometry import geometry_of
from lycoris_diff.functional import norms

HOSTS = ["linear", "hf-conv1d", "conv1d-zeros", "conv2d-3x1", "conv3d-1x3x3", "conv2d-groups2"]


def layer_of(config, layer: nn.Module):
    model = get_peft_model(Holder(layer), config)
    randomize(model)
    return model.get_base_model().layer


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_norm_is_that_of_the_change(algorithm, host):
    layer = layer_of(ALGORITHMS[algorithm](), LAYERS[host]())
    expected = float(layer.get_delta_weight("default").norm())
    adapter = layer.adapter("default")
    weight = layer.base_weight() if adapter.depends_on_weight else None
    assert change_norm(adapter, weight) == pytest.approx(expected, rel=2e-4)
    # strength is not a part of it
    adapter.set_strength(0.0)
    assert change_norm(adapter, weight) == pytest.approx(expected, rel=2e-4)
    assert adapter.get_strength() == 0.0


def test_a_weight_that_is_needed_and_not_given():
    layer = layer_of(ALGORITHMS["lora-dora"](), nn.Linear(24, 36))
    assert change_norm(layer.adapter("default")) is None


def test_windows_of_a_product():
    """A share of a fused projection: only its rows count."""
    geometry = geometry_of(nn.Linear(12, 7, bias=False))
    for kind in ({"lokr_w2": (5, 6)}, {"lokr_w2_a": (5, 2), "lokr_w2_b": (2, 6)}):
        shapes = {"lokr_w1": (4, 2), **kind}
        adapter = LoKr(geometry, LoKrConfig(r=2, alpha=3, rows=(8, 7)), shapes)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        dense = adapter.delta(adapter.inputs())
        assert dense.shape == (7, 12)
        assert change_norm(adapter) == pytest.approx(float(dense.norm()), rel=1e-4)


@pytest.mark.parametrize("second", ["full", "pair", "core"])
@pytest.mark.parametrize("first", ["full", "pair", "pair of large rank"])
@pytest.mark.parametrize("rows", [None, (0, 20), (3, 9), (5, 5), (7, 1), (18, 2)])
def test_lokr_and_windows_of_it(rows, first, second):
    torch.manual_seed(0)
    r = 9 if first == "pair of large rank" else 2
    f = {"lokr_w1": torch.randn(4, 3)} if first == "full" else {"lokr_w1_a": torch.randn(4, r), "lokr_w1_b": torch.randn(r, 3)}
    if second == "full":
        f |= {"lokr_w2": torch.randn(5, 2, 3)}
        w2 = f["lokr_w2"]
    elif second == "pair":
        f |= {"lokr_w2_a": torch.randn(5, 2), "lokr_w2_b": torch.randn(2, 6)}
        w2 = f["lokr_w2_a"] @ f["lokr_w2_b"]
    else:
        f |= {"lokr_t2": torch.randn(2, 2, 3), "lokr_w2_a": torch.randn(2, 5), "lokr_w2_b": torch.randn(2, 2)}
        w2 = torch.einsum("pqk,po,qi->oik", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    w1 = f["lokr_w1"] if first == "full" else f["lokr_w1_a"] @ f["lokr_w1_b"]
    dense = torch.kron(w1, w2.flatten(1))  # columns in another order, which a norm does not see
    if rows is not None:
        dense = dense[rows[0] : sum(rows)]
    assert float(norms.lokr(f, rows)) == pytest.approx(float(dense.double().square().sum()), rel=1e-5)


def test_shira_with_repeated_positions():
    f = {"shira_weight": torch.tensor([1.0, 2.0, -4.0]), "shira_indices": torch.tensor([[1, 1, 0], [2, 2, 5]])}
    assert float(norms.shira(f)) == 3.0**2 + 4.0**2


@pytest.mark.parametrize("cored", [False, True])
@pytest.mark.parametrize("rank", [2, 30])
def test_loha_in_pieces(rank, cored, monkeypatch):
    monkeypatch.setattr(norms, "_AT_ONCE", 40)  # a few rows at a time
    torch.manual_seed(0)
    f, halves = {}, []
    for k in "12":
        a, b = torch.randn(rank, 7), torch.randn(rank, 12)
        core = torch.randn(rank, rank, 3) if cored else torch.eye(rank)[..., None]
        halves.append(torch.einsum("pqk,po,qi->oik", core.double(), a.double(), b.double()))
        f |= {f"hada_w{k}_a": a if cored else a.mT, f"hada_w{k}_b": b} | ({f"hada_t{k}": core} if cored else {})
    assert float(norms.loha(f)) == pytest.approx(float((halves[0] * halves[1]).square().sum()), rel=1e-5)


def test_wide_loha_is_estimated():
    layer = layer_of(LoHaConfig(r=24, alpha=24, target_modules="all"), nn.Linear(600, 700))
    assert SAMPLE_ABOVE < 600 * 700
    exact = float(layer.get_delta_weight("default").norm())
    assert change_norm(layer.adapter("default")) == pytest.approx(exact, rel=0.1)


def test_zero_and_not_finite():
    for fill, check in ((0.0, lambda n: n == 0.0), (float("nan"), lambda n: n != n), (1e30, lambda n: n == float("inf"))):
        layer = layer_of(ALGORITHMS["lokr"](), nn.Linear(24, 36))
        with torch.no_grad():
            layer.adapter("default").lokr_w2_b.fill_(fill)
        norm = change_norm(layer.adapter("default"))
        assert norm is not None and check(norm)
