"""The algorithms and host layers every oracle test runs over, and small helpers to build and fill them.

Sizes are chosen so that each name below really is what it says: 24 = 4*6 inputs and 36 = 6*6 outputs give LoKr factors
a rank of 2 splits, and 5 does not divide 24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lycoris_diff import (
    AdapterModel,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
    get_peft_model,
)

IN, OUT = 24, 36
TARGET = ["layer"]

# ---------------------------------------------------------------------------------------------------------- algorithms


def _maker(kind: type, **fields: Any) -> Callable[..., Any]:
    return lambda **more: kind(**{"target_modules": list(TARGET), **fields, **more})


ALGORITHMS: dict[str, Callable[..., Any]] = {
    "lokr": _maker(LoKrConfig, r=2, alpha=3),
    "lokr-full-w2": _maker(LoKrConfig, r=8, alpha=4),
    "lokr-full-matrix": _maker(LoKrConfig, r=2, alpha=3, full_matrix=True),
    "lokr-both": _maker(LoKrConfig, r=2, alpha=3, decompose_both=True),
    "lokr-factor": _maker(LoKrConfig, r=1, alpha=3, decompose_factor=12),
    "lokr-w1-only": _maker(LoKrConfig, r=2, alpha=3, decompose_factor=12, decompose_both=True),
    "lokr-tucker": _maker(LoKrConfig, r=2, alpha=3, use_effective_conv2d=True),
    "loha": _maker(LoHaConfig, r=2, alpha=3),
    "loha-wide": _maker(LoHaConfig, r=12, alpha=5),
    "loha-tucker": _maker(LoHaConfig, r=2, alpha=3, use_effective_conv2d=True),
    "miss": _maker(MissConfig, r=6),
    "miss-odd": _maker(MissConfig, r=5),
    "miss-mini": _maker(MissConfig, r=6, mini_r=9, init_weights="mini"),
    "miss-mini-odd": _maker(MissConfig, r=5, mini_r=4, init_weights="mini"),
    "miss-bat": _maker(MissConfig, r=6, init_weights="bat"),
    "shira": _maker(ShiraConfig, r=2, random_seed=7),
    "lora": _maker(LoraConfig, r=4, lora_alpha=6),
    "lora-rs": _maker(LoraConfig, r=4, lora_alpha=6, use_rslora=True),
    "lora-tucker": _maker(LoraConfig, r=4, lora_alpha=6, use_effective_conv2d=True),
    "lora-dora": _maker(LoraConfig, r=4, lora_alpha=6, use_dora=True),
    "lora-dora-in": _maker(LoraConfig, r=4, lora_alpha=6, weight_decompose=True, dora_axis="in"),
    "lora-tucker-dora": _maker(LoraConfig, r=4, lora_alpha=6, weight_decompose=True, use_effective_conv2d=True),
    "loha-dora": _maker(LoHaConfig, r=2, alpha=3, weight_decompose=True),
    "loha-dora-in": _maker(LoHaConfig, r=2, alpha=3, weight_decompose=True, dora_axis="in"),
    "lokr-dora": _maker(LoKrConfig, r=2, alpha=3, weight_decompose=True),
    "lokr-dora-in": _maker(LoKrConfig, r=2, alpha=3, weight_decompose=True, dora_axis="in"),
    "lokr-tucker-dora": _maker(LoKrConfig, r=2, alpha=3, weight_decompose=True, use_effective_conv2d=True),
}

# Tensors each name must have on a layer with a kernel larger than one (Tucker falls back to plain elsewhere).
EXPECTED_TENSORS: dict[str, set[str]] = {
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lokr-full-w2": {"lokr_w1", "lokr_w2"},
    "lokr-full-matrix": {"lokr_w1", "lokr_w2"},
    "lokr-both": {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    "lokr-factor": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lokr-w1-only": {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    "lokr-tucker": {"lokr_w1", "lokr_t2", "lokr_w2_a", "lokr_w2_b"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "loha-wide": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "loha-tucker": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "miss": {"miss_block"},
    "miss-odd": {"miss_block"},
    "miss-mini": {"miss_block"},
    "miss-mini-odd": {"miss_block"},
    "miss-bat": {"miss_block"},
    "shira": {"shira_weight", "shira_indices"},
    "lora": {"lora_A.weight", "lora_B.weight"},
    "lora-rs": {"lora_A.weight", "lora_B.weight"},
    "lora-tucker": {"lora_A.weight", "lora_B.weight", "lora_mid.weight"},
    "lora-dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "loha-dora": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "dora_scale"},
    "lokr-dora": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "dora_scale"},
}

ADDITIVE = [n for n in ALGORITHMS if "dora" not in n and n != "miss-bat"]
DORA = [n for n in ALGORITHMS if "dora" in n]

# -------------------------------------------------------------------------------------------------------- host layers

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


def _conv(n: int, kernel: Any = 3, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: CONVS[n](IN, OUT, kernel, **fields)


PLAIN_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-nobias": lambda: nn.Linear(IN, OUT, bias=False),
    "hf-conv1d": lambda: Conv1D(OUT, IN),
}
PADDED_LAYERS = {f"conv{n}d-{mode}": _conv(n, padding=1, padding_mode=mode) for n in CONVS for mode in PADDING_MODES}
SHAPED_LAYERS: dict[str, Callable[[], nn.Module]] = {}
for _n in CONVS:
    SHAPED_LAYERS |= {
        f"conv{_n}d-1x1": _conv(_n, 1),
        f"conv{_n}d-nobias": _conv(_n, bias=False),
        f"conv{_n}d-stride2": _conv(_n, stride=2, padding=1),
        f"conv{_n}d-dilation2": _conv(_n, dilation=2, padding=2),
        f"conv{_n}d-groups2": _conv(_n, groups=2, padding=1),
        f"conv{_n}d-same": _conv(_n, padding="same"),
        f"conv{_n}d-same-even-circular": _conv(_n, 4, padding="same", dilation=1, padding_mode="circular"),
        f"conv{_n}d-valid-replicate": _conv(_n, 2, padding="valid", padding_mode="replicate"),
        f"conv{_n}d-all-at-once": _conv(_n, stride=2, dilation=2, groups=4, padding=2, padding_mode="reflect"),
    }
SHAPED_LAYERS |= {
    "conv2d-3x1": _conv(2, (3, 1), padding=(1, 0)),
    "conv2d-uneven": _conv(2, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1), padding_mode="circular"),
    "conv3d-1x3x3": _conv(3, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate"),
}
LAYERS = PLAIN_LAYERS | PADDED_LAYERS | SHAPED_LAYERS


def fits(algorithm: str, layer: str) -> bool:
    """Leave out pairs that only repeat another: a Tucker core needs a kernel (1x1 stays in, it must fall back)."""
    return "tucker" not in algorithm or layer.startswith("conv")


def pairs(layers: dict[str, Any], algorithms: Any = tuple(ALGORITHMS)) -> list[tuple[str, str]]:
    return [(a, name) for a in algorithms for name in layers if fits(a, name)]


class Holder(nn.Module):
    """The smallest model: one layer under the name ``layer``."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make_layer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = LAYERS[name]()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
    return layer.to(dtype).requires_grad_(False)


