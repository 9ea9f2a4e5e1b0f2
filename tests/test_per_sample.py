"""One batch with other adapters for every sample gives every sample what a batch of its own gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Holder, adapt, make_input, make_layer, randomize
from modelcases import CONFIGS, STRONG, wrapped
from more_adapters import EVERY, filled
from smallpipelines import pipeline
from torch import nn

from lycoris_diff import (
    AdapterError,
    FullConfig,
    LoKrConfig,
    LoraConfig,
    NormConfig,
    adapters_per_sample,
    fuse_adapters,
    get_peft_model,
    inject_adapter,
    set_adapters,
)
from lycoris_diff.bookkeeping import adapted_layers

ENTRIES = ["a", None, ["a", "b"], "b", "__base__"]


def alone(model, entry, x):
    """What one sample gives by itself."""
    names = [entry] if isinstance(entry, str) else list(entry or ())
    if not names or names == ["__base__"]:
        with model.disable_adapter():
            return model(x)
    model.set_adapter(names)
    return model(x)


def two(algorithm, layer):
    """One layer with an adapter of the algorithm and a LoKr."""
    model, adapted = adapt(make_layer(layer), EVERY[algorithm](), "a")
    model.set_adapter("a")
    filled(model)
    model.add_adapter("b", LoKrConfig(r=2, target_modules=["layer"]))
    randomize(model) if not algorithm.startswith("more-") else None
    model.set_adapter(["a", "b"])
    filled(model, 0.1)
    model.set_scale("a", 0.7)
    return model, adapted


@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros", "hf-conv1d"])
@pytest.mark.parametrize("algorithm", EVERY)
def test_every_algorithm(algorithm, layer):
    """Equal to separate runs up to the order in which float64 adds."""
    try:
        model, adapted = two(algorithm, layer)
    except AdapterError as error:
        pytest.skip(f"not on this layer: {error}")
    x = torch.cat([make_input(adapted.base_layer, seed=seed) for seed in range(5)])  # two rounds of five samples
    expected = torch.cat([alone(model, ENTRIES[row % 5], x[row : row + 1]) for row in range(10)])
    model.set_adapter("b")  # what is active does not count
    torch.testing.assert_close(model(x, adapter_names=ENTRIES), expected, rtol=1e-10, atol=1e-10)
    assert adapted.samples is None


def test_gradients():
    model, _ = two("lokr", "linear")
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    gradients = []
    for together in (True, False):
        model.set_adapter(["a", "b"])
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        if together:
            y = model(leaf, adapter_names=["a", None, ["a", "b"]])
        else:
            y = torch.cat([alone(model, entry, leaf[row : row + 1]) for row, entry in enumerate(["a", None, ["a", "b"]])])
            model.set_adapter(["a", "b"])
        y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_whole_text_encoder():
    model = wrapped("lokr", name="a")
    model.add_adapter("b", CONFIGS["loha"](target_modules=["fc1"]))
    randomize(model, std=STRONG)
    ids = torch.randint(0, 60, (3, 8))
    expected = torch.cat([alone(model, entry, ids[row : row + 1]).last_hidden_state for row, entry in enumerate("ab")])
    found = model(input_ids=ids[:2], adapter_names=["a", "b"]).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["layer", "group"])
def test_norms(norm):
    model = filled(get_peft_model(Holder(norm), NormConfig(), adapter_name="a"))
    x = torch.randn(4, 8, 8)
    with model.disable_adapter():
        base = model(x)
    found = model(x, adapter_names=["a", None])
    torch.testing.assert_close(found, torch.where(torch.tensor([1, 0, 1, 0]).bool()[:, None, None], model(x), base))


def test_change_of_the_bias_alone():
    model = get_peft_model(Holder(nn.Linear(4, 6)), FullConfig(target_modules=["layer"]), adapter_name="a")
    with torch.no_grad():
        model.get_base_model().layer.adapter("a").get_tensor("diff_b").fill_(2.0)
    x = torch.randn(2, 3, 4)
    added = model(x, adapter_names=["a", None]) - model(x, adapter_names=[None, None])
    torch.testing.assert_close(added, torch.tensor([2.0, 0.0])[:, None, None].expand(2, 3, 6))


def test_zero_strength_is_the_base():
    model, _ = two("lora", "linear")
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    model.set_scale("a", 0.0)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        assert torch.equal(model(x, adapter_names=["a", None]), base)


class TestPipeline:
    @pytest.fixture(scope="class")
    def pipe(self):
        pipe = pipeline("sd15")
        for name, config in (("a", LoKrConfig(r=2)), ("b", LoraConfig(r=2))):
            inject_adapter(pipe.unet, config, name)
            inject_adapter(pipe.text_encoder, LoraConfig(r=2), name)
        filled(pipe.unet, 0.2)
        filled(pipe.text_encoder, 0.2)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe, prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np", "guidance_scale": 5.0}
        return pipe(prompts, generator=generators, **call).images

    def test_pictures_are_those_of_separate_runs(self, pipe):
        """With classifier-free guidance, which doubles the batch; float32 sums in another order."""
        entries = ["a", None, ["a", "b"]]
        expected = []
        for seed, entry in enumerate(entries):
            set_adapters(pipe, [entry] if isinstance(entry, str) else entry or [])
            expected.append(self.draw(pipe, ["a b"], [seed])[0])
        assert np.abs(expected[0] - expected[1]).max() > 0.01
        set_adapters(pipe, "b")
        with adapters_per_sample(pipe, entries):
            found = self.draw(pipe, ["a b"] * 3, range(3))
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
        assert all(layer.samples is None for _, layer in adapted_layers(pipe.unet))

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([], "an entry for every sample"),
            ("a", "an entry for every sample"),
            (["a", "c"], "no adapter 'c'"),
            ([3], "has the entry 3"),
            ([["a", 3]], "a list of names or None"),
        ],
    )
    def test_bad_entries(self, pipe, entries, message):
        with pytest.raises(AdapterError, match=message), adapters_per_sample(pipe, entries):
            pass

    def test_another_number_of_prompts(self, pipe):
        with pytest.raises(AdapterError, match="for 3 pictures, and 1 are to be"), adapters_per_sample(pipe, ["a"] * 3):
            self.draw(pipe, ["a"], [0])
        assert all(layer.samples is None for _, layer in adapted_layers(pipe.unet))

    def test_fused(self):
        pipe = pipeline("sd15")
        inject_adapter(pipe.unet, LoraConfig(r=2), "a")
        fuse_adapters(pipe)
        with pytest.raises(AdapterError, match="unfuse"), adapters_per_sample(pipe, ["a"]):
            pass


def test_what_cannot_differ_between_samples():
    whole = wrapped("lora", name="a", target_modules=["q_proj"], modules_to_save=["final_layer_norm"])
    with pytest.raises(AdapterError, match="modules_to_save"):
        whole(torch.zeros(1, 4, dtype=torch.long), adapter_names=["a"])
    biased = wrapped("lora", name="a", target_modules=["q_proj"], bias="all")
    with pytest.raises(AdapterError, match="biases of the base model"):
        biased(torch.zeros(1, 4, dtype=torch.long), adapter_names=["a"])
