"""Broken, mixed and foreign files: named module by module, and the rest is read."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch
from readcases import Layers, normal, only, pair
from safetensors.torch import save_file

from lycoris_diff.checkpoints.parse import raw_from_tensors, read_raw
from lycoris_diff.checkpoints.suffixes import SUFFIXES
from lycoris_diff.errors import CheckpointError

LOHA = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
LOKR = {"lokr_w1": (2, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}
BROKEN = {
    "no up": ({"lora_down.weight": (2, 8)}, "'up' is missing"),
    "no down": ({"lora_up.weight": (6, 2)}, "'down' is missing"),
    "only mid": ({"lora_mid.weight": (2, 2, 3, 3)}, "missing"),
    "ranks differ": ({"lora_down.weight": (2, 8), "lora_up.weight": (6, 3)}, "ranks differ: 2, 3"),
    "a rank that would broadcast": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 1)}, "ranks differ: 4, 1"),
    "rank 0": ({"lora_down.weight": (0, 8), "lora_up.weight": (6, 0)}, "holds nothing"),
    "core's rank": ({"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), "lora_mid.weight": (3, 2, 3, 3)}, "'mid' has shape"),
    "wide up": ({"lora_down.weight": (2, 8, 1, 1), "lora_up.weight": (6, 2, 3, 3)}, "'up' has shape"),
    "one axis": ({"lora_down.weight": (8,), "lora_up.weight": (6, 2)}, "'down' has shape"),
    "hada half": ({k: v for k, v in LOHA.items() if "w2" not in k}, "'hada_w2_a' is missing"),
    "hada core": (LOHA | {"hada_t1": (2, 2, 3, 3)}, "'hada_t2' is missing"),
    "hada rows": (LOHA | {"hada_w2_a": (5, 2)}, "row counts differ"),
    "lokr w2_a only": ({"lokr_w1": (2, 4), "lokr_w2_a": (3, 2)}, "'lokr_w2_b' is missing"),
    "lokr no w1": ({"lokr_w2": (3, 2)}, "'lokr_w1_a' is missing"),
    "lokr twice": (LOKR | {"lokr_w2": (3, 2)}, "both whole and as a low-rank pair"),
    "lokr core and whole": ({"lokr_w1": (2, 4), "lokr_w2": (3, 2), "lokr_t2": (2, 2, 3, 3)}, "no core beside it"),
    "lokr core's rank": (LOKR | {"lokr_w2_a": (2, 3), "lokr_t2": (3, 3, 3, 3)}, "'lokr_t2' has shape"),
    "lokr first core": (LOKR | {"lokr_t1": (2, 2, 3, 3)}, "core for the first half"),
    "glora shapes": ({"a1.weight": (8, 2), "a2.weight": (3, 8), "b1.weight": (6, 2), "b2.weight": (2, 8)}, "neither the new"),
    "glora half": ({"a1.weight": (8, 2), "a2.weight": (2, 8)}, "'b1' is missing"),
    "ia3 flag": ({"weight": (6,), "on_input": (2,)}, "'on_input' has shape"),
    "ia3 matrix": ({"weight": (6, 8), "on_input": ()}, "expected one axis"),
    "on_input alone": ({"on_input": ()}, "'weight' is missing"),
    "norm of two sizes": ({"w_norm": (6,), "b_norm": (5,)}, "sizes differ"),
    "oft blocks": ({"oft_blocks": (3, 4, 5)}, "'oft_blocks' has shape"),
    "oft rescale": ({"oft_blocks": (3, 4, 4), "rescale": (13, 1)}, "13 values"),
    "oft lists": ({"oft_blocks.0": (3, 4, 4), "oft_blocks.2": (3, 4, 4)}, "'oft_blocks.1' is missing"),
    "oft sizes": ({"oft_blocks.0": (3, 4, 4), "oft_blocks.1": (3, 6, 6)}, "cannot be one adapter"),
    "tlora": ({"q_layer.weight": (2, 8), "p_layer.weight": (6, 2), "lambda_layer": (1, 3)}, "ranks differ"),
    "miss": ({"miss_block": (3,)}, "two axes"),
    "shira": ({"shira_weight": (4,), "shira_indices": (2, 3)}, "expected \\(2, 4\\)"),
    "shira alone": ({"shira_weight": (4,)}, "'shira_indices' is missing"),
    "sparse half": ({"bias_values": (3,), "bias_size": (2,)}, "'bias_indices' is missing"),
    "alpha alone": ({"alpha": ()}, "no factor"),
    "magnitude alone": ({"dora_scale": (6, 1)}, "no factor"),
    "padded weight": ({"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), "reshape_weight": (2,)}, "padded|cannot be read"),
    "replaced weight": ({"set_weight": (6, 8)}, "replaces the layer's weight"),
    "stored rotation": ({"oft_diag": (3, 4, 4)}, "rotation itself"),
    "embedding": ({"lora_embedding_A": (2, 8), "lora_embedding_B": (6, 2)}, "embeddings"),
    "unknown suffix": ({"lokr_w9": (2, 2)}, "no known|ends in nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_module_is_named_and_the_rest_is_read(case, tmp_path):
    shapes, words = BROKEN[case]
    bad = {f"lora_unet_bad.{k}": torch.ones(s) for k, s in shapes.items()}
    b, a = pair()
    good = {"lora_unet_good.lora_up.weight": b, "lora_unet_good.lora_down.weight": a}
    save_file(bad | good, tmp_path / "file.safetensors")
    raw = read_raw(tmp_path / "file.safetensors")
    assert [module.name for module in raw.modules] == ["good"]
    assert set(raw.unknown) == set(bad)
    assert any(re.search(words, reason) for reason in raw.unknown.values()), raw.unknown
    save_file(bad, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        read_raw(tmp_path / "file.safetensors")
    assert "lora_unet_bad" in str(error.value) and "file.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "bad", [torch.tensor([[0.5, 1], [0, 1]]), torch.tensor([[float("nan"), 1], [0, 1]]), torch.tensor([[-1, 0], [0, 0]])]
)
def test_positions_that_are_none(bad):
    with pytest.raises(CheckpointError, match="shira_indices"):
        only({"shira_weight": normal(2), "shira_indices": bad})


def test_two_algorithms_on_one_module_are_reported():
    b, a = pair()
    tensors = {"lora_up.weight": b, "lora_down.weight": a} | {k: torch.randn(s) for k, s in LOHA.items()}
    raw = raw_from_tensors({f"x.{k}": v for k, v in tensors.items()})
    (module,) = raw.modules
    assert [e.algorithm for e in module.entries] == ["LORA"] and len(module.keys) == 2
    assert set(raw.unknown) == {f"x.{k}" for k in LOHA} and any("lora and loha" in n for n in raw.notes)
    tensors = {"lora_up.weight": b, "lora_down.weight": a, "diff": torch.randn(6, 8), "diff_b": torch.randn(6)}
    raw = raw_from_tensors({f"x.{k}": v for k, v in tensors.items()})
    assert [e.algorithm for e in raw.modules[0].entries] == ["LORA", "FULL"] and set(raw.unknown) == {"x.diff"}


def test_the_same_factor_under_two_spellings():
    b, a = pair()
    tensors = {
        "x.lora_up.weight": b,
        "x.lora_down.weight": a,
        "x.lora_B.weight": b.clone(),
        "x.lora_A.default.weight": a.clone(),
    }
    raw = raw_from_tensors(tensors)
    assert len(raw.modules) == 1
    assert raw.unknown == dict(zip(list(tensors)[2:], [f"the same factor is there as {k!r}" for k in list(tensors)[:2]]))


def test_harmless_extras_and_unknown_tensors_are_listed():
    b, a = pair()
    extras = {"bundle_emb.token.string_to_param.*": normal(2, 8), "bundle_emb.style.clip_l": normal(8)}
    extras |= {
        "lora_te_text_model_embeddings_position_ids": torch.arange(3),
        "text_model.embeddings.position_ids": torch.arange(3),
    }
    extras |= {"_aux.step": torch.tensor(1)}
    odd = {"something": normal(2), "x.y.z": normal(2)}
    raw = raw_from_tensors({"x.lora_up.weight": b, "x.lora_down.weight": a} | extras | odd)
    assert set(raw.extras) == set(extras) and set(raw.unknown) == set(odd)


def test_a_whole_model_is_no_adapter():
    tensors = {f"model.diffusion_model.{k}": v for k, v in Layers().state_dict().items()}
    with pytest.raises(CheckpointError, match="no adapter"):
        raw_from_tensors(tensors)


def test_integer_and_half_factors(tmp_path):
    up, down = torch.randint(-9, 9, (6, 3)), torch.randn(3, 8).bfloat16()
    save_file({"x.lora_up.weight": up, "x.lora_down.weight": down}, tmp_path / "f.safetensors")
    (entry,) = read_raw(tmp_path / "f.safetensors").modules[0].entries
    assert entry.tensors["lora_A.weight"].dtype == torch.bfloat16  # the file's own
    assert torch.equal(entry.tensors["lora_B.weight"], up.float())


def test_hostile_names_cost_little():
    b, a = pair()
    names = [
        "a" * 10**6,
        "." * 10**6,
        "x" + ".lora_A" * 10**5,
        "_lora" * 10**5 + ".up.weight",
        "x.parts.1" * 10**5,
        "x.0" * 10**5,
    ]
    start = time.perf_counter()
    raw = raw_from_tensors({"x.lora_up.weight": b, "x.lora_down.weight": a} | {n: torch.ones(1) for n in names})
    assert time.perf_counter() - start < 5 and set(raw.unknown) == set(names)


def test_any_shapes_under_any_suffixes_are_read_or_refused():
    """Nothing but a `CheckpointError` ever comes out, whatever the tensors are."""
    draw = random.Random(0)
    groups: dict[str, list[str]] = {}
    for suffix, meaning in SUFFIXES.items():
        groups.setdefault(meaning.group, []).append(suffix)
    sizes = [0, 1, 2, 3, 4, 8]
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool, torch.float8_e4m3fn]
    outcomes = set()
    for _ in range(4000):
        family = [*draw.sample(list(groups), draw.choice([1, 1, 2])), "shared"]
        pool = [suffix for group in family for suffix in groups[group]]
        tensors = {}
        for suffix in draw.sample(pool, draw.randint(1, len(pool))):
            shape = [draw.choice(sizes) for _ in range(draw.choice([0, 1, 2, 2, 2, 3, 4, 5]))]
            stem = "x.processor.qkv_lora1" if SUFFIXES[suffix].spelling == "xlabs" else "lora_unet_x"
            tensors[stem + suffix] = (3 * torch.randn(shape)).to(draw.choice(dtypes))
        try:
            raw = raw_from_tensors(tensors)
            known = [key for module in raw.modules for key in module.keys]
            assert sorted([*known, *raw.unknown]) == sorted(tensors)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
