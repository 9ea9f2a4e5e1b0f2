"""Which base model a file is for, from its names, the shapes of its factors and its metadata."""

from __future__ import annotations

import pytest
import torch
from namecases import as_file, default_index

from lycoris_diff.checkpoints.checkpoint import Entry, Named, RawCheckpoint
from lycoris_diff.checkpoints.guess import closest_base, explain_base, guess_base
from lycoris_diff.checkpoints.rewrite import weight_shape
from lycoris_diff.checkpoints.slices import row_count
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


def test_windows_of_a_product_count_with_their_own_rows() -> None:
    """What a fused LoKr of Flux.1 becomes in a PEFT directory: q, k and v each over the blocks that cover them."""
    rows = {"to_q": (0, 3072), "to_k": (48, 3072), "to_v": (0, 3072), "proj_mlp": (96, 12288)}
    modules = []
    for name, window in rows.items():
        blocks = -(-sum(window) // 168)
        tensors = {"lokr_w1": torch.ones(blocks, 48), "lokr_w2": torch.ones(168, 64)}
        path = f"single_transformer_blocks.0.{name if name == 'proj_mlp' else f'attn.{name}'}"
        modules.append(Named(path, False, (), [Entry("LOKR", tensors, options={"rows": window})]))
    assert guess_base(RawCheckpoint(modules, "peft")) == "flux"


@pytest.mark.parametrize(
    ("algorithm", "shapes", "rows", "columns"),
    [
        ("LORA", {"lora_A.weight": (2, 8, 3, 3), "lora_B.weight": (6, 2, 1, 1)}, 6, 72),
        ("LOHA", {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}, 6, 8),
        ("LOHA", {"hada_w1_a": (2, 6), "hada_w1_b": (2, 8), "hada_w2_a": (2, 6), "hada_t1": (2, 2, 3, 3)}, 6, 72),
        ("LOKR", {"lokr_w1": (2, 4), "lokr_w2": (3, 2, 3)}, 6, 24),
        (
            "LOKR",
            {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, 3)},
            6,
            24,
        ),
        ("LOKR", {"lokr_w1": (2, 4), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 6)}, 6, 24),
        ("FULL", {"diff": (6, 4, 3)}, 6, 12),
        ("FULL", {"diff_b": (6,)}, 6, None),
        ("DIAG_OFT", {"oft_blocks": (2, 3, 3)}, 6, None),
        ("LYCORIS_BOFT", {"oft_blocks": (4, 2, 3, 3)}, 6, None),
        ("TLORA", {"p_layer": (6, 2), "q_layer": (2, 8), "lambda_layer": (1, 2)}, 6, 8),
    ],
)
def test_size_that_factors_make(
    algorithm: str, shapes: dict[str, tuple[int, ...]], rows: int | None, columns: int | None
) -> None:
    entry = Entry(algorithm, {name: torch.zeros(shape) for name, shape in shapes.items()})
    shape = weight_shape(entry, flat=True)
    assert row_count(entry) == rows and (shape and torch.Size(shape[1:]).numel()) == columns
