"""Gradients: finite differences, the dense autograd reference, and the ways torch can run a layer."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from cases import (
    ALGORITHMS,
    LAYERS,
    PADDED_LAYERS,
    PLAIN_LAYERS,
    SHAPED_LAYERS,
    adapt,
    as_function,
    build,
    dense_gradients,
    make_input,
    pairs,
    randomize,
    relative_error,
    trainable,
)
from torch import nn

pytestmark = pytest.mark.usefixtures("fused")


def own_gradients(model, adapted, x, cotangent):
    x = x.detach().requires_grad_()
    wanted = trainable(adapted) | {"input": x}
    return dict(zip(wanted, torch.autograd.grad(model(x), list(wanted.values()), cotangent)))


def compare(config, model, adapted, x, tolerance):
    cotangent = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(x.dtype)
    own, dense = own_gradients(model, adapted, x, cotangent), dense_gradients(config, adapted, x, cotangent)
    assert own.keys() == dense.keys()
    for name in own:
        assert own[name].dtype == (x.dtype if name == "input" else trainable(adapted)[name].dtype)
        assert relative_error(own[name], dense[name]) < tolerance, name


@pytest.mark.parametrize(("algorithm", "layer"), pairs(LAYERS))
def test_equal_to_dense_autograd(algorithm, layer):
    config, model, adapted = build(algorithm, layer)
    for large in (False, True):
        compare(config, model, adapted, make_input(adapted.base_layer, large), 1e-8)


@pytest.mark.parametrize(
    ("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv1d-circular", "conv2d-groups2")})
)
def test_equal_to_dense_autograd_in_float32(algorithm, layer):
    config, model, adapted = build(algorithm, layer, torch.float32)
    for large in (False, True):
        compare(config, model, adapted, make_input(adapted.base_layer, large), 1e-4)


@pytest.mark.parametrize(("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "conv2d-zeros")}))
def test_half_precision_base_trains_float32_factors(algorithm, layer):
    """Input gradients come back in the base's dtype, factor gradients in float32, both near the exact ones."""
    config, model, adapted = build(algorithm, layer, torch.bfloat16)
    for large in (False, True):
        compare(config, model, adapted, make_input(adapted.base_layer, large), 4e-2)


@pytest.mark.parametrize(
    ("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv1d-reflect", "conv2d-stride2")})
)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_finite_differences(algorithm, layer, large):
    """gradcheck in the fast mode: random projections of the full Jacobians."""
    _, model, adapted = build(algorithm, layer)
    run, inputs = as_function(model, make_input(adapted.base_layer, large))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-5, rtol=1e-3, eps=1e-6)


TINY = {
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (2, 3), padding=(1, 0), stride=(1, 2), padding_mode="circular"), (1, 6, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=2, dilation=2), (2, 6, 4)),
}
TINY_FIELDS = {
    "lokr": {"r": 1, "alpha": 2, "decompose_factor": 2},
    "lokr-both": {"r": 1, "alpha": 2, "decompose_factor": 3},
    "lokr-tucker": {"r": 1, "alpha": 2, "decompose_factor": 2},
    "miss-odd": {"r": 4},
    "miss": {"r": 3},
    "miss-mini": {"r": 3, "mini_r": 2},
    "miss-mini-odd": {"r": 4, "mini_r": 2},
    "miss-bat": {"r": 2},
    "shira": {"r": 1},
    "lokr-dora": {"r": 1, "decompose_factor": 2},
    "lokr-dora-in": {"r": 1, "decompose_factor": 2},
    "lokr-tucker-dora": {"r": 1, "decompose_factor": 2},
    "lora": {"r": 2},
}


def tiny(algorithm, layer):
    torch.manual_seed(0)
    make, shape = TINY[layer]
    model, _ = adapt(make().double(), ALGORITHMS[algorithm](**TINY_FIELDS.get(algorithm, {})))
    randomize(model)
    return as_function(model, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    pairs(TINY, [n for n in ALGORITHMS if n not in ("loha-wide", "lokr-factor", "lokr-w1-only")]),
)
def test_full_finite_differences(algorithm, layer):
    """Every entry of every Jacobian, on layers small enough for it."""
    run, inputs = tiny(algorithm, layer)
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    pairs(
        {k: TINY[k] for k in ("linear", "conv2d")},
        ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora", "loha-tucker"],
    ),
)
def test_second_derivatives(algorithm, layer):
    run, inputs = tiny(algorithm, layer)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_frozen_base_gets_no_gradient_and_trainable_base_does():
    for name in ("lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora"):
        _, model, adapted = build(name, "linear")
        base, x = adapted.base_layer, make_input(adapted.base_layer)
        model(x).sum().backward()
        assert base.weight.grad is None and base.bias.grad is None
        base.weight.requires_grad_()
        base.bias.requires_grad_()
        model(x).sum().backward()
        assert base.bias.grad is not None and relative_error(base.bias.grad, torch.full((36,), 6.0)) < 1e-12
        assert base.weight.grad is not None and base.weight.grad.abs().sum() > 0
        # finite difference of one entry of the base weight
        with torch.no_grad():
            step = 1e-6
            up = base.weight.clone()
            base.weight[1, 2] += step
            high = model(x).sum()
            base.weight.copy_(up)
            base.weight[1, 2] -= step
            low = model(x).sum()
            base.weight.copy_(up)
        assert abs((high - low) / (2 * step) - base.weight.grad[1, 2]) < 1e-5 * max(1, abs(base.weight.grad[1, 2])), name


def test_case_lists_cover_every_kind():
    assert len(PLAIN_LAYERS) + len(PADDED_LAYERS) + len(SHAPED_LAYERS) == len(LAYERS)
    assert {type(LAYERS[name]()).__name__ for name in LAYERS} == {"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"}
