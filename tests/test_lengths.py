"""DoRA over LoRA and LoHa as one operation of formulas: output and gradients against a dense rebuild, in every way it runs."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from cases import ALGORITHMS, adapt, as_function, kept_storages, make_input, make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from more_adapters import filled
from test_around import results
from torch import nn
from torch.utils.checkpoint import checkpoint

from lycoris_diff import LoHaConfig, LoraConfig, OFTConfig
from lycoris_diff.execution import lengths
from lycoris_diff.execution.costs import NOWHERE, Folded, rides
from lycoris_diff.layers import choosing, parts, separate
from lycoris_diff.layers import layer as layers

#: whether narrow products ride along, and what runs through the changed weight
WAYS = {
    "riding": (True, NOWHERE),
    "reading": (False, NOWHERE),
    "folded": (False, Folded(True, True)),
    "riding-back": (True, Folded(True, False)),
    "riding-there": (True, Folded(False, True)),
}
HOSTS = [
    "linear",
    "linear-nobias",
    "hf-conv1d",
    "conv1d-zeros",
    "conv2d-1x1",
    "conv2d-stride2",
    "conv2d-reflect",
    "conv3d-zeros",
]


def take(patch: pytest.MonkeyPatch, way: str) -> list:
    """From now on layers of any size run in that way; returned is a list that grows with every call of the operation."""
    ride, folds = WAYS[way]
    choose, run, calls = choosing.choose, lengths.lengthened, []
    patch.setattr("lycoris_diff.layers.light.SMALL", 0)
    patch.setattr("lycoris_diff.layers.light.LITTLE", 0)

    def chosen(*args, foldable=False, **more):
        return dataclasses.replace(choose(*args, **more), mode="beside", folded=folds if foldable else NOWHERE)

    patch.setattr(choosing, "remembered", chosen)
    patch.setattr(layers, "rides", lambda shape, tokens: ride and len(shape) == 2)
    patch.setattr(layers, "lengthened", lambda *args: calls.append(args) or run(*args))
    return calls


@pytest.fixture(params=WAYS)
def calls(request, monkeypatch):
    return take(monkeypatch, request.param)


def dora(host, algorithm="lora-dora", **fields):
    """A model with that layer, filled, in float64 like its layer."""
    config = ALGORITHMS[algorithm](**fields)
    model, adapted = adapt(host, config, "a")
    model.set_adapter("a")
    return filled(model, 0.3), adapted


def rebuilt(adapted, x):
    """As `results`, from one dense float64 weight."""
    base, adapter = adapted.base_layer, adapted.adapter("a")
    leaves = {name: adapter.get_tensor(name).detach().double().requires_grad_() for name in adapter.factor_shapes}
    weight = adapted.geometry.canonical(base.weight.double())
    dense = oracles.loha if "hada_w1_a" in leaves else oracles.lora
    change = oracles.dora(weight, dense(leaves, adapter.scaling, tuple(weight.shape)), leaves[adapter.magnitude_name], "out")
    state = {"weight": adapted.geometry.stored(weight + change)}
    if base.bias is not None:
        state["bias"] = base.bias.double()
    x = x.detach().double().requires_grad_()
    y = torch.func.functional_call(base, state, (x,))
    found = torch.autograd.grad(y.square().sum(), [x, *leaves.values()])
    return y.detach(), found[0], dict(zip(leaves, found[1:], strict=True))


def found(model, x):
    """`results` with the gradients under the factors' names, in float64."""
    y, g_x, grads = results(model, x)
    return y.double(), g_x.double(), {name.partition(".adapters.a.")[2]: value.double() for name, value in grads.items()}


def compare(model, adapted, x, **tolerance):
    torch.testing.assert_close(found(model, x), rebuilt(adapted, x), **tolerance)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", [*WAYS, "apart", "dense"])
