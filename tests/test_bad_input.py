"""Bad input: a clear error of the library's own, and nothing half done."""

from __future__ import annotations

import json

import pytest
import torch
from cases import ALGORITHMS, Holder, adapt, assert_untouched, fingerprint, make_layer, randomize
from modelcases import CONFIGS, adapted_layers, wrapped
from safetensors.torch import load_file, save_file
from smallmodels import clip, output_of, tokens, unet
from torch import nn

from lycoris_diff import (
    AdapterError,
    AdapterModel,
    CheckpointError,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter,
    set_peft_model_state_dict,
)

LAYER = {"target_modules": ["layer"]}


def test_one_public_base_of_errors():
    for error in (CheckpointError, ConfigError, TargetError):
        assert issubclass(error, AdapterError)
    assert issubclass(AdapterError, ValueError)


# ------------------------------------------------------------------------------------------------------ configurations

BAD_CONFIGS = {
    "lokr r=0": (lambda: LoKrConfig(r=0, **LAYER), "r"),
    "lokr r<0": (lambda: LoKrConfig(r=-4, **LAYER), "-4"),
    "lokr r=1.5": (lambda: LoKrConfig(r=1.5, **LAYER), "1.5"),
    "lokr r text": (lambda: LoKrConfig(r="8", **LAYER), "8"),
    "lokr r true": (lambda: LoKrConfig(r=True, **LAYER), "r"),
    "loha r=0": (lambda: LoHaConfig(r=0, **LAYER), "r"),
    "lora r=0": (lambda: LoraConfig(r=0, **LAYER), "r"),
    "miss r=0": (lambda: MissConfig(r=0, **LAYER), "r"),
    "shira r=0": (lambda: ShiraConfig(r=0, **LAYER), "r"),
    "miss r above in": (lambda: MissConfig(r=25, **LAYER), "24"),
    "shira r above what fits": (lambda: ShiraConfig(r=15, **LAYER), "15"),
    "mini_r does not divide": (lambda: MissConfig(r=6, mini_r=7, init_weights="mini", **LAYER), "7"),
    "mini_r=0": (lambda: MissConfig(r=6, mini_r=0, init_weights="mini", **LAYER), "mini_r"),
    "bat does not divide out": (lambda: MissConfig(r=8, init_weights="bat", **LAYER), "8"),
    "bat does not divide in": (lambda: MissConfig(r=9, init_weights="bat", **LAYER), "9"),
    "miss mode": (lambda: MissConfig(r=6, init_weights="bats", **LAYER), "bats"),
    "lokr start": (lambda: LoKrConfig(init_weights="lycris", **LAYER), "lycris"),
    "loha start": (lambda: LoHaConfig(init_weights="bat", **LAYER), "bat"),
    "factor 0": (lambda: LoKrConfig(decompose_factor=0, **LAYER), "decompose_factor"),
    "factor -3": (lambda: LoKrConfig(decompose_factor=-3, **LAYER), "-3"),
    "alpha nan": (lambda: LoKrConfig(alpha=float("nan"), **LAYER), "alpha"),
    "alpha inf": (lambda: LoraConfig(lora_alpha=float("inf"), **LAYER), "alpha"),
    "dora axis": (lambda: LoraConfig(use_dora=True, dora_axis="rows", **LAYER), "rows"),
    "bias": (lambda: LoraConfig(bias="some", **LAYER), "some"),
    "rank pattern value": (lambda: LoKrConfig(rank_pattern={"layer": 0}, **LAYER), "rank_pattern|r"),
    "mask type": (lambda: ShiraConfig(r=2, mask_type=3, **LAYER), "mask"),
    "seed": (lambda: ShiraConfig(r=2, random_seed="x", **LAYER), "seed"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list(BAD_CONFIGS))
def test_bad_values_are_refused_before_anything_changes(case):
    make, words = BAD_CONFIGS[case]
    base = Holder(make_layer("linear"))
    before = fingerprint(base)
    with pytest.raises(AdapterError, match=words):
        get_peft_model(base, make())
    assert_untouched(base, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list(BAD_CONFIGS))
def test_bad_values_in_a_second_adapter(case):
    make, _ = BAD_CONFIGS[case]
    model, _ = adapt(make_layer("linear"), ALGORITHMS["lokr"]())
    before = fingerprint(model)
    with pytest.raises(AdapterError):
        model.add_adapter("second", make())
    assert_untouched(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", [LoKrConfig, LoHaConfig, MissConfig, ShiraConfig, LoraConfig])
def test_unknown_fields(kind):
    with pytest.raises((AdapterError, TypeError), match="rnak"):
        kind(rnak=4)
    with pytest.raises((AdapterError, TypeError)):
        LoKrConfig(alpha=3, lora_alpha=5)


@pytest.mark.parametrize("kind", [LoKrConfig, LoHaConfig])
def test_pefts_unsupported_fields_are_refused_away_from_their_default(kind):
    with pytest.raises((AdapterError, TypeError)):
        kind(target_parameters=["x"])
    with pytest.raises((AdapterError, TypeError)):
        LoraConfig(use_qalora=True)


def test_fields_without_effect_warn():
    with pytest.warns(UserWarning, match="mini_r"):
        get_peft_model(Holder(make_layer("linear")), MissConfig(r=6, mini_r=4, **LAYER))


def test_a_late_failure_leaves_no_trace():
    """The second layer does not fit; the first must not stay adapted."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(24, 36)
            self.second = nn.Linear(10, 36)

    base = Two()
    before = fingerprint(base)
    for config in (
        MissConfig(r=12, target_modules=["first", "second"]),
        MissConfig(r=12, init_weights="bat", target_modules=["first", "second"]),
        ShiraConfig(r=8, target_modules=["first", "second"]),
    ):
        for call in (get_peft_model, inject_adapter):
            with pytest.raises(AdapterError, match="second"):
                call(base, config, adapter_name="default")
            assert_untouched(base, before)


# --------------------------------------------------------------------------------------------------- layers and models


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(4, 6),
        lambda: nn.LayerNorm(6),
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: nn.LSTM(4, 6),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.Bilinear(3, 4, 5),
        lambda: nn.Sequential(nn.Linear(3, 4)),
        lambda: nn.Identity(),
    ],
)
@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig, MissConfig, ShiraConfig, LoraConfig])
def test_unsupported_layers(make, config):
    base = Holder(make())
    before = fingerprint(base)
    with pytest.raises(AdapterError, match=type(base.layer).__name__):
        get_peft_model(base, config(r=1, target_modules=["layer"]))
    assert_untouched(base, before)


def test_layers_whose_forward_is_never_called():
    """MultiheadAttention reads out_proj's weight itself: adapting it must act or be refused, never do nothing."""
    base = Holder(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 3, 8)
    plain = base.layer(x, x, x)[0]
    try:
        model = get_peft_model(base, LoKrConfig(r=1, target_modules=["out_proj"], init_weights=False))
    except AdapterError:
        return
    assert not torch.equal(model.get_base_model().layer(x, x, x)[0], plain)


def test_packed_linear_layers_work_or_are_refused():
    """A Linear subclass whose weight is packed bytes (quantised) must not fail later, inside forward."""

    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(8, 6)
            self.weight = nn.Parameter(torch.randint(0, 255, (24, 1), dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.linear(x, torch.ones(6, 8), self.bias)

    for config in (LoKrConfig, LoHaConfig, LoraConfig):
        base = Holder(Packed())
        x = torch.randn(2, 8)
        plain = base(x)
        try:
            model = get_peft_model(base, config(r=1, target_modules=["layer"], init_weights=False))
        except AdapterError:
            continue
        assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    base = Holder(layer)
    before = fingerprint(base)
    with pytest.raises(AdapterError):
        get_peft_model(base, LoKrConfig(r=1, target_modules=["layer"]))
    assert_untouched(base, before)


@pytest.mark.parametrize("thing", [None, "unet", 3, {"a": 1}, [nn.Linear(2, 2)]])
def test_models_that_are_none(thing):
    with pytest.raises((AdapterError, TypeError)):
        get_peft_model(thing, LoKrConfig(target_modules=["layer"]))


@pytest.mark.parametrize("config", [None, {"r": 4}, "lokr", LoKrConfig])
def test_configs_that_are_none(config):
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, TypeError)):
        get_peft_model(base, config)
    assert_untouched(base, before)


def test_wrong_config_for_the_class():
    from lycoris_diff import LoHaModel

    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, TypeError)):
        LoHaModel(base, LoKrConfig(target_modules=["q_proj"]), "default")
    assert_untouched(base, before)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "strong", None])
