"""Hypothesis over odd sizes, ranks and factors: whatever is built, forward is the dense float64 rebuild."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import adapt, factors, randomize, reference, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lycoris_diff import LoHaConfig, LoKrConfig, LoraConfig, MissConfig, ShiraConfig
from lycoris_diff.functional import miss

settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

WIDTH = st.integers(1, 40)
RANK = st.integers(1, 24)
ALPHA = st.one_of(st.integers(1, 64), st.floats(0.01, 100))
AXIS = st.sampled_from([None, "out", "in"])


@st.composite
def hosts(draw):
    """A host layer and an input for it."""
    inp, out, kind = draw(WIDTH), draw(WIDTH), draw(st.sampled_from(["linear", "hf", 1, 2, 3]))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10**6)))
    if kind == "linear":
        layer = nn.Linear(inp, out, bias=bias)
        shape = draw(st.sampled_from([(inp,), (1, inp), (5, inp), (2, 3, inp), (0, inp), (300, inp)]))
    elif kind == "hf":
        layer = Conv1D(out, inp)
        shape = draw(st.sampled_from([(1, inp), (2, 3, inp), (300, inp)]))
    else:
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        inp, out = inp * groups, out * groups
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(kind))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        fields = {
            "stride": tuple(draw(st.integers(1, 2)) for _ in range(kind)),
            "dilation": tuple(draw(st.integers(1, 2)) for _ in range(kind)),
            "padding": tuple(draw(st.integers(0, 2)) for _ in range(kind)),
        }
        if draw(st.booleans()):
            fields |= {"padding": draw(st.sampled_from(["same", "valid"])), "stride": 1}
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1](
            inp, out, kernel, groups=groups, bias=bias, padding_mode=mode, **fields
        )
        shape = (2, inp, *[draw(st.integers(5, 8)) for _ in range(kind)])
    layer = layer.double().requires_grad_(False)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer, torch.randn(shape, dtype=torch.float64)


def plain_sizes(layer: nn.Module) -> tuple[int, int, int]:
    weight = oracles.canonical_weight(layer)
    return weight.shape[0], weight.shape[1], weight[0].numel()


def check(layer, x, config) -> None:
    model, adapted = adapt(layer, config)
    start = model(x).detach()
    assert relative_error(start, oracles.apply(layer, x)) < 1e-9, "default start"
    randomize(model)
    expected = reference(adapted, config, x)
    assert relative_error(model(x).detach(), expected) < 1e-9, "forward"
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-9, "forward without gradients"
    weight = layer.weight.clone()
    model.merge_adapter()
    assert relative_error(model(x).detach(), expected) < 1e-9, "merged"
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)
    cotangent = torch.randn_like(expected)
    own = torch.autograd.grad(model(x), [p for p in factors(adapted).values() if p.requires_grad], cotangent)
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in factors(adapted).items()}
    dense = oracles.forward(layer, x, [(1.0, oracles.delta(config, leaves, layer))])
    wanted = [v for v in leaves.values() if v.requires_grad]
    for a, b in zip(own, torch.autograd.grad(dense, wanted, cotangent)):
        assert relative_error(a, b) < 1e-7 or (a - b).abs().max() < 1e-10, "gradient"


@given(hosts(), RANK, ALPHA, st.sampled_from([-1, 1, 2, 3, 4, 8, 16]), st.booleans(), st.booleans(), st.booleans(), AXIS)
def test_lokr(host, r, alpha, factor, both, core, full, axis):
    layer, x = host
    config = LoKrConfig(
        r=r,
        alpha=alpha,
        decompose_factor=factor,
        decompose_both=both,
        use_effective_conv2d=core,
        full_matrix=full,
        target_modules=["layer"],
        weight_decompose=axis is not None,
        dora_axis=axis or "out",
    )
    check(layer, x, config)


@given(hosts(), RANK, ALPHA, st.booleans(), AXIS)
def test_loha(host, r, alpha, core, axis):
    layer, x = host
    config = LoHaConfig(
        r=r,
        alpha=alpha,
        use_effective_conv2d=core,
        target_modules=["layer"],
        weight_decompose=axis is not None,
        dora_axis=axis or "out",
    )
    check(layer, x, config)


@given(hosts(), RANK, ALPHA, st.booleans(), st.booleans(), AXIS)
def test_lora(host, r, alpha, core, rs, axis):
    layer, x = host
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rs,
        use_effective_conv2d=core,
        target_modules=["layer"],
        weight_decompose=axis is not None,
        dora_axis=axis or "out",
    )
    check(layer, x, config)


@given(hosts(), RANK, st.integers(1, 12), st.sampled_from([True, "mini", "bat"]))
def test_miss(host, r, mini, mode):
    """Ranks that do not fit are refused, all others are right."""
    layer, x = host
    out, inp, columns = plain_sizes(layer)
    config = MissConfig(r=r, mini_r=mini if mode == "mini" else 1, init_weights=mode, target_modules=["layer"])
    fits = r <= inp if mode != "bat" else out % r == 0 and columns % r == 0
    if mode == "mini":
        fits = fits and out % mini == 0
    if not fits:
        with pytest.raises(ValueError):
            adapt(layer, config)
        return
    check(layer, x, config)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(1, 40), st.sampled_from([(), (2, 3)]))
def test_miss_added_to_a_weight(r, s, repeats, inp, kernel):
    """The same with the repeated block and without; that one is a tensor that can be saved."""
    block = torch.randn(r, s, *kernel, dtype=torch.float64)
    total = torch.randn(s * repeats, inp, *kernel, dtype=torch.float64)
    tiled = miss.tile(block, *total.shape[:2])
    assert tiled.is_contiguous() or s * repeats == 1
    rebuilt = torch.stack([torch.stack([block[i % r, o % s] for i in range(inp)]) for o in range(s * repeats)])
    assert torch.equal(tiled, rebuilt)
    assert torch.equal(miss.add_tiled(total, block), total + tiled)
    across = total.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(miss.add_tiled(across, block), total + tiled)


@given(hosts(), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 2**31)))
def test_shira(host, r, seed):
    layer, x = host
    out, _, columns = plain_sizes(layer)
    config = ShiraConfig(r=r, random_seed=seed, target_modules=["layer"])
    if r * (out + columns) > out * columns:
        with pytest.raises(ValueError):
            adapt(layer, config)
        return
    check(layer, x, config)


@settings(max_examples=30)
@given(st.integers(1, 400), st.integers(1, 400), RANK, st.sampled_from([-1, 2, 5, 8, 16, 64]), st.booleans())
def test_lokr_shapes_for_any_size(inp, out, r, factor, both):
    config = LoKrConfig(r=r, decompose_factor=factor, decompose_both=both, target_modules=["layer"])
    _, adapted = adapt(nn.Linear(inp, out), config)
    own = {k: tuple(v.shape) for k, v in factors(adapted).items()}
    assert own == oracles.lokr_shapes(out, inp, (), r, factor, both)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12), st.data())
def test_any_sequence_of_merges_ends_at_the_same_bits(steps, data):
    """Merging, unmerging, scaling, switching in any order: unmerged weights are the first ones, bit for bit."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 12).to(torch.bfloat16).requires_grad_(False)
    weight = layer.weight.clone()
    model, _ = adapt(layer, LoKrConfig(r=1, target_modules=["layer"]), "a")
    model.add_adapter("b", MissConfig(r=3, init_weights="bat", target_modules=["layer"]))
    model.add_adapter("c", LoraConfig(r=2, use_dora=True, target_modules=["layer"]))
    randomize(model, std=1.0)
    for name in steps:
        action = data.draw(st.sampled_from(["merge", "merge one", "unmerge", "scale", "switch", "forward", "off"]))
        if action == "merge":
            model.merge_adapter()
        elif action == "merge one":
            model.merge_adapter([name])
        elif action == "unmerge":
            model.unmerge_adapter()
            assert torch.equal(layer.weight, weight)
        elif action == "scale":
            model.set_scale(name, data.draw(st.sampled_from([0.0, 0.5, 1.0, -3.0])))
        elif action == "switch":
            model.set_adapter([name])
        elif action == "forward":
            model(torch.ones(1, 12, dtype=torch.bfloat16))
        else:
            with model.disable_adapter():
                y = model(torch.ones(1, 12, dtype=torch.bfloat16))
            assert torch.equal(y, nn.functional.linear(torch.ones(1, 12, dtype=torch.bfloat16), weight, layer.bias))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)