def test_rows_of_zeros(way, dtype, axis, monkeypatch):
    """A row, or column, that is all zero has no direction: it stays zero at any magnitude, and all gradients are finite."""
    calls = take(monkeypatch, way) if way in WAYS else []
    base = nn.Linear(24, 16, dtype=dtype).requires_grad_(False)
    base.weight[2 if axis == "out" else slice(None), 2 if axis == "in" else slice(None)] = 0
    model, adapted = dora(base, "loha-dora", dora_axis=axis)
    adapter = adapted.adapter("a")
    with torch.no_grad():
        adapter.get_tensor(adapter.magnitude_name).fill_(10)
        for name in ("hada_w1_a", "hada_w2_a") if axis == "out" else ("hada_w1_b", "hada_w2_b"):
            factor = adapter.get_tensor(name)
            (factor[2] if axis == "out" else factor[:, 2]).zero_()
    if way != "apart":
        monkeypatch.setattr(separate, "on_rows", lambda adapter: way != "dense")
    if way not in WAYS:
        base.register_forward_hook(lambda *args: None)
    x = torch.randn(5, 24, dtype=dtype)
    y, g_x, grads = results(model, x)
    assert all(t.isfinite().all() for t in (y, g_x, *grads.values()))
    weight = model.get_submodule("layer").merged_weight(["a"])
    assert weight.isfinite().all() and not (weight[2] if axis == "out" else weight[:, 2]).any()
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T + base.bias.float(), rtol=2e-2, atol=5e-2)
    assert len(calls) == (way in WAYS and axis == "out")


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
@pytest.mark.parametrize("host", HOSTS)
def test_same_function(host, algorithm, calls):
    model, adapted = dora(make_layer(host), algorithm)
    compare(model, adapted, make_input(adapted.base_layer), rtol=1e-10, atol=1e-10)
    assert len(calls) == 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(WAYS)), *[st.integers(1, 40)] * 3, st.integers(0, 40), *[st.booleans()] * 2, st.floats(0.1, 9))
def test_any_sizes(way, inp, out, rank, tokens, bias, hadamard, alpha):
    torch.manual_seed(0)
    layer = nn.Linear(inp, out, bias=bias, dtype=torch.float64).requires_grad_(False)
    small = 1e-6 if inp == 1 else 1e-8  # of one column the sign is left, and the gradient cancels to zero
    with pytest.MonkeyPatch.context() as patch:
        calls = take(patch, way)
        fields = {"r": min(rank, inp, out, 6), "alpha": alpha} if hadamard else {"r": min(rank, inp, out), "lora_alpha": alpha}
        model, adapted = dora(layer, "loha-dora" if hadamard else "lora-dora", **fields)
        compare(model, adapted, torch.randn(tokens, inp, dtype=torch.float64), rtol=1e-8, atol=small)
        assert len(calls) == 1


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
def test_derivatives(algorithm, calls):
    """By finite differences, of the second order as well."""
    _, adapted = dora(make_layer("linear"), algorithm, r=2)
    run, inputs = as_function(adapted, make_input(adapted.base_layer)[:1])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert calls


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_other_dtypes(dtype, tolerance, algorithm, calls):
    """Factors in float32; what is rounded to a half precision is the input, the output and what runs beside."""
    model, adapted = dora(make_layer("linear", dtype), algorithm)
    x = make_input(adapted.base_layer)
    (*ours, grads), (*theirs, expected) = found(model, x), rebuilt(adapted, x)
    assert grads.keys() == expected.keys() and len(calls) == 1
    for value, other in [*zip(ours, theirs, strict=True), *((grads[name], expected[name]) for name in grads)]:
        assert (value - other).norm() <= tolerance * other.norm()
    assert model(x).dtype is dtype


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_factors_in_another_dtype(dtype, other, algorithm, calls):
    """From one call to the next, which no layer is told; rows of another dtype cannot ride along."""
    model, adapted = dora(make_layer("linear", dtype), algorithm, r=4)
    x = make_input(adapted.base_layer)
    model(x)
    adapted.adapter("a").to(other)
    compare(model, adapted, x, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


ONE = [("lora-dora", name) for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "x", "")]
ONE += [("loha-dora", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "dora_scale")]