def test_bad_scales(scale):
    model = wrapped("lokr")
    expected = output_of(model, tokens())
    with pytest.raises((AdapterError, TypeError)):
        model.set_scale("default", scale)
    assert torch.equal(output_of(model, tokens()), expected)


# --------------------------------------------------------------------------------------------------------------- files


def saved(path, kind="lokr"):
    model = wrapped(kind, target_modules=["q_proj", "fc1"])
    model.save_pretrained(path)
    return path / "adapter_model.safetensors"


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors, part):
    return next(k for k in sorted(tensors) if part in k)


BROKEN = {
    "wrong shape": lambda t: t.update({first(t, "lokr_w1"): torch.zeros(3, 3)}),
    "transposed factor": lambda t: t.update({(k := first(t, "fc1.lokr_w2_a")): t[k].T.contiguous()}),
    "missing factor": lambda t: t.pop(first(t, "lokr_w2_b")),
    "missing layer": lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.fc1" in k],
    "unknown tensor": lambda t: t.update({first(t, "lokr_w1").replace("lokr_w1", "lokr_w9"): torch.zeros(2)}),
    "unknown layer": lambda t: t.update({"base_model.model.nowhere.lokr_w1": torch.zeros(2, 2)}),
    "empty": lambda t: t.clear(),
    "wrong dtype": lambda t: t.update({(k := first(t, "lokr_w1")): t[k].to(torch.int32)}),
    "other prefix": lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)],
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused_and_nothing_changes(case, tmp_path):
    path = saved(tmp_path)
    edit(path, BROKEN[case])
    base = clip()
    before = fingerprint(base)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors|lokr|adapter"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)
    model = wrapped("loha", target_modules=["q_proj"])
    before = fingerprint(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path, "second")
    assert_untouched(model, before)
    assert list(model.active_adapters) == ["default"] and list(model.peft_config) == ["default"]


