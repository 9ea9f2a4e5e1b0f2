"""DataParallel, which transformers' Trainer takes where one process sees several GPUs: replicas use their own tensors."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import adapt, make_input, make_layer
from more_adapters import EVERY, filled
from torch import nn

from lycoris_diff import LoraConfig, NormConfig, get_peft_model

replicating = sys.modules["torch.nn.parallel.replicate"]


@pytest.fixture
def replicate(monkeypatch):
    """torch's own, with copies in place of the broadcast to other devices."""
    copies = lambda tensors, devices, detach=False: [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]
    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copies)
    return lambda model: replicating.replicate(model, [0, 1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algorithm", EVERY)
def test_replicas_run_with_their_own_factors(algorithm, training, replicate):
    torch.manual_seed(0)
    layer = make_layer("linear")
    model, _ = adapt(layer, EVERY[algorithm](), "a")
    filled(model, 0.1)
    model.train(training)
    x = make_input(layer)
    y = model(x)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(y.square().sum() * 2, [p for p in model.parameters() if p.requires_grad])
    replicas = replicate(model)
    outputs = [replica(x) for replica in replicas]
    for output in outputs:
        torch.testing.assert_close(output, y)
    total = sum(output.square().sum() for output in outputs)
    grads = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
    for name, grad, want in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for replica in replicas:
            torch.testing.assert_close(replica(x), y)


class Mixed(nn.Module):
    """A convolution, a norm, a linear layer and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.linear(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).tanh())


def mixed(**fields):
    torch.manual_seed(0)
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["conv", "linear"], **fields), "a")
    model.add_adapter("b", NormConfig(target_modules=["norm"]))
    model.set_adapter(["a", "b"])
    return filled(model)


def summed():
    model = mixed()
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "s")
    model.set_adapter("s")
    return model


@pytest.mark.parametrize("make", [mixed, lambda: mixed(modules_to_save=["head"]), summed], ids=["mixed", "head", "sum"])
def test_replicas_of_whole_models(make, replicate):
    model, x = make(), torch.randn(2, 4, 5, 5)
    y = model(x)
    replicas = replicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.allclose(model(x), y)
    for replica in replicas:
        torch.testing.assert_close(replica(x), y)