@pytest.mark.parametrize(("algorithm", "trained"), ONE)
def test_only_one_is_trained(algorithm, trained, calls):
    model, adapted = dora(make_layer("linear"), algorithm)
    x = make_input(adapted.base_layer)
    y, g_x, grads = rebuilt(adapted, x)
    for name in adapted.adapter("a").factor_shapes:
        adapted.adapter("a").get_tensor(name).requires_grad_(name == trained)
    x.requires_grad_(trained == "x")
    ours = model(x)
    torch.testing.assert_close(ours.detach(), y)
    assert len(calls) == (trained not in ("x", "")) and ours.requires_grad == bool(trained)  # frozen ones are prepared once
    if trained:
        leaf, expected = (x, g_x) if trained == "x" else (adapted.adapter("a").get_tensor(trained), grads[trained])
        [gradient] = torch.autograd.grad(ours.square().sum(), [leaf])
        torch.testing.assert_close(gradient, expected)


def test_a_trained_bias(calls):
    model, adapted = dora(make_layer("linear"))
    adapted.base_layer.bias.requires_grad_()
    y = model(make_input(adapted.base_layer))
    [found] = torch.autograd.grad(y.square().sum(), [adapted.base_layer.bias])
    torch.testing.assert_close(found, 2 * y.detach().sum((0, 1)))
    assert len(calls) == 1


def test_other_strides(calls):
    """An input that is a transposed view, and a gradient that is one number in all places."""
    model, adapted = dora(make_layer("linear"))
    x = make_input(adapted.base_layer)[0].T.contiguous().T.requires_grad_()
    expected = rebuilt(adapted, x)[0]
    y = model(x)
    torch.testing.assert_close(y.detach(), expected)
    leaves = [x, *(p for p in adapted.adapters.parameters() if p.requires_grad)]
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(expanded, torch.autograd.grad(y, leaves, torch.ones_like(y)))
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, calls):
    model, adapted = dora(make_layer("linear"))
    x = make_input(adapted.base_layer)
    expected = found(model, x)
    again = lambda x: checkpoint(model, x, use_reentrant=reentrant)
    held = x.clone().requires_grad_()
    y = again(held)
    y.square().sum().backward()
    torch.testing.assert_close((y.detach(), held.grad), expected[:2])
    grads = {name: adapted.adapter("a").get_tensor(name).grad for name in expected[2]}
    torch.testing.assert_close(grads, expected[2])
    assert len(calls) >= 2  # the first of the reentrant kind records nothing


def test_a_row_of_zeros(calls):
    """It stays zero, and gives nothing that is not finite."""
    model, adapted = dora(make_layer("linear"))
    with torch.no_grad():
        adapted.base_layer.weight[3] = 0
        adapted.adapter("a").get_tensor("lora_B.weight")[3] = 0
    x = make_input(adapted.base_layer)
    y, g_x, grads = results(model, x)
    assert torch.equal(y[..., 3], adapted.base_layer.bias[3].expand_as(y[..., 3]))
    assert all(bool(torch.isfinite(t).all()) for t in (g_x, *grads.values())) and calls


def test_another_strength(calls):
    """Rows are scaled at full strength alone; a plan of the one is not taken for the other."""
    model, adapted = dora(make_layer("linear"))
    x = make_input(adapted.base_layer)
    full, base = model(x), adapted.base_layer(x)
    model.set_scale("a", 0.5)
    torch.testing.assert_close(model(x), (full + base) / 2)
    assert len(calls) == 1
    model.set_scale("a", 1.0)
    torch.testing.assert_close(model(x), full)
    assert len(calls) == 2


def test_beside_another(calls):
    model, _ = dora(make_layer("linear"))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["layer"]))
    model.set_adapter(["a", "b"])
    model(make_input(model.get_base_model().layer.base_layer))
    assert not calls


