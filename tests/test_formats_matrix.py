"""The numbered cases of the formats' test matrix through the public interface, against the fixtures' own expectations."""

from __future__ import annotations

import pytest
import torch
from community import SCHEMES, CommunityFile, base_weight, community_file, names_in, schemes_for, spread
from community_algorithms import ALGORITHMS, Draw, lokr, make
from community_names import weights_of
from formats_run import changed, changes, check, difference, models, parameters, pipeline, refused, same
from tinymodels import DENOISER, TEXT_ENCODERS, run
from torch import nn

import lycoris_diff
from lycoris_diff import AdapterError

# LyCORIS adds tiny numbers to DoRA's and constrained OFT's norms; T-LoRA's reader computes singular vectors of its own
TOLERANCE = {"dora": 1e-6, "tlora": 1e-6, "constraint": 1e-7, "kohya-oft": 1e-7}


def tolerance(algorithm: str) -> float:
    return next((t for word, t in TOLERANCE.items() if word in algorithm), 1e-9)


# --- 1, 2, 7, 8, 10, 11: every algorithm on every kind of layer


LAYER_CASES = [
    (algorithm, scheme)
    for algorithm in ALGORITHMS
    if algorithm != "tlora-random"
    for scheme in schemes_for("layers", algorithm)
    if scheme != "peft" or community_file("layers", scheme, algorithm, models("layers"), limit=1).modules
]


@pytest.mark.parametrize(("algorithm", "scheme"), LAYER_CASES)
def test_algorithm_on_every_kind_of_layer(algorithm, scheme, tmp_path):
    file = community_file("layers", scheme, algorithm, models("layers"))
    report = check("layers", file, tmp_path, tolerance(algorithm))
    assert len(report.matched) == file.modules and not report.problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("algorithm", ["lora", "loha-cp", "lokr-w2", "lokr-tucker", "glora", "full-bias", "lora-dora-rows"])
def test_files_in_low_precision(algorithm, dtype, tmp_path):
    """The file's values are exact in its dtype; nothing is computed in it."""
    file = community_file("layers", "lycoris", algorithm, models("layers"), dtype=dtype)
    check("layers", file, tmp_path, tolerance(algorithm))


def test_whole_lokr_has_no_alpha(tmp_path):
    """Case 7: alpha 4, 1e10, infinite, NaN or absent, the same change."""
    found = []
    for name in ("lokr-full", "lokr-full-alpha-1e10", "lokr-full-alpha-inf", "lokr-full-alpha-nan", "lokr-full-no-alpha"):
        file = community_file("layers", "lycoris", name, models("layers"))
        found.append(changes("layers", models("layers"), file.write(tmp_path / name))[0])
    assert all(same(found[0], other) for other in found[1:])


def test_whole_lokr_in_a_peft_directory_has_the_alpha_of_its_config(tmp_path):
    """Case 10: PEFT's alpha / r holds for whole factors too."""
    file = community_file("layers", "peft", "lokr-full", models("layers"), ["linear"])
    made = make("lokr-full", torch.zeros(16, 24), 0)
    assert file.config["alpha"] / file.config["r"] == 2 / 64 and made.scale == 1
    check("layers", file, tmp_path)


# --- 3, 6, 16: names


NAMED = [
    pytest.param(f, s, marks=pytest.mark.slow) if f == "sdxl" and s not in ("kohya", "kohya-diffusers", "diffusers") else (f, s)
    for f in DENOISER
    for s in schemes_for(f, "lora")
]


@pytest.mark.parametrize(("family", "scheme"), NAMED)
def test_names_of_every_family_and_scheme(family, scheme, tmp_path):
    """Plain LoRA on every module of every component arrives where it belongs (cases 3, 4, 6 and 16)."""
    file = community_file(family, scheme, "lora", models(family))
    report = check(family, file, tmp_path)
    assert not report.problems and len(report.matched) == sum(len(m) for m in file.expected.values())


@pytest.mark.parametrize("family", ["sd15", "qwen", "wan"])
@pytest.mark.parametrize("algorithm", ["lora", "lokr-full", "lora-dora-rows"])
def test_one_adapter_under_all_names(family, algorithm, tmp_path):
    """Case 3: the same factors under every scheme that has an alpha make the same change, bit for bit."""
    denoiser = DENOISER[family]
    parts = {denoiser: models(family)[denoiser]}
    paths = sorted(weights_of(parts[denoiser]))[::7]
    found = {}
    for scheme in schemes_for(family, algorithm):
        if SCHEMES[scheme].alpha and scheme != "peft":
            file = community_file(family, scheme, algorithm, parts, paths)
            found[scheme] = changes(family, models(family), file.write(tmp_path / scheme))[0]
    reference, *others = found.values()
    assert len(others) > 2 and all(same(reference, other) for other in others)


