"""Changes that multiply the weight, made on the layer's input or output instead: the same function, chosen by cost."""

from __future__ import annotations

import more_adapters
import pytest
import torch
from cases import adapt, make_input, make_layer
from more_adapters import filled

from lycoris_diff import AdapterError, BOFTConfig, DiagOFTConfig, GLoraConfig, IA3Config, OFTConfig
from lycoris_diff.execution.costs import around_is_cheaper
from lycoris_diff.layers import separate as layers

MADE = {
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["layer"]),
    "oft-shared": lambda: OFTConfig(oft_block_size=4, block_share=True, target_modules=["layer"]),
    "diag-oft": lambda: DiagOFTConfig(r=4, constraint=0.5, target_modules=["layer"]),
    "diag-oft-rescaled": lambda: DiagOFTConfig(r=4, rescaled=True, target_modules=["layer"]),
    "boft": lambda: BOFTConfig(r=18, target_modules=["layer"]),
    "ia3-in": lambda: IA3Config(on_input=True, target_modules=["layer"]),
    "ia3-out": lambda: IA3Config(target_modules=["layer"]),
    "glora": lambda: GLoraConfig(r=2, target_modules=["layer"]),
}
EVERY = MADE | {f"more-{k}": make for k, (make, _) in more_adapters.CASES.items()}


def results(model, x):
    """Output, and gradients of the input and of everything trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros", "conv2d-reflect", "conv2d-all-at-once", "hf-conv1d"])
@pytest.mark.parametrize("algorithm", EVERY)
def test_same_function(algorithm, layer, strength, monkeypatch):
    """In float64 output and all gradients equal those of the changed weight."""
    try:
        model, adapted = adapt(make_layer(layer), EVERY[algorithm](), "a")
    except AdapterError as error:
        pytest.skip(f"not on this layer: {error}")
    model.set_adapter("a")
    filled(model, 0.2)
    model.set_scale("a", strength)
    x = make_input(adapted.base_layer)
    monkeypatch.setattr(layers, "around_is_cheaper", lambda *args: False)
    expected = results(model, x)
    monkeypatch.setattr(layers, "around_is_cheaper", lambda *args: True)
    found = results(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_two_at_once(monkeypatch):
    """One that maps the input, one that maps the output, and one beside."""
    model, adapted = adapt(make_layer("linear"), MADE["oft"](), "a")
    for name in ("diag-oft", "glora"):
        model.add_adapter(name, MADE[name]())
    model.set_adapter(["a", "diag-oft", "glora"])
    filled(model, 0.2)
    x = make_input(adapted.base_layer)
    monkeypatch.setattr(layers, "around_is_cheaper", lambda *args: False)
    expected = results(model, x)
    monkeypatch.setattr(layers, "around_is_cheaper", lambda *args: True)
    torch.testing.assert_close(results(model, x), expected, rtol=1e-9, atol=1e-9)


class TestChoice:
    def test_wide_layers_train_around(self):
        assert around_is_cheaper((1280, 1280), 1024, True, 32 * 1280)

    def test_few_weights_and_many_tokens_do_not(self):
        assert not around_is_cheaper((64, 64), 65536, False, 32 * 64)

    @pytest.mark.parametrize("cheap", [True, False])
    def test_followed(self, cheap, monkeypatch):
        """The weight is run around where that is the choice, and only there."""
        model, adapted = adapt(make_layer("linear"), MADE["oft"](), "a")
        model.set_adapter("a")
        filled(model, 0.2)
        monkeypatch.setattr(layers, "around_is_cheaper", lambda *args: cheap)
        calls = []
        real = layers.run_around
        monkeypatch.setattr(layers, "run_around", lambda *args: calls.append(args) or real(*args))
        model(make_input(adapted.base_layer))
        assert bool(calls) is cheap

    def test_hooks_see_the_layers_own_input(self):
        """A base layer that is watched is called as it would be without adapters."""
        model, adapted = adapt(make_layer("linear"), MADE["oft"](), "a")
        model.set_adapter("a")
        filled(model, 0.2)
        seen = []
        adapted.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        x = make_input(adapted.base_layer)
        model(x)
        assert torch.equal(seen[0], x)


@pytest.mark.parametrize("algorithm", MADE)
def test_no_tokens(algorithm):
    model, adapted = adapt(make_layer("linear"), MADE[algorithm](), "a")
    model.set_adapter("a")
    filled(model, 0.2)
    x = make_input(adapted.base_layer)[:0]
    assert model(x).shape == adapted.base_layer(x).shape
