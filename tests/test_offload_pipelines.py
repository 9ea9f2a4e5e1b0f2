"""Adapters on offloaded pipelines (model, sequential, group), and on quantized layers."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from pipelinefiles import make_file, with_changes
from smallpipelines import latents, pipeline, same_weights
from test_pipelines import close, fingerprint
from torch import nn

from lycoris_diff import AdapterError
from lycoris_diff.diffusion import (
    LoadError,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    fuse_adapters,
    load_adapter,
    merge_adapters,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)

CPU = torch.device("cpu")
SOME = lambda path: "blocks.1.attentions.0" in path or "blocks.2.resnets.0" in path or path.startswith("encoder.layers.1")
BOTH = ("unet", "text_encoder")


def sequential(pipe) -> None:
    """What ``enable_sequential_cpu_offload`` does; with "cpu:0", as it spells the device, accelerate itself fails."""
    pipe.remove_all_hooks()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


OFFLOAD = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "group-block": lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "group-leaf": lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, "leaf_level"),
}


@pytest.fixture
def files(tmp_path):
    base = pipeline("sd15")
    first = make_file(tmp_path / "first.safetensors", base, "lokr", BOTH, SOME, seed=1, scale=0.2)
    second = make_file(tmp_path / "second.safetensors", base, "lora", BOTH, SOME, seed=2, scale=0.2)
    return base, tmp_path / "first.safetensors", first, tmp_path / "second.safetensors", second


def hooks(pipe) -> dict[str, list[str]]:
    """Kinds of every hook on every module of the base model, by its path without adapters."""
    found: dict[str, list[str]] = {}
    for component, part in pipe.components.items():
        modules = part.named_modules() if isinstance(part, nn.Module) else ()
        for path, module in modules:
            own, group = vars(module).get("_hf_hook"), vars(module).get("_diffusers_hook")
            kinds = [] if own is None else [type(own).__name__]
            kinds += [] if group is None else sorted(group.hooks)
            if ".adapters" not in path:
                found.setdefault(f"{component}.{path}".replace(".base_layer", ""), []).extend(kinds)
    return found


@pytest.mark.parametrize("kind", list(OFFLOAD))
@pytest.mark.parametrize("when", ["offloaded before loading", "offloaded after loading"])
def test_life_of_adapters_on_an_offloaded_pipeline(kind, when, files):
    base, first, one, second, two = files
    pipe = copy.deepcopy(base)
    if when == "offloaded before loading":
        OFFLOAD[kind](pipe)
        before = hooks(pipe)
        load_adapter(pipe, first, "one")
    else:
        load_adapter(pipe, first, "one")
        OFFLOAD[kind](pipe)
        before = None
    assert close(latents(pipe), latents(with_changes(base, (one, 1.0))))
    load_adapter(pipe, second, "two", weight=0.5)
    both = latents(with_changes(base, (one, 1.0), (two, 0.5)))
    for _ in range(2):
        assert close(latents(pipe), both)
    fuse_adapters(pipe)
    assert close(latents(pipe), both)
    disable_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))
    enable_adapters(pipe)
    assert close(latents(pipe), both)
    unfuse_adapters(pipe)
    assert close(latents(pipe), both)
    set_adapters(pipe, {"two": 1.0})
    assert close(latents(pipe), latents(with_changes(base, (two, 1.0))))
    delete_adapter(pipe, "two")
    set_adapters(pipe, {"one": 0.0})
    assert torch.equal(latents(pipe), latents(base))
    unload_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))
    if before is not None:
        assert hooks(pipe) == before
    pipe.remove_all_hooks()
    if not kind.startswith("group"):
        assert same_weights(pipe, base)
        never = copy.deepcopy(base)
        OFFLOAD[kind](never)
        never.remove_all_hooks()
        assert fingerprint(pipe) == fingerprint(never)


@pytest.mark.parametrize("kind", list(OFFLOAD))
def test_merging_for_good(kind, files):
    base, first, one, _, _ = files
    pipe = copy.deepcopy(base)
    OFFLOAD[kind](pipe)
    load_adapter(pipe, first, "one")
    merge_adapters(pipe)
    assert close(latents(pipe), latents(with_changes(base, (one, 1.0))))


def test_hooks_can_be_taken_off_under_adapters(files):
    """Libraries that walk over the modules find their own hooks only."""
    base, first, one, _, _ = files
    pipe = copy.deepcopy(base)
    sequential(pipe)
    load_adapter(pipe, first, "one")
    pipe.remove_all_hooks()
    assert close(latents(pipe), latents(with_changes(base, (one, 1.0))))
    pipe.enable_model_cpu_offload(device="cpu")
    assert close(latents(pipe), latents(with_changes(base, (one, 1.0))))
    sequential(pipe)
    assert close(latents(pipe), latents(with_changes(base, (one, 1.0))))
    unload_adapters(pipe)
    assert torch.equal(latents(pipe), latents(base))


def test_layerwise_casting(files):
    """Weights stored in 8 bits and cast up for every call: the factors stay in the computing dtype."""
    base, first, one, _, _ = files
    pipe = copy.deepcopy(base)
    plain = copy.deepcopy(base)
    for one_of in (pipe, plain):
        one_of.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    load_adapter(pipe, first, "one")
    # the same weights, rounded to 8 bits, with the change written in
    rounded = copy.deepcopy(base)
    for (_, p), (_, q) in zip(rounded.unet.named_parameters(), plain.unet.named_parameters(), strict=True):
        p.data.copy_(q.data.float())
    assert close(latents(pipe), latents(with_changes(rounded, (one, 1.0))), 1e-3)
    with pytest.raises(AdapterError, match="packed"):
        fuse_adapters(pipe, components=["unet"])
    unload_adapters(pipe)
    assert torch.equal(latents(pipe), latents(plain))


# --- quantized layers --------------------------------------------------------------------------------------------------------
class PackedLinear(nn.Linear):
    """A stand-in for a quantized layer: int8 weight, one scale a row; refuses to be read as a plain weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("row_scale", scale.to(layer.weight.dtype))
        self.calls = 0

    def dequantized(self) -> torch.Tensor:
        return self.weight.to(self.row_scale.dtype) * self.row_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.dequantized(), self.bias)


