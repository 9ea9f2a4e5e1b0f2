"""Reading adapter directories: PEFT's own against the weights that PEFT merges, and this library's in every coding."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from modelcases import CONFIGS, adapted_layers, three_adapters, wrapped
from readcases import changed
from safetensors.torch import load_file, save_file
from smallmodels import clip
from torch import nn

from lycoris_diff.checkpoints.build import entry_delta
from lycoris_diff.checkpoints.parse import read_raw
from lycoris_diff.errors import CheckpointError

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.block = nn.ModuleDict({"fc1": nn.Linear(16, 24), "fc2": nn.Linear(24, 16, bias=False)})
        self.conv = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block["fc2"](self.block["fc1"](x)))


LINEAR, ALL = ["fc1", "fc2"], ["fc1", "fc2", "conv"]
WRITTEN = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "lora patterns": ("LoraConfig", {
        "r": 4, "lora_alpha": 6, "target_modules": ALL, "use_rslora": True, "rank_pattern": {"fc2": 2},
        "alpha_pattern": {"block.fc1": 1},
    }),
    "lora bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["fc1"], "lora_bias": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 6, "target_modules": ALL}),
    "loha core": ("LoHaConfig", {"r": 2, "alpha": 6, "target_modules": ALL, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 6, "target_modules": ALL}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 6, "target_modules": ALL, "decompose_both": True}),
    "lokr core": ("LoKrConfig", {"r": 1, "alpha": 6, "target_modules": ALL, "use_effective_conv2d": True}),
    "lokr full": ("LoKrConfig", {"r": 64, "alpha": 16, "target_modules": ALL}),
    "lokr factor": ("LoKrConfig", {"r": 2, "alpha": 6, "target_modules": LINEAR, "decompose_factor": 8}),
    "miss": ("MissConfig", {"r": 5, "target_modules": LINEAR}),
    "miss mini": ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini", "target_modules": LINEAR}),
    "miss bat": ("MissConfig", {"r": 4, "init_weights": "bat", "target_modules": LINEAR}),
    "shira": ("ShiraConfig", {"r": 2, "target_modules": LINEAR}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR}),
    "oft exact": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR, "use_cayley_neumann": False}),
    "oft shared": ("OFTConfig", {"r": 0, "oft_block_size": 8, "target_modules": LINEAR, "block_share": True}),
}  # fmt: skip
#: not in the formulas of `rebuild`; through the library's own adapter
BUILT = ("oft exact", "oft shared", "oft")


def peft_directory(case, path):
    """A directory of PEFT with random factors; weights before and after merging, and biases."""
    name, fields = WRITTEN[case]
    model = peft.get_peft_model(Net(), getattr(peft, name)(**fields))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value)) if "magnitude" in key else value.normal_(std=0.2)
    model.save_pretrained(path)
    merged = model.merge_and_unload()
    return dict(Net().named_parameters()), dict(merged.named_parameters())


@pytest.mark.parametrize("case", list(WRITTEN))
def test_directories_of_peft_do_what_peft_merges(case, tmp_path):
    before, after = peft_directory(case, tmp_path)
    raw = read_raw(tmp_path)
    assert (raw.dialect, raw.trainer, raw.unknown) == ("peft", "PEFT", {})
    assert json.loads(raw.metadata["adapter_config"])["peft_type"]
    paths = [k.removesuffix(".weight") for k in before if k.endswith("weight") and "head" not in k]
    wanted = [p for p in paths if p.split(".")[-1] in WRITTEN[case][1]["target_modules"]]
    assert {m.name for m in raw.modules} == set(wanted)
    for module in raw.modules:
        weight, bias = (before.get(f"{module.name}.{k}") for k in ("weight", "bias"))
        weight, bias = weight.double(), None if bias is None else bias.double()
        if case in BUILT:
            moved = weight + entry_delta(module.entries, tuple(weight.shape), weight)
        else:
            moved, bias = changed(module.entries, weight, bias)
        want = after[f"{module.name}.weight"].double()
        assert (moved - want).norm() < 3e-6 * want.norm()
        assert (want - weight).norm() > 1e-2 * weight.norm()
        if bias is not None:
            assert torch.allclose(bias, after[f"{module.name}.bias"].double(), atol=1e-6)


def test_a_weights_file_beside_its_config(tmp_path):
    peft_directory("lora", tmp_path)
    raw = read_raw(tmp_path / "adapter_model.safetensors")
    assert raw.modules[0].entries[0].alpha_source == "config"
    (tmp_path / "adapter_config.json").unlink()
    raw = read_raw(tmp_path)  # one safetensors file, but nothing tells its strength
    assert raw.modules[0].entries[0].alpha_source == "default" and raw.dialect == "peft"


def test_one_directory_for_each_component(tmp_path):
    peft_directory("lora", tmp_path / "unet")
    peft_directory("lokr", tmp_path / "text_encoder")
    raw = read_raw(tmp_path)
    found = {(m.components, m.entries[0].algorithm) for m in raw.modules}
    assert found == {(("unet",), "LORA"), (("text_encoder",), "LOKR")}
    assert {"adapter_config.unet", "adapter_config.text_encoder"} <= set(raw.metadata)
    assert read_raw(tmp_path / "unet").modules[0].components == ("unet",)


def edit(path, **values):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_model_s_class_tells_the_component(tmp_path):
    peft_directory("lora", tmp_path)
    for name, component in (
        ("UNet2DConditionModel", "unet"),
        ("FluxTransformer2DModel", "transformer"),
        ("CLIPTextModelWithProjection", "text_encoder_2"),
        ("CLIPTextModel", "text_encoder"),
    ):
        edit(tmp_path, auto_mapping={"base_model_class": name, "parent_library": "diffusers"})
        assert read_raw(tmp_path).modules[0].components == (component,)


REFUSED = {
    "another algorithm": ({"peft_type": "MISS", "lora_alpha": None}, "LORA, the config says MISS"),
    "unknown algorithm": ({"peft_type": "VERA"}, "peft_type 'VERA'"),
    "another rank": ({"r": 5}, "rank 4, the config says r=5"),
    "DoRA without magnitudes": ({"use_dora": True}, "no magnitude"),
    "an option that changes the meaning": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "a start that moved the base": ({"init_lora_weights": "pissa"}, "pissa"),
    "no strength": ({"r": 0}, "r is 0"),
    "alpha": ({"lora_alpha": "many"}, "alpha is 'many'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_config_that_cannot_be_followed_is_refused(case, tmp_path):
    values, words = REFUSED[case]
    peft_directory("lora", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ALL} | values))
    with pytest.raises(CheckpointError, match=words):
        read_raw(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "not json", "[" * 100_000, '{"r": 1}', '{"peft_type": 7}'])
def test_a_config_that_is_none(text, tmp_path):
    peft_directory("lora", tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_raw(tmp_path)


def test_directories_without_an_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_raw(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        read_raw(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="peft_type"):
        read_raw(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        read_raw(tmp_path)


def test_modules_trained_in_full_are_named(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["fc1"], modules_to_save=["head"], bias="all")
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    raw = read_raw(tmp_path)
    assert [m.name for m in raw.modules] == ["block.fc1"]
    assert any("modules_to_save" in r for k, r in raw.unknown.items() if "head.weight" in k)
    assert any("bias that was trained" in r for k, r in raw.unknown.items() if "fc1" in k)


def test_simpletuner_s_config_beside_its_weights(tmp_path):
    shapes = {"lokr_w1": (2, 2), "lokr_w2": (3, 4)}
    save_file({f"lycoris_a.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "lycoris_config.json").write_text('{"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1}')
    raw = read_raw(tmp_path)
    assert (raw.trainer, raw.dialect) == ("SimpleTuner", "simpletuner") and "lokr" in raw.metadata["lycoris_config"]


# --- this library's own
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_own_directories_do_what_merging_does(kind, compact, tmp_path):
    model = wrapped(kind, base=clip().double())
    model.save_pretrained(tmp_path, compact=compact)
    raw = read_raw(tmp_path)
    assert raw.unknown == {} and raw.dialect == "peft"
    check_merged(raw, model)


def test_own_sums_of_adapters(tmp_path):
    model = three_adapters().double()
    model.add_weighted_adapter(["a", "b", "c"], [0.5, 2.0, 1.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    (folder,) = [p.parent for p in tmp_path.rglob("adapter_config.json")]
    raw = read_raw(folder)
    assert raw.unknown == {} and raw.trainer == "lycoris_diff"
    assert {e.algorithm for m in raw.modules for e in m.entries} == {"LOKR", "SHIRA", "MISS"}
    check_merged(raw, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"weights": [0.5, 2.0, 0.25]}))
    raw = read_raw(folder)  # a weight that depends on the base weight cannot be part of a factor
    assert any("at weight 0.25" in reason for reason in raw.unknown.values())


def check_merged(raw, model):
    layers = adapted_layers(model)
    assert {m.name for m in raw.modules} == {p.removeprefix("model.") for p in layers}
    weights = {p.removeprefix("model."): layer.base_layer.weight.detach().clone() for p, layer in layers.items()}
    after = model.merge_and_unload()
    for module in raw.modules:
        weight = weights[module.name]
        delta = entry_delta(module.entries, tuple(weight.shape), weight)
        want = after.get_submodule(module.name).weight.detach() - weight
        assert want.norm() > 1e-3 and (delta - want).norm() < 1e-6 * want.norm()


def test_tensors_of_the_file_are_not_copied(tmp_path):
    wrapped("lora").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for module in read_raw(tmp_path).modules:
        for name, value in module.entries[0].tensors.items():
            assert torch.equal(value, stored[f"base_model.model.{module.name}.{name}"])


OWN = {
    "GLORA": ({"glora_a1": (8, 2), "glora_a2": (2, 8), "glora_b1": (6, 2), "glora_b2": (2, 8)}, {"r": 2, "alpha": 3}, {}),
    "IA3": ({"ia3_weight": (8,)}, {"on_input": True}, {"on_input": True}),
    "FULL": ({"diff": (6, 8), "diff_b": (6,)}, {}, {}),
    "NORM": ({"w_norm": (6,), "b_norm": (6,)}, {}, {}),
    "DIAG_OFT": ({"oft_blocks": (3, 2, 2)}, {"constraint": 0.25}, {"constraint": 0.25}),
    "LYCORIS_BOFT": ({"oft_blocks": (1, 3, 2, 2)}, {"constraint": 0.5}, {"constraint": 0.5}),
    "OFT": ({"oft_R.weight": (2, 6)}, {"scaled": True, "oft_block_size": 4, "peft_version": "0.21"}, {"scaled": True}),
    "TLORA": ({"q_layer": (2, 8), "p_layer": (6, 2), "lambda_layer": (1, 2)}, {"r": 2, "alpha": 3, "sig_type": "last"},
              {"sig_type": "last"}),
    "LOKR": ({"lokr_w1": (2, 4), "lokr_w2": (5, 2)}, {"r": 1, "alpha": 1.5, "rows": [3, 6]}, {"rows": (3, 6)}),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", list(OWN))
def test_own_algorithms_keep_their_options_in_the_config(algorithm, tmp_path):
    shapes, fields, options = OWN[algorithm]
    tensors = {f"base_model.model.a.b.{k}": torch.randn(s) for k, s in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": f"LYCORIS_DIFF_{algorithm}", **fields}))
    raw = read_raw(tmp_path)
    (entry,) = raw.modules[0].entries
    assert (entry.algorithm, entry.options, raw.unknown, raw.notes) == (algorithm, options, {}, [])
    assert {k: tuple(v.shape) for k, v in entry.tensors.items()} == shapes
    assert entry.scale == (1.5 if "alpha" in fields else 1.0)
