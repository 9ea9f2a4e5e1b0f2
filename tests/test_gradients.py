"""Gradients: finite differences, the dense autograd reference, and the ways torch can run a layer."""

from __future__ import annotations

import copy

import oracles
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
    factors,
    fits,
    make_input,
    make_layer,
    pairs,
    randomize,
    relative_error,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint


def build(algorithm: str, layer: str, dtype: torch.dtype = torch.float64):
    config = ALGORITHMS[algorithm]()
    model, adapted = adapt(make_layer(layer, dtype), config)
    randomize(model)
    return config, model, adapted


def trainable(adapted: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in factors(adapted).items() if v.is_floating_point()}


def dense_gradients(config, adapted, x, cotangent):
    """Gradients of the factors and the input through the dense float64 rebuild."""
    leaves = {
        k: v.detach().to(torch.float64).requires_grad_() if v.is_floating_point() else v for k, v in factors(adapted).items()
    }
    x = x.detach().to(torch.float64).requires_grad_()
    y = oracles.forward(adapted.base_layer, x, [(1.0, oracles.delta(config, leaves, adapted.base_layer))])
    wanted = {k: v for k, v in leaves.items() if v.is_floating_point()} | {"input": x}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), cotangent.to(torch.float64))))


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
    parameters = trainable(adapted)
    names = list(parameters)
    full = dict(zip((id(p) for p in model.parameters()), dict(model.named_parameters())))
    paths = [full[id(parameters[n])] for n in names]
    x = make_input(adapted.base_layer, large).requires_grad_()

    def run(x, *values):
        return functional_call(model, dict(zip(paths, values)), (x,))

    inputs = (x, *[p.detach().clone().requires_grad_() for p in parameters.values()])
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
    model, adapted = adapt(make().double(), ALGORITHMS[algorithm](**TINY_FIELDS.get(algorithm, {})))
    randomize(model)
    parameters = trainable(adapted)
    paths = {id(p): n for n, p in model.named_parameters()}
    names = [paths[id(p)] for p in parameters.values()]

    def run(x, *values):
        return functional_call(model, dict(zip(names, values)), (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return run, (x, *[p.detach().clone().requires_grad_() for p in parameters.values()])


@pytest.mark.parametrize("layer", list(TINY))
@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if n not in ("loha-wide", "lokr-factor", "lokr-w1-only")])
def test_full_finite_differences(algorithm, layer):
    """Every entry of every Jacobian, on layers small enough for it."""
    if not fits(algorithm, layer):
        pytest.skip("no core without a kernel")
    run, inputs = tiny(algorithm, layer)
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora", "loha-tucker"])
def test_second_derivatives(algorithm, layer):
    if not fits(algorithm, layer):
        pytest.skip("no core without a kernel")
    run, inputs = tiny(algorithm, layer)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-5, rtol=1e-3, fast_mode=True)


# -------------------------------------------------------------------------------------------------- ways to run a layer