def test_the_error_names_the_first_differences(tmp_path):
    path = saved(tmp_path)
    key = "base_model.model.encoder.layers.0.mlp.fc1.lokr_w1"
    edit(path, lambda t: t.update({first(t, "layers.0.mlp.fc1.lokr_w1"): torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError) as error:
        AdapterModel.from_pretrained(clip(), tmp_path)
    text = str(error.value)
    assert key.split("base_model.model.")[1].rsplit(".", 1)[0].split("encoder.")[1] in text
    assert "3" in text and "5" in text


@pytest.mark.parametrize("keep", [0, 5, 100, -40])
def test_truncated_files(keep, tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError), match="adapter_model"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"peft_type": 5}', '{"peft_type": "NOTHING", "r": 3}', "{}"])
def test_broken_config_files(text, tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError), match=r"adapter_config|NOTHING|peft_type"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_edited_config_files(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for change in (
        {"r": 5},
        {"r": "two"},
        {"decompose_both": True, "r": 1},
        {"target_modules": ["v_proj"]},
        {"alpha": None},
    ):
        path.write_text(json.dumps({**good, **change}))
        base = clip()
        before = fingerprint(base)
        with pytest.raises(AdapterError):
            AdapterModel.from_pretrained(base, tmp_path)
        assert_untouched(base, before)


def test_nothing_there(tmp_path):
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path / "missing")
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path)
    saved(tmp_path).unlink()
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_a_file_for_another_model(tmp_path):
    saved(tmp_path)
    base = unet()
    before = fingerprint(base)
    with pytest.raises(AdapterError):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)
    small = Holder(make_layer("linear"))
    before = fingerprint(small)
    with pytest.raises(AdapterError):
        AdapterModel.from_pretrained(small, tmp_path)
    assert_untouched(small, before)