@pytest.mark.parametrize("with_text_model", [True, False])
def test_text_encoders_with_and_without_text_model(with_text_model, tmp_path):
    """Case 16: 72 modules of CLIP-L, 192 and the projection of CLIP-G."""
    scheme = "kohya-diffusers" if with_text_model else "kohya-no-text-model"
    parts = {c: m for c, m in models("sdxl").items() if c != "unet"}
    file = community_file("sdxl", scheme, "lora", parts)
    stem = "lora_te1_text_model_encoder_layers_11_mlp_fc2" if with_text_model else "lora_te1_encoder_layers_11_mlp_fc2"
    assert f"{stem}.lora_up.weight" in file.tensors
    report = check("sdxl", file, tmp_path)
    assert report.components == {"text_encoder": 72, "text_encoder_2": 193}


FUSED = ("flux", "flux2", "sd3", "lumina2", "zimage", "hunyuan")
# A row slice of these is exact (formats.md, rule 8 and 2.5); LoKr by a window over the shared factors.
SLICED = (
    *("lora", "lora-dora-rows", "dylora", "loha", "loha-dora-rows", "lokr-full", "lokr-w1", "lokr-w2", "lokr-both"),
    *(
        "lokr-unbalanced",
        "lokr-factor",
        "lokr-dora-rows",
        "glora",
        "glora-old",
        "ia3-out",
        "ia3-in",
        "full",
        "full-bias",
        "sparse-bias",
    ),
)
# The change of a slice needs the whole base weight, or mixes rows of different slices: exact or refused, never wrong.
WHOLE = ("lora-dora-columns", "loha-dora-columns", "lokr-dora-columns", "diag-oft", "diag-oft-constraint", "boft", "tlora-data")


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("algorithm", SLICED)
def test_fused_and_swapped_weights(family, algorithm, tmp_path):
    """Cases 5 and 6: q, k and v out of one weight, and halves of modulations exchanged."""
    file = community_file(family, "kohya", algorithm, {"transformer": models(family)["transformer"]})
    if algorithm == "full-bias" and not file.modules:
        pytest.skip("a model without biases")
    check(family, file, tmp_path, tolerance(algorithm))


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("algorithm", WHOLE)
def test_fused_weights_that_may_not_split(family, algorithm, tmp_path):
    parts = {"transformer": models(family)["transformer"]}
    fused = [shares for shares in names_in("kohya", family, "transformer", parts["transformer"]).values() if len(shares) > 1]
    file = community_file(family, "kohya", algorithm, parts, [fused[0][0].path])
    if not file.modules:
        pytest.skip("no such files")
    path = file.write(tmp_path / "file")
    try:
        found, _ = changes(family, models(family), path)
    except AdapterError:
        refused(family, path)
        return
    assert max(difference(found, file.expected).values()) < tolerance(algorithm)


@pytest.mark.parametrize("scheme", ["kohya", "diffusion_model"])
@pytest.mark.parametrize("split", [(12, 6), (3, 3), (16, 8), (4, 2), (48, 12), (72, 4), (1, 1), (144, 48)])
def test_flux_qkv_lokr(split, scheme, tmp_path):
    """Case 5: factors of the 144 rows whose blocks end on the borders of q, k and v (48, 96), and ones whose blocks do not."""
    _lokr_on(tmp_path, scheme, "transformer_blocks.0.attn.to_q", split)


@pytest.mark.parametrize("w2", ["full", "low"])
@pytest.mark.parametrize("split", [(16, 6), (12, 6), (21, 4), (7, 2), (336, 48)])
def test_flux_linear1_lokr(split, w2, tmp_path):
    """Case 5: 336 rows of q, k, v and mlp (48, 96, 144)."""
    _lokr_on(tmp_path, "kohya", "single_transformer_blocks.0.attn.to_q", split, w2)


