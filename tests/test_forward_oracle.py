"""Forward == dense float64 reference == merged == reloaded, for every algorithm x layer kind x padding x dtype."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from cases import (
    ADDITIVE,
    ALGORITHMS,
    DORA,
    EXPECTED_TENSORS,
    LAYERS,
    PADDED_LAYERS,
    PLAIN_LAYERS,
    SHAPED_LAYERS,
    adapt,
    factors,
    make_input,
    make_layer,
    pairs,
    randomize,
    reference,
    relative_error,
)
from torch import nn

from lycoris_diff import AdapterModel, inject_adapter

pytestmark = pytest.mark.usefixtures("fused")

# Largest error over the largest expected value. Half precision: one rounding of the output, plus the base layer's own;
# merged weights are rounded to the base dtype as well, and sum up over in * K products.
FORWARD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
MERGED_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def build(algorithm: str, layer: str, dtype: torch.dtype = torch.float64, seed: int = 3):
    config = ALGORITHMS[algorithm]()
    model, adapted = adapt(make_layer(layer, dtype), config)
    randomize(model, seed)
    return config, model.eval(), adapted


def check(algorithm: str, layer: str, dtype: torch.dtype, sizes: tuple[bool, ...]) -> None:
    config, model, adapted = build(algorithm, layer, dtype)
    inputs = [make_input(adapted.base_layer, large) for large in sizes]
    expected = [reference(adapted, config, x) for x in inputs]

    with torch.no_grad():
        outputs = [model(x) for x in inputs]
    for x, y, ref in zip(inputs, outputs, expected):
        assert y.dtype == dtype
        assert relative_error(y, ref) < FORWARD_TOLERANCE[dtype], f"forward, input {tuple(x.shape)}"

    tracked = [model(x) for x in inputs]  # gradients needed: may take another way of running
    for x, y, ref in zip(inputs, tracked, expected):
        assert y.requires_grad and y.dtype == dtype
        assert relative_error(y.detach(), ref) < FORWARD_TOLERANCE[dtype], f"forward with grad, input {tuple(x.shape)}"

    fresh, _ = adapt(make_layer(layer, dtype), ALGORITHMS[algorithm]())
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        for x, y in zip(inputs, outputs):
            assert torch.equal(fresh.eval()(x), y), "reloaded from state_dict"

    base_bits = adapted.base_layer.weight.detach().clone()
    model.merge_adapter()
    with torch.no_grad():
        for x, ref in zip(inputs, expected):
            assert relative_error(model(x), ref) < MERGED_TOLERANCE[dtype], f"merged, input {tuple(x.shape)}"
    model.unmerge_adapter()
    assert torch.equal(adapted.base_layer.weight, base_bits)


@pytest.mark.parametrize(("algorithm", "layer"), pairs(SHAPED_LAYERS))
def test_every_geometry(algorithm, layer):
    check(algorithm, layer, torch.float64, sizes=(False, True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("algorithm", "layer"), pairs(PLAIN_LAYERS | PADDED_LAYERS))
def test_every_padding_mode_and_dtype(algorithm, layer, dtype):
    sizes = (False, True) if dtype is torch.float64 or layer in PLAIN_LAYERS else (False,)
    check(algorithm, layer, dtype, sizes)


NAMED = {k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv1d-zeros", "conv2d-zeros", "conv3d-zeros")}


@pytest.mark.parametrize(("algorithm", "layer"), pairs(NAMED, list(EXPECTED_TENSORS)))
def test_factor_names(algorithm, layer):
    _, _, adapted = build(algorithm, layer)
    assert set(factors(adapted)) == EXPECTED_TENSORS[algorithm]


@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if "tucker" in n])
@pytest.mark.parametrize("layer", ["conv1d-1x1", "conv2d-1x1", "conv3d-1x1"])
def test_no_core_for_pointwise_convolutions(algorithm, layer):
    _, _, adapted = build(algorithm, layer)
    assert not {"lokr_t2", "hada_t1", "lora_mid.weight"} & set(factors(adapted))


@pytest.mark.parametrize(("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv2d-zeros")}))
def test_delta_weight_is_what_merging_adds(algorithm, layer):
    config, model, adapted = build(algorithm, layer)
    weight = adapted.base_layer.weight.detach().clone()
    expected = oracles.delta(config, {k: v.detach() for k, v in factors(adapted).items()}, adapted.base_layer)
    for strength in (1.0, 0.5, -2.0):
        model.set_scale("default", strength)
        change = adapted.get_delta_weight("default").detach()
        assert change.shape == weight.shape
        assert relative_error(change, strength * expected) < 1e-10
        model.merge_adapter()
        assert relative_error(adapted.base_layer.weight - weight, strength * expected) < 1e-10
        model.unmerge_adapter()
        assert torch.equal(adapted.base_layer.weight, weight)


@pytest.mark.parametrize(
    ("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv1d-circular", "conv2d-stride2")})
)
def test_strength(algorithm, layer):
    """0 is exactly the base, and between 0 and 1 the change of the weight is scaled: W + m (W_adapted - W)."""
    config, model, adapted = build(algorithm, layer)
    for large in (False, True):
        x = make_input(adapted.base_layer, large)
        base = adapted.base_layer(x)
        for strength in (0.5, 0.0, -1.5, 1.0):
            model.set_scale("default", strength)
            y = model(x).detach()
            assert relative_error(y, reference(adapted, config, x, strength)) < 1e-9
            if strength == 0.0:
                assert torch.equal(y, base)
                with torch.no_grad():
                    assert torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_strength_zero_is_the_base_in_every_dtype(algorithm, dtype):
    layer = "conv2d-reflect" if "tucker" in algorithm else "linear"
    _, model, adapted = build(algorithm, layer, dtype)
    model.set_scale("default", 0.0)
    for large in (False, True):
        x = make_input(adapted.base_layer, large)
        assert torch.equal(model(x), adapted.base_layer(x))


@pytest.mark.parametrize(("algorithm", "layer"), pairs({k: LAYERS[k] for k in ("linear", "hf-conv1d", "conv2d-zeros")}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_start_changes_nothing(algorithm, layer, dtype):
    model, adapted = adapt(make_layer(layer, dtype), ALGORITHMS[algorithm]())
    x = make_input(adapted.base_layer)
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2  # DoRA rounds the norm; everything else is exact
    if algorithm in DORA:
        assert relative_error(model(x).detach(), adapted.base_layer(x)) < tolerance
    else:
        assert torch.equal(model(x), adapted.base_layer(x))


@pytest.mark.parametrize("start", ["lycoris", False])
def test_other_starts(start):
    for name in ("lokr", "lokr-full-w2", "lokr-both", "lokr-tucker"):
        model, adapted = adapt(make_layer("conv2d-zeros"), ALGORITHMS[name](init_weights=start))
        x = make_input(adapted.base_layer)
        assert torch.equal(model(x), adapted.base_layer(x)) == (start == "lycoris")
    if start is False:
        for name in ("loha", "loha-tucker", "miss", "shira", "lora", "lora-dora"):
            model, adapted = adapt(make_layer("conv2d-zeros"), ALGORITHMS[name](init_weights=False))
            x = make_input(adapted.base_layer)
            assert relative_error(model(x).detach(), adapted.base_layer(x)) > 1e-6, name


# ---------------------------------------------------------------------------------------------- several at one layer

MIXTURES = {
    "linear": ["lokr", "loha", "miss-bat", "shira", "lora-dora", "miss-odd"],
    "hf-conv1d": ["lokr-dora-in", "miss-mini", "lora", "miss-bat"],
    "conv1d-circular": ["lokr-tucker", "loha-dora", "miss-bat"],
    "conv2d-reflect": ["loha-tucker", "lora-tucker", "shira", "miss-bat", "lora-dora-in"],
    "conv2d-groups2": ["lokr", "miss-odd", "lora"],
    "conv3d-replicate": ["loha-dora-in", "lokr-full-matrix", "miss-mini-odd", "miss-bat"],
}


def mixture(layer: str, names: list[str], strengths: dict[str, float]):
    base = make_layer(layer)
    configs = {name: ALGORITHMS[name]() for name in names}
    model, adapted = adapt(base, configs[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    for i, name in enumerate(sorted(names)):
        randomize(adapted.adapters[name], seed=i)
    for name, strength in strengths.items():
        model.set_scale(name, strength)
    return model.eval(), adapted, configs


@pytest.mark.parametrize("layer", list(MIXTURES))
def test_several_adapters_add_up_in_any_order(layer):
    names = MIXTURES[layer]
    strengths = {name: 0.3 + 0.4 * i for i, name in enumerate(names)}
    model, adapted, configs = mixture(layer, names, strengths)
    reverse, _, _ = mixture(layer, names[::-1], strengths)
    weight = adapted.base_layer.weight.detach().clone()
    changes = [
        (
            strengths[n],
            oracles.delta(configs[n], {k: v.detach() for k, v in factors(adapted, n).items()}, adapted.base_layer),
        )
        for n in names
    ]
    for large in (False, True):
        x = make_input(adapted.base_layer, large)
        expected = oracles.forward(adapted.base_layer, x, changes)
        for active in (names, names[::-1], names[1:] + names[:1]):
            model.set_adapter(active)
            reverse.set_adapter(active)
            assert relative_error(model(x).detach(), expected) < 1e-9
            assert relative_error(reverse(x).detach(), expected) < 1e-9
            model.merge_adapter()
            assert relative_error(model(x).detach(), expected) < 1e-9
            model.unmerge_adapter()
            assert torch.equal(adapted.base_layer.weight, weight)
        model.set_adapter(names[1:2])
        assert relative_error(model(x).detach(), oracles.forward(adapted.base_layer, x, changes[1:2])) < 1e-9


def test_two_miss_adapters_with_other_modes():
    """Each runs its own formula, and bat is taken against the unmodified weight."""
    names = ["miss", "miss-mini", "miss-bat"]
    for first in names:
        order = [first] + [n for n in names if n != first]
        model, adapted, configs = mixture("linear", order, {})
        model.set_adapter(order)
        x = make_input(adapted.base_layer)
        changes = [
            (
                1.0,
                oracles.delta(configs[n], {k: v.detach() for k, v in factors(adapted, n).items()}, adapted.base_layer),
            )
            for n in order
        ]
        assert relative_error(model(x).detach(), oracles.forward(adapted.base_layer, x, changes)) < 1e-9


# --------------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_inputs_of_every_rank_and_layout(algorithm):
    layers = ["conv1d-circular", "conv2d-zeros"] if "tucker" in algorithm else ["linear", "hf-conv1d", "conv2d-zeros"]
    for layer in layers:
        config, model, adapted = build(algorithm, layer)
        base = adapted.base_layer
        full = make_input(base)
        empty = full[:0]
        views = [full, full[0], empty]
        if oracles.is_conv(base):
            views += [full.transpose(-1, 1).contiguous().transpose(-1, 1), full[..., ::2] if full.ndim == 3 else full]
        else:
            views += [full[0, 0], full.transpose(0, 1), full[:, :1].expand(-1, 5, -1), full.unsqueeze(0)]
        for x in views:
            if layer == "conv1d-circular" and x.numel() == 0:
                continue  # torch itself refuses to pad nothing
            y = model(x)
            assert relative_error(y.detach(), reference(adapted, config, x)) < 1e-9, tuple(x.shape)


@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora"])
def test_caller_tensors_are_never_written(algorithm):
    """Accumulating into the base layer's output must not reach a tensor somebody else holds."""
    _, model, adapted = build(algorithm, "linear")
    seen = {}
    adapted.base_layer.register_forward_hook(lambda m, args, out: seen.update(out=out, copy=out.detach().clone()))
    x = make_input(adapted.base_layer)
    before = x.clone()
    y = model(x)
    assert torch.equal(x, before)
    if "out" in seen:
        assert torch.equal(seen["out"], seen["copy"])
    assert torch.isfinite(y).all()


