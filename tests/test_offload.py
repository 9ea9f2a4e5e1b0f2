"""Bases whose weights are not where they seem: offloaded by accelerate, or computed by a parametrization."""

from __future__ import annotations

import accelerate
import pytest
import torch
from cases import ALGORITHMS, Holder, randomize, relative_error
from modelcases import CONFIGS
from torch import nn

from lycoris_diff import AdapterError, get_peft_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(24, 36)
        self.conv = nn.Conv1d(36, 24, 1)

    def forward(self, x):
        return self.conv(self.fc1(x).relu().transpose(1, 2))


def adapted(kind: str, base: nn.Module):
    model = get_peft_model(base, CONFIGS[kind](target_modules=["fc1", "conv"]))
    randomize(model)
    return model.eval()


def offload(model: nn.Module) -> None:
    """Weights on the meta device, brought in by hooks for the length of a call."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def check(model, kind: str) -> None:
    x = torch.randn(2, 5, 24)
    expected = adapted(kind, Net())(x).detach()
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(model(x), expected) < 1e-5
    try:
        model.merge_adapter()
    except AdapterError:
        pass  # refusing is fine, half a merge is not
    else:
        assert relative_error(model(x).detach(), expected) < 1e-5
        model.unmerge_adapter()
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_offloading_an_adapted_model(kind):
    base = Net()
    model = adapted(kind, base)
    offload(base)
    check(model, kind)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_adapting_an_offloaded_model(kind):
    """New adapters of an offloaded base are real tensors, and a default start changes nothing."""
    base = Net()
    offload(base)
    model = get_peft_model(base, CONFIGS[kind](target_modules=["fc1", "conv"]))
    factors = [p for n, p in model.named_parameters() if p.requires_grad]
    assert factors and not any(p.is_meta for p in factors)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert relative_error(model(x), Net()(x)) < 1e-5
    randomize(model)
    twin = adapted(kind, Net())  # a SHiRA mask follows from the seed, a magnitude from the weight: both are the same
    with torch.no_grad():
        assert relative_error(model(x), twin(x)) < 1e-5
    check(model, kind)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("algorithm", ["lokr", "loha", "lora", "miss", "miss-bat", "shira", "lora-dora"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_work_or_are_refused(norm, algorithm):
    """A weight-normalised layer has no weight parameter: adapting it, and merging, act or raise the library's error."""
    base = Holder(norm(nn.Linear(24, 36)))
    x = torch.randn(3, 24)
    plain = base(x).detach()
    try:
        model = get_peft_model(base, ALGORITHMS[algorithm]())
    except AdapterError:
        assert torch.equal(base(x), plain)
        return
    randomize(model)
    changed = model(x).detach()
    assert relative_error(changed, plain) > 1e-3
    try:
        model.merge_adapter()
    except AdapterError:
        assert torch.equal(model(x), changed)
        return
    assert relative_error(model(x).detach(), changed) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(model(x), changed)