def test_shira_indices_out_of_range(tmp_path):
    path = saved(tmp_path, "shira")
    for bad in (10_000, -1):
        edit(path, lambda t, bad=bad: t[first(t, "shira_indices")].__setitem__((0, 0), bad))
        base = clip()
        before = fingerprint(base)
        with pytest.raises(CheckpointError, match=r"(?i)ind"):
            AdapterModel.from_pretrained(base, tmp_path)
        assert_untouched(base, before)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_files_with_non_finite_values_never_merge_safely(kind, value, tmp_path):
    """Such a file is refused at load, or loads and is refused by a safe merge; the base weights stay as they were."""
    path = saved(tmp_path, kind)
    edit(path, lambda t: t[next(k for k in sorted(t) if t[k].is_floating_point())].view(-1).__setitem__(0, value))
    base = clip()
    before = fingerprint(base)
    try:
        model = AdapterModel.from_pretrained(base, tmp_path)
    except AdapterError:
        assert_untouched(base, before)
        return
    with pytest.raises(AdapterError):
        model.merge_adapter(safe_merge=True)
    model.unload()
    assert_untouched(base, before, flags=False)


def test_state_dicts_that_do_not_fit():
    model = wrapped("lokr", target_modules=["q_proj"])
    good = get_peft_model_state_dict(model)
    before = fingerprint(model)
    key = sorted(good)[0]
    for change in (
        {k: v for k, v in good.items() if k != key},
        {**good, key: torch.zeros(1, 1)},
        {**good, "base_model.model.more.lokr_w1": torch.zeros(2)},
    ):
        with pytest.raises(AdapterError):
            set_peft_model_state_dict(model, change)
        assert_untouched(model, before)


def test_saving_is_atomic(tmp_path, monkeypatch):
    """A failure while writing leaves the older files whole and no half file behind."""
    import safetensors.torch

    path = saved(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = wrapped("lokr", target_modules=["q_proj", "fc1"])
    randomize(model, seed=77)

    def fail(*args, **kwargs):
        target = next((a for a in args[1:] if isinstance(a, (str, type(path)))), None) or kwargs.get("filename")
        if target:
            with open(target, "wb") as f:
                f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for module in list(__import__("sys").modules.values()):
        if getattr(module, "__name__", "").startswith("lycoris_diff") and hasattr(module, "save_file"):
            monkeypatch.setattr(module, "save_file", fail)
    try:
        model.save_pretrained(tmp_path)
    except OSError:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    else:
        assert load_file(path).keys() == get_peft_model_state_dict(model).keys()  # written some other way


def test_saving_where_a_file_stands(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises((AdapterError, OSError)):
        wrapped("lokr").save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_pickles_are_not_opened(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    path.unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({**tensors, "bomb": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(clip(), tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_loading_under_a_taken_name(tmp_path):
    saved(tmp_path)
    model = wrapped("lokr", target_modules=["q_proj"])
    before = fingerprint(model)
    for name in ("default", "a.b"):
        with pytest.raises(AdapterError):
            model.load_adapter(tmp_path, name)
        assert_untouched(model, before)
    assert len(adapted_layers(model)) == 3
