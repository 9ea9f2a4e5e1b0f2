"""Adapters on quantized layers: their own kernel runs, nothing is dequantized, and merging is asked for and measured.

Tolerances. With float32 inputs and in train mode all four kernels multiply by the numbers that the weight stands for (they
round weights only), so outputs and gradients are compared with a float64 layer of those numbers plus the change: 1e-5, some
float32 roundings. In eval mode bitsandbytes' int8 also rounds the input to 8 bits, an error of about 1/127 of it; there what
the adapter adds is compared with what it adds to the float64 layer. In bfloat16 2^-8 is one rounding of an output.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Holder, relative_error, trainable
from more_adapters import shake
from pipelinefiles import make_file, with_changes
from quantizedcases import (
    ACCEPTED,
    DYNAMIC,
    MAKERS,
    REFUSED,
    SCHEMES,
    Unknown,
    change,
    dense,
    dequantizations,
    doubles,
    expected,
    linear,
    packed_bits,
    quantized,
    quiet,
    same_bits,
    settings,
    values,
)
from smallpipelines import latents, pipeline
from test_pipelines import close
from torch import nn

from lycoris_diff import (
    AdaptedLayer,
    AdapterError,
    AdapterModel,
    ConfigError,
    GLoraConfig,
    IA3Config,
    LoraConfig,
    RequantizeReport,
    fuse_adapters,
    get_peft_model,
    inject_adapter,
    load_adapter,
    merge_adapters,
    save_adapter,
    unfuse_adapters,
)
from lycoris_diff.tiny import load_pipeline

HERE = {"target_modules": ["layer"]}
EXACT = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(scheme: str, case: str, **sizes):
    """Config, model in train mode and adapted layer, factors away from their start."""
    config = MAKERS[case]()
    model = get_peft_model(Holder(quantized(scheme, **sizes)), config)
    layer = model.get_base_model().layer
    shake(layer.adapters["default"], std=0.2)
    return config, model.train(), layer


def tokens(inp: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 7, inp, generator=torch.Generator().manual_seed(seed))


# --- forward and backward ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_values_plus_the_change(scheme, case):
    config, model, layer = adapted(scheme, case)
    plain, leaves = dense(layer.base_layer), doubles(layer)
    x = tokens().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, wanted = model(x), expected(case, config, leaves, plain, x64)
    assert relative_error(y, wanted) < EXACT
    assert relative_error(y, x64 @ plain.weight.T + plain.bias) > 1e-3  # the adapter does something
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(seed)
    names = [k for k, v in leaves.items() if v.is_floating_point()]
    found = torch.autograd.grad(wanted, [x64, *[leaves[k] for k in names]], seed.double())
    assert relative_error(x.grad, found[0]) < EXACT
    for name, gradient in zip(names, found[1:], strict=True):
        assert relative_error(trainable(layer)[name].grad, gradient) < 5 * EXACT, name
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("case", ["lokr", "loha", "lora", "lora-dora", "oft", "boft", "glora", "shira"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16(scheme, case):
    """Factors stay in float32, everything else runs in the layer's dtype."""
    config, model, layer = adapted(scheme, case, dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(layer).values()} == {torch.float32}
    x = tokens().bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    wanted = expected(case, config, doubles(layer), dense(layer.base_layer), x.double())
    assert relative_error(y, wanted) < 4 * 2**-8