class Shared(nn.Module):
    """A base that hands out the same tensor twice: an identity-like subclass of Linear."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(x)
        return h + self.layer(h)


@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora"])
def test_a_layer_called_twice(algorithm):
    torch.manual_seed(0)
    base = Shared().double()
    report = inject_adapter(base, ALGORITHMS[algorithm](r=1), adapter_name="default")
    assert report.matched == ["layer"]
    randomize(base)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = base(x)
    dense = copy.deepcopy(base)
    AdapterModel(dense).merge_adapter()
    assert relative_error(y.detach(), dense(x).detach()) < 1e-9
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("algorithm", [n for n in ADDITIVE if "tucker" not in n])
def test_base_hooks_still_run(algorithm):
    """A forward hook on the base layer sees its call and may replace its output (offload, quantization, tracing)."""
    config, model, adapted = build(algorithm, "linear")
    x = make_input(adapted.base_layer)
    expected = reference(adapted, config, x) + 1
    calls = []
    handle = adapted.base_layer.register_forward_hook(lambda m, args, out: calls.append(1) or out + 1)
    assert relative_error(model(x).detach(), expected) < 1e-9
    assert calls
    handle.remove()
    assert relative_error(model(x).detach(), expected - 1) < 1e-9


@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora"])
def test_half_base_keeps_float32_factors_and_small_updates(algorithm):
    """An update far below a bf16 step of the weight must not be swallowed, and the output has the base's dtype."""
    config = ALGORITHMS[algorithm]()
    model, adapted = adapt(make_layer("linear", torch.bfloat16), config)
    assert {p.dtype for p in adapted.adapters["default"].parameters()} == {torch.float32}
    if algorithm in ("lora-dora", "miss-bat", "shira"):
        return  # these run one operation with the effective weight, rounded as merging rounds it
    randomize(model, std=0.2 if algorithm in ("lokr", "loha") else 0.02)
    with torch.no_grad():
        adapted.base_layer.bias.zero_()
    x = make_input(adapted.base_layer, large=True)
    base = adapted.base_layer(x).double()
    change = model(x).detach().double() - base
    exact = reference(adapted, config, x) - oracles.apply(adapted.base_layer, x)
    assert exact.abs().max() > 1e-3 * base.abs().max()
    cosine = torch.cosine_similarity(change.flatten(), exact.flatten(), dim=0)
    assert cosine > 0.5
