"""Merging and unmerging: bit for bit, safely, at any strength, and weighted sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import randomize, relative_error
from modelcases import CONFIGS, STRONG, adapted_layers, bits, same_bits, three_adapters, wrapped
from smallmodels import clip, output_of, tokens

from lycoris_diff import AdapterError, AdapterModel, get_peft_model


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


def test_switching_while_merged_never_mixes():
    """a adapts q_proj and fc1, b fc1 and fc2: with a merged and b chosen, the model is a, or b, or the call is refused."""
    model, x = three_adapters(), tokens()
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = output_of(model, x)
    model.set_adapter("a")
    model.merge_adapter()
    try:
        model.set_adapter("b")
    except AdapterError:
        assert relative_error(output_of(model, x), expected["a"]) < 1e-4
        return
    now = output_of(model, x)
    assert min(relative_error(now, y) for y in expected.values()) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(output_of(model, x), expected["b"])


def test_disabling_nests_and_survives_errors():
    model, x = wrapped("lokr"), tokens()
    plain, changed = output_of(clip(), x), output_of(model, x)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(output_of(model, x), plain)
        assert torch.equal(output_of(model, x), plain)
    assert torch.equal(output_of(model, x), changed)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(output_of(model, x), changed)


def test_half_precision_inference_keeps_the_file_and_merges_from_it(tmp_path):
    """Factors of a float32 file compute in the base's bf16, yet merging and saving use the values as stored."""
    from safetensors.torch import load_file

    model = wrapped("lokr", target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "first")
    loaded = AdapterModel.from_pretrained(clip().bfloat16(), tmp_path / "first")
    assert {p.dtype for n, p in loaded.named_parameters() if "lokr_" in n} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    exact = adapted_layers(model)
    weights = bits(loaded)
    loaded.merge_adapter()
    for name, layer in adapted_layers(loaded).items():
        expected = (weights[name].float() + exact[name].get_delta_weight("default")).bfloat16()
        assert torch.equal(layer.base_layer.weight, expected)


def test_casting_while_merged():
    """The snapshot follows the model to another dtype."""
    model = wrapped("lokr", target_modules=["q_proj"])
    original = bits(model)
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    now = bits(model)
    assert all(now[n].dtype == torch.float16 and torch.equal(now[n], original[n].half()) for n in now)


def test_loading_weights_while_merged():
    """A state dict of the unmerged model, loaded into the merged one, is not overwritten by unmerging."""
    model, x = wrapped("lokr", target_modules=["q_proj"]), tokens()
    expected = output_of(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    model.load_state_dict(state)
    model.unmerge_adapter()
    assert relative_error(output_of(model, x), expected) < 1e-5


def test_a_model_survives_pickling(tmp_path):
    model, x = three_adapters(), tokens()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output_of(again, x), output_of(model, x))
