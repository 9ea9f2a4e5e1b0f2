"""A wanted size becomes a rank or a factor, and what comes out has exactly the size that was told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lycoris_diff import AdapterError, LoHaConfig, LoKrConfig, LoraConfig, MissConfig, ShiraConfig, get_peft_model, save_adapter
from lycoris_diff.adapters import (
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    NormConfig,
    OFTConfig,
    TLoraConfig,
)
from lycoris_diff.diffusion.components import models_of
from lycoris_diff.errors import ConfigError
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.sizes import count_parameters, size_knob
from lycoris_diff.training.sizing import fit_size, parse_size


class Odd(nn.Module):
    """Layers whose sizes share no divisors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 45), nn.Linear(45, 31), nn.Conv2d(8, 12, 3)


NAMES = ["a", "b", "c"]
SIZED = {
    "lora": LoraConfig(target_modules=NAMES),
    "dora": LoraConfig(target_modules=NAMES, weight_decompose=True),
    "patterns": LoraConfig(target_modules=NAMES, rank_pattern={"b": 3}, alpha_pattern={"a": 3, "b": 2}),
    "tucker": LoraConfig(target_modules=NAMES, use_effective_conv2d=True),
    "loha": LoHaConfig(target_modules=NAMES),
    "lokr": LoKrConfig(r=2, target_modules=NAMES),
    "lokr-full": LoKrConfig(full_matrix=True, target_modules=NAMES),
    "lokr-huge-rank": LoKrConfig(r=1000, target_modules=NAMES),
    "glora": GLoraConfig(target_modules=NAMES),
    "miss": MissConfig(r=4, target_modules=NAMES),
    "shira": ShiraConfig(r=2, target_modules=NAMES),
    "diag-oft": DiagOFTConfig(r=4, rescaled=True, target_modules=NAMES),
    "boft": BOFTConfig(r=16, target_modules=["c"]),
    "oft": OFTConfig(target_modules=NAMES),
    "oft-blocks": OFTConfig(r=4, oft_block_size=0, target_modules=NAMES),
    "tlora": TLoraConfig(target_modules=["a", "b"]),
}


def trained(model, config):
    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", SIZED)
@settings(deadline=None, max_examples=3)
@given(share=st.floats(0, 1))
def test_the_closest_size_is_found(name, share):
    config, model = SIZED[name], Odd()
    knob = size_knob(model, config)
    sizes = {}
    limit = 6 if knob.field == "decompose_factor" else 72 if "oft" in name else 31
    for value in range(1, limit + 1):
        try:
            sizes[value] = count_parameters(model, config.for_layer(**{knob.field: value}))
        except ConfigError:
            continue
    kind = {v for v in sizes if size_knob(model, config.for_layer(**{knob.field: v})) == knob}
    sizes = {v: n for v, n in sizes.items() if v in kind}
    target = round(min(sizes.values()) + share * (max(sizes.values()) - min(sizes.values())))
    choice = fit_size({"unet": model}, {"unet": config}, parameters=target)
    assert choice.knob == {"unet": (knob.field, getattr(choice.configs["unet"], knob.field))}
    assert abs(choice.parameters - target) <= min(abs(n - target) for n in sizes.values())
    assert choice.parameters == trained(Odd(), choice.configs["unet"])
    assert all(abs(choice.parameters - target) <= abs(other.parameters - target) for other in choice.alternatives)


@pytest.mark.parametrize("name", ["lora", "patterns", "loha", "glora", "tlora"])
def test_every_layer_keeps_its_strength(name):
    config = SIZED[name]
    choice = fit_size({"unet": Odd()}, {"unet": config}, parameters=1000)
    before, after = get_peft_model(Odd(), config), get_peft_model(Odd(), choice.configs["unet"])
    for path in NAMES if name != "tlora" else NAMES[:2]:
        old, new = (m.get_base_model().get_submodule(path).adapter("default") for m in (before, after))
        assert old.scaling == pytest.approx(new.scaling)
    assert choice.configs["unet"].r != config.r


def test_modules_trained_in_full_and_biases_count():
    config = LoraConfig(target_modules=["a"], modules_to_save=["b"], bias="all")
    choice = fit_size({"unet": Odd()}, {"unet": config}, parameters=2500)
    assert choice.parameters == trained(Odd(), choice.configs["unet"])
    assert abs(choice.parameters - 2500) <= (24 + 45) / 2


