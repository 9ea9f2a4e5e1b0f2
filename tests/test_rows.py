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
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.sampled_from([(), (3,), (2, 3)]))
def test_in_blocks_of_any_size(tokens, out, block, space):
    grad, unscaled = torch.randn(2, tokens, out, *space, dtype=torch.float64)
    row = torch.randn(out, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        found = rows.rows_backward(grad, unscaled, row)
    torch.testing.assert_close(found, by_autograd(grad, unscaled, row))


def test_half_precision_is_summed_in_float32(monkeypatch):
    """Blocks that were rounded before they are added would lose the last of them."""
    monkeypatch.setattr(rows, "BLOCK", 8)
    grad, unscaled = torch.ones(2, 1000, 8, dtype=torch.bfloat16)
    total, scaled = rows.rows_backward(grad, unscaled, torch.full((8,), 0.5))
    assert torch.equal(total, torch.full((8,), 1000.0))
    assert scaled.dtype is torch.bfloat16 and torch.equal(scaled, grad / 2)
