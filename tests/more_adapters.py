"""Cases of GLoRA, (IA)^3, full differences, the OFT family and T-LoRA, and small helpers to build and fill them."""

from __future__ import annotations

import more_oracles as dense
import oracles
import torch
from cases import ALGORITHMS, adapt, make_layer
from torch import nn

from lycoris_diff import BOFTConfig, DiagOFTConfig, FullConfig, GLoraConfig, IA3Config, OFTConfig, TLoraConfig

LINEAR = ("linear", "linear-nobias", "hf-conv1d")
HOSTS = (*LINEAR, "conv1d-circular", "conv2d-zeros", "conv2d-1x1", "conv2d-groups2", "conv3d-nobias")
HERE = {"target_modules": ["layer"]}

#: name -> config maker, and ``(config, factors, weight, layer) -> adapted weight``
CASES = {
    "glora": (lambda: GLoraConfig(r=3, alpha=5, **HERE), lambda c, t, w, h: dense.glora(t, w, 5 / 3)),
    "glora-core": (
        lambda: GLoraConfig(r=3, alpha=5, use_effective_conv2d=True, **HERE),
        lambda c, t, w, h: dense.glora(t, w, 5 / 3),
    ),
    "ia3": (lambda: IA3Config(**HERE), lambda c, t, w, h: dense.ia3(t, w, False)),
    "ia3-in": (
        lambda: IA3Config(on_input=True, **HERE),
        lambda c, t, w, h: dense.ia3(t, w, True, getattr(h, "groups", 1)),
    ),
    "full": (lambda: FullConfig(**HERE), lambda c, t, w, h: w + t["diff"]),
    "full-weight": (lambda: FullConfig(train_bias=False, **HERE), lambda c, t, w, h: w + t["diff"]),
    "diag-oft": (lambda: DiagOFTConfig(r=6, **HERE), lambda c, t, w, h: dense.diag_oft(t, w)),
    "diag-oft-limit": (
        lambda: DiagOFTConfig(r=12, constraint=0.02, rescaled=True, **HERE),
        lambda c, t, w, h: dense.diag_oft(t, w, 0.02),
    ),
    "boft": (lambda: BOFTConfig(r=18, **HERE), lambda c, t, w, h: dense.boft(t, w)),
    "boft-limit": (
        lambda: BOFTConfig(r=18, constraint=0.02, rescaled=True, **HERE),
        lambda c, t, w, h: dense.boft(t, w, 0.02),
    ),
    "oft": (lambda: OFTConfig(oft_block_size=6, **HERE), lambda c, t, w, h: dense.peft_oft(t, w)),
    "oft-shared": (lambda: OFTConfig(oft_block_size=4, block_share=True, **HERE), lambda c, t, w, h: dense.peft_oft(t, w)),
    "oft-scaled": (lambda: OFTConfig(r=2, scaled=True, **HERE), lambda c, t, w, h: dense.peft_oft(t, w, scaled=True)),
    "oft-exact": (
        lambda: OFTConfig(oft_block_size=8, use_cayley_neumann=False, **HERE),
        lambda c, t, w, h: dense.peft_oft(t, w, exact=True),
    ),
    "tlora": (lambda: TLoraConfig(r=4, alpha=6, **HERE), lambda c, t, w, h: dense.tlora(t, w, 1.5)),
    "tlora-last": (
        lambda: TLoraConfig(r=4, alpha=6, sig_type="last", **HERE),
        lambda c, t, w, h: dense.tlora(t, w, 1.5, "last"),
    ),
    "tlora-middle": (
        lambda: TLoraConfig(r=5, alpha=5, sig_type="middle", **HERE),
        lambda c, t, w, h: dense.tlora(t, w, 1.0, "middle"),
    ),
}
POINTWISE = ("tlora", "tlora-last", "tlora-middle")
PAIRS = [
    (name, host)
    for name in CASES
    for host in HOSTS
    if not (name in POINTWISE and host.startswith("conv") and host != "conv2d-1x1")
    and not (name == "glora-core" and host in (*LINEAR, "conv2d-1x1"))
]


#: every algorithm of the tests, as functions that make a config
EVERY = {**ALGORITHMS, **{f"more-{name}": make for name, (make, _) in CASES.items()}}


def filled(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Noise in every trained parameter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(std * noise.to(parameter.dtype))
    return model


def shake(adapter: nn.Module, seed: int = 3, std: float = 0.3) -> None:
    """Move every factor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_((std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype))


def adapted(name: str, host: str, dtype: torch.dtype = torch.float64):
    """Config, model and layer of a case with factors away from their start."""
    config = CASES[name][0]()
    model, layer = adapt(make_layer(host, dtype), config)
    shake(layer.adapters["default"])
    return config, model.eval(), layer


def factors_of(layer: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    return {k: v.detach().double() for k, v in layer.adapters[name].named_parameters()}


def expected(case: str, config, layer: nn.Module, x, t=None):
    """Output with the adapted weight and the bias ``b + diff_b``, in float64."""
    t = factors_of(layer) if t is None else t
    base = layer.base_layer
    weight = oracles.canonical_weight(base)
    change = CASES[case][1](config, t, weight, base) - weight
    y = oracles.forward(base, x, [(1.0, oracles.to_layout(base, change))])
    return y if "diff_b" not in t else y + on_channels(base, t["diff_b"])


def on_channels(base: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    return vector.reshape(-1, *[1] * len(base.kernel_size)) if oracles.is_conv(base) else vector
