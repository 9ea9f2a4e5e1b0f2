"""Whole models to benchmark, with random weights: what goes in, which modules are adapted, and who adapts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import lycoris
import peft
import torch
from benchmarking import Algorithm, fill_factors, saved_bytes
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

import lycoris_diff

LYCORIS = {"LoraConfig": "LoConModule", "LoKrConfig": "LokrModule", "LoHaConfig": "LohaModule"}
TRANSFORMER = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CONV = ("proj_in", "proj_out", "conv1", "conv2")
FLUX = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
BLOCKS = (BasicTransformerBlock, ResnetBlock2D, FluxTransformerBlock, FluxSingleTransformerBlock)
FLUX_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")


@dataclass(frozen=True)
class Workload:
    """A model and one step's input.

    Attributes:
        make: builds the model on the meta device.
        inputs: gives the keyword arguments of a call, on the CPU in float32; the one called `through` gets a gradient, so that
            the frozen model's backward pass reaches every layer.
        through: its name.
        targets: names of modules by the name of the target set.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    through: str
    targets: Mapping[str, tuple[str, ...]]

    def model(self, dtype: torch.dtype, device: str, weights: Path | None = None) -> nn.Module:
        """Return the model, frozen, with small random weights, or with those of a file, which processes share on a CPU."""
        with torch.device("meta"):
            model = self.make()
        model = model.to(dtype).to_empty(device=device)
        if weights:
            state = torch.load(weights, map_location=device, mmap=True, weights_only=True)
            model.load_state_dict(state, assign=True)
            return model.requires_grad_(False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(float(name.endswith("weight")))
        return model.requires_grad_(False)

    def call(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Return the inputs of a step on `device`."""
        values = {name: value.to(device) for name, value in self.inputs().items()}
        values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
        values[self.through].requires_grad_(True)
        return values


class Stack(nn.Module):
    """Transformer blocks one after the other."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if temb is None:
                hidden_states = block(hidden_states, encoder_hidden_states=encoder_hidden_states)
            else:
                encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return hidden_states


def _sd15() -> nn.Module:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _sdxl() -> nn.Module:
    return Stack([BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048) for _ in range(2)])


def _flux() -> nn.Module:
    double = [FluxTransformerBlock(3072, 24, 128)]
    return Stack([*double, *(FluxSingleTransformerBlock(3072, 24, 128) for _ in range(2))])


def _latents(edge: int) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(1, 4, edge, edge),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }


def _tokens(image: int, text: int, width: int, context: int, temb: bool = False) -> dict[str, Tensor]:
    values = {"hidden_states": torch.randn(1, image, width), "encoder_hidden_states": torch.randn(1, text, context)}
    return values | ({"temb": torch.randn(1, width)} if temb else {})


def _tiny() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(64, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=1,
    )


_UNET = {"attention": TRANSFORMER, "conv": (*TRANSFORMER, *CONV)}
WORKLOADS = {
    "sd15-32": Workload(_sd15, partial(_latents, 32), "sample", _UNET),
    "sd15-64": Workload(_sd15, partial(_latents, 64), "sample", _UNET),
    "sdxl-stack": Workload(_sdxl, partial(_tokens, 1024, 77, 1280, 2048), "hidden_states", {"attention": TRANSFORMER}),
    "sdxl-stack-512": Workload(_sdxl, partial(_tokens, 256, 77, 1280, 2048), "hidden_states", {"attention": TRANSFORMER}),
    "flux-stack": Workload(
        _flux, partial(_tokens, 1024, 512, 3072, 3072, True), "hidden_states", {"attention": FLUX, "all": (*FLUX, *FLUX_MLP)}
    ),
    "flux-stack-256": Workload(
        _flux, partial(_tokens, 256, 128, 3072, 3072, True), "hidden_states", {"attention": FLUX, "all": (*FLUX, *FLUX_MLP)}
    ),
    "tiny": Workload(_tiny, partial(_latents, 8), "sample", _UNET),  # to try the scripts
}

