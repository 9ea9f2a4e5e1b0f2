"""One configuration a system for whole models, and helpers around the adapted layers of a model."""

from __future__ import annotations

from cases import randomize
from smallmodels import clip
from torch import Tensor, nn

from lycoris_diff import (
    AdaptedLayer,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoKrModel,
    LoraConfig,
    LoraModel,
    MissConfig,
    MissModel,
    ShiraConfig,
    ShiraModel,
    get_peft_model,
)

CLASSES = {
    LoKrConfig: LoKrModel,
    LoHaConfig: LoHaModel,
    MissConfig: MissModel,
    ShiraConfig: ShiraModel,
    LoraConfig: LoraModel,
}
CONFIGS = {
    "lokr": lambda **k: LoKrConfig(r=2, alpha=3, **k),
    "loha": lambda **k: LoHaConfig(r=2, alpha=3, **k),
    "miss": lambda **k: MissConfig(r=4, **k),
    "miss-bat": lambda **k: MissConfig(r=4, init_weights="bat", **k),
    "shira": lambda **k: ShiraConfig(r=1, random_seed=0, **k),
    "lora": lambda **k: LoraConfig(r=2, lora_alpha=3, **k),
    "lora-dora": lambda **k: LoraConfig(r=2, lora_alpha=3, use_dora=True, **k),
}
STRONG = 0.2


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def wrapped(kind: str = "lokr", base: nn.Module | None = None, name: str = "default", **fields):
    fields.setdefault("target_modules", "all-linear")
    model = get_peft_model(clip() if base is None else base, CONFIGS[kind](**fields), adapter_name=name)
    randomize(model, std=STRONG)
    return model.eval()


def three_adapters():
    model = wrapped("lokr", name="a", target_modules=["q_proj", "fc1"])
    model.add_adapter("b", CONFIGS["shira"](target_modules=["fc1", "fc2"]))
    model.add_adapter("c", CONFIGS["miss-bat"](target_modules=["q_proj"]))
    randomize(model, std=STRONG)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.base_layer.weight.detach().clone() for n, layer in adapted_layers(model).items()}


def same_bits(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    now = bits(model)
    return all(now[n].equal(expected[n]) for n in expected)