def make_input(layer: nn.Module, large: bool = False, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if oracles.is_conv(layer):
        n = len(layer.kernel_size)
        size = {1: (7, 301), 2: (6, 24), 3: (5, 9)}[n][large]
        shape: tuple[int, ...] = (3 if large else 2, layer.in_channels, *[size + i for i in range(n)])
    else:
        shape = (4, 257, IN) if large else (2, 3, IN)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype or layer.weight.dtype)


def adapt(layer: nn.Module, config: Any, name: str = "default") -> tuple[AdapterModel, nn.Module]:
    """Model around one adapted layer, and that layer."""
    model = get_peft_model(Holder(layer), config, adapter_name=name)
    return model, model.get_base_model().layer


def as_function(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The model as a function of its input and of everything it trains, and where to check its derivatives."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run(x: Tensor, *values: Tensor) -> Any:
        return functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    return run, tuple(t.detach().clone().requires_grad_() for t in (x, *trained.values()))


def kept_storages(model: nn.Module, x: Tensor) -> list[int]:
    """Bytes of every storage that a forward keeps for backward, but for the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)  # alive until the end, so that no address is given out twice
    assert y.requires_grad
    return [size for address, size in kept.items() if address not in own]


def randomize(model: nn.Module, seed: int = 3, std: float = 0.5) -> None:
    """Fill every adapter factor with noise; magnitudes of DoRA stay positive and near the norm they start from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not any(part in name for part in ("lokr_", "hada_", "lora_", "miss_", "shira_", "dora_")):
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name or "dora_scale" in name:
                p.mul_(1 + 0.3 * noise.tanh().to(p.dtype))
            else:
                p.copy_(std * noise)


def factors(layer: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors (parameters and buffers) under their file names."""
    adapter = layer.adapters[name]
    tensors = dict(adapter.named_parameters())
    tensors |= {k: b for k, b in adapter.named_buffers() if k.endswith("shira_indices")}
    return tensors


def reference(layer: nn.Module, config: Any, x: Tensor, strength: float = 1.0, name: str = "default") -> Tensor:
    base = layer.base_layer
    tensors = {k: v.detach() for k, v in factors(layer, name).items()}
    return oracles.forward(base, x, [(strength, oracles.delta(config, tensors, base))])


def build(algorithm: str, layer: str, dtype: torch.dtype = torch.float64):
    """Config, model and layer of a case, filled with noise."""
    config = ALGORITHMS[algorithm]()
    model, adapted = adapt(make_layer(layer, dtype), config)
    randomize(model)
    return config, model, adapted


def trainable(adapted: nn.Module) -> dict[str, Tensor]:
    """The adapter's trained factors under their file names."""
    return {k: v for k, v in factors(adapted).items() if v.is_floating_point()}


def dense_gradients(config, adapted, x, cotangent):
    """Gradients of the factors and the input through the dense float64 rebuild."""
    leaves = {
        k: v.detach().to(torch.float64).requires_grad_() if v.is_floating_point() else v for k, v in factors(adapted).items()
    }
    x = x.detach().to(torch.float64).requires_grad_()
    y = oracles.forward(adapted.base_layer, x, [(1.0, oracles.delta(config, leaves, adapted.base_layer))])
    wanted = {k: v for k, v in leaves.items() if v.is_floating_point()} | {"input": x}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), cotangent.to(torch.float64))))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    expected = expected.to(torch.float64)
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual.to(torch.float64) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a refused or undone call must leave alone: module tree, tensors bit for bit, flags, hooks."""
    tree = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {k: (v.dtype, tuple(v.shape), v.detach().clone()) for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return {"tree": tree, "tensors": tensors, "flags": flags, "hooks": hooks, "mode": model.training}


def assert_untouched(model: nn.Module, before: dict[str, Any], flags: bool = True) -> None:
    after = fingerprint(model)
    assert after["tree"] == before["tree"]
    assert after["hooks"] == before["hooks"]
    assert after["mode"] == before["mode"]
    if flags:
        assert after["flags"] == before["flags"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for key, (dtype, shape, value) in before["tensors"].items():
        new_dtype, new_shape, new_value = after["tensors"][key]
        assert (new_dtype, new_shape) == (dtype, shape), key
        assert torch.equal(new_value, value) or (
            (new_value.isnan() == value.isnan()).all() and torch.equal(new_value.nan_to_num(), value.nan_to_num())
        ), f"{key} changed"
