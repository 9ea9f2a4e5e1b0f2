"""The ways torch can run a layer: autocast, checkpointing, functional transforms, copies, compiling."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
import torch._dynamo.testing
from cases import (
    ALGORITHMS,
    LAYERS,
    Holder,
    build,
    dense_gradients,
    factors,
    kept_storages,
    make_input,
    pairs,
    randomize,
    relative_error,
    trainable,
)
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from lycoris_diff import LoraConfig, LoraModel
from lycoris_diff.execution import sparse

pytestmark = pytest.mark.usefixtures("fused")


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


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    pairs(
        {k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv1d-zeros", "conv2d-reflect")},
        [n for n in ALGORITHMS if n not in ("loha-wide", "lora-rs")],
    ),
)
def test_functional_transforms(algorithm, layer):
    """Per-sample gradients by vmap over grad equal a loop; vmap over inputs equals the batch. Nothing has run before."""
    sparse._announce_sparse.cache_clear()
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


# ---------------------------------------------------------------------------------------------------------- compiling


COMPILED = [
    ("linear", ["lokr", "lokr-both", "loha", "loha-wide", "miss-odd", "miss-mini", "miss-bat", "shira", "lora"]),
    ("linear", ["lora-dora", "loha-dora-in", "lokr-dora"]),
    ("conv2d-zeros", ["lokr", "lokr-tucker", "loha", "loha-tucker", "miss", "miss-bat", "shira", "lora", "lora-tucker"]),
    ("conv2d-zeros", ["lora-dora-in", "lokr-tucker-dora"]),
]


@pytest.mark.parametrize(("algorithm", "layer"), [(a, layer) for layer, names in COMPILED for a in names])
def test_compiles_whole(algorithm, layer):
    """One graph, forward and backward; another strength causes no recompile."""
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


def test_compiled_dora_keeps_no_weight():
    """Its rows are scaled, not built."""
    layer = Holder(torch.nn.Linear(96, 128)).requires_grad_(False)
    model = LoraModel(layer, LoraConfig(r=4, use_dora=True, target_modules=["layer"]))
    randomize(model)
    x = torch.randn(20, 96, requires_grad=True)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert max(kept_storages(compiled, x)) < 96 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "layer"),
    pairs(
        {k: LAYERS[k] for k in ("linear", "conv2d-zeros")},
        ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora", "loha-tucker"],
    ),
)
def test_inductor(algorithm, layer):
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
