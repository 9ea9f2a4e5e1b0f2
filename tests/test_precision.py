"""Values that a dtype, autocast, an address or an earlier value could spoil."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import adapt, make_layer
from more_adapters import EVERY, filled
from test_around import results
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lycoris_diff import AdapterError, FullConfig, LoHaConfig, LoraConfig, LoraModel, get_peft_model


def lora(layer: nn.Module, std: float = 0.3, **fields) -> tuple[LoraModel, nn.Module]:
    """A model with that layer and an adapter "a" of normal values."""
    fields = {"r": 4, "lora_alpha": 4} | fields
    model, adapted = adapt(layer, LoraConfig(target_modules=["layer"], **fields), "a")
    with torch.no_grad():
        for name in ("lora_A.weight", "lora_B.weight"):
            adapted.adapter("a").get_tensor(name).normal_(std=std)
    return model, adapted


# ------------------------------------------------------------------------------------------------ a file's own values


def zero_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()


def zero_through_data(model):
    for p in model.parameters():
        p.data.zero_()


def zero_by_assignment(model):
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()}, assign=True)


def zero_by_vector(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(torch.zeros_like(vector), model.parameters())


@pytest.fixture
def loaded(tmp_path):
    """A bfloat16 layer with float32 factors of a file, and the file's change of its weight."""
    model, adapted = lora(nn.Linear(64, 64))
    model.save_pretrained(tmp_path)
    layer = nn.Sequential()
    layer.layer = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    model = LoraModel.from_pretrained(layer, tmp_path / "a")
    return model, adapted.get_delta_weight("a")


@pytest.mark.parametrize("zero", [zero_in_place, zero_through_data, zero_by_assignment, zero_by_vector])
@pytest.mark.parametrize("copied", ["before", "after", "never"])
def test_values_of_a_file_end_with_the_live_ones(loaded, zero, copied):
    model, change = loaded
    if copied == "before":
        model = copy.deepcopy(model)
    torch.testing.assert_close(model.model.layer.get_delta_weight("default"), change, rtol=0, atol=1e-6)
    zero(model.model.layer.adapters)
    if copied == "after":
        model = copy.deepcopy(model)
    assert not model.model.layer.get_delta_weight("default").any()


def test_values_of_a_file_outlast_a_conversion(loaded):
    model, change = loaded
    model.half()
    model.float()
    torch.testing.assert_close(model.model.layer.get_delta_weight("default"), change, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------- memory in common


def test_a_shared_bias_is_not_merged_into():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].bias = model["a"].bias
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, FullConfig(target_modules=["a"]))
    with pytest.raises(AdapterError, match="'a' shares its bias with another module"):
        adapted.merge_adapter()
    torch.testing.assert_close(adapted.unload().state_dict(), before, rtol=0, atol=0)


def test_a_shared_bias_does_not_matter_to_weights():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].bias = model["a"].bias
    get_peft_model(model, LoraConfig(target_modules=["a"])).merge_adapter()


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.T, lambda w: w[2:6]])
def test_views_of_one_memory_are_tied(view):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = nn.Parameter(view(model["a"].weight.detach()))
    with pytest.raises(AdapterError, match="'a' shares its weight"):
        get_peft_model(model, LoraConfig(target_modules=["a"])).merge_adapter()