@pytest.mark.parametrize(("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv2d-circular")}))
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_autocast(algorithm, layer, large):
    config, model, adapted = build(algorithm, layer, torch.float32)
    x = make_input(adapted.base_layer, large)
    base = oracles.apply(adapted.base_layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == adapted.base_layer(x).dtype
    cotangent = torch.randn(y.shape).to(y.dtype)
    expected = oracles.forward(
        adapted.base_layer,
        x,
        [(1.0, oracles.delta(config, {k: v.detach() for k, v in factors(adapted).items()}, adapted.base_layer))],
    )
    assert base.shape == expected.shape
    assert relative_error(y.detach(), expected) < 3e-2
    wanted = trainable(adapted)
    own = torch.autograd.grad(y, list(wanted.values()), cotangent)
    dense = dense_gradients(config, adapted, x, cotangent)
    for (name, parameter), value in zip(wanted.items(), own):
        assert value.dtype == parameter.dtype == torch.float32
        assert relative_error(value, dense[name]) < 6e-2, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_gradient_checkpointing(algorithm, reentrant):
    layer = "conv2d-zeros" if "tucker" in algorithm else "linear"
    _, model, adapted = build(algorithm, layer)
    x = make_input(adapted.base_layer, large=True).requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in trainable(adapted).values()] + [x.grad.clone()]
    model.zero_grad()
    x.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip([p.grad for p in trainable(adapted).values()] + [x.grad], expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv1d-zeros", "conv2d-reflect"])
@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if n not in ("loha-wide", "lora-rs")])
def test_functional_transforms(algorithm, layer):
    """Per-sample gradients by vmap over grad equal a loop; vmap over inputs equals the batch."""
    if not fits(algorithm, layer):
        pytest.skip("no core without a kernel")
    _, model, adapted = build(algorithm, layer)
    x = make_input(adapted.base_layer)
    batch = torch.stack([x, -0.5 * x, x.cos()])
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert parameters

    def loss(values, sample):
        return functional_call(model, values, (sample,)).square().mean()

    whole = grad(loss)(parameters, x)
    reference = torch.autograd.grad(model(x).square().mean(), [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(whole.values(), reference):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    for i, sample in enumerate(batch):
        alone = grad(loss)(parameters, sample)
        for name in parameters:
            assert torch.allclose(together[name][i], alone[name], rtol=1e-8, atol=1e-11), name

    mapped = vmap(model)(batch)
    assert torch.allclose(mapped, torch.stack([model(sample) for sample in batch]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora"])
def test_vmap_over_parameters(algorithm):
    """Ensembles: several sets of factors at once."""
    _, model, adapted = build(algorithm, "linear")
    x = make_input(adapted.base_layer)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    live = dict(model.named_parameters())
    stacked = {n: torch.stack([live[n].detach() * s for s in (1.0, 0.3, 2.0)]) for n in names}
    together = vmap(lambda values: functional_call(model, values, (x,)))(stacked)
    for i in range(3):
        alone = functional_call(model, {n: v[i] for n, v in stacked.items()}, (x,))
        assert torch.allclose(together[i], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_deepcopy(algorithm):
    layer = "conv1d-zeros" if "tucker" in algorithm else "linear"
    _, model, adapted = build(algorithm, layer)
    x = make_input(adapted.base_layer)
    before = model(x).detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    randomize(twin, seed=9)
    twin.set_scale("default", 0.25)
    twin.merge_adapter()
    assert torch.equal(model(x), before)
    twin.unmerge_adapter()
    assert torch.equal(twin.get_base_model().layer.base_layer.weight, adapted.base_layer.weight)


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


# ---------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros"])
@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if n not in ("lora-rs", "miss-mini-odd", "lokr-factor")])
def test_compiles_whole(algorithm, layer):
    """One graph, forward and backward; another strength causes no recompile."""
    if not fits(algorithm, layer) or (layer == "conv2d-zeros" and algorithm in ("loha-wide", "lokr-w1-only")):
        pytest.skip("covered by another case")
    _, model, adapted = build(algorithm, layer, torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = make_input(adapted.base_layer)

    def step(run):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), [p.grad.clone() for p in trainable(adapted).values()]

    for strength in (1.0, 0.4, 2.0):
        model.set_scale("default", strength)
        (y, grads), (expected, expected_grads) = step(compiled), step(model)
        assert relative_error(y, expected) < 1e-5
        for a, b in zip(grads, expected_grads):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7
    model.set_scale("default", 0.0)
    assert relative_error(compiled(x).detach(), adapted.base_layer(x)) < 1e-6
    assert counter.frame_count == 1


def test_new_values_cause_no_recompile():
    _, model, adapted = build("lokr", "linear", torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = make_input(adapted.base_layer)
    with torch.no_grad():
        compiled(x)
        randomize(model, seed=8)
        assert relative_error(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros"])
@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora", "loha-tucker"])
def test_inductor(algorithm, layer):
    if not fits(algorithm, layer):
        pytest.skip("no core without a kernel")
    _, model, adapted = build(algorithm, layer, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = make_input(adapted.base_layer, large=True)
    y = compiled(x)
    assert relative_error(y.detach(), model(x).detach()) < 1e-4
    y.square().sum().backward()
    grads = [p.grad.clone() for p in trainable(adapted).values()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, b in zip(grads, [p.grad for p in trainable(adapted).values()]):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6


def test_case_lists_cover_every_kind():
    assert len(PLAIN_LAYERS) + len(PADDED_LAYERS) + len(SHAPED_LAYERS) == len(LAYERS)
    assert {type(LAYERS[name]()).__name__ for name in LAYERS} == {"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"}
