"""Formulas of steps' weights: their gradients against autograd's, and what of a program's results is kept for them."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, adapt
from more_adapters import filled
from test_around import results
from torch import nn

from lycoris_diff.adapters.slot import larger
from lycoris_diff.execution import engine
from lycoris_diff.execution.steps import Conv
from lycoris_diff.execution.weights import Cores, Factor, KhatriRao

R, S, N = 3, 2, 5
SHAPES = {
    "rows": ((R, N), (S, N)),
    "columns": ((N, R), (N, S)),
    "cores": ((3, 2, 4, 1), (2, 5, 4, 1)),
}
FORMULAS = {
    "factor": (Factor("a", scaled=True, shape=(5, 3)), "rows"),
    "factor-swapped": (Factor("a", swapped=True), "rows"),
    "khatri-rao": (KhatriRao("a", "b"), "rows"),
    "khatri-rao-kernel": (KhatriRao("a", "b", scaled=True, shape=(6, 1, 5)), "rows"),
    "khatri-rao-swapped": (KhatriRao("a", "b", swapped=True, scaled=True), "rows"),
    "khatri-rao-upright": (KhatriRao("a", "b", swapped=True, upright=True, scaled=True), "columns"),
    "khatri-rao-upright-wide": (KhatriRao("a", "b", upright=True), "columns"),
    "cores": (Cores("a", "b", (4,)), "cores"),
}


@pytest.mark.parametrize("wanted", [("a", "b"), ("a",), ("b",), ()], ids=lambda w: "+".join(w) or "none")
@pytest.mark.parametrize("layout", ["rows-first", "columns-first"])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_the_weight(name, layout, wanted):
    formula, shapes = FORMULAS[name]
    wanted = tuple(n for n in wanted if n in formula.names)
    factors = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in zip("ab", SHAPES[shapes])}
    f = {**factors, "scale": 0.7}
    weight = formula(f)
    grad = torch.randn(weight.shape, dtype=weight.dtype)
    if layout == "columns-first":
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        found = formula.pull(f, grad, wanted)
    assert set(found) == set(wanted)
    for n in wanted:
        torch.testing.assert_close(found[n], torch.autograd.grad(weight, factors[n], grad, retain_graph=True)[0])


def test_khatri_rao_is_its_definition():
    first, second = torch.randn(R, N), torch.randn(S, N)
    w = KhatriRao("a", "b")({"a": first, "b": second})
    for i in range(R):
        for j in range(S):
            torch.testing.assert_close(w[i * S + j], first[i] * second[j])
    assert torch.equal(KhatriRao("a", "b", swapped=True, upright=True)({"a": first.T, "b": second.T}), w.T)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("algorithm", ["loha-tucker", "lora-tucker"])
def test_a_convolution_in_between_runs_once_where_its_result_fits(algorithm, monkeypatch):
    """The output of the core's convolution is kept for backward within the limit, else computed anew: the same gradients."""
    runs = []
    real = Conv.apply
    monkeypatch.setattr(Conv, "apply", lambda self, *args: runs.append(self) or real(self, *args))
    model, _ = adapt(nn.Conv2d(32, 24, 3, padding=1).double(), ALGORITHMS[algorithm](), "a")
    model.set_adapter("a")
    filled(model, 0.3)
    x = torch.randn(2, 32, 12, 12, dtype=torch.float64)
    found = results(model, x)
    assert len(runs) == 1
    for kept in (4 / 32 / 2, 0):  # room for the first step's result alone, and for none
        runs.clear()
        monkeypatch.setattr(engine, "KEPT", kept)
        torch.testing.assert_close(found, results(model, x), rtol=1e-12, atol=1e-12)
        assert len(runs) == 2


@pytest.mark.parametrize("algorithm", ["loha", "loha-tucker", "lora", "lora-tucker"])
def test_slots_have_other_ranks_than_their_configs(algorithm):
    """Room for contents of a larger rank: the factored form goes by the factors, on convolutions too."""
    layer = nn.Conv2d(12, 10, 3, padding=1).double()
    small, large = (adapt(layer, ALGORITHMS[algorithm](r=r), "a")[1].adapter("a") for r in (2, 3))
    slot = larger(small, large)
    with torch.no_grad():
        for name in slot.factor_shapes:
            slot.get_tensor(name).copy_(torch.randn(slot.factor_shapes[name]))
    f, x = slot.inputs(), torch.randn(2, 12, 5, 5, dtype=torch.float64)
    program = slot.program(f)
    torch.testing.assert_close(program.run(slot.geometry, x, f), slot.geometry.apply(x, slot.delta(f)))
    assert slot.config.r == 2 and program.width == (9 if algorithm.startswith("loha") else 3)
