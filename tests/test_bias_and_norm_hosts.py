"""Adapters that change biases and normalisation layers, beside all others."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from cases import Holder, adapt, as_function, make_input, make_layer, relative_error
from more_adapters import CASES, HERE, factors_of, on_channels, shake
from torch import nn

from lycoris_diff import (
    CheckpointError,
    FullConfig,
    GLoraConfig,
    LoKrConfig,
    LoraConfig,
    NormConfig,
    TargetError,
    get_peft_model,
)
from lycoris_diff.checkpoints.build import adapter_of
from lycoris_diff.checkpoints.checkpoint import Entry
from lycoris_diff.execution.geometry import geometry_of
from lycoris_diff.execution.norms import norm_geometry_of


# ------------------------------------------------------------------------------------------------------------- biases
def test_only_a_bias():
    """The weight is neither changed nor read; a host without a bias gets one while merged."""
    for host in ("linear", "linear-nobias", "conv2d-zeros", "conv2d-nobias", "hf-conv1d"):
        base = make_layer(host)
        entry = Entry("FULL", {"diff_b": torch.randn(36)})
        x = make_input(base)
        model, layer = adapt(copy.deepcopy(base), LoraConfig(r=2, target_modules=["layer"]), "lora")
        layer.add("shift", adapter_of(entry, layer.geometry, torch.float64))
        model.peft_config["shift"] = FullConfig()
        shake(layer.adapters["lora"])
        wanted = base(x) + on_channels(base, entry.tensors["diff_b"].double())
        model.set_adapter("shift")
        assert relative_error(model(x), wanted) < 1e-12
        assert layer.get_delta_weight("shift").abs().max() == 0
        assert torch.equal(layer.get_delta_bias("shift"), entry.tensors["diff_b"].double())
        assert layer.get_delta_bias("lora") is None
        both = wanted + (adapt_output(base, layer, x) - base(x))
        model.set_adapter(["lora", "shift"])
        for merged in (["shift"], ["lora"], ["lora", "shift"]):
            model.merge_adapter(merged)
            assert relative_error(model(x), both) < 1e-9, (host, merged)
        model.set_scale("shift", 2.0)
        assert relative_error(model(x), both + wanted - base(x)) < 1e-9
        model.set_scale("shift", 1.0)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.delete_adapter("shift")
        model.unmerge_adapter()
        assert [n for n, _ in layer.base_layer.named_parameters()] == [n for n, _ in base.named_parameters()]
        assert all(torch.equal(p, q) for p, q in zip(layer.base_layer.parameters(), base.parameters(), strict=True))


def adapt_output(base, layer, x):
    """Output of a copy that carries the layer's LoRA only."""
    model, fresh = adapt(copy.deepcopy(base), LoraConfig(r=2, target_modules=["layer"]))
    fresh.adapters["default"].load_state_dict(layer.adapters["lora"].state_dict())
    return model(x).detach()


def test_a_bias_beside_every_way_of_running():
    """Factored, dense, with a row factor, with dropout, with hooks, compiled."""
    x = torch.randn(5, 24, dtype=torch.float64)
    shift = torch.randn(36, dtype=torch.float64)
    for other in (
        LoraConfig(r=2, **HERE),
        LoraConfig(r=2, use_dora=True, **HERE),
        LoKrConfig(r=2, **HERE),
        CASES["ia3"][0](),
        LoraConfig(r=2, lora_dropout=0.5, **HERE),
    ):
        for host in ("linear", "linear-nobias"):
            model, layer = adapt(make_layer(host), other, "other")
            shake(layer.adapters["other"])
            model.add_adapter("shift", FullConfig(train_bias=True, **HERE))
            adapter = adapter_of(Entry("FULL", {"diff_b": shift}), layer.geometry, torch.float64)
            layer.remove("shift")
            layer.add("shift", adapter.requires_grad_(True))
            model.eval()
            model.set_adapter("other")
            wanted = model(x).detach() + shift
            model.set_adapter(["other", "shift"])
            assert relative_error(model(x), wanted) < 1e-10
            (grad,) = torch.autograd.grad(model(x).sum(), adapter.get_parameter("diff_b"))
            assert relative_error(grad, torch.full((36,), 5.0)) < 1e-12
            handle = layer.base_layer.register_forward_hook(lambda m, a, y: y)
            assert relative_error(model(x), wanted) < 1e-10
            handle.remove()
            assert relative_error(torch.compile(model.get_base_model(), backend="eager")(x), wanted) < 1e-10
            assert relative_error(torch.func.vmap(model.get_base_model())(x), wanted) < 1e-10


