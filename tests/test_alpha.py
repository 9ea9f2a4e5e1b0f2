"""The trained strength: every source and convention of formats.md, through whole files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lycoris_diff.checkpoints.alpha import Claim, Notes, resolve, scalar, training_args
from lycoris_diff.checkpoints.parse import raw_from_tensors, read_raw
from lycoris_diff.errors import CheckpointError

INF, NAN = float("inf"), float("nan")


def lora(stem="lora_unet_a", rank=4, out=6, columns=8):
    return {f"{stem}.lora_down.weight": torch.randn(rank, columns), f"{stem}.lora_up.weight": torch.randn(out, rank)}


def lokr(stem="lora_unet_a", w1="full", w2="full", rank=3, rank1=None):
    t = (
        {"lokr_w1": torch.randn(2, 4)}
        if w1 == "full"
        else {"lokr_w1_a": torch.randn(2, rank1 or rank), "lokr_w1_b": torch.randn(rank1 or rank, 4)}
    )
    t |= (
        {"lokr_w2": torch.randn(8, 5)}
        if w2 == "full"
        else {"lokr_w2_a": torch.randn(8, rank), "lokr_w2_b": torch.randn(rank, 5)}
    )
    return {f"{stem}.{k}": v for k, v in t.items()}


def loha(stem="lora_unet_a", rank=4):
    shapes = {"hada_w1_a": (6, rank), "hada_w1_b": (rank, 8), "hada_w2_a": (6, rank), "hada_w2_b": (rank, 8)}
    return {f"{stem}.{k}": torch.randn(s) for k, s in shapes.items()}


def read(tensors, metadata=None, **options):
    raw = raw_from_tensors(tensors, metadata, **options)
    (module,) = raw.modules
    return module.entries[0], raw


# --- tensors
ALPHAS = {
    "float32": (torch.tensor(2.0), 0.5),
    "one axis": (torch.tensor([2.0]), 0.5),
    "two axes": (torch.tensor([[2.0]]), 0.5),
    "int64": (torch.tensor(2), 0.5),
    "bool": (torch.tensor(True), 0.25),
    "bfloat16": (torch.tensor(27.71).bfloat16(), 27.75 / 4),
    "float16": (torch.tensor(2.0).half(), 0.5),
    "float64": (torch.tensor(1 / 3, dtype=torch.float64), 1 / 12),
    "negative": (torch.tensor(-2.0), -0.5),
    "float8": (torch.tensor(448.0).to(torch.float8_e4m3fn), 112.0),
}


@pytest.mark.parametrize("make", [lora, loha, lambda: lokr(w2="low", rank=4)])
@pytest.mark.parametrize("case", list(ALPHAS))
def test_alpha_over_rank_in_any_type(case, make):
    alpha, scale = ALPHAS[case]
    entry, _ = read(make() | {"lora_unet_a.alpha": alpha})
    assert entry.scale == pytest.approx(scale, rel=1e-12)
    assert (entry.rank, entry.alpha_source) == (4, "tensor")
    assert entry.alpha == pytest.approx(float(alpha.double()))


@pytest.mark.parametrize("make", [lora, loha, lambda: lokr(w2="low", rank=4)])
def test_no_alpha_is_a_strength_of_one(make):
    entry, _ = read(make())
    assert (entry.scale, entry.alpha, entry.alpha_source) == (1.0, None, "default")


@pytest.mark.parametrize(
    "stem, scale",
    [
        ("lora_unet_a", 1.0),
        ("lycoris_a", 1.0),
        ("lora_te1_a", 1.0),
        ("diffusion_model.a", 1.0),
        ("blocks.0.a", 1.0),
        ("transformer.a", 0.0),
        ("unet.a", 0.0),
        ("clip_l.a", 0.0),
    ],
)
def test_alpha_zero_is_the_rank_for_trainers_of_the_kohya_family(stem, scale):
    entry, raw = read(lora(stem) | {f"{stem}.alpha": torch.tensor(0.0)})
    assert entry.scale == scale and entry.alpha == 0 and any("alpha of 0" in n for n in raw.notes)


def test_the_dialect_decides_about_zero_and_can_be_given():
    tensors = lora("transformer.a") | {"transformer.a.alpha": torch.tensor(0.0)}
    assert read(tensors, dialect="kohya")[0].scale == 1.0
    with pytest.raises(CheckpointError, match=r"unknown dialect 'koya'.*kohya"):
        read(tensors, dialect="koya")


@pytest.mark.parametrize("alpha", [INF, -INF, NAN])
@pytest.mark.parametrize("make", [lora, loha, lambda: lokr(w2="low"), lambda: lokr(w1="low")])
def test_a_non_finite_alpha_is_refused(make, alpha):
    tensors = make() | {"lora_unet_a.alpha": torch.tensor(alpha)} | lora("lora_unet_b")
    raw = raw_from_tensors(tensors)
    assert [m.name for m in raw.modules] == ["b"]
    assert set(raw.unknown) == {k for k in tensors if "_a." in k} and all("finite" in r for r in raw.unknown.values())
    with pytest.raises(CheckpointError, match="finite"):
        raw_from_tensors(make() | {"lora_unet_a.alpha": torch.tensor(alpha)})


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0)])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(CheckpointError, match="'alpha'"):
        raw_from_tensors(lora() | {"lora_unet_a.alpha": alpha})
    with pytest.raises(CheckpointError, match="single number"):
        scalar(torch.ones(3), "alpha")


def test_a_huge_alpha_is_kept_and_noted():
    entry, raw = read(lokr(w2="low", rank=4) | {"lora_unet_a.alpha": torch.tensor(1e10)})
    assert entry.scale == pytest.approx(2.5e9) and any("damaged" in n for n in raw.notes)


# --- LoKr's halves
@pytest.mark.parametrize("alpha", [None, 4.0, 1e10, INF, NAN, 0.0, -3.0])
def test_full_halves_ignore_any_alpha(alpha):
    """fp16 makes infinity of ai-toolkit's placeholder, bf16 and fp8 other numbers."""
    tensors = lokr() | ({} if alpha is None else {"lora_unet_a.alpha": torch.tensor(alpha)})
    entry, raw = read(tensors)
    assert entry.scale == 1.0 and entry.rank == 0
    assert entry.alpha_source == ("default" if alpha is None else "ignored") and not raw.notes


