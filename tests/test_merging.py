"""Merging and unmerging: bit for bit, safely, at any strength, and weighted sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import randomize, relative_error
from modelcases import CONFIGS, STRONG, adapted_layers, bits, same_bits, three_adapters, wrapped
from smallmodels import clip, output_of, tokens

from lycoris_diff import AdapterError, get_peft_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unmerge_is_bit_exact_whatever_happened(dtype):
    base = clip().to(dtype)
    model = get_peft_model(base, CONFIGS["lokr"](target_modules=["q_proj", "fc1"]), adapter_name="a")
    model.add_adapter("b", CONFIGS["shira"](target_modules=["fc1", "fc2"]))
    model.add_adapter("c", CONFIGS["miss-bat"](target_modules=["q_proj"]))
    model.add_adapter("d", CONFIGS["lora-dora"](target_modules=["q_proj", "fc2"]))
    original = bits(model)
    randomize(model, std=1.0)
    for order in itertools.permutations("abcd", 3):
        model.set_adapter(list(order))
        model.merge_adapter()
        assert not same_bits(model, original)
        model.set_scale(order[0], 0.3)
        model.set_scale(order[1], -2.0)
        model.set_adapter(list(order[:2]))
        with model.disable_adapter():
            assert torch.equal(output_of(model, tokens()), output_of(clip().to(dtype), tokens()))
        model.unmerge_adapter()
        assert same_bits(model, original)
        for name in order:
            model.set_scale(name, 1.0)
    for name in "abcd":  # one after the other
        model.merge_adapter([name])
    model.unmerge_adapter()
    assert same_bits(model, original)
    model.unmerge_adapter()
    assert same_bits(model, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_nan_adapter_does_no_lasting_harm(dtype):
    base = clip().to(dtype)
    model = get_peft_model(base, CONFIGS["lokr"](target_modules=["q_proj", "fc1"]), adapter_name="good")
    model.add_adapter("bad", CONFIGS["loha"](target_modules=["fc1", "fc2"]))
    original = bits(model)
    randomize(model, std=STRONG)
    with torch.no_grad():
        next(p for n, p in reversed(list(model.named_parameters())) if ".bad." in n)[0, 0] = float("nan")
    model.set_adapter(["good", "bad"])
    model.merge_adapter()
    assert any(w.isnan().any() for w in bits(model).values())
    model.unmerge_adapter()
    assert same_bits(model, original)
    with pytest.raises(AdapterError, match=r"(?i)finite|nan"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model, original)
    with pytest.raises(AdapterError, match=r"(?i)finite|nan"):
        model.merge_and_unload(safe_merge=True)
    assert same_bits(model, original)
    model.set_adapter("good")
    model.merge_adapter(safe_merge=True)
    assert not same_bits(model, original)
    model.unmerge_adapter()
    assert same_bits(model, original)


def test_safe_merge_refuses_overflow_of_the_base_dtype():
    model = get_peft_model(clip().half(), CONFIGS["lokr"](target_modules=["fc1"]))
    original = bits(model)
    randomize(model, std=1e4)
    with pytest.raises(AdapterError):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model, original)


def test_scale_while_merged_re_merges():
    model, x = three_adapters(), tokens()
    model.set_adapter(["a", "b", "c"])
    original = bits(model)
    for strength in (0.5, 0.0, 2.0, 1.0):
        model.set_scale("a", strength)
        expected = output_of(model, x)
        model.set_scale("a", 1.0)
        model.merge_adapter()
        model.set_scale("a", strength)
        assert relative_error(output_of(model, x), expected) < 1e-4
        model.unmerge_adapter()
        assert same_bits(model, original)
        assert torch.equal(output_of(model, x), expected)
        model.set_scale("a", 1.0)
    with pytest.raises(AdapterError):
        model.set_scale("nothing", 1.0)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_scale_zero_can_be_undone(kind):
    model, x = wrapped(kind), tokens()
    changed = output_of(model, x)
    model.set_scale("default", 0.0)
    assert torch.equal(output_of(model, x), output_of(clip(), x))
    model.set_scale("default", 1.0)
    assert torch.equal(output_of(model, x), changed)


def test_merge_takes_the_named_adapters_only():
    model, x = three_adapters(), tokens()
    model.set_adapter(["a", "b"])
    both = output_of(model, x)
    model.set_adapter("a")
    model.merge_adapter(["a", "b"])
    assert relative_error(output_of(model, x), both) < 1e-4
    with pytest.raises(AdapterError):
        model.merge_adapter(["zzz"])
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["a", "b"])
    assert relative_error(output_of(merged, x), both) < 1e-4
    assert not adapted_layers(merged)


def test_half_adapter_on_a_float_base_merges_in_full_precision():
    """An adapter of zeros, stored in bf16, leaves a float32 weight alone."""
    for kind in CONFIGS:
        model = get_peft_model(clip(), CONFIGS[kind](target_modules=["q_proj"]))
        for layer in adapted_layers(model).values():
            layer.adapters["default"].to(torch.bfloat16)
        if kind == "lora-dora":
            continue  # a rounded magnitude is a change
        original = bits(model)
        model.merge_adapter()
        assert same_bits(model, original), kind


def test_weighted_sum_is_exact_across_algorithms_and_ranks():
    x = tokens()
    for kinds in (["lora", "lora"], ["lokr", "loha", "miss"], ["shira", "lora", "miss-bat"], ["lora-dora", "lokr"]):
        base = clip().double()
        names = [f"n{i}" for i in range(len(kinds))]
        configs = [CONFIGS[k](target_modules=["q_proj", "fc1"]) for k in kinds]
        for i, config in enumerate(configs):
            config.r = config.r * 2**i
        model = get_peft_model(base, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:]):
            model.add_adapter(name, config)
        randomize(model, std=STRONG)
        weights = [0.7, -0.4, 1.3][: len(names)]
        model.set_adapter(names)
        for name, weight in zip(names, weights):
            model.set_scale(name, weight)
        expected = output_of(model, x)
        for name in names:
            model.set_scale(name, 1.0)
        model.add_weighted_adapter(names, weights, "mix")
        model.set_adapter("mix")
        assert relative_error(output_of(model, x), expected) < 1e-9, kinds
        model.merge_adapter()
        assert relative_error(output_of(model, x), expected) < 1e-9
        model.unmerge_adapter()
        model.set_scale("mix", 0.0)
        assert torch.equal(output_of(model, x), output_of(clip().double(), x))
    with pytest.raises(AdapterError):
        model.add_weighted_adapter(["n0"], [1.0, 2.0], "wrong")
    with pytest.raises(AdapterError):
        model.add_weighted_adapter(["n0", "zzz"], [1.0, 2.0], "wrong")
    with pytest.raises(AdapterError):
        model.add_weighted_adapter(["n0", "n1"], [1.0, 2.0], "n0")