def test_trained_biases_and_changed_biases():
    """A config that trains base biases, and an adapter that shifts them, stay apart when one of them goes."""
    model, layer = adapt(make_layer("linear"), LoraConfig(r=2, bias="all", **HERE), "lora")
    original = layer.base_layer.bias.detach().clone()
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
    model.add_adapter("full", FullConfig(**HERE))
    shake(layer.adapters["full"])
    model.set_adapter(["lora", "full"])
    model.merge_adapter()
    model.delete_adapter("lora")
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, original)


# ------------------------------------------------------------------------------------------------------------- norms
class ScaleOnly(nn.Module):
    """An RMSNorm of transformers' making: a stored weight, an own forward."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


ScaleOnly.__module__, ScaleOnly.__name__ = "transformers.models.toy.modeling_toy", "ToyRMSNorm"


def norms() -> dict[str, nn.Module]:
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    made = {
        "layer": nn.LayerNorm(12),
        "layer-nobias": nn.LayerNorm(12, bias=False),
        "fp32": FP32LayerNorm(12),
        "group": nn.GroupNorm(4, 12),
        "rms": nn.RMSNorm(12, eps=1e-6),
        "diffusers-rms": RMSNorm(12, eps=1e-6),
        "diffusers-rms-bias": RMSNorm(12, eps=1e-6, bias=True),
        "transformers-rms": ScaleOnly(12),
    }
    for i, norm in enumerate(made.values()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in norm.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
    return {k: v.double().requires_grad_(False) for k, v in made.items()}


def norm_reference(norm: nn.Module, x, w, b):
    """The norm with another weight and bias, from the definition."""
    if isinstance(norm, nn.GroupNorm):
        parts = x.reshape(x.shape[0], norm.num_groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        w, b = (v.reshape(-1, 1, 1) for v in (w, b))
        return parts.reshape(x.shape) * w + b
    if isinstance(norm, nn.LayerNorm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    else:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * w if b is None else x * w + b


@pytest.mark.parametrize("name", norms())
def test_norms(name):
    base = norms()[name]
    model = get_peft_model(Holder(copy.deepcopy(base)), NormConfig())
    layer = model.get_base_model().layer
    x = torch.randn(3, 12, 5, 5, dtype=torch.float64) if name == "group" else torch.randn(3, 7, 12, dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    shake(layer.adapters["default"])
    t = factors_of(layer)
    bias = getattr(base, "bias", None)
    assert set(t) == ({"w_norm"} if bias is None else {"w_norm", "b_norm"})
    for strength in (1.0, 0.4, 0.0):
        model.set_scale("default", strength)
        w = base.weight + strength * t["w_norm"]
        wanted = norm_reference(base, x, w, None if bias is None else bias + strength * t["b_norm"])
        tolerance = 1e-5 if name == "fp32" or "diffusers" in name else 1e-10  # these compute in float32
        assert relative_error(model(x), wanted) < tolerance
        model.merge_adapter(safe_merge=True)
        assert relative_error(model(x), wanted) < tolerance
        model.unmerge_adapter()
        assert all(torch.equal(p, q) for p, q in zip(layer.base_layer.parameters(), base.parameters(), strict=True))
    assert torch.equal(model(x), base(x))
    model.set_scale("default", 1.0)
    assert relative_error(torch.compile(model.get_base_model(), backend="eager")(x), model(x)) < 1e-6
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda m, a, y: seen.append(1))
    model(x)
    assert seen
    handle.remove()
    assert relative_error(copy.deepcopy(model).merge_and_unload()(x), model(x)) < tolerance
    model.add_adapter("second", NormConfig())
    shake(layer.adapters["second"], seed=9)
    total = {k: t[k] + v for k, v in factors_of(layer, "second").items()}
    model.set_adapter(["default", "second"])
    wanted = norm_reference(base, x, base.weight + total["w_norm"], None if bias is None else bias + total["b_norm"])
    assert relative_error(model(x), wanted) < tolerance
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert relative_error(model(x), wanted) < tolerance
    model.merge_adapter()
    assert relative_error(model(x), wanted) < tolerance
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize("name", ["layer", "group", "rms", "transformers-rms"])
def test_norm_gradients(name):
    model = get_peft_model(Holder(norms()[name]), NormConfig())
    shake(model.get_base_model().layer.adapters["default"])
    x = torch.randn(2, 12, 3, dtype=torch.float64) if name == "group" else torch.randn(3, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(*as_function(model, x))


def test_norms_on_offloaded_and_half_models():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(24), nn.Linear(24, 36)

        def forward(self, x):
            return self.layer(self.norm(x))

    torch.manual_seed(0)
    plain = Net()
    model = get_peft_model(copy.deepcopy(plain), NormConfig())
    shake(model.get_base_model().norm.adapters["default"])
    x = torch.randn(4, 24)
    wanted = model(x).detach()
    offloaded = cpu_offload(copy.deepcopy(plain), torch.device("cpu"))
    again = get_peft_model(offloaded, NormConfig())
    again.get_base_model().norm.adapters["default"].load_state_dict(
        model.get_base_model().norm.adapters["default"].state_dict()
    )
    assert again.get_base_model().norm.base_layer.weight.is_meta
    assert relative_error(again(x), wanted) < 1e-6
    later = copy.deepcopy(model)
    cpu_offload(later.get_base_model(), torch.device("cpu"))
    assert later.get_base_model().norm.base_layer.weight.is_meta
    assert relative_error(later(x), wanted) < 1e-6
    half = get_peft_model(copy.deepcopy(plain).bfloat16(), NormConfig())
    adapter = half.get_base_model().norm.adapters["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    adapter.load_state_dict(model.get_base_model().norm.adapters["default"].state_dict())
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative_error(half(x.bfloat16()), wanted) < 3e-2


def test_where_norms_and_other_algorithms_belong():
    for norm in (nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((2, 8)), nn.BatchNorm2d(8)):
        assert norm_geometry_of(norm) is None
        with pytest.raises(TargetError, match="LayerNorm, GroupNorm and RMSNorm"):
            get_peft_model(Holder(norm), NormConfig(**HERE))
    with pytest.raises(TargetError, match="LayerNorm"):
        get_peft_model(Holder(nn.Linear(4, 4)), NormConfig(**HERE))
    with pytest.raises(TargetError, match="no module"):
        get_peft_model(Holder(nn.Linear(4, 4)), NormConfig())
    with pytest.raises(TargetError, match="supported are Linear"):
        get_peft_model(Holder(nn.LayerNorm(4)), GLoraConfig(**HERE))
    geometry = norm_geometry_of(nn.LayerNorm(8, bias=False))
    with pytest.raises(CheckpointError, match="b_norm"):
        adapter_of(Entry("NORM", {"w_norm": torch.ones(8), "b_norm": torch.ones(8)}), geometry)
    with pytest.raises(CheckpointError, match="w_norm"):
        adapter_of(Entry("NORM", {"w_norm": torch.ones(8)}), geometry_of(nn.Linear(8, 8)))