def _lokr_on(folder, scheme, path, split, w2="low"):
    parts = models("flux")
    layers = weights_of(parts["transformer"])
    names = names_in(scheme, "flux", "transformer", parts["transformer"])
    stem, shares = next((s, shares) for s, shares in names.items() if shares[0].path == path)
    weight, _ = base_weight(layers, shares)
    made = lokr(Draw(5), tuple(weight.shape), split=split, w2=w2)
    tensors = {f"{stem}.{k}": v for k, v in made.tensors.items()} | {f"{stem}.alpha": made.alpha}
    change = spread(made.change(weight, None, made.scale)[0], shares)
    expected = {"transformer": {share.path: (dw, None) for share, dw in zip(shares, change)}}
    check("flux", CommunityFile(tensors, {}, expected, None, 1), folder)


# --- 9: strength of adapters that depend on the weight


@pytest.mark.parametrize(
    "algorithm", ["lora-dora-rows", "lora-dora-columns", "loha-dora-rows", "glora", "ia3-in", "diag-oft", "boft", "lora"]
)
@pytest.mark.parametrize("m", [0.0, 0.5, 1.0, -1.0])
def test_strength_scales_the_change(algorithm, m, tmp_path):
    """W + m (W_adapted - W); at 0 the base bit for bit."""
    file = community_file("layers", "lycoris", algorithm, models("layers"))
    found, _ = changes("layers", models("layers"), file.write(tmp_path / "file"), weight=m)
    if m == 0:
        assert not any(found.values())
        return
    scaled = {c: {p: (m * dw, None) for p, (dw, _) in own.items()} for c, own in file.expected.items()}
    assert max(difference(found, scaled).values()) < tolerance(algorithm)


# --- 13: mixed files


def test_a_mixed_file_is_reported_and_refused(tmp_path):
    parts = models("sd15")
    one = community_file("sd15", "kohya-sd", "lora", parts, lambda p: p.endswith("attn1.to_q"))
    two = community_file("sd15", "diffusers", "lora", parts, lambda p: p.endswith("attn2.to_k"))
    mixed = one.merged(two)
    mixed.tensors |= {
        "bundle_emb.token.string_to_param.*": torch.randn(2, 16),
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "lora_unet_down_blocks_0_attentions_0_proj_out_typo.lora_up.weight": torch.randn(8, 2),
        "lora_unet_down_blocks_0_attentions_0_proj_out_typo.lora_down.weight": torch.randn(2, 8, 1, 1),
        "who.knows.what": torch.zeros(3),
    }
    path = mixed.write(tmp_path / "mixed")
    message = refused("sd15", path)
    assert "typo" in message and "who.knows.what" in message
    found, report = changes("sd15", models("sd15"), path, strict=False)
    assert max(difference(found, mixed.expected).values()) < 1e-9
    assert any("bundle_emb" in name for name in report.extras) and any("position_ids" in name for name in report.extras)
    assert any("typo" in name for name in report.unmatched) and any("who.knows.what" in name for name in report.unused)


@pytest.mark.parametrize("extra", ["bundle_emb.tok.clip_l", "text_model.embeddings.position_ids", "_aux.step"])
def test_harmless_tensors_do_not_refuse(extra, tmp_path):
    parts = models("sd15")
    file = community_file("sd15", "kohya-sd", "lora", parts, lambda p: p.endswith("attn1.to_q"))
    file.tensors[extra] = torch.zeros(1, 16)
    report = check("sd15", file, tmp_path)
    assert report.extras == [extra]


def test_one_weight_under_two_names_is_not_summed(tmp_path):
    """Quirk 23: files hold the same adapter under two schemes; it must not count twice."""
    parts = {"transformer": models("flux")["transformer"]}
    select = lambda p: p.endswith("ff.net.2")
    one = community_file("flux", "diffusers", "lora-no-alpha", parts, select)
    two = community_file("flux", "kohya", "lora-no-alpha", parts, select)
    both = CommunityFile({**one.tensors, **two.tensors}, {}, one.expected, None, one.modules)
    path = both.write(tmp_path / "both")
    found, report = changes("flux", models("flux"), path, strict=False)
    assert max(difference(found, one.expected).values()) < 1e-9
    assert report.notes, "the conflict is not reported"


# --- 15: stacking