@pytest.mark.parametrize("w1, w2", [("low", "full"), ("full", "low"), ("low", "low")])
def test_one_low_rank_half_is_enough_for_alpha(w1, w2):
    entry, _ = read(lokr(w1=w1, w2=w2, rank=3) | {"lora_unet_a.alpha": torch.tensor(6.0)})
    assert (entry.scale, entry.rank, entry.alpha_source) == (2.0, 3, "tensor")


def test_halves_of_different_rank():
    """Readers divide by the second half's rank; the change stays what the factors say."""
    tensors = lokr(w1="low", w2="low", rank=3, rank1=2)
    entry, raw = read(tensors | {"lora_unet_a.alpha": torch.tensor(6.0)})
    assert entry.scale == 2.0 and entry.rank == 3 and any("different ranks" in n for n in raw.notes)
    stored = tensors["lora_unet_a.lokr_w1_a"] @ tensors["lora_unet_a.lokr_w1_b"]
    assert torch.allclose(entry.tensors["lokr_w1_a"] @ entry.tensors["lokr_w1_b"], stored)
    with pytest.raises(CheckpointError, match="ranks 4 and 3"):
        raw_from_tensors(lokr(w1="low", w2="low", rank=3, rank1=4))


def test_the_rank_of_tucker_factors_is_the_down_side_s():
    """LyCORIS reads dim 1 of the up factor, which is not the rank in this layout."""
    t = {
        "lokr_w1": torch.randn(2, 2),
        "lokr_w2_a": torch.randn(3, 8),
        "lokr_w2_b": torch.randn(3, 5),
        "lokr_t2": torch.randn(3, 3, 3, 3),
    }
    entry, _ = read({f"lora_unet_a.{k}": v for k, v in t.items()} | {"lora_unet_a.alpha": torch.tensor(1.5)})
    assert (entry.scale, entry.rank) == (0.5, 3)
    t = {"hada_w1_a": (3, 8), "hada_w1_b": (3, 5), "hada_t1": (3, 3, 3, 3)}
    t |= {k.replace("1", "2", 1): v for k, v in t.items()}
    entry, _ = read({f"lora_unet_a.{k}": torch.randn(s) for k, s in t.items()} | {"lora_unet_a.alpha": torch.tensor(1.5)})
    assert (entry.scale, entry.rank) == (0.5, 3)