# --------------------------------------------------------------------------------------------------------- contenders


class Contender:
    """A model with an adapter's tensors in it, or beside it in a module of their own, and its optimizer."""

    def __init__(self, model: nn.Module, adapter: nn.Module | None = None):
        self.model = model
        self.owners = nn.ModuleList([model, *filter(None, [adapter])])
        self.trainable = fill_factors(self.owners)
        self.parameters = sum(parameter.numel() for parameter in self.trainable)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-6, fused=True) if self.trainable else None

    def forward(self, call: Mapping[str, Tensor]) -> Tensor:
        """Return the model's output."""
        output = self.model(**call)
        return output.sample if hasattr(output, "sample") else output

    def step(self, call: Mapping[str, Tensor], gradient: Tensor) -> None:
        """Forward, backward, optimizer."""
        self.forward(call).backward(gradient)
        if self.optimizer:
            self.optimizer.step()

    def clear(self, call: Mapping[str, Tensor]) -> None:
        """Forget all gradients."""
        for tensor in (*call.values(), *self.trainable):
            tensor.grad = None

    def freeze(self) -> None:
        """Turn from training to inference, for good."""
        self.owners.eval().requires_grad_(False)

    def saved_bytes(self, call: Mapping[str, Tensor]) -> int:
        """Return the bytes kept for backward."""
        return saved_bytes(self.owners, lambda: self.forward(call))


def shared(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with modules of its own and the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _base(model: nn.Module, algorithm: Algorithm, targets: tuple[str, ...]) -> Contender:
    return Contender(model)


def _ours(model: nn.Module, algorithm: Algorithm, targets: tuple[str, ...]) -> Contender:
    lycoris_diff.inject_adapter(model, algorithm.config_of(lycoris_diff, list(targets), True, algorithm.ours))
    return Contender(model)


def _peft(model: nn.Module, algorithm: Algorithm, targets: tuple[str, ...]) -> Contender | None:
    if "conv1" in targets and not algorithm.conv:
        return None
    peft.inject_adapter_in_model(algorithm.config_of(peft, list(targets), True, algorithm.peft), model)
    return Contender(model)


def _lycoris(model: nn.Module, algorithm: Algorithm, targets: tuple[str, ...], bypass: bool = False) -> Contender | None:
    if algorithm.config not in LYCORIS or (bypass and "weight_decompose" in algorithm.lycoris):
        return None
    fields = {"lora_dim": algorithm.fields["r"], "use_tucker": algorithm.tucker, **algorithm.lycoris}
    adapters = nn.ModuleList()
    for name, layer in list(model.named_modules()):
        if any(name == target or name.endswith(f".{target}") for target in targets) and isinstance(
            layer, nn.Linear | nn.Conv2d
        ):
            adapters.append(getattr(lycoris, LYCORIS[algorithm.config])(name, layer, bypass_mode=bypass, **fields))
            adapters[-1].apply_to()
    return Contender(model, adapters.to(next(model.parameters()).device))


CONTENDERS: dict[str, Callable[[nn.Module, Algorithm, tuple[str, ...]], Contender | None]] = {
    "base": _base,
    "ours": _ours,
    "PEFT": _peft,
    "LyCORIS": _lycoris,
    "LyCORIS bypass": partial(_lycoris, bypass=True),
}


@cache
def base_model(workload: str, dtype: torch.dtype, device: str, weights: Path | None = None) -> nn.Module:
    """Return the model of a workload; the same one at every call."""
    torch.manual_seed(0)
    return WORKLOADS[workload].model(dtype, device, weights)


def make(
    contender: str,
    workload: str,
    algorithm: Algorithm,
    targets: str,
    dtype: torch.dtype,
    device: str,
    weights: Path | None = None,
) -> Contender | None:
    """Return a contender over a workload's shared weights, or None if it does not have this algorithm there."""
    model = shared(base_model(workload, dtype, device, weights))
    return CONTENDERS[contender](model, algorithm, WORKLOADS[workload].targets[targets])