@pytest.mark.parametrize("case", ["lokr", "miss", "oft", "diag-oft", "ia3-in", "glora", "lora-dora", "full"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference(scheme, case):
    """In eval mode, where bitsandbytes runs other kernels: what is added to the layer's own output is the change."""
    inp, out = 64, 96
    config, model, layer = adapted(scheme, case, inp=inp, out=out)
    plain, leaves = dense(layer.base_layer), doubles(layer)
    model.eval()
    x = tokens(inp)
    with torch.no_grad(), quiet():
        own, y = layer.base_layer(x), model(x)
        added = expected(case, config, leaves, plain, x.double()) - plain(x.double())
        # kernels that round the input (int8) or compute in bfloat16 (nf4 on some processors) make an error of their own
        kernel = relative_error(own, plain(x.double()))
    assert kernel < 0.02
    assert relative_error(y, own.double() + added) < EXACT + 4 * kernel


@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_algorithms_at_once_with_strengths(scheme):
    """Each change is taken against the unmodified weight, and the changes add up; two runs of the layer at most."""
    cases = {"oft": 0.5, "diag-oft": 1.5, "ia3-in": 1.0, "lokr": -0.7, "lora-dora": 0.4, "glora": 0.8}
    model = get_peft_model(Holder(quantized(scheme)), MAKERS["oft"](), adapter_name="oft")
    for name in list(cases)[1:]:
        model.add_adapter(name, MAKERS[name]())
    model.set_adapter(list(cases))
    layer = model.get_base_model().layer
    plain, x = dense(layer.base_layer), tokens()
    wanted = plain(x.double())
    for seed, (name, strength) in enumerate(cases.items()):
        shake(layer.adapters[name], seed=seed, std=0.2)
        model.set_scale(name, strength)
        delta = change(name, MAKERS[name](), doubles(layer, name), plain)
        wanted = wanted + strength * (x.double() @ delta.T)
    model.train()
    assert relative_error(model(x), wanted) < EXACT
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    for name in cases:
        model.set_scale(name, 0.0)
    with torch.no_grad():
        assert torch.equal(model(x), layer.base_layer(x))


@pytest.mark.parametrize("case", ["oft", "diag-oft", "glora", "lora-dora", "lokr"])
def test_adapters_by_sample(case):
    _, model, layer = adapted("torchao-int8", case)
    x = tokens()
    both = model(x)
    mixed = model(x, adapter_names=["default", "__base__"])
    assert relative_error(mixed[0], both[0]) < EXACT
    assert torch.equal(mixed[1], layer.base_layer(x)[1])


def test_dropped_rows_keep_the_layers_own_output():
    config = GLoraConfig(r=3, rank_dropout=0.5, **HERE)
    model = get_peft_model(Holder(quantized("torchao-int8")), config).train()
    layer = model.get_base_model().layer
    shake(layer.adapters["default"], std=0.2)
    x = tokens()
    model.eval()
    with torch.no_grad():
        own, whole = layer.base_layer(x), model(x)
    model.train()
    torch.manual_seed(0)
    y = model(x).detach()
    dropped = torch.stack([(y[..., i] - own[..., i]).abs().max() < 1e-5 for i in range(36)])
    assert 5 < int(dropped.sum()) < 31
    assert relative_error(y[..., ~dropped], whole[..., ~dropped].double()) < EXACT


@pytest.mark.parametrize("case", ["lokr", "loha", "miss", "shira", "lora", "oft", "boft", "ia3", "glora", "full", "lora-dora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_dequantized_but_by_the_layers_own_kernel(scheme, case, monkeypatch):
    """A training step calls the libraries' dequantizing functions as often as the frozen layer alone, run as often."""
    _, model, layer = adapted(scheme, case)
    base, runs = layer.base_layer, []
    base.register_forward_hook(lambda *_: runs.append(1))
    with dequantizations(monkeypatch) as calls:
        layer.values()
        assert calls, "the counter sees reading a weight"
        calls.clear()
        base(tokens().requires_grad_()).sum().backward()
        alone = list(calls)
        calls.clear()
        runs.clear()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(tokens().requires_grad_()).square().mean().backward()
        optimizer.step()
        assert len(runs) == (2 if case == "lora-dora" else 1)  # DoRA sends its factors through the layer as further tokens
        assert sorted(calls) == sorted(alone * len(runs))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["lokr", "shira", "oft", "diag-oft", "lora-dora"])
def test_training_saving_and_loading(scheme, case, tmp_path):
    base = Holder(quantized(scheme))
    again = copy.deepcopy(base)
    bits = packed_bits(base.layer)
    model = get_peft_model(base, MAKERS[case]()).train()
    x, target = tokens(), tokens(36, seed=9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.98 * losses[0]
    assert same_bits(bits, packed_bits(model.get_base_model().layer.base_layer))
    model.save_pretrained(tmp_path)
    loaded = AdapterModel.from_pretrained(again, tmp_path, is_trainable=True).train()
    assert torch.equal(loaded(x), model(x))


# --- what is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_needs_the_values_in_every_step_is_refused_when_attached(scheme, case):
    base = Holder(quantized(scheme))
    layer, weight, bits = base.layer, base.layer.weight, packed_bits(base.layer)
    with pytest.raises(ConfigError, match="'layer'") as caught:
        get_peft_model(base, MAKERS[case]())
    text = str(caught.value)
    assert REFUSED[case] in text and type(weight).__name__ in text and "exclude_modules" in text
    assert base.layer is layer and layer.weight is weight and same_bits(bits, packed_bits(layer))
    assert "_lycoris_diff_state" not in vars(base) and not layer._forward_hooks


@pytest.mark.parametrize("case", ["miss-bat", "lokr-dora", "tlora"])
def test_directories_of_what_is_refused_are_refused(case, tmp_path):
    get_peft_model(Holder(linear()), MAKERS[case]()).save_pretrained(tmp_path)
    base = Holder(quantized("torchao-int8"))
    with pytest.raises(AdapterError, match=r"'layer'.*Int8Tensor.*quantized"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert type(base.layer) is nn.Linear and "_lycoris_diff_state" not in vars(base)


def test_dora_on_a_weight_that_cannot_be_read_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown.*int8.*can be read"):
        get_peft_model(Holder(Unknown(linear())), LoraConfig(r=2, use_dora=True, **HERE))
    model = get_peft_model(Holder(Unknown(linear())), IA3Config(init_weights=False, **HERE))  # which needs no values
    assert not torch.equal(model(tokens()), model.get_base_model().layer.base_layer(tokens()))


def test_training_through_a_layer_without_gradients_is_refused():
    """Activations rounded on the fly cut the graph: everything before the layer would train on half of its gradient."""
    model = get_peft_model(Holder(DYNAMIC(linear())), LoraConfig(r=2, init_weights=False, **HERE)).train()
    with pytest.raises(AdapterError, match=r"'layer'.*Int8Tensor.*no gradient"):
        model(tokens().requires_grad_())
    assert model(tokens()).requires_grad  # the first layer of a model: its input needs none
    with torch.no_grad():
        assert model(tokens().requires_grad_()).shape == (2, 7, 36)
    turned = get_peft_model(Holder(DYNAMIC(linear())), IA3Config(on_input=True, **HERE)).train()
    with pytest.raises(AdapterError, match="no gradient"):  # here the adapter's own gradient comes through the layer
        turned(tokens())


# --- merging -------------------------------------------------------------------------------------------------------------
def two_layers(scheme: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module("first", quantized(scheme, inp=64, out=96))
    model.add_module("plain", linear(96, 64, seed=1))
    model.add_module("second", quantized(scheme, inp=64, out=96, seed=2))
    return model


def on_two(scheme: str, std: float = 0.2) -> AdapterModel:
    model = get_peft_model(two_layers(scheme), LoraConfig(r=4, target_modules=["first", "plain", "second"])).train()
    for index, name in enumerate(("first", "plain", "second")):
        shake(model.get_submodule(name).adapters["default"], seed=index, std=std)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_is_refused_unless_asked_for(scheme):
    model = on_two(scheme)
    base = model.get_base_model()
    bits = [packed_bits(base.get_submodule(n).base_layer) for n in ("first", "second")]
    plain = base.plain.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"'first', 'second' are packed.*requantize=True"):
            merge()
    with pytest.raises(AdapterError, match=r"'first'.*requantize=True"):
        base.first.merge(["default"])
    assert model.merged_adapters == [] and torch.equal(base.plain.base_layer.weight, plain)
    after = [packed_bits(base.get_submodule(n).base_layer) for n in ("first", "second")]
    assert all(same_bits(a, b) for a, b in zip(bits, after, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_requantizing_is_measured_and_taken_back(scheme, capsys):
    model = on_two(scheme)
    base = model.get_base_model()
    layers = {n: base.get_submodule(n) for n in ("first", "second")}
    x = tokens(64)
    bits = {n: packed_bits(layer.base_layer) for n, layer in layers.items()}
    before = {n: values(layer.base_layer) for n, layer in layers.items()}
    kinds = {n: settings(layer.base_layer) for n, layer in layers.items()}
    unmerged = model(x).detach()
    reports: list[RequantizeReport] = []
    model.merge_adapter(requantize=reports.append)
    assert capsys.readouterr().out == ""
    (report,) = reports
    assert set(report.losses) == {"first", "second"}
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        missed = values(layer.base_layer) - (before[name] + delta)
        assert report.losses[name] == pytest.approx(float(missed.norm() / delta.norm()), rel=1e-3)
        assert 0.0005 < report.losses[name] < (0.3 if "4" in scheme else 0.03)
        assert not same_bits(bits[name], packed_bits(layer.base_layer))
        assert settings(layer.base_layer) == kinds[name]
    assert report.worst == max(((n, v) for n, v in report.losses.items()), key=lambda pair: pair[1])
    assert "2 quantized layers" in str(report) and f"{report.worst[1]:.1%}" in str(report)
    assert report.to_dict()["losses"] == report.losses
    merged = model(x).detach()
    assert 1e-6 < relative_error(merged, unmerged.double()) < (0.3 if "4" in scheme else 0.03)
    held = model.snapshot_bytes
    assert held > sum(t.numel() * t.element_size() for t in packed_bits(base.first.base_layer))
    model.set_scale("default", 0.5)  # merges again, from the original
    model.set_scale("default", 1.0)
    assert torch.equal(model(x), merged)
    with model.disable_adapter():
        assert all(same_bits(bits[n], packed_bits(layer.base_layer)) for n, layer in layers.items())
    assert torch.equal(model(x), merged)
    model.eval()
    with torch.no_grad(), quiet():
        model(x)  # bitsandbytes may rearrange what it runs with
    model.unmerge_adapter()
    assert all(same_bits(bits[n], packed_bits(layer.base_layer)) for n, layer in layers.items())
    assert torch.equal(model.train()(x), unmerged)
    assert model.snapshot_bytes == 0
    model.merge_adapter(requantize=True)
    assert model.merged_adapters == ["default"]
    assert "of the adapters' change is lost: median" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["oft", "diag-oft", "glora", "lora-dora", "full", "shira"])
@pytest.mark.parametrize("scheme", ["torchao-int8", "bnb-int8"])
def test_every_algorithm_can_be_merged(scheme, case):
    config, model, layer = adapted(scheme, case)
    plain = dense(layer.base_layer)
    delta = change(case, config, doubles(layer), plain)
    wanted = plain.weight + delta
    assert relative_error(layer.get_delta_weight("default"), delta) < EXACT
    base = model.merge_and_unload(requantize=lambda report: None)
    assert type(base.layer) is type(quantized(scheme))
    assert relative_error(values(base.layer), wanted) < 1 / 127


def test_what_multiplies_the_weight_does_not_run_around_a_merged_one():
    """Every change is taken against the unmodified weight, which a merged layer's kernel does not read."""
    model = get_peft_model(Holder(quantized("torchao-int8")), MAKERS["lora"](), adapter_name="lora").train()
    model.add_adapter("oft", MAKERS["oft"]())
    layer = model.get_base_model().layer
    for name in ("lora", "oft"):
        shake(layer.adapters[name], std=0.2)
    model.set_adapter(["lora", "oft"])
    beside, bits = model(tokens()), packed_bits(layer.base_layer)
    with pytest.raises(AdapterError, match=r"'layer' is packed.*\['oft'\] multiply"):
        model.merge_adapter("lora", requantize=True)
    assert same_bits(bits, packed_bits(layer.base_layer))
    layer.active = ("lora",)
    model.merge_adapter("lora", requantize=lambda report: None)
    layer.active = ("lora", "oft")
    with pytest.raises(AdapterError, match=r"\['lora'\] merged into it"):
        model(tokens())
    model.merge_adapter(["lora", "oft"], requantize=lambda report: None)
    assert relative_error(model(tokens()), beside.double()) < 0.02


def test_a_change_of_nothing_rounds_nothing():
    """Rounding anew would not give the same bits, and there is no reason to."""
    for scheme in SCHEMES:
        model = get_peft_model(Holder(quantized(scheme)), LoraConfig(r=2, **HERE)).train()
        layer = model.get_base_model().layer
        bits, reports = packed_bits(layer.base_layer), []
        model.merge_adapter(requantize=reports.append)
        assert same_bits(bits, packed_bits(layer.base_layer)) and reports[0].losses == {"layer": 0.0}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_is_refused_before_anything_is_rounded(scheme, safe):
    model = on_two(scheme)
    model.get_base_model().second.adapters["default"].lora_B.weight.data[0] = float("inf")
    bits = packed_bits(model.get_base_model().first.base_layer)
    with pytest.raises(AdapterError, match=r"'second'"):
        model.merge_adapter(safe_merge=safe, requantize=True)
    assert same_bits(bits, packed_bits(model.get_base_model().first.base_layer)) and model.merged_adapters == []


def test_weights_of_unknown_kinds_and_states_are_not_rounded():
    model = get_peft_model(Holder(Unknown(linear())), LoraConfig(r=2, init_weights=False, **HERE))
    with pytest.raises(AdapterError, match=r"'layer' cannot be merged into.*torchao int8"):
        model.merge_adapter(requantize=True)
    _, model, layer = adapted("bnb-nf4", "lora", inp=64, out=96)
    model.eval()
    with torch.no_grad():
        model(tokens(64).bfloat16())
    if not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        return  # a processor without bfloat16 instructions: nothing is rearranged
    with pytest.raises(AdapterError, match="rearranged"):
        model.merge_adapter(requantize=True)
    with pytest.raises(AdapterError, match="no gradient"):
        model.train()(tokens(64).requires_grad_())


# --- pipelines -----------------------------------------------------------------------------------------------------------
def test_fusing_on_a_pipeline(tmp_path, capsys):
    quantization = pytest.importorskip("torchao.quantization")
    base = pipeline("sd15")
    some = lambda path: "blocks.1.attentions.0" in path
    changes = make_file(tmp_path / "a.safetensors", base, "lokr", ("unet",), some, scale=0.3)
    pipe = copy.deepcopy(base)
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())
    for path, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            base.unet.get_submodule(path).weight.data = module.weight.dequantize()
    plain = latents(pipe)
    load_adapter(pipe, tmp_path / "a.safetensors")
    beside = latents(pipe)
    bits = {p: packed_bits(m.base_layer) for p, m in pipe.unet.named_modules() if _is_quantized(m)}
    assert len(bits) > 3
    for merge in (fuse_adapters, merge_adapters):
        with pytest.raises(AdapterError, match=r"packed.*requantize=True"):
            merge(pipe)
    assert torch.equal(latents(pipe), beside)
    assert fuse_adapters(pipe, requantize=True) == ["default"]
    assert f"rounded into {len(bits)} quantized layers" in capsys.readouterr().out
    fused = latents(pipe)
    assert not torch.equal(fused, beside) and close(fused, latents(with_changes(base, (changes, 1.0))), 0.05)
    unfuse_adapters(pipe)
    after = {p: packed_bits(m.base_layer) for p, m in pipe.unet.named_modules() if _is_quantized(m)}
    assert all(same_bits(bits[p], after[p]) for p in bits)
    assert torch.equal(latents(pipe), beside)
    reports: list[RequantizeReport] = []
    assert merge_adapters(pipe, requantize=reports.append) >= len(bits)
    assert {f"unet.{p}" for p in bits} == set(reports[0].losses) and reports[0].worst[1] < 0.1
    assert torch.equal(latents(pipe), fused) and not torch.equal(fused, plain)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) and hasattr(module.base_layer.weight, "dequantize") and not module.has_plain_weight


def test_layerwise_casting_can_be_rounded_into():
    """8-bit floats as storage, of one of diffusers' hooks: the weight is read and written, its hooks stay."""
    layer = linear()
    values = layer.weight.clone()
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model = get_peft_model(Holder(layer), LoraConfig(r=2, init_weights=False, **HERE))
    delta = model.get_base_model().layer.get_delta_weight("default").detach()
    stored, reports = layer.weight.detach().clone(), []
    model.merge_adapter(requantize=reports.append)
    assert layer.weight.dtype == torch.float8_e4m3fn and 0.001 < reports[0].worst[1] < 0.2
    assert relative_error(layer.weight.float(), (values + delta).double()) < 0.1
    model.unmerge_adapter()
    assert torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))


def test_the_command_says_what_was_lost(tmp_path, capsys):
    """The built-in pipeline has nothing to round: the option changes nothing and says so."""
    from lycoris_diff.cli.main import main

    base = load_pipeline()
    inject_adapter(base.unet, LoraConfig(r=2, init_weights=False, target_modules=["to_q"]), "a")
    save_adapter(base, tmp_path / "a.safetensors", adapter_name="a")
    arguments = ["merge", "--model", "tiny", "--adapter", str(tmp_path / "a.safetensors"), "--requantize"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "no quantized layer was changed" in capsys.readouterr().out
