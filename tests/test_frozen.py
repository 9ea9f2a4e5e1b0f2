"""What a layer prepares of its frozen adapters: the same bits as without, prepared once, and anew after every change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases import adapt, make_input, make_layer
from more_adapters import EVERY, filled
from torch import nn

from lycoris_diff import AdapterError, LoKrConfig, LoraConfig
from lycoris_diff.execution.weights import Cores, Factor, KhatriRao
from lycoris_diff.layers import frozen

pytestmark = pytest.mark.usefixtures("fused")


def frozen_pair(algorithm, layer="linear", dtype=torch.float64):
    """One layer with a frozen adapter "a" of the algorithm and a LoKr "b", both active."""
    model, adapted = adapt(make_layer(layer), EVERY[algorithm](), "a")
    model.set_adapter("a")
    filled(model)
    model.add_adapter("b", LoKrConfig(r=2, target_modules=["layer"]))
    model.set_adapter("b")
    filled(model, 0.1)
    model.set_adapter(["a", "b"], inference_mode=True)
    return model.eval().to(dtype), adapted


def check(model, x):
    """Bits with what was prepared equal those of a call that records gradients, and so prepares nothing."""
    expected = model(x)
    with torch.no_grad():
        first, second = model(x), model(x)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    return expected


@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros", "hf-conv1d"])
@pytest.mark.parametrize("algorithm", EVERY)
def test_same_bits(algorithm, layer):
    try:
        model, adapted = frozen_pair(algorithm, layer)
    except AdapterError as error:
        pytest.skip(f"not on this layer: {error}")
    x = make_input(adapted.base_layer)
    for names in (["a"], ["a", "b"], ["b"]):
        model.set_adapter(names, inference_mode=True)
        check(model, x)
    assert adapted in frozen._PREPARED


def edited(name):
    """Change one of the tensors in place."""

    def change(model, adapted):
        with torch.no_grad():
            adapted.get_parameter(name).mul_(1.5)

    return change


def replaced(model, adapted):
    adapted.base_layer.weight.data = adapted.base_layer.weight.data * 1.5


def replaced_twice(model, adapted):
    """The second may come to lie where the first was."""
    factor = adapted.get_parameter("adapters.a.lora_B.weight")
    for _ in range(2):
        factor.data = factor.data * 2


def loaded(model, adapted):
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})


def assigned(model, adapted):
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()}, assign=True)


CHANGES = {
    "a factor": edited("adapters.a.lora_B.weight"),
    "the other adapter": edited("adapters.b.lokr_w1"),
    "DoRA's magnitude": edited("adapters.a.lora_magnitude_vector"),
    "the base weight": edited("base_layer.weight"),
    "the base bias": edited("base_layer.bias"),
    "another base weight": replaced,
    "a factor's data, twice": replaced_twice,
    "a trained strength": lambda model, adapted: setattr(adapted.adapter("a"), "scaling", 7.0),
    "a strength": lambda model, adapted: model.set_scale("a", 0.5),
    "zero strength": lambda model, adapted: model.set_scale("a", 0.0),
    "another adapter": lambda model, adapted: model.set_adapter("b", inference_mode=True),
    "no adapter": lambda model, adapted: model.disable_adapter_layers(),
    "deleted": lambda model, adapted: model.delete_adapter("a"),
    "a state": loaded,
    "an assigned state": assigned,
    "a dtype": lambda model, adapted: model.to(torch.float32),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change, alone):
    model, adapted = frozen_pair("lora-dora")
    if alone and change != "the other adapter":  # DoRA's factors of the rows
        model.set_adapter("a", inference_mode=True)
    x = make_input(adapted.base_layer)
    before = check(model, x)
    CHANGES[change](model, adapted)
    x = x.to(next(model.parameters()).dtype)
    assert not torch.equal(check(model, x), before)  # what `check` compares with saw the change


@pytest.mark.parametrize("change", [lambda model: model.merge_adapter(["a"]), nn.Module.train], ids=["merged", "training"])
def test_other_ways_to_run(change):
    model, adapted = frozen_pair("lora-dora")
    x = make_input(adapted.base_layer)
    before = check(model, x)
    change(model)
    torch.testing.assert_close(check(model, x), before, rtol=1e-12, atol=1e-12)


def test_undone_change():
    """There and back again: what was remembered of the first state does not answer for the second."""
    model, adapted = frozen_pair("lora-dora")
    x = make_input(adapted.base_layer)
    before = check(model, x)
    model.merge_adapter()
    check(model, x)
    model.unmerge_adapter()
    assert torch.equal(check(model, x), before)


def programs_of(ready):
    return [term.program for term in ready.call.terms if term.program]


def count(monkeypatch, cls, name):
    calls = []
    real = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args: calls.append(name) or real(self, *args))
    return calls


class TestOnce:
    def test_row_factors(self, monkeypatch):
        model, adapted = frozen_pair("lora-dora")
        model.set_adapter("a", inference_mode=True)
        calls = count(monkeypatch, type(adapted.adapter("a")), "row_statistics")
        x = make_input(adapted.base_layer)
        with torch.no_grad():
            for _ in range(5):
                model(x)
        assert len(calls) == 1

    def test_programs_by_size(self, monkeypatch):
        """A prompt and its negative, two resolutions: what is prepared for one stays when the other comes."""
        model, adapted = frozen_pair("loha")
        calls = count(monkeypatch, type(adapted.adapter("a")), "program")
        small = make_input(adapted.base_layer)
        large = torch.cat([small] * 3)
        with torch.no_grad():
            for x in (small, large, small, large, small, large):
                model(x)
        assert len(calls) == 2

    @pytest.mark.parametrize(
        ("algorithm", "layer", "formula"),
        [("loha", "linear", KhatriRao), ("loha-tucker", "conv2d-zeros", Cores), ("lokr", "linear", Factor)],
    )
    def test_weights_of_steps(self, algorithm, layer, formula, monkeypatch):
        """Between the outer ones as well."""
        model, adapted = frozen_pair(algorithm, layer)
        x = make_input(adapted.base_layer)
        with torch.no_grad():
            model(x)
            calls = count(monkeypatch, formula, "__call__")
            model(x)
        assert not calls

    def test_many_sizes(self):
        model, adapted = frozen_pair("loha")
        x = make_input(adapted.base_layer)
        with torch.no_grad():
            for size in range(1, 3 * frozen.SIZES):
                model(torch.cat([x] * size))
        assert len(frozen._PREPARED[adapted].ready) <= frozen.SIZES

    def test_casts(self, monkeypatch):
        model, adapted = frozen_pair("lora", dtype=torch.float32)
        adapted.base_layer.to(torch.bfloat16)
        x = make_input(adapted.base_layer).to(torch.bfloat16)
        with torch.no_grad():
            model(x)
        (ready,) = frozen._PREPARED[adapted].ready.values()
        assert {t.dtype for t in ready.tensors if t.dim()} == {torch.bfloat16}


class TestNotUsed:
    def test_trainable_factors(self):
        """EMA and other tools write through `.data`, which leaves no trace."""
        model, adapted = frozen_pair("lora")
        model.set_adapter(["a", "b"])
        with torch.no_grad():
            model(make_input(adapted.base_layer))
        assert adapted not in frozen._PREPARED

    def test_training(self):
        model, adapted = frozen_pair("lora")
        with torch.no_grad():
            model.train()(make_input(adapted.base_layer))
        assert adapted not in frozen._PREPARED

    def test_inference_tensors(self):
        with torch.inference_mode():
            model, adapted = frozen_pair("lora")
            x = make_input(adapted.base_layer)
            first = model(x)
            adapted.get_parameter("adapters.a.lora_B.weight").mul_(2)
            assert not torch.equal(model(x), first)
        assert adapted not in frozen._PREPARED

    def test_inference_mode_and_after(self):
        """What was computed in inference mode is no part of a later graph."""
        model, adapted = frozen_pair("lora-dora")
        x = make_input(adapted.base_layer)
        with torch.inference_mode():
            first = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), first)
        model(x.requires_grad_()).sum().backward()
        assert x.grad is not None


class TestNotKept:
    def test_a_replaced_weight_is_freed(self):
        model, adapted = frozen_pair("lora")
        x = make_input(adapted.base_layer)
        before = check(model, x)
        old = weakref.ref(adapted.base_layer.weight)
        adapted.base_layer.weight = nn.Parameter(2 * adapted.base_layer.weight.detach(), requires_grad=False)
        gc.collect()
        assert old() is None
        assert not torch.equal(check(model, x), before)

    def test_copies_are_their_own(self):
        model, adapted = frozen_pair("lora-dora")
        x = make_input(adapted.base_layer)
        before = check(model, x)
        twin = copy.deepcopy(model)
        edited("adapters.a.lora_B.weight")(twin, twin.model.layer)
        assert not torch.equal(check(twin, x), before)
        assert torch.equal(check(model, x), before)

    def test_moved(self):
        model, adapted = frozen_pair("lora-dora")
        check(model, make_input(adapted.base_layer))
        assert adapted in frozen._PREPARED
        model.to(torch.float32)
        assert adapted not in frozen._PREPARED

    def test_deleted_and_dropped(self):
        gc.collect()
        model, adapted = frozen_pair("loha")
        others = len(frozen._PREPARED)
        check(model, make_input(adapted.base_layer))
        assert len(frozen._PREPARED) == others + 1
        model.delete_adapter("a")
        assert adapted not in frozen._PREPARED
        check(model, make_input(adapted.base_layer))
        del model, adapted
        gc.collect()
        assert len(frozen._PREPARED) == others

    @pytest.mark.parametrize("layer", [nn.Linear(640, 640), nn.Linear(1280, 320)])
    def test_small_beside_the_weight(self, layer):
        """Kept is less than a tenth of the weight for LoRA and LoKr, and a quarter for each of LoHa's two products."""
        lokr = LoKrConfig(r=2, target_modules=["layer"])
        for algorithm, share in ((LoraConfig(r=8, target_modules=["layer"]), 0.1), (lokr, 0.1), (EVERY["loha"](), 0.5)):
            model, adapted = adapt(copy.deepcopy(layer), algorithm, "a")
            model.set_adapter("a", inference_mode=True)
            with torch.no_grad():
                model.eval()(torch.randn(3, layer.in_features))
            (ready,) = frozen._PREPARED[adapted].ready.values()
            own = {t.data_ptr() for t in adapted.parameters()}
            built = [s.weight({}) for p in programs_of(ready) for s in (p.first, p.mid, p.last) if s is not None and s.weight]
            kept = sum(t.numel() for t in (*built, *ready.tensors) if t.data_ptr() not in own)
            assert kept <= share * layer.weight.numel()
