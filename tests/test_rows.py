"""A factor on every output row: gradients in blocks against autograd's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_diff.execution import rows


def by_autograd(grad, unscaled, row):
    held, factor = unscaled.clone().requires_grad_(), row.clone().requires_grad_()
    return torch.autograd.grad(rows.scale_rows(held, factor, None), [factor, held], grad)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 3))
def test_in_blocks_of_any_size(tokens, out, block, space, room):
    grad, unscaled = torch.randn(2, tokens, out, *space, dtype=torch.float64)
    row = torch.randn(out, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        total, scaled = rows.rows_backward(grad, unscaled, row, room)
        alone = rows.sum_products(grad, unscaled)
    assert len(scaled) == tokens + (0 if space else room)
    expected = by_autograd(grad, unscaled, row)
    torch.testing.assert_close((total, scaled[:tokens]), expected)
    torch.testing.assert_close(alone, expected[0])


def test_half_precision_is_summed_in_float32(monkeypatch):
    """Blocks that were rounded before they are added would lose the last of them."""
    monkeypatch.setattr(rows, "BLOCK", 8)
    grad, unscaled = torch.ones(2, 1000, 8, dtype=torch.bfloat16)
    total, scaled = rows.rows_backward(grad, unscaled, torch.full((8,), 0.5))
    assert torch.equal(total, torch.full((8,), 1000.0))
    assert scaled.dtype is torch.bfloat16 and torch.equal(scaled, grad / 2)
    space = grad.T.reshape(1, 8, 1000)  # of a convolution
    assert torch.equal(rows.sum_products(space, space), total)
