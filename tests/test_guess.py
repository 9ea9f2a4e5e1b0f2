"""Which base model a file is for, from its names, the shapes of its factors and its metadata."""

from __future__ import annotations

import pytest
from namecases import as_file, default_index

from lycoris_diff.checkpoints.guess import closest_base, explain_base, guess_base
from lycoris_diff.naming import KNOWN_BASES, known_base


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "lycoris", "peft"])
@pytest.mark.parametrize("base", KNOWN_BASES)
def test_the_base_model_is_told_from_names_and_shapes(base: str, scheme: str) -> None:
    assert guess_base(as_file(base, scheme, every=3)) == base


def test_metadata_decides_between_models_that_fit_alike() -> None:
    raw = as_file("sd3", "kohya", {"modelspec.architecture": "stable-diffusion-3.5-medium/lora"})
    assert guess_base(raw) == "sd3", "the modulations of SD3.5 medium have more rows"
    raw.modules = [module for module in raw.modules if module.name.endswith("attn_qkv")]
    guess = explain_base(raw)
    assert guess.base == "sd35-medium" and "sd3" in guess.ties
    assert guess.reasons[-1] == "the metadata says 'stable-diffusion-3.5-medium/lora'"
    assert guess_base(as_file("sdxl", "kohya", {"ss_base_model_version": "sd_v1"})) == "sdxl", "names and shapes first"


def test_base_of_text_encoders_alone() -> None:
    assert guess_base(as_file("sd21", "kohya", only="text_encoder")) == "sd21"
    raw = as_file("sdxl", "kohya", only="text_encoder_2")
    assert guess_base(raw) == "sdxl"
    for module in raw.modules:
        module.components = ()
    assert guess_base(raw) == "sdxl"


def test_base_behind_an_unknown_prefix_and_of_nonsense() -> None:
    raw = as_file("sd15", "lycoris")
    for module in raw.modules:
        module.name = f"my_style_{module.name}"
    assert guess_base(raw) == "sd15"
    for module in raw.modules:
        module.name = "nothing.known"
    assert guess_base(raw) == ""
    assert "0 of 282 modules" in explain_base(raw).reasons[0]


def test_the_base_a_live_model_is() -> None:
    assert closest_base(known_base("sd21")["unet"]) == "sd21"
    assert closest_base(default_index("FluxTransformer2DModel")) == "flux"
    assert closest_base(default_index("FluxTransformer2DModel", num_layers=2)) == "flux"