@pytest.mark.parametrize("config", [LoraConfig(weight_decompose=True, r=2), LoKrConfig(full_matrix=True), MissConfig(r=4)])
def test_bytes_of_the_file(config, tmp_path):
    pipe = build_pipeline(0)
    config = config.for_layer(target_modules=["to_q", "to_k"])
    choice = fit_size(models_of(pipe), {"unet": config}, bytes=parse_size("150kB"), metadata={"ss_note": "x" * 99})
    assert all(not parameter.is_meta for parameter in pipe.unet.parameters())
    pipe.unet = get_peft_model(pipe.unet, choice.configs["unet"], "default")
    save_adapter(pipe, tmp_path / "adapter.safetensors", "default", metadata={"ss_note": "x" * 99})
    assert (tmp_path / "adapter.safetensors").stat().st_size == choice.bytes
    assert all(abs(choice.bytes - 150_000) <= abs(other.bytes - 150_000) for other in choice.alternatives)
    assert len(choice.alternatives) == 2


def test_one_value_serves_all_components():
    models = {"unet": Odd(), "text_encoder": Odd()}
    configs = {"unet": LoraConfig(r=16, target_modules=NAMES), "text_encoder": LoraConfig(r=2, alpha=2, target_modules=["a"])}
    choice = fit_size(models, configs, parameters=2000)
    assert choice.configs["unet"].r == choice.configs["text_encoder"].r
    assert choice.parameters == sum(trained(Odd(), config) for config in choice.configs.values())
    fixed = fit_size(models, configs | {"text_encoder": IA3Config(target_modules=["a"])}, parameters=2000)
    assert fixed.knob.keys() == {"unet"}
    assert fixed.parameters == sum(trained(Odd(), config) for config in fixed.configs.values())


def test_a_full_lokr_has_a_factor_and_never_a_rank():
    for name in ("lokr-full", "lokr-huge-rank"):
        choice = fit_size({"unet": Odd()}, {"unet": SIZED[name]}, parameters=600)
        assert choice.label == "factor" and choice.knob["unet"][0] == "decompose_factor"
    smaller, larger = choice.alternatives
    assert smaller.value > larger.value and smaller.parameters < larger.parameters


@pytest.mark.parametrize(
    ("configs", "target", "words"),
    [
        ({"unet": IA3Config(target_modules=NAMES)}, 100, "IA3 on unet: the size follows"),
        ({"unet": FullConfig(target_modules=NAMES)}, 100, "FULL on unet: the size follows"),
        ({"unet": LoraConfig(target_modules=NAMES)}, 10, "rank 1 has 229 .* adapt fewer modules"),
        ({"unet": LoraConfig(target_modules=NAMES)}, 10**9, "adapt more modules"),
        ({"unet": LoKrConfig(r=1, target_modules=NAMES)}, 10**6, "full_matrix=True"),
        (
            {"unet": LoraConfig(target_modules=NAMES), "text_encoder": LoKrConfig(full_matrix=True, target_modules=NAMES)},
            999,
            "unet by r and text_encoder by decompose_factor",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(configs, target, words):
    with pytest.raises(ConfigError, match=words):
        fit_size({"unet": Odd(), "text_encoder": Odd()}, configs, parameters=target)


def test_norms_have_no_size():
    with pytest.raises(ConfigError, match="NORM on unet"):
        fit_size({"unet": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))}, {"unet": NormConfig()}, parameters=8)


def test_one_target_is_needed():
    for both in ({}, {"parameters": 5, "bytes": 5}):
        with pytest.raises(ConfigError, match="give one of them"):
            fit_size({"unet": Odd()}, {"unet": SIZED["lora"]}, **both)


def test_a_format_that_cannot_say_it_is_refused():
    pipe = build_pipeline(0)
    config = ShiraConfig(r=2, target_modules=["to_q"])
    with pytest.raises(AdapterError, match="kohya"):
        fit_size(models_of(pipe), {"unet": config}, bytes=100_000)
    assert fit_size(models_of(pipe), {"unet": config}, bytes=100_000, format="peft").bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10MB", 10**7), ("10 MiB", 10 * 2**20), ("2.5 kb", 2500), (".5gb", 5 * 10**8), ("77", 77), (77, 77), ("1KiB", 1024)],
)
def test_sizes_in_words(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "ten MB", "10 parsecs", "-3MB", "0", "1e3", "nan"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10**6), st.sampled_from(["kB", "MB", "KiB", "MiB"]))
def test_units(number, unit):
    base = {"k": 1, "m": 2}[unit[0].lower()]
    assert parse_size(f"{number}{unit}") == number * (1024 if "i" in unit else 1000) ** base