def test_two_adapters_add_up_in_any_order(tmp_path):
    """Each change is taken against the unmodified weight, so that no order matters, for weight-dependent algorithms too."""
    names = ("lokr-w2", "lora-dora-rows", "glora", "ia3-out", "diag-oft")
    files = {name: community_file("layers", "lycoris", name, models("layers")) for name in names}
    paths = {name: file.write(tmp_path / name) for name, file in files.items()}
    both = CommunityFile({}, {}, {})
    for file in files.values():
        both = both.merged(file)
    results = []
    for order in (names, names[::-1]):
        parts = models("layers")
        pipe, before = pipeline("layers", parts=parts), parameters(parts)
        for name in order:
            lycoris_diff.load_adapter(pipe, paths[name], name)
        assert lycoris_diff.list_adapters(pipe) == list(order)
        lycoris_diff.fuse_adapters(pipe)
        found = changed(before, parameters(parts))
        assert max(difference(found, both.expected).values()) < 1e-6
        results.append(found)
        for name in order:
            lycoris_diff.delete_adapter(pipe, name)
        lycoris_diff.unload_adapters(pipe)
        assert same(before, parameters(parts))
    for name, value in results[0]["unet"].items():
        torch.testing.assert_close(results[1]["unet"][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "flux", "flux2", "sd3", "wan"])
def test_output_is_that_of_the_changed_weights(family, tmp_path):
    """The pipeline's denoiser and text encoders compute with the adapter what they compute with changed weights."""
    parts = models(family)
    scheme = "kohya-sd" if family == "sd15" else "kohya"
    file = community_file(family, scheme, "lokr-w2", parts).merged(_some(family, scheme, parts))
    expected, base = models(family), {}
    with torch.no_grad():
        for component, own in file.expected.items():
            base[component] = run(expected[component], _model_of(family, component))
            layers = dict(expected[component].named_modules())
            for path, (dw, db) in own.items():
                layers[path].weight.add_(dw.reshape(layers[path].weight.shape))
                if db is not None:
                    layers[path].bias.add_(db)
    pipe = pipeline(family, parts=parts)
    lycoris_diff.load_adapter(pipe, file.write(tmp_path / "file"), "file")
    for component, before in base.items():
        got, want = run(parts[component], _model_of(family, component)), run(expected[component], _model_of(family, component))
        assert (want - before).norm() > 1e-3 * before.norm()
        assert (got - want).norm() < 1e-7 * (want - before).norm()
    lycoris_diff.unload_adapters(pipe)
    for component, before in base.items():
        assert torch.equal(run(parts[component], _model_of(family, component)), before)


def _some(family: str, scheme: str, parts: dict[str, nn.Module]) -> CommunityFile:
    """Norms of UNets, which LoKr cannot change."""
    if family not in ("sd15", "sdxl"):
        return CommunityFile({}, {}, {})
    return community_file(family, scheme, "norm", {"unet": parts["unet"]})


def _model_of(family: str, component: str) -> str:
    return TEXT_ENCODERS.get(family, {}).get(component, family)


# --- what cannot be


def test_tlora_from_a_random_start_is_refused(tmp_path):
    """The file lacks what training began with; on layers of some size that shows in the factors."""
    file = community_file("sd15", "lycoris", "tlora-random", models("sd15"), lambda path: path.startswith("mid_block"))
    assert "random" in refused("sd15", file.write(tmp_path / "file"))


def test_tlora_whose_metadata_tells_of_a_random_start_is_refused(tmp_path):
    metadata = {"lycoris_config": '{"algo": "tlora", "use_data_init": false}'}
    file = community_file("layers", "lycoris", "tlora-data", models("layers"), metadata=metadata)
    assert "random" in refused("layers", file.write(tmp_path / "file"))


@pytest.mark.parametrize("name", ["rmsnorm", "embedding"])
def test_layers_that_take_no_adapter_are_refused(name, tmp_path):
    tensors = {f"lycoris_{name}.lora_down.weight": torch.randn(2, 16), f"lycoris_{name}.lora_up.weight": torch.randn(16, 2)}
    message = refused("layers", CommunityFile(tensors).write(tmp_path / "file"))
    assert name in message


def test_a_norms_change_on_rmsnorm_is_exact_or_refused(tmp_path):
    w = torch.randn(16)
    path = CommunityFile({"lycoris_rmsnorm.w_norm": w}).write(tmp_path / "file")
    try:
        found, _ = changes("layers", models("layers"), path)
    except AdapterError:
        refused("layers", path)
        return
    torch.testing.assert_close(found["unet"]["rmsnorm.weight"], w.double(), rtol=1e-9, atol=1e-9)


def test_a_file_without_effect_is_refused(tmp_path):
    file = community_file("layers", "lycoris", "lora", models("layers"))
    file.tensors = {k: torch.zeros_like(v) if "lora_up" in k else v for k, v in file.tensors.items()}
    refused("layers", file.write(tmp_path / "file"))