def test_algorithms_without_a_strength_ignore_alpha():
    entry, _ = read({"lora_unet_a.diff": torch.randn(6, 8), "lora_unet_a.alpha": torch.tensor(3.0)})
    assert (entry.algorithm, entry.scale, entry.alpha, entry.alpha_source) == ("FULL", 1.0, 3.0, "ignored")
    entry, _ = read({"lora_unet_a.oft_blocks": torch.randn(2, 3, 3), "lora_unet_a.alpha": torch.tensor(0.25)})
    assert (entry.scale, entry.options["constraint"], entry.alpha_source) == (1.0, 0.25, "tensor")
    for alpha in (torch.tensor(0.0), torch.tensor(-1.0), None):
        tensors = {"lora_unet_a.oft_blocks": torch.randn(2, 3, 3)} | ({} if alpha is None else {"lora_unet_a.alpha": alpha})
        assert read(tensors)[0].options["constraint"] == 0.0
    with pytest.raises(CheckpointError, match="finite"):
        read({"lora_unet_a.oft_blocks": torch.randn(2, 3, 3), "lora_unet_a.alpha": torch.tensor(NAN)})


def test_a1111_s_scale_comes_before_alpha():
    tensors = lora() | {"lora_unet_a.alpha": torch.tensor(2.0), "lora_unet_a.scale": torch.tensor(0.3)}
    entry, raw = read(tensors)
    assert entry.scale == pytest.approx(0.3) and entry.alpha_source == "tensor"
    assert any("disagree" in n for n in raw.notes)


# --- metadata
def sd_scripts(**args):
    return {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": json.dumps(args)}


def test_training_metadata_is_compared_but_never_decides():
    entry, raw = read(lora() | {"lora_unet_a.alpha": torch.tensor(2.0)}, sd_scripts())
    assert entry.scale == 0.5 and not raw.notes
    entry, raw = read(lora() | {"lora_unet_a.alpha": torch.tensor(3.0)}, sd_scripts())
    assert entry.scale == 0.75 and any("mean a strength of 0.5" in n and "'a'" in n for n in raw.notes)
    entry, raw = read(lora(), sd_scripts())
    assert entry.scale == 1.0 and any("no alpha tensor" in n for n in raw.notes)
    entry, raw = read(lora(rank=8) | {"lora_unet_a.alpha": torch.tensor(8.0)}, sd_scripts())  # a resized module
    assert not raw.notes


def test_convolutions_are_compared_with_their_own_settings():
    conv = {"lora_unet_a.lora_down.weight": torch.randn(2, 8, 3, 3), "lora_unet_a.lora_up.weight": torch.randn(6, 2, 1, 1)}
    alpha = {"lora_unet_a.alpha": torch.tensor(1.0)}
    assert not read(conv | alpha, sd_scripts(conv_dim=2, conv_alpha=1))[1].notes
    assert read(conv | alpha, sd_scripts(conv_dim="2", conv_alpha="2"))[1].notes


def test_rs_lora_is_in_the_alpha_already():
    folded = {"lora_unet_a.alpha": torch.tensor(2 * math.sqrt(4))}
    entry, raw = read(lora() | folded, sd_scripts(rs_lora="True"))
    assert entry.scale == 1.0 and not raw.notes
    _, raw = read(lokr() | {"lora_unet_a.alpha": torch.tensor(8.0)}, sd_scripts(rs_lora=True))
    assert any("sqrt(rank)" in n for n in raw.notes)
    assert read(lora() | folded, sd_scripts(rs_lora="False"))[1].notes


@pytest.mark.parametrize("args, noted", [({"algo": "dylora"}, 1), ({"algo": "dylora", "block_size": "1"}, 0), ({}, 0)])
def test_dylora_is_trained_stronger_than_it_is_read(args, noted):
    """LyCORIS' forward divides alpha by the number of blocks, its files are read by alpha / rank."""
    _, raw = read(lora() | {"lora_unet_a.alpha": torch.tensor(2.0)}, {"ss_network_args": json.dumps(args)})
    assert len(raw.notes) == noted


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_alpha": "None", "ss_network_dim": "Dynamic", "ss_network_args": "[1, 2"},
        {"ss_network_alpha": "inf", "ss_network_dim": "nan", "ss_network_args": "[" * 10_000},
        {"ss_network_args": '"text"', "lycoris_config": "null", "lora_adapter_metadata": "7"},
        {"lora_adapter_metadata": '{"unet.r": "many"}'},
    ],
)
def test_metadata_that_says_nothing_is_no_matter(metadata):
    entry, _ = read(lora("unet.a") | {"unet.a.alpha": torch.tensor(2.0)}, metadata)
    assert entry.scale == 0.5


