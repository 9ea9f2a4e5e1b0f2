"""Small layers in training: plain operations instead of the fused one, with the same output and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ALGORITHMS, Holder, adapt, kept_storages, make_input, make_layer
from more_adapters import filled
from test_around import results
from torch import nn

from lycoris_diff import AdapterError, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter
from lycoris_diff.execution import engine, lengths, steps
from lycoris_diff.layers import light
from lycoris_diff.layers.plans import KINDS


@pytest.fixture
def ran(monkeypatch):
    """How often each way was taken."""
    counts = {"light": 0, "fused": 0}

    def counted(name, module, function):
        real = getattr(module, function)

        def run(*args):
            counts[name] += 1
            return real(*args)

        return run

    from lycoris_diff.layers import layer

    monkeypatch.setattr(layer, "run_light", counted("light", light, "run_light"))
    monkeypatch.setattr(layer, "adapted", counted("fused", engine, "adapted"))
    monkeypatch.setattr(layer, "lengthened", counted("fused", lengths, "lengthened"))
    return counts


LIGHT = ("lora", "lokr", "loha", "miss-odd", "miss-mini", "lora-tucker", "lokr-tucker", "loha-tucker")


@pytest.mark.parametrize("layer", ["linear", "conv1d-zeros", "conv2d-zeros", "conv2d-all-at-once", "conv3d-zeros", "hf-conv1d"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_function(algorithm, layer, ran, monkeypatch):
    model, adapted = adapt(make_layer(layer), ALGORITHMS[algorithm](), "a")
    model.set_adapter("a")
    model.add_adapter("b", LoKrConfig(r=2, target_modules=["layer"]))
    model.set_adapter(["a", "b"])
    filled(model, 0.3)
    model.set_scale("a", 0.7)
    x = make_input(adapted.base_layer)
    found = results(model, x)
    if layer == "linear" and (algorithm in LIGHT or "dora" in algorithm):
        assert ran == {"light": 1, "fused": 0}
    monkeypatch.setattr(light, "SMALL", 0)
    monkeypatch.setattr(light, "LITTLE", 0)
    adapted.plans.clear()
    torch.testing.assert_close(found, results(model, x), rtol=1e-10, atol=1e-10)
    assert ran["light"] <= 1


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_copied_factors(algorithm, ran, monkeypatch):
    """Where there are many rows, the last factor is multiplied as a copy: output and gradients, and none behind a view."""
    monkeypatch.setattr(steps, "MANY", 2)
    model, adapted = adapt(make_layer("linear"), ALGORITHMS[algorithm](), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["layer"]))
    model.set_adapter(["a", "b"])
    filled(model, 0.3)
    x = make_input(adapted.base_layer)
    found = results(model, x)
    assert ran["light"] == 1 and "Addmm" in type(adapted(x[0]).grad_fn).__name__
    monkeypatch.setattr(steps, "MANY", 10**9)
    torch.testing.assert_close(found, results(model, x), rtol=1e-12, atol=1e-12)


def layer_with(config=None, width=64, dtype=torch.float32):
    model = Holder(nn.Linear(width, width).to(dtype)).requires_grad_(False)
    inject_adapter(model, config or LoraConfig(r=4, target_modules=["layer"]))
    return filled(model)


class TestWhen:
    def test_small_and_large(self, ran):
        model = layer_with(width=256)
        model(torch.randn(4, 256))
        assert ran == {"light": 1, "fused": 0}
        model(torch.randn(light.SMALL // 512 + 1, 256))
        assert ran == {"light": 1, "fused": 1}

    @pytest.mark.parametrize("name", ["lora", "loha", "shira", "loha-dora"])
    def test_many_tokens_of_a_little_weight(self, name, ran):
        """The weight is changed then, whose backward is the same work in either way; it is kept, and is little."""
        assert layer_with().layer.geometry.out ** 2 <= light.LITTLE
        model, _ = adapt(nn.Linear(64, 64), ALGORITHMS[name](), "a")
        model.set_adapter("a")
        filled(model, 0.3)
        x = torch.randn(light.SMALL // 64, 64, requires_grad=True)
        assert model.layer.choices(x)["a"].mode == "instead"
        model(x)
        assert ran == {"light": 1, "fused": 0}

    def test_not_without_gradients(self, ran):
        with torch.no_grad():
            layer_with()(torch.randn(4, 64))
        assert ran == {"light": 0, "fused": 1}

    @pytest.mark.parametrize("field", ["lora_dropout", "module_dropout"])
    def test_not_by_chance(self, field, ran):
        """Dropouts are the other paths' business; out of training there are none."""
        config = LoraConfig(r=4, target_modules=["layer"], **{field: 0.5})
        model = layer_with(config)
        model.train()(torch.randn(4, 64))
        assert ran["light"] == 0
        model.eval()(torch.randn(4, 64))
        assert ran["light"] == 1

    def test_an_idle_neighbour(self, ran):
        """It is left out, and the other one runs as if it were alone."""
        model = layer_with()
        alone = model(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
        inject_adapter(model, LoraConfig(r=2, target_modules=["layer"]), "idle")
        model.layer.active = ("default", "idle")
        idle = model.layer.adapter("idle").requires_grad_(False)
        idle.set_strength(0.0)
        again = model(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
        assert ran == {"light": 2, "fused": 0} and torch.equal(alone, again)
        plan = next(p for p in model.layer.plans.values() if p is not None)
        assert [adapter for adapter, *_ in plan.parts] == [model.layer.adapter("default")]

    def test_what_depends_on_the_weight(self, ran):
        """DoRA changes a little weight as long as its gradient is little work as well."""
        model = layer_with(LoraConfig(r=4, target_modules=["layer"], use_dora=True), width=160)
        model(torch.randn(4, 160))
        assert ran == {"light": 1, "fused": 0}
        model(torch.randn(light.CHEAP // 160**2 + 1, 160))
        assert ran == {"light": 1, "fused": 1}
        layer_with(LoraConfig(r=4, target_modules=["layer"], use_dora=True), width=256)(torch.randn(4, 256))
        assert ran == {"light": 1, "fused": 2}


class TestChanges:
    """What was found for an input does not outlive what it depends on."""

    def test_factors_in_another_dtype(self):
        """`cast_training_params` of diffusers replaces the data of parameters, unseen."""
        model = layer_with(dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        x = torch.randn(4, 64, dtype=torch.bfloat16)
        before = model(x)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), before)

    def test_another_adapter_of_the_same_name(self, ran):
        model, adapted = adapt(nn.Linear(64, 64), LoraConfig(r=4, target_modules=["layer"]), "a")
        model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))  # keeps the layer adapted
        model.set_adapter("a")
        filled(model)
        x = torch.randn(4, 64)
        model(x)
        model.delete_adapter("a")
        model.add_adapter("a", LoKrConfig(r=2, target_modules=["layer"]))
        model.set_adapter("a")
        filled(model)
        found = model(x)
        expected = x @ (adapted.base_layer.weight + adapted.get_delta_weight("a")).T + adapted.base_layer.bias
        torch.testing.assert_close(found, expected)

    def test_merged_and_back(self):
        model, _ = adapt(nn.Linear(64, 64), LoraConfig(r=4, target_modules=["layer"]), "a")
        model.set_adapter("a")
        filled(model)
        x = torch.randn(4, 64)
        before = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(x), before)

    def test_copies_are_their_own(self):
        model = layer_with()
        x = torch.randn(4, 64)
        before = model(x)
        twin = copy.deepcopy(model)
        filled(twin)
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("tokens", [4, light.SMALL // 64])
    def test_hooks_are_called(self, tokens):
        model = layer_with()
        x = torch.randn(tokens, 64)
        model(x)
        seen = []
        model.layer.base_layer.register_forward_hook(lambda *args: seen.append(args))
        model(x)
        assert len(seen) == 1

    @pytest.mark.parametrize("tokens", [4, light.SMALL // 64])
    def test_a_base_weight_that_trains(self, tokens):
        model = layer_with()
        x = torch.randn(tokens, 64)
        model(x)
        model.layer.base_layer.weight.requires_grad_()
        model(x).sum().backward()
        torch.testing.assert_close(model.layer.base_layer.weight.grad, x.sum(0).expand(64, 64), rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize("tokens", [4, light.SMALL // 256])
    @pytest.mark.parametrize("name", ["lora", "loha", "lokr", "miss-odd"])
    def test_strengths(self, name, tokens):
        """The factor on the change is taken as a number there; it follows all that decides it."""
        model, adapted = adapt(nn.Linear(256, 256), ALGORITHMS[name](), "a")
        model.set_adapter("a")
        filled(model)
        x = torch.randn(tokens, 256)
        base = adapted.base_layer(x)
        change = model(x) - base
        for strength in (0.5, -2.0, 1.0):
            model.set_scale("a", strength)
            torch.testing.assert_close(model(x) - base, strength * change, rtol=1e-3, atol=1e-4)
        adapted.adapter("a").scaling *= 3
        torch.testing.assert_close(model(x) - base, 3 * change, rtol=1e-3, atol=1e-4)
        leaf = next(p for p in adapted.adapter("a").parameters())
        model(x[:4]).sum().backward()
        found, leaf.grad = leaf.grad, None
        adapted.adapter("a").scaling /= 3
        model(x[:4]).sum().backward()
        torch.testing.assert_close(found, 3 * leaf.grad, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("tokens", [4, light.SMALL // 256])
    def test_a_strength_that_learns(self, tokens):
        model = layer_with(width=256)
        adapter, x = model.layer.adapter("default"), torch.randn(tokens, 256)
        model(x)
        adapter.strength.requires_grad_()
        change = (model(x) - model.layer.base_layer(x)).sum()
        (found,) = torch.autograd.grad(change, adapter.strength)
        torch.testing.assert_close(found, change.detach(), rtol=1e-2, atol=1e-1)

    def test_many_shapes(self):
        model = layer_with()
        for tokens in range(1, 150):
            model(torch.randn(tokens, 64))
        assert len(model.layer.plans) <= KINDS


@pytest.mark.parametrize(
    ("algorithm", "tokens", "share"),
    [("lora", 16, 2), ("lokr", 16, 2), ("miss-odd", 16, 2), ("lora", 1024, 1.2), ("lokr", 1024, 1.6), ("miss-odd", 1024, 0.2)],
)
def test_kept_for_backward(algorithm, tokens, share):
    """The input, where a factor meets it, and nothing of the weight's size."""
    model, _ = adapt(nn.Linear(256, 256), ALGORITHMS[algorithm](), "a")
    model.set_adapter("a")
    filled(model)
    x = torch.randn(tokens, 256, requires_grad=True)
    kept = kept_storages(model, x)
    assert sum(kept) <= share * x.nbytes
    assert all(size < 256 * 256 * 4 or size == x.nbytes for size in kept)


def test_wide_results_between_steps_run_as_one_operation(ran):
    """LoKr of a small factor has few slices and narrow results; of about the root of the width, wide ones."""
    for factor, expected in ((8, {"light": 1, "fused": 0}), (-1, {"light": 1, "fused": 1})):
        config = LoKrConfig(r=8, decompose_factor=factor, target_modules=["layer"])
        layer_with(config, width=320)(torch.randn(600, 320))
        assert ran == expected


def test_what_would_keep_much_runs_as_one_operation(ran):
    """Products of factors that autograd would keep, and nearly no tokens beside them."""
    for config in (LoHaConfig(r=16, target_modules=["layer"]), LoraConfig(r=128, target_modules=["layer"])):
        layer_with(config, width=256)(torch.randn(4, 256))
    assert ran == {"light": 0, "fused": 2}


def test_a_layer_that_gives_no_gradient_is_noticed():
    """Also when the layer was quantized after its first step."""
    torchao = pytest.importorskip("torchao.quantization")
    model = layer_with()
    x = torch.randn(4, 64, requires_grad=True)
    model(x).sum().backward()
    torchao.quantize_(model.layer.base_layer, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda *args: True)
    with pytest.raises(AdapterError, match="no gradient of its input"):
        model(x)
