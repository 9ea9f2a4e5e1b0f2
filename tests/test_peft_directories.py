"""Whole adapter directories, defaults and names, both ways between PEFT 0.21 and the library."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from cases import ALGORITHMS, Holder, adapt, make_layer, randomize, relative_error
from torch import nn

import lycoris_diff
from lycoris_diff import (
    AdapterError,
    AdapterModel,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    ShiraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)})
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block["fc2"](torch.relu(self.block["fc1"](x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


RICH = {
    "LoKrConfig": {"r": 2, "alpha": 6, "rank_pattern": {"fc1": 1}, "alpha_pattern": {"fc2": 5}, "decompose_factor": 4},
    "LoHaConfig": {"r": 2, "alpha": 6, "rank_pattern": {"block.fc1": 3}, "alpha_pattern": {"^block.fc2$": 5}},
    "LoraConfig": {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"fc2": 4},
        "alpha_pattern": {"fc2": 1},
        "use_rslora": True,
    },
    "MissConfig": {"r": 8, "init_weights": "mini", "mini_r": 4},
    "ShiraConfig": {"r": 3, "random_seed": 5},
}


@pytest.mark.parametrize("kind", list(RICH))
def test_directories_with_patterns_and_saved_modules(kind, tmp_path):
    shared = {**RICH[kind], "target_modules": ["fc1", "fc2"], "modules_to_save": ["head"]}
    x = torch.randn(5, 16)
    theirs = peft.get_peft_model(net(), getattr(peft, kind)(**shared))
    ours = get_peft_model(net(), getattr(lycoris_diff, kind)(**shared))
    for model, seed in ((theirs, 1), (ours, 2)):
        randomize(model, seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "head" in name and p.requires_grad:
                    p.add_(0.5 * seed)
        model.eval()

    theirs.save_pretrained(tmp_path / "peft")
    read = AdapterModel.from_pretrained(net(), tmp_path / "peft")
    assert relative_error(read(x).detach(), theirs(x).detach()) < 1e-5
    assert not any(p.requires_grad for p in read.parameters())
    trainable = AdapterModel.from_pretrained(net(), tmp_path / "peft", is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]

    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert relative_error(back(x).detach(), ours(x).detach()) < 1e-5
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    reread = getattr(peft, kind).from_pretrained(tmp_path / "ours")
    for name, value in RICH[kind].items():
        assert config[name] == value and getattr(reread, name) == value
    assert config["peft_type"] == theirs.peft_config["default"].peft_type.value
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_named_adapters_and_state_dict_functions(tmp_path):
    model = get_peft_model(net(), LoKrConfig(r=1, target_modules=["fc1"]), adapter_name="first")
    model.add_adapter("second", LoHaConfig(r=2, target_modules=["fc2"]))
    randomize(model)
    keys = set(get_peft_model_state_dict(model, adapter_name="second"))
    assert keys == {f"base_model.model.block.fc2.hada_w{i}_{h}" for i in "12" for h in "ab"}
    live = {n for n, _ in model.named_parameters() if "lokr" in n}
    assert live and all(n.split("first.")[-1].startswith("lokr_w") for n in live)
    assert all(".first.lokr_w" in n for n in live)

    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in Path(tmp_path).rglob("adapter_model.safetensors")) == ["adapter_model.safetensors"] * 2
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "first", adapter_name="first")
    x = torch.randn(2, 16)
    model.set_adapter("first")
    assert relative_error(theirs(x).detach(), model(x).detach()) < 1e-5

    state = {k: v + 1 for k, v in get_peft_model_state_dict(model, adapter_name="first").items()}
    set_peft_model_state_dict(model, state, adapter_name="first")
    now = get_peft_model_state_dict(model, adapter_name="first")
    assert all(torch.equal(now[k], state[k]) for k in state)


def test_other_names_of_the_same_things():
    assert PeftModel is AdapterModel
    assert LoKrConfig(lora_alpha=32).alpha == 32 and LoHaConfig(lora_alpha=4).alpha == 4
    assert LoraConfig(alpha=5, r=5).lora_alpha == 5
    assert LoraConfig(use_dora=True).weight_decompose and LoraConfig(weight_decompose=True).use_dora
    assert LoraConfig(init_lora_weights=False).init_weights is False


DEFAULTS = [
    (LoKrConfig, "LoKrConfig"),
    (LoHaConfig, "LoHaConfig"),
    (MissConfig, "MissConfig"),
    (ShiraConfig, "ShiraConfig"),
]


@pytest.mark.parametrize(("ours", "name"), DEFAULTS)
def test_defaults_are_pefts(ours, name):
    theirs = getattr(peft, name)()
    for field in type(theirs).__dataclass_fields__:
        if field in ("peft_type", "auto_mapping", "peft_version", "runtime_config"):
            continue
        assert getattr(ours(), field) == getattr(theirs, field), field


def test_lora_defaults_are_pefts():
    theirs, ours = peft.LoraConfig(), LoraConfig()
    for field in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "bias",
        "fan_in_fan_out",
        "target_modules",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, tmp_path):
    x = torch.randn(5, 16)
    fields = {"r": 2, "target_modules": ["fc1"], "bias": bias}
    theirs, ours = peft.get_peft_model(net(), peft.LoraConfig(**fields)), get_peft_model(net(), LoraConfig(**fields))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (theirs, ours):
        randomize(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias") and p.requires_grad:
                    p.add_(1.0)
        model.save_pretrained(tmp_path / type(model).__module__.split(".")[0])
    read = AdapterModel.from_pretrained(net(), tmp_path / "peft")
    assert relative_error(read(x).detach(), theirs(x).detach()) < 1e-5
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "lycoris_diff")
    assert relative_error(back(x).detach(), ours(x).detach()) < 1e-5


@pytest.mark.parametrize("algorithm", ["lokr", "loha", "miss", "shira", "lora", "lora-dora"])
def test_unknown_fields_of_a_config_file_are_refused(algorithm, tmp_path):
    model, _ = adapt(make_layer("linear", torch.float32), ALGORITHMS[algorithm]())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "r": config["r"], "surely_not_a_field": 3}))
    with pytest.raises((AdapterError, TypeError), match="surely_not_a_field"):
        AdapterModel.from_pretrained(Holder(make_layer("linear", torch.float32)), tmp_path)