def test_simpletuner_s_config_tells_about_the_run():
    args = training_args({"lycoris_config": json.dumps({"linear_dim": 4, "linear_alpha": 2, "sig_type": "last"})})
    assert (args.dim, args.alpha, args.sig_type) == (4, 2, "last")


def diffusers_metadata(**values):
    return {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in values.items()})}


def peft_lora(stem, rank=4):
    return {f"{stem}.lora_A.weight": torch.randn(rank, 8), f"{stem}.lora_B.weight": torch.randn(6, rank)}


def test_diffusers_metadata_is_a_config():
    entry, raw = read(peft_lora("unet.a"), diffusers_metadata(r=4, lora_alpha=2))
    assert (entry.scale, entry.alpha, entry.alpha_source) == (0.5, 2, "metadata")
    assert (raw.dialect, raw.trainer) == ("diffusers", "diffusers")
    entry, _ = read(peft_lora("unet.a"), diffusers_metadata(r=4, lora_alpha=2, use_rslora=True))
    assert entry.scale == 1.0
    entry, _ = read(
        peft_lora("unet.b.to_q"), diffusers_metadata(r=8, lora_alpha=8, rank_pattern={"to_q": 4}, alpha_pattern={"b.to_q": 1})
    )
    assert entry.scale == 0.25
    entry, raw = read(peft_lora("unet.a") | {"unet.a.alpha": torch.tensor(4.0)}, diffusers_metadata(r=4, lora_alpha=2))
    assert (entry.scale, entry.alpha_source) == (1.0, "tensor") and any("disagree" in n for n in raw.notes)
    entry, _ = read(peft_lora("text_encoder.a"), diffusers_metadata(r=4, lora_alpha=2))  # says nothing of this component
    assert (entry.scale, entry.alpha_source) == (1.0, "default")
    other = diffusers_metadata(r=16, lora_alpha=2)
    with pytest.raises(CheckpointError, match="rank 4, the config says r=16"):
        read(peft_lora("unet.a"), other)
    entry, raw = read(peft_lora("unet.a") | {"unet.a.alpha": torch.tensor(2.0)}, other)  # left over from a conversion
    assert (entry.scale, entry.alpha_source) == (0.5, "tensor") and any("r=16" in n for n in raw.notes)
    assert read(lora("lora_unet_a"), other)[0].scale == 1.0  # flat names cannot be found in its patterns


# --- the resolver itself
def test_the_first_source_decides_and_the_others_are_compared():
    notes = Notes()
    claims = [Claim("config", 2.0, True, 8.0), Claim("tensor", 4.0)]
    assert resolve("LORA", 4, claims, notes) == (2.0, 8.0, "config")
    assert len(notes.lines()) == 1 and "2 and 1" in notes.lines()[0]
    assert resolve("LORA", 4, claims[1:], notes) == (1.0, 4.0, "tensor")
    assert resolve("LOKR", 0, claims, Notes(), both_full=True) == (2.0, 8.0, "config")
    assert resolve("LOKR", 0, claims[1:], Notes(), both_full=True) == (1.0, 4.0, "ignored")
    assert resolve("IA3", 0, claims[1:], Notes()) == (1.0, 4.0, "ignored")


def test_the_same_note_on_many_modules_is_one_line():
    tensors = {}
    for name in "abc":
        tensors |= lora(f"lora_unet_{name}") | {f"lora_unet_{name}.alpha": torch.tensor(0.0)}
    (note,) = raw_from_tensors(tensors).notes
    assert "3 modules" in note and "'a'" in note


# --- PEFT directories
@pytest.mark.parametrize("both_full, rslora", [(False, False), (True, False), (False, True)])
def test_a_config_decides_for_its_directory(both_full, rslora, tmp_path):
    kind = "LOKR" if both_full else "LORA"
    tensors = lokr("base_model.model.a") if both_full else peft_lora("base_model.model.a")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": kind, "r": 64 if both_full else 4, "alpha" if both_full else "lora_alpha": 16}
    config |= {"use_rslora": True} if rslora else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        entry = read_raw(path).modules[0].entries[0]
        assert entry.alpha_source == "config" and entry.alpha == 16
        assert entry.scale == (0.25 if both_full else 16 / math.sqrt(4) if rslora else 4.0)
