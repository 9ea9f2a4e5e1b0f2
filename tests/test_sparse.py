"""SHiRA's three ways to run, against dense float64 operations: sparse products, single entries of the gradient, all of it."""

from __future__ import annotations

import accelerate
import pytest
import torch
from cases import adapt, randomize
from torch import nn

from lycoris_diff import ShiraConfig, inject_adapter
from lycoris_diff.execution import sparse
from lycoris_diff.execution.costs import Choice
from lycoris_diff.execution.sparse import BLOCK

WAYS = {
    "beside": Choice("beside", 0, 0),
    "entries": Choice("instead", 0, 0, sampled=True),
    "dense": Choice("instead", 0, 0),
}


def shira(seed):
    return ShiraConfig(r=2, target_modules=["layer"], random_seed=seed)


def forced(way):
    """A linear layer with SHiRA that runs in one way whatever its size, and what its cost model is asked for."""
    torch.manual_seed(0)
    model, adapted = adapt(nn.Linear(20, 28).double(), shira(0))
    randomize(model)
    adapted._choose = lambda adapter, f, *args, **more: (WAYS[way], adapter.program(f))
    return model, adapted


def gradients(model, x, grad):
    """Output, gradient of the input, and those of the values, as the library computes them."""
    x = x.clone().requires_grad_()
    values = [p for n, p in model.named_parameters() if n.endswith("shira_weight")]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *values], grad)]


def rebuilt(adapted, x, grad):
    """The same from dense matrices."""
    base, adapters = adapted.base_layer, adapted.adapters.values()
    at = [tuple(a.shira_indices.long()) for a in adapters]
    weight = base.weight.detach().clone()
    for adapter, positions in zip(adapters, at, strict=True):
        weight[positions] += adapter.shira_weight.detach() * adapter.scaling * adapter.get_strength()
    dense = grad.flatten(0, -2).T @ x.flatten(0, -2)
    scales = [a.scaling * a.get_strength() for a in adapters]
    entries = [dense[positions] * scale for positions, scale in zip(at, scales, strict=True)]
    return [x @ weight.T + base.bias.detach(), grad @ weight, *entries]


@pytest.mark.parametrize("tokens", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 276])
@pytest.mark.parametrize("way", WAYS)
def test_against_dense_matrices(way, tokens, fused):
    model, adapted = forced(way)
    x, grad = torch.randn(tokens, 20, dtype=torch.float64), torch.randn(tokens, 28, dtype=torch.float64)
    torch.testing.assert_close(gradients(model, x, grad), rebuilt(adapted, x, grad), rtol=1e-12, atol=1e-12)
    [plan] = adapted.plans.values()
    [term] = plan.call.terms
    assert (term.program is not None, term.sampled is not None) == (way == "beside", way == "entries")


