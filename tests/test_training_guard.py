"""What is not finite is found by name: gradients, the module it begins in, weights that are about to be saved."""

from __future__ import annotations

import random

import numpy as np
import pytest
import smallmodels
import torch
from torch import nn

from lycoris_diff import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from lycoris_diff.errors import AdapterError
from lycoris_diff.training.guard import check_finite_adapters, first_nonfinite_module, nonfinite_gradients


@pytest.fixture
def models():
    unet = get_peft_model(smallmodels.unet(), LoKrConfig(r=4, target_modules=["to_q", "to_v"]), "default")
    text_encoder = get_peft_model(smallmodels.clip(), LoraConfig(r=4, target_modules=["q_proj"]), "default")
    return {"unet": unet, "text_encoder": text_encoder}


def forward_of(models):
    """A training step's forward, text encoder first."""
    inputs = smallmodels.unet_inputs()

    def forward():
        inputs["encoder_hidden_states"] = models["text_encoder"](torch.tensor([[0, 5, 6, 1, 1]] * 2))[0]
        return models["unet"](**inputs).sample.square().mean()

    return forward


def parameter(model, part):
    """First parameter of a model with that text in its name, and its name without the wrapper."""
    inner = model.get_base_model()
    return next((p, name) for name, p in inner.named_parameters() if part in name)


# --- gradients and weights -----------------------------------------------------------------------------------------------
def test_gradients_are_named_by_component_and_path(models):
    forward_of(models)().backward()
    assert nonfinite_gradients(models) == []
    _, in_unet = parameter(models["unet"], "to_v.adapters")
    _, in_text = parameter(models["text_encoder"], "q_proj.adapters")
    for component, name, value in (("unet", in_unet, float("nan")), ("text_encoder", in_text, float("-inf"))):
        models[component].get_base_model().get_parameter(name).grad.view(-1)[-1] = value
    assert nonfinite_gradients(models) == [f"unet.{in_unet}", f"text_encoder.{in_text}"]


def test_no_gradient_is_no_trouble(models):
    assert nonfinite_gradients(models) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_adapters_are_not_saved(models, value):
    check_finite_adapters(models)
    bad, name = parameter(models["text_encoder"], "q_proj.adapters")
    with torch.no_grad():
        bad.view(-1)[3] = value
    with pytest.raises(AdapterError) as refused:
        check_finite_adapters(models)
    assert f"text_encoder.{name}" in str(refused.value) and "not saved" in str(refused.value)


def test_many_bad_tensors_are_counted(models):
    trained = [p for p in models["unet"].parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.fill_(float("nan"))
    with pytest.raises(AdapterError, match=rf"and {len(trained) - 5} more"):
        check_finite_adapters(models)


# --- the module it begins in ---------------------------------------------------------------------------------------------
def test_nothing_is_found_in_a_clean_model(models):
    assert first_nonfinite_module(models, forward_of(models)) is None


@pytest.mark.parametrize(
    ("component", "part", "module"),
    [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.adapters", "attn1.to_v"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.base_layer.weight", "attn1.to_v"),
        ("unet", "mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv1"),
        ("text_encoder", "layers.1.self_attn.q_proj.adapters", "layers.1.self_attn.q_proj"),
    ],
)
def test_a_bad_weight_is_found_where_it_is_used(models, component, part, module):
    bad, _ = parameter(models[component], part)
    # later ones are bad as well: the first one is asked for
    last, _ = parameter(models["unet"], "conv_out.weight")
    with torch.no_grad():
        bad.view(-1)[0] = float("nan")
        last.view(-1)[0] = float("nan")
    found = first_nonfinite_module(models, forward_of(models))
    assert found is not None and found.startswith(f"{component}.") and found.endswith(module)


def test_an_overflow_is_found_though_every_weight_is_finite(models):
    huge, _ = parameter(models["unet"], "mid_block.resnets.0.conv1.weight")
    with torch.no_grad():
        huge.fill_(3e38)
    check_finite_adapters(models)
    found = first_nonfinite_module(models, forward_of(models))
    assert found is not None and found.endswith("mid_block.resnets.0.conv1")


class Attention(nn.Module):
    """What overflows between its layers is its own doing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = 1.0

    def forward(self, x, attention_mask=None):
        scores = self.first(x) * self.scale * self.scale
        return {"out": (self.last(scores if attention_mask is None else scores + attention_mask.exp()),)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.drop, self.head = nn.Linear(4, 4), Attention(), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        return self.head(self.drop(self.attention(self.embed(x), attention_mask=attention_mask)["out"][0]))


def test_the_module_that_computes_between_its_layers_is_blamed():
    model = Model()
    model.attention.scale = 1e30
    assert first_nonfinite_module({"unet": model}, lambda: model(torch.ones(2, 4))) == "unet.attention"


def test_an_attention_mask_is_no_bad_input():
    model, mask = Model(), torch.tensor([0.0, 0.0, float("-inf"), 0.0])
    assert first_nonfinite_module({"unet": model}, lambda: model(torch.ones(2, 4), mask)) is None
    model.attention.scale = 1e30
    assert first_nonfinite_module({"unet": model}, lambda: model(torch.ones(2, 4), mask)) == "unet.attention"


def test_bad_inputs_are_not_the_models_doing():
    model = Model()
    bad = torch.tensor([[1.0, float("nan"), 0.0, 0.0]])
    assert first_nonfinite_module({"unet": model}, lambda: model(bad)) == "input of unet"
    assert first_nonfinite_module({"unet": model}, lambda: model(x=bad)) == "input of unet"


def test_half_precision_overflow():
    model = get_peft_model(Model().half(), LoHaConfig(r=2, target_modules=["embed"]), "default").eval()
    with torch.no_grad():
        model.head.weight.fill_(6e4)
        model.head.bias.fill_(0)
    x = torch.full((1, 4), 100.0).half()
    assert first_nonfinite_module({"unet": model}, lambda: model(x)) == "unet.head"


def test_looking_leaves_the_run_as_it_was(models):
    forward = forward_of(models)
    model = Model().train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in models["unet"].modules()]

    def forward_with_chance():
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), forward(), model(torch.ones(1, 4))

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert first_nonfinite_module({**models, "third": model}, forward_with_chance) is None
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in models["unet"].modules()] == hooks
    assert model.training and torch.is_grad_enabled()


def test_hooks_go_when_the_forward_raises():
    model = Model()
    with pytest.raises(RuntimeError, match="shape"):
        first_nonfinite_module({"unet": model}, lambda: model(torch.ones(2, 5)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