def quantize(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


def dequantize(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PackedLinear:
                layer = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                layer.weight.data, layer.bias = child.dequantized(), child.bias
                setattr(parent, name, layer)


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_quantized_layers_keep_their_weight_packed(algorithm, tmp_path):
    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, algorithm, ("unet",), SOME, scale=0.3)
    changes = make_file(tmp_path / "a.safetensors", pipe, algorithm, ("unet",), SOME, scale=0.3)
    quantize(pipe.unet)
    plain = copy.deepcopy(pipe)
    dequantize(plain.unet)
    packed = {p: m.weight.clone() for p, m in pipe.unet.named_modules() if isinstance(m, PackedLinear)}
    load_adapter(pipe, tmp_path / "a.safetensors", weight=0.7)
    assert close(latents(pipe), latents(with_changes(plain, (changes, 0.7))))
    layers = {p.replace(".base_layer", ""): m for p, m in pipe.unet.named_modules() if isinstance(m, PackedLinear)}
    assert layers.keys() == packed.keys()
    assert all(m.weight.dtype == torch.int8 and torch.equal(m.weight, packed[p]) for p, m in layers.items())
    with pytest.raises(AdapterError, match="packed"):
        fuse_adapters(pipe)
    set_adapters(pipe, {"default": 0.0})
    assert close(latents(pipe), latents(plain), 1e-6)


def test_quantized_layers_refuse_what_needs_their_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    pipe = pipeline("sd15")
    make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet",), lambda p: p.endswith("attn1.to_q"))
    tensors = load_file(tmp_path / "a.safetensors")
    for key in [k for k in tensors if k.endswith("lora_up.weight")]:
        tensors[key.replace("lora_up.weight", "dora_scale")] = torch.ones(tensors[key].shape[0], 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    load_adapter(copy.deepcopy(pipe), tmp_path / "dora.safetensors")
    quantize(pipe.unet)
    with pytest.raises(LoadError, match="int8"):
        load_adapter(pipe, tmp_path / "dora.safetensors")


def test_torchao_int8_weight_only(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lokr", ("unet",), SOME, scale=0.3)
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())
    plain = copy.deepcopy(pipeline("sd15"))
    for path, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            plain.unet.get_submodule(path).weight.data = module.weight.dequantize()
    load_adapter(pipe, tmp_path / "a.safetensors")
    assert close(latents(pipe), latents(with_changes(plain, (changes, 1.0))), 1e-3)
    unload_adapters(pipe)


def test_bitsandbytes_int8(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pipe = pipeline("sd15")
    changes = make_file(tmp_path / "a.safetensors", pipe, "lora", ("unet",), lambda p: ".attn1.to_q" in p, scale=0.3)
    plain = copy.deepcopy(pipe)
    for path, layer in list(pipe.unet.named_modules()):
        if path.endswith(".attn1.to_q"):
            packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
            packed.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, name = path.rpartition(".")
            setattr(pipe.unet.get_submodule(parent), name, packed.to("cpu"))
    try:
        latents(pipe)
    except Exception as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    load_adapter(pipe, tmp_path / "a.safetensors")
    assert close(latents(pipe), latents(with_changes(plain, (changes, 1.0))), 0.05)
