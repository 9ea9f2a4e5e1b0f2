"""Matrix products against what they are in plain terms: any sizes, derivatives, transforms; and where blocks are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_diff.execution import products


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Whatever the machine has, as many as make blocks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(products, "ROWS", 4)


def batched(monkeypatch):
    """A list that grows with every batch of products."""
    made, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: made.append(len(a)) or real(a, b))
    return made


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


SIZES = st.sampled_from([1, 3, products.NARROW, 2 * products.NARROW, 50, 10 * products.NARROW, 170])
ROWS = st.sampled_from([0, 1, 7, 64, 300, 301, 512, 1280])


@settings(max_examples=80, deadline=None)
@given(ROWS, SIZES, SIZES, st.booleans())
def test_times(rows, width, inner, strided):
    x, weight = draw(rows, inner), draw(inner, width).T if strided else draw(width, inner)
    grad = torch.randn(rows, width, dtype=torch.float64)
    expected, found = x @ weight.T, products.times(x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(y, (x, weight), grad) for y in (expected, found)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(ROWS, SIZES, SIZES)
def test_narrow_product(rows, left, right):
    a, b = draw(rows, left), draw(rows, right)
    torch.testing.assert_close(products.narrow_product(a, b), a.T @ b, rtol=1e-12, atol=1e-12)


def test_where_blocks_are_made(monkeypatch):
    made = batched(monkeypatch)
    cases = ((512, 64, 1), (510, 64, 0), (513, 64, 0), (512, 31, 0), (2000, 161, 0), (1280, 160, 1), (256, 32, 1))
    for rows, width, count in cases:
        made.clear()
        products.times(draw(rows, 9), draw(width, 9))
        assert made == [2] * count, (rows, width)
        made.clear()
        products.narrow_product(draw(rows, 200), draw(rows, width))
        assert made == [2] * count, (rows, width)


def test_partial_sums_stay_small(monkeypatch):
    """However many threads there are, at most a quarter of what is multiplied."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    made = batched(monkeypatch)
    products.narrow_product(draw(16 * 4 * 64 - 16, 200), draw(16 * 4 * 64 - 16, 64))
    assert not made
    products.narrow_product(draw(16 * 4 * 64, 200), draw(16 * 4 * 64, 64))
    assert made == [16]


def test_not_in_half_precision(monkeypatch):
    made = batched(monkeypatch)
    products.times(torch.randn(512, 9).bfloat16(), torch.randn(64, 9).bfloat16())
    assert not made


def test_transforms():
    x, weight = draw(512, 20), draw(64, 20)
    found = torch.vmap(products.times, in_dims=(None, 0))(x, torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(found, torch.stack([x @ weight.T, 2 * x @ weight.T]))
    slopes = torch.func.grad(lambda w: products.times(x, w).square().sum())(weight)
    torch.testing.assert_close(slopes, 2 * (x @ weight.T).T @ x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    both = lambda x, weight: (products.times(x, weight), products.narrow_product(x, products.times(x, weight)))
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, width in ((512, 64), (300, 40)):
        x, weight = draw(rows, 20), draw(width, 20)
        torch.testing.assert_close(compiled(x, weight), (x @ weight.T, x.T @ (x @ weight.T)))
