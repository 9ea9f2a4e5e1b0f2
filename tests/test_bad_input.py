"""Bad input: a clear error of the library's own, and nothing half done."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, Holder, adapt, assert_untouched, fingerprint, make_layer
from modelcases import wrapped
from smallmodels import clip, output_of, tokens
from torch import nn

from lycoris_diff import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
    TargetError,
    get_peft_model,
    inject_adapter,
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
