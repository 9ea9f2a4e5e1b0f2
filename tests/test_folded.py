"""Factored forms whose output, or gradient of the input, comes from the changed weight: where, and the same function."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, adapt, as_function, kept_storages, make_input, make_layer
from more_adapters import filled
from test_around import results
from torch import nn

from lycoris_diff import LoKrConfig, LoraConfig
from lycoris_diff.execution.costs import Folded, choose, folded

LAYERS = ["linear", "conv1d-zeros", "conv2d-zeros", "conv2d-all-at-once", "hf-conv1d"]
FOLDING = ("lora", "lokr", "loha")


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ((320, 320), 1024, (True, True)),
        ((2560, 320), 1024, (True, False)),  # the output is large, the input is small
        ((320, 1280), 1024, (False, True)),
        ((640, 640), 256, (False, False)),
        ((320, 320, 3, 3), 4096, (False, False)),
        ((128, 128), 10**6, (False, False)),  # a little weight: calls cost more
    ],
)
def test_where(shape, tokens, expected):
    assert folded(shape, tokens) == expected


def test_it_counts_in_the_choice():
    """LoKr with a full w2: its products beside the layer cost more than the weight's gradient, unless some are folded."""
    sizes = (320, 320), 1024, True, 15_360, 320
    assert choose(*sizes).mode == "instead"
    found = choose(*sizes, foldable=True)
    assert (found.mode, found.folded) == ("beside", (True, True))
    assert str(found) == "beside, forward and backward through the weight (beside 106.2M, instead 124.5M multiply-adds)"


def calls(adapted):
    return [plan.call for plan in adapted.plans.values() if plan is not None and plan.call is not None]


def ways(algorithm, layer):
    """A layer with the adapter at another strength and a LoKr beside it, and an input."""
    model, adapted = adapt(make_layer(layer), ALGORITHMS[algorithm](), "a")
    model.add_adapter("b", LoKrConfig(r=2, target_modules=["layer"]))
    model.set_adapter(["a", "b"])
    filled(model, 0.3)
    model.set_scale("a", 0.7)
    return model, adapted, make_input(adapted.base_layer)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_function(algorithm, layer, request):
    """In float64, output and every gradient; beside an adapter that may change the weight by itself."""
    model, adapted, x = ways(algorithm, layer)
    expected = results(model, x)
    request.getfixturevalue("folded")
    adapted.plans.clear()
    torch.testing.assert_close(results(model, x), expected, rtol=1e-10, atol=1e-10)
    if layer == "linear" and algorithm in FOLDING:
        assert [call.folded for call in calls(adapted)] == [Folded(True, True)]


@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True)])
@pytest.mark.parametrize("algorithm", FOLDING)
def test_one_of_the_two(algorithm, forward, backward, request, monkeypatch):
    model, adapted, x = ways(algorithm, "linear")
    expected = results(model, x)
    request.getfixturevalue("folded")
    monkeypatch.setattr("lycoris_diff.execution.costs.folded", lambda shape, tokens: Folded(forward, backward))
    adapted.plans.clear()
    torch.testing.assert_close(results(model, x), expected, rtol=1e-10, atol=1e-10)
    assert [call.folded for call in calls(adapted)] == [(forward, backward)]


@pytest.mark.parametrize("algorithm", FOLDING)
def test_second_derivatives(algorithm, folded):
    model, adapted = adapt(make_layer("linear"), ALGORITHMS[algorithm]())
    filled(model, 0.3)
    run, inputs = as_function(adapted, make_input(adapted.base_layer)[:3])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert all(call.folded == (True, True) for call in calls(adapted)) and calls(adapted)


@pytest.mark.parametrize("algorithm", FOLDING)
def test_frozen(algorithm, folded):
    """The same bits prepared or not, and nothing is left of an earlier value."""
    model, adapted, x = ways(algorithm, "linear")
    expected = model(x).detach()
    model.requires_grad_(False).eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        for parameter in adapted.adapter("a").parameters():
            parameter.mul_(2)
        assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("algorithm", FOLDING)
def test_no_changed_weight_is_kept(algorithm):
    model, adapted = adapt(nn.Linear(192, 256), ALGORITHMS[algorithm](), "a")
    model.set_adapter("a")
    filled(model)
    x = torch.randn(1024, 192, requires_grad=True)
    assert sum(kept_storages(model, x)) <= (x.numel() + 1) * 4  # the scale
    assert [call.folded for call in calls(adapted)] == [(True, True)]


def test_not_in_half_precision(folded):
    """What is small beside the weight would be lost in their sum."""
    model, adapted = adapt(nn.Linear(64, 64).bfloat16(), LoraConfig(r=4, target_modules=["layer"]), "a")
    model.set_adapter("a")
    filled(model)
    model(torch.randn(8, 64, dtype=torch.bfloat16))
    assert [call.folded for call in calls(adapted)] == [(False, False)]


def test_untrained_output_is_the_base_models(folded):
    layer = nn.Linear(64, 64)
    x = torch.randn(8, 64)
    expected = layer(x)
    model, adapted = adapt(layer, LoraConfig(r=4, target_modules=["layer"]), "a")
    model.set_adapter("a")
    assert torch.equal(model(x), expected)
    assert calls(adapted)