@pytest.mark.parametrize("way", WAYS)
def test_two_adapters_at_other_strengths(way, fused):
    model, adapted = forced(way)
    inject_adapter(model.get_base_model(), shira(1), "second")
    model.set_adapter(["default", "second"])
    randomize(model)
    model.set_scale("second", -0.5)
    x, grad = torch.randn(2, 5, 20, dtype=torch.float64), torch.randn(2, 5, 28, dtype=torch.float64)
    torch.testing.assert_close(gradients(model, x, grad), rebuilt(adapted, x, grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_remembered_follows_the_positions(way, fused):
    model, adapted = forced(way)
    x, grad = torch.randn(9, 20, dtype=torch.float64), torch.randn(9, 28, dtype=torch.float64)
    gradients(model, x, grad)
    indices = adapted.adapters["default"].shira_indices
    moved = torch.stack([(indices[0] + 3) % 28, indices[1]])
    indices.copy_(moved)  # in place, as load_state_dict does
    torch.testing.assert_close(gradients(model, x, grad), rebuilt(adapted, x, grad), rtol=1e-12, atol=1e-12)
    adapted.adapters["default"].shira_indices = torch.stack([moved[0], (moved[1] + 1) % 20])  # another tensor
    torch.testing.assert_close(gradients(model, x, grad), rebuilt(adapted, x, grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_values_get_no_gradient(way, fused):
    model, adapted = forced(way)
    adapted.adapters["default"].shira_weight.requires_grad_(False)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    expected = rebuilt(adapted, x.detach(), torch.ones(6, 28, dtype=torch.float64))[1]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_changed_at_the_entries_alone(dtype, repeated, transposed, monkeypatch):
    """With the same bits as the whole weight in float32, rounded once; where a position occurs twice, its values add up."""
    torch.manual_seed(0)
    model, adapted = adapt(nn.Linear(20, 28).to(dtype), shira(0))
    randomize(model)
    adapter, base = adapted.adapters["default"], adapted.base_layer
    if transposed:
        base.weight.data = base.weight.data.T.contiguous().T
    if repeated:
        adapter.shira_indices.copy_(adapter.shira_indices.roll(1, 1).where(torch.arange(96) < 9, adapter.shira_indices))
    adapter.set_strength(0.7)
    change = adapter.shira_weight.detach() * adapter.get_strength() * adapter.scaling
    flat = adapter.shira_indices[0].long() * 20 + adapter.shira_indices[1].long()
    wanted = base.weight.detach().float().reshape(-1).index_add(0, flat, change).view(28, 20).to(dtype)
    x = torch.randn(5, 20, dtype=dtype)
    adapted._choose = lambda adapter, f, *args, **more: (WAYS["entries"], adapter.program(f))
    copies = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: copies.append(t.shape) or original(t, *a, **k))
    found = model(x).detach()
    monkeypatch.undo()
    assert ((28, 20) in copies) == (repeated or transposed)
    assert torch.equal(found, nn.functional.linear(x, wanted, base.bias))
    model.merge_adapter()
    assert torch.equal(base.weight, wanted) and base.weight.stride() == ((1, 28) if transposed else (20, 1))


def test_function_transforms_over_half_precision():
    """Values are mapped over and differentiated like any others, at the entries alone."""
    model, adapted = adapt(nn.Linear(20, 28).bfloat16(), shira(0))
    adapter, base = adapted.adapters["default"], adapted.base_layer
    adapter.program(adapter.inputs())  # what is remembered is there
    name = next(n for n, _ in model.named_parameters() if n.endswith("shira_weight"))
    x, values = torch.randn(5, 20, dtype=torch.bfloat16), torch.randn(3, 96)
    assert adapter.change_entries(base.weight, adapter.inputs()) is not None

    def run(v):
        return torch.func.functional_call(model, {name: v}, (x,)).float().square().sum()

    def dense(v):
        weight = (
            base.weight.detach().float().index_put(tuple(adapter.shira_indices.long()), adapter.scaling * v, accumulate=True)
        )
        return (x.float() @ weight.T + base.bias.float()).square().sum()

    torch.testing.assert_close(torch.vmap(run)(values), torch.stack([dense(v) for v in values]), rtol=0.02, atol=0)
    expected = torch.func.grad(dense)(values[0])
    assert (torch.func.grad(run)(values[0]) - expected).norm() <= 0.02 * expected.norm()


def test_offloaded_positions():
    """What is remembered of positions is not read where they are not."""
    model, _ = adapt(nn.Linear(20, 28), shira(0))
    randomize(model)
    x = torch.randn(300, 20)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_after_inference_mode(dtype):
    """What is remembered of positions may be part of a graph."""
    model, _ = adapt(nn.Linear(20, 28).to(dtype), shira(0))
    x = torch.randn(300, 20, dtype=dtype)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("shira_weight"))


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("tokens", [1, 127, 128, 300, 513, 5000])
def test_transposed_blocks(tokens, threads, monkeypatch):
    """Of any sizes, and never many at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for t in (torch.randn(tokens, 7), torch.randn(7, tokens).T, torch.randn(tokens, 7).bfloat16()):
        blocks = list(sparse._turned_blocks(t))
        assert torch.equal(torch.cat(blocks, 1), t.T.float())
        assert all(block.is_contiguous() and block.shape[1] <= sparse.BLOCK for block in blocks)
        assert max(block.untyped_storage().nbytes() for block in blocks) <= 4 * 7 * sparse.BLOCK * threads