def test_neighbours_in_one_memory_are_not_tied():
    """As weights read from one file may be."""
    whole = torch.randn(2, 8, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["a"].weight, model["b"].weight = nn.Parameter(whole[0]), nn.Parameter(whole[1])
    get_peft_model(model, LoraConfig(target_modules=["a"], init_lora_weights=False)).merge_adapter()
    assert torch.equal(model["b"].weight, whole[1]) and not torch.equal(model["a"].base_layer.weight, torch.zeros(8, 8))


def test_norms_of_a_transposed_weight_are_its_own():
    model = nn.ModuleDict({"a": nn.Linear(24, 24), "b": Conv1D(24, 24), "c": nn.Linear(24, 8)})
    with torch.no_grad():
        model["a"].weight.mul_(torch.rand(24, 1) * 3)
    model["b"].weight = model["a"].weight
    model["c"].weight = nn.Parameter(model["a"].weight.detach()[:8])
    adapted = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["a", "b", "c"]))
    filled(adapted, 0.1)
    x = torch.randn(4, 24)
    for _ in range(2):
        for layer in (model["a"], model["b"], model["c"]):
            base = layer.base_layer
            weight = layer.geometry.canonical(base.weight + layer.get_delta_weight("default"))
            torch.testing.assert_close(layer(x), x @ weight.T + base.bias, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("algorithm", EVERY)
def test_merging_inside_autocast(algorithm):
    """Weights, changes and new adapters are what they are without it."""
    torch.manual_seed(0)
    model, adapted = adapt(make_layer("linear").float(), EVERY[algorithm](), "a")
    filled(model, 0.1)
    change, weight = adapted.get_delta_weight("a"), adapted.merged_weight(["a"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, merged = adapted.get_delta_weight("a"), adapted.merged_weight(["a"])
    torch.testing.assert_close((again, merged), (change, weight), rtol=0, atol=0)


def test_attached_inside_autocast():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, adapted = adapt(layer, LoraConfig(r=4, use_dora=True, target_modules=["layer"]), "a")
    norm = layer.weight.norm(dim=1)
    torch.testing.assert_close(adapted.adapter("a").get_tensor("lora_magnitude_vector").flatten(), norm)


def test_float64_stays_under_autocast():
    model, adapted = lora(nn.Linear(8, 8, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    adapted.base_layer.register_forward_hook(lambda *args: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- strengths


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half])
def test_strength_outlasts_a_conversion(convert):
    model, adapted = lora(nn.Linear(16, 16))
    model.eval().set_scale("a", 0.3)
    convert(model)
    assert adapted.adapter("a").strength.dtype is torch.float32
    model.float()
    x = torch.randn(4, 16)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(model(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_strength_beyond_float16(recorded, hooked):
    model, adapted = lora(nn.Linear(64, 64).half(), std=1e-4, r=1, lora_alpha=8)
    with torch.no_grad():
        adapted.adapter("a").get_tensor("lora_B.weight")[0] = 0
    if hooked:
        adapted.base_layer.register_forward_hook(lambda *args: None)
    model.eval().set_scale("a", 1e5)
    x = torch.randn(8, 64).half()
    weight = adapted.base_layer.weight + adapted.get_delta_weight("a")
    with torch.set_grad_enabled(recorded):
        y = model(x)
    torch.testing.assert_close(y.float(), x.float() @ weight.T + adapted.base_layer.bias.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", ["fused", "hooked", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_at_great_strengths(way, dtype):
    """Rounded terms do not cancel: the error is that of rounding the output, whatever the strength."""
    model, adapted = lora(nn.Linear(512, 512, bias=False).to(dtype), std=1e-3, use_dora=True)
    if way == "hooked":
        adapted.base_layer.register_forward_hook(lambda *args: None)
    model.set_scale("a", 100.0)
    x = torch.randn(8, 512).to(dtype)
    expected = x.double() @ (adapted.base_layer.weight.double() + adapted.get_delta_weight("a").double()).T
    y = called(model, x, way)
    assert (y.double() - expected).norm() / expected.norm() < 0.01


def called(model, x, way):
    return model(x, adapter_names=["a"] * len(x)) if way == "sampled" else model(x)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_rows_below_float16(recorded, hooked):
    """Where a row's factor is beyond the range of float16, its output, which is none, stays finite."""
    layer = nn.Linear(512, 512, bias=False).half()
    with torch.no_grad():
        layer.weight[3] = 6e-8
    model, adapted = lora(layer, std=0, use_dora=True)
    if hooked:
        layer.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        adapted.adapter("a").get_tensor("lora_magnitude_vector").add_(0.5)
    x = torch.zeros(8, 512).half()
    x[:, 0] = 0.01
    with torch.set_grad_enabled(recorded):
        assert model(x).isfinite().all()


# --------------------------------------------------------------------------------------------------------- remembered


@pytest.mark.parametrize("dora", [False, True])
def test_values_that_come_to_a_freed_place(dora):
    """A frozen layer notices tensors that were put into a parameter twice, at whatever address."""
    model, adapted = lora(nn.Linear(256, 256, bias=False), std=0.01, use_dora=dora)
    model.eval().requires_grad_(False)
    x, base = torch.randn(8, 256), adapted.base_layer.weight
    factor = adapted.adapter("a").get_tensor("lora_B.weight")
    with torch.no_grad():
        for _ in range(6):
            model(x)
            for number in (3.0, 0.5):
                base.data = base.data * number
                factor.data = factor.data * number
            expected = x @ (base + adapted.get_delta_weight("a")).T
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)


def test_sums_of_sums():
    """Every factor of every part takes its gradient, and all of them are one change of the weight."""
    model, adapted = lora(nn.Linear(16, 16, dtype=torch.float64))
    model.add_adapter("b", LoHaConfig(r=2, target_modules=["layer"]))
    model.set_adapter(["a", "b"])
    filled(model, 0.3)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "s")
    model.add_weighted_adapter(["s", "a"], [2.0, -0.25], "t")
    x = torch.randn(4, 16, dtype=torch.float64)
    expected = 1.75 * adapted.get_delta_weight("a") + adapted.get_delta_weight("b")
    torch.testing.assert_close(adapted.get_delta_weight("t"), expected, rtol=1e-10, atol=1e-10)
    model.set_adapter("t")
    for parameter in adapted.adapters["t"].parameters():
        parameter.requires_grad_()
    y, _, grads = results(model, x)
    torch.testing.assert_close(y, nn.functional.linear(x, adapted.base_layer.weight + expected, adapted.base_layer.bias))
    own = {name: value for name, value in grads.items() if ".adapters.t." in name}
    assert len(own) == 8 and all(value.any() for value in own.values())
    adapted.base_layer.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------- other passes


@pytest.mark.parametrize("tokens", [4, 4000])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_derivatives(dora, tokens):
    model, adapted = lora(nn.Linear(256, 256, dtype=torch.float64), use_dora=dora)
    x, direction = torch.randn(2, tokens, 256, dtype=torch.float64)
    weight = adapted.base_layer.weight + adapted.get_delta_weight("a")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, direction @ weight.T, rtol=1e-8, atol=1e-8)


class Checkpointed(nn.Module):
    """As diffusers' blocks: recomputed in backward where a flag says so."""

    def __init__(self):
        super().__init__()
        self.layer, self.gradient_checkpointing = nn.Linear(8, 8), True

    def forward(self, x):
        run = lambda x: self.layer(x).tanh()
        return checkpoint(run, x, use_reentrant=True) if self.gradient_checkpointing else run(x)


def test_samples_and_checkpointing():
    model = get_peft_model(Checkpointed(), LoraConfig(r=2, target_modules=["layer"]), "a")
    filled(model, 0.3)
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        model(x, adapter_names=["a", None])
    with torch.no_grad():
        y = model(x, adapter_names=["a", None])
    model.model.gradient_checkpointing = False
    torch.testing.assert_close(model(x, adapter_names=["a", None]), y)