@pytest.mark.parametrize("host", ["linear", "conv2d-zeros"])
def test_tucker_and_other_algorithms(host, calls):
    """They have no plain product, or an axis of their own: they run as before."""
    for name in ("lora-tucker-dora", "lora-dora-in", "loha-dora-in", "lokr-dora"):
        model, adapted = adapt(make_layer(host), ALGORITHMS[name](), "a")
        model.set_adapter("a")
        model(make_input(adapted.base_layer))
    assert len(calls) == (1 if host == "linear" else 0)  # where there is no kernel, a Tucker form is a plain one


def test_changed_weight(calls):
    """What is remembered of the base weight is forgotten when that changes."""
    model, adapted = dora(make_layer("linear"))
    x = make_input(adapted.base_layer)
    model(x)
    with torch.no_grad():
        adapted.base_layer.weight.mul_(2)
    compare(model, adapted, x, rtol=1e-10, atol=1e-10)


def test_what_is_kept(calls):
    """The input, the output before its rows are scaled, and a few numbers a row; whole storages, not views of them."""
    model, _ = dora(nn.Linear(96, 128).requires_grad_(False), r=4)
    x = torch.randn(300, 96, requires_grad=True)
    assert sum(kept_storages(model, x)) <= 4 * (300 * 96 + 300 * 128 + 300 * 4 + 128 * (4 + 3))


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
def test_factors_as_narrow_as_the_layer(algorithm, calls):
    """The norms and their gradients are float32, the factors in bfloat16."""
    model, adapted = dora(make_layer("linear", torch.bfloat16), algorithm, r=4)
    adapted.adapter("a").to(torch.bfloat16)
    x = make_input(adapted.base_layer)
    grads, expected = found(model, x)[2], rebuilt(adapted, x)[2]
    assert grads.keys() == expected.keys() and len(calls) == 1
    for name, value in grads.items():
        assert (value - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_wide_products_keep_little(calls, monkeypatch):
    """With few tokens there would be more to keep of LoHa than the input: it takes the other path."""
    monkeypatch.setattr(layers, "ROOM", 0)
    model, _ = dora(nn.Linear(96, 128).requires_grad_(False), "loha-dora", r=6)
    x = torch.randn(30, 96, requires_grad=True)
    assert sum(kept_storages(model, x)) <= 4 * (x.numel() + 30 * 128 + 2 * 128 + 30 * 36) and not calls


def test_where_they_ride():
    assert rides((320, 320), 320) and not rides((320, 320), 321)
    assert not rides((320, 320, 3, 3), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The changed weight, and the lengths, would lose what is small beside others; float16 has not even the range."""
    model, _ = dora(nn.Linear(300, 300).to(dtype).requires_grad_(False))
    for way in ("riding", "folded"):
        with pytest.MonkeyPatch.context() as patch:
            calls = take(patch, way)
            model(torch.randn(4, 300, dtype=dtype))
        [(call, how, x, *_)] = calls
        assert call.terms[0].folded == NOWHERE and not how.rides(x, torch.float32)
        assert how.rides(x, lengths.dtype_back(x, torch.float32)) == (way == "riding" and dtype is torch.bfloat16)
        model.get_base_model().layer.plans.clear()


@pytest.mark.parametrize("way", ["riding", "reading"])
@pytest.mark.parametrize("sign", [1, -0.5, -0.97, 0])
def test_lengths_of_a_half_precision_weight(sign, way, monkeypatch):
    """As exact as float32 makes them, also where the change undoes most of the weight; 0 is a change along nothing."""
    calls = take(monkeypatch, way)
    monkeypatch.setattr(lengths, "BLOCK", 1000)  # several of them
    base = nn.Linear(256, 64, bias=False).bfloat16().requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(torch.randn(64, 8) @ torch.randn(8, 256) + 0.05 * torch.randn(64, 256))
    model, adapted = dora(base, r=8)
    adapter, weight = adapted.adapter("a"), base.weight.double()
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    up, down = (sign * left[:, :8] * sizes[:8], right[:8]) if sign else torch.randn(2, 8, 256).double().unbind()
    up = up[:64] if sign else up.T[:64]
    with torch.no_grad():
        adapter.get_tensor("lora_B.weight").copy_(up / adapter.scaling)
        adapter.get_tensor("lora_A.weight").copy_(down)
    model(torch.randn(9, 256, dtype=torch.bfloat16)).sum().backward()
    row = lengths._run(*calls[0])[1].row.double()
    expected = adapter.get_tensor("lora_magnitude_vector").double() / (weight + up @ down).norm(dim=1)
    torch.testing.assert_close(row, expected, rtol=1e-3 if sign == -0.97 else 1e-5, atol=0)
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


# --- in plain operations -------------------------------------------------------------------------------------------------
@pytest.fixture
def apart(monkeypatch):
    """As compiled code, function transforms and dropout run it; the list grows by how many ran around a layer together."""
    take(monkeypatch, "reading")
    run, calls = separate.run_around, []
    monkeypatch.setattr(layers.AdaptedLayer, "_fusable", lambda *args: False)
    monkeypatch.setattr(separate, "run_around", lambda members, *args: calls.append(len(members)) or run(members, *args))
    return calls


@pytest.mark.parametrize("algorithm", ["lora-dora", "loha-dora"])
@pytest.mark.parametrize("host", HOSTS)
def test_same_function_apart(host, algorithm, apart):
    model, adapted = dora(make_layer(host), algorithm)
    compare(model, adapted, make_input(adapted.base_layer), rtol=1e-10, atol=1e-10)
    assert apart == [1]


@pytest.mark.parametrize("strength", [0.4, 0.0, -1.0])
def test_strengths_apart(strength, apart):
    model, adapted = dora(make_layer("linear"))
    x = make_input(adapted.base_layer).requires_grad_()
    model.set_scale("a", strength)
    adapted.adapter("a").strength.requires_grad_()  # so that it runs at zero as well
    found = model(x)
    assert apart == [1]
    if strength == 0:
        assert torch.equal(found, adapted.base_layer(x))
    model.merge_adapter()
    torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-10)


OTHERS = {
    "trained weight": (None, [1]),
    "dora": (lambda: LoraConfig(r=3, use_dora=True, target_modules=["layer"]), [2]),
    "columns": (lambda: LoHaConfig(r=2, weight_decompose=True, dora_axis="in", target_modules=["layer"]), []),
    "oft": (lambda: OFTConfig(oft_block_size=4, target_modules=["layer"]), [2]),
    "lora": (lambda: LoraConfig(r=3, target_modules=["layer"]), [1]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_with_others_apart(other, apart, monkeypatch):
    """Everything equals what the changed weight gives, the gradient of a weight that trains as well."""
    config, ran = OTHERS[other]
    model, adapted = dora(make_layer("linear"))
    if config is None:
        adapted.base_layer.weight.requires_grad_()
    else:
        model.add_adapter("b", config())
        model.set_adapter(["a", "b"])
    filled(model, 0.3)
    x = make_input(adapted.base_layer)
    monkeypatch.setattr(separate, "around_is_cheaper", lambda *args: True)
    found = results(model, x)
    assert apart == ran
    monkeypatch.setattr(separate, "around_is_cheaper", lambda *args: False)
    monkeypatch.setattr(separate, "on_rows", lambda adapter: False)
    torch.testing.assert_close(found, results(model, x), rtol=1e-10, atol=1e-10)
    assert apart == ran and (config is not None or "layer.base_layer.weight" in {n.split("model.")[-1] for n in found[2]})


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_weight_that_trains_beside_hooks(axis):
    """What is added to the layer's own output gives the weight its gradient too."""
    model, adapted = dora(make_layer("linear"), "loha-dora", dora_axis=axis)
    adapted.base_layer.weight.requires_grad_()
    x = make_input(adapted.base_layer)
    expected = results(model, x)
    adapted.base_layer.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(results(model, x), expected, rtol=1e-10, atol=1e-10)
    assert any(name.endswith("base_layer.weight") for name in expected[2])


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_apart(hooked, monkeypatch):
    """The dropped input meets the weight and the factors; nothing of the weight's size is kept."""
    take(monkeypatch, "reading")
    model, adapted = dora(nn.Linear(96, 128).requires_grad_(False), lora_dropout=0.0 if hooked else 0.5)
    model.train()
    seen = []
    if hooked:
        adapted.base_layer.register_forward_hook(lambda *args: seen.append(args))
    x = torch.randn(20, 96)

    def seeded():
        torch.manual_seed(3)
        return results(model, x)

    found = seeded()
    assert len(seen) == hooked, "other people's hooks see one call"
    trained = x.clone().requires_grad_()
    kept = max(kept_storages(model, trained))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separate, "on_rows", lambda adapter: False)
        torch.testing.assert_close(found, seeded(), rtol=1e-4, atol=1e-4)
        assert kept < adapted.base_layer.weight.nbytes <= max(kept_storages(model, trained))


def test_row_factors_of_a_half_precision_weight():
    """Exact where the change undoes most of a row, under autocast too, and no copy of the weight is kept for backward."""
    base = nn.Linear(256, 64, bias=False).bfloat16().requires_grad_(False)
    model, adapted = dora(base, r=8)
    adapter = adapted.adapter("a")
    left, sizes, right = torch.linalg.svd(base.weight.double(), full_matrices=False)
    with torch.no_grad():
        adapter.get_tensor("lora_B.weight").copy_(-0.97 * left[:, :8] * sizes[:8] / adapter.scaling)
        adapter.get_tensor("lora_A.weight").copy_(right[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = parts.row_factor(adapter, base.weight, adapter.inputs())
    up, down = (adapter.get_tensor(name).double() for name in ("lora_B.weight", "lora_A.weight"))
    weight = base.weight.double() + adapter.scaling * up @ down
    grads = torch.autograd.grad(row.sum(), list(adapter.parameters()), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = torch.autograd.grad(row.sum(), list(adapter.parameters()))
    torch.testing.assert_close(again, grads)
    torch.testing.assert_close(row.double(), adapter.get_tensor("lora_magnitude_vector").double() / weight.norm(dim=1))

    class Rows(nn.Module):
        def forward(self, x):
            return parts.row_factor(adapter, base.weight, adapter.inputs())

    holder = Rows()
    holder.inner = model
    assert max(kept_storages(holder, base.weight), default=0) < base.weight.nbytes


def test_many_tokens_apart(apart):
    """Where the weight goes into the output often, building it costs less, and keeps less, than scaling the output."""
    model, adapted = dora(nn.Linear(16, 24, dtype=torch.float64).requires_grad_(False))
    for tokens, ran in ((64, [1]), (65, [1])):  # only the first
        compare(model, adapted, torch.randn(tokens, 16, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        assert apart == ran, tokens


def test_weights_that_are_no_parameters(apart):
    model, adapted = dora(nn.Linear(16, 24, dtype=torch.float64).requires_grad_(False))
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = model(x)
    for name, value in list(adapted.base_layer._parameters.items()):
        del adapted.base_layer._parameters[name]
        setattr(adapted.base_layer, name, value.detach())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_channels_last_apart(apart):
    model, _ = dora(nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False))
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last) and apart == [1]


def test_forward_derivatives_apart(apart):
    """Of the weight too, whose row norms were remembered without a derivative."""
    model, adapted = dora(nn.Linear(16, 24, dtype=torch.float64).requires_grad_(False))
    x, weight = torch.randn(5, 16, dtype=torch.float64), adapted.base_layer.weight
    direction = torch.randn_like(weight)

    def derivative():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weight.detach(), direction)
            del adapted.base_layer._parameters["weight"]
            adapted.base_layer.weight = dual
            try:
                return torch.autograd.forward_ad.unpack_dual(model(x)).tangent.clone()
            finally:
                del adapted.base_layer.weight
                adapted.base_layer.register_parameter("weight", weight)

    model(x)  # remembers them
    with torch.no_grad():
        step = 1e-6
        weight += step * direction
        ahead = model(x)
        weight -= 2 * step * direction
        expected = (ahead - model(x)) / (2 * step)
        weight += step * direction
    torch.testing.assert_close(derivative(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(derivative(), expected, rtol=1e-5, atol=1e-6)
