"""Case 12 and 4: what is written is read back the same by us and by others; files for the real models map completely."""

from __future__ import annotations

import logging

import pytest
import torch
from community import CommunityFile, community_file, names_in
from community_names import weights_of
from formats_run import changes, difference, models, pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tinymodels import DENOISER, run
from torch import nn

import lycoris_diff
from lycoris_diff import AdapterError
from lycoris_diff.naming import known_base

KOHYA = (
    *("lora", "lora-tucker", "lora-dora-rows", "lora-dora-columns", "loha", "loha-cp", "loha-dora-rows"),
    *("lokr-full", "lokr-w1", "lokr-w2", "lokr-both", "lokr-tucker", "lokr-unbalanced", "lokr-dora-rows"),
    *("glora", "glora-old", "ia3-out", "ia3-in", "full-bias", "norm", "diag-oft", "diag-oft-rescale"),
    *("boft", "tlora-data", "sparse-bias"),
)
PEFT = ("peft-oft", "miss", "miss-bat", "miss-mini", "shira", "lokr-full-no-alpha")
SOURCES = dict.fromkeys(KOHYA, "kohya-sd") | dict.fromkeys(PEFT, "peft")
FORMATS = ("kohya", "lycoris", "comfyui", "onetrainer", "ai-toolkit", "diffusers", "peft")
#: who must be able to say what; any other pair may be refused, and must be exact if it is not
MUST = {
    "kohya": ("lora", "loha", "lokr", "glora", "ia3", "full", "norm", "diag-oft", "boft"),
    "lycoris": ("lora", "loha", "lokr", "glora", "ia3", "full", "norm", "diag-oft", "boft"),
    "peft": ("miss", "shira", "peft-oft", "lokr-full-no-alpha"),
    "diffusers": (),
    "comfyui": ("lora", "loha", "lokr-w2", "lokr-full"),
    "onetrainer": (),
    "ai-toolkit": (),
}
TOLERANCE = 2e-6  # relative, factors in float32


def _part(path: str) -> bool:
    return path.startswith(("down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0"))


def _saved(family: str, file: CommunityFile, folder, format: str):
    """The file loaded, saved in another format, and where."""
    parts = {c: m for c, m in models(family).items() if c in file.expected or not c.startswith("text_encoder")}
    pipe = pipeline(family, parts=parts)
    lycoris_diff.load_adapter(pipe, file.write(folder / "source"), "file", weight=0.5)  # as trained is what is saved
    target = folder / ("target" if format == "peft" else "target.safetensors")
    lycoris_diff.save_adapter(pipe, target, "file", format=format)
    return target


# the other pairs differ from these in one of the two tables that make up a writer
QUICK = ("lora", "lora-dora-rows", "loha", "lokr-w2", "lokr-full", "glora", "full-bias", "miss", "boft")
PAIRS = [
    (a, f) if f in ("kohya", "peft") or a in QUICK else pytest.param(a, f, marks=pytest.mark.slow)
    for a in SOURCES
    for f in FORMATS
]


@pytest.mark.parametrize(("algorithm", "format"), PAIRS)
def test_saved_and_loaded_again(algorithm, format, tmp_path):
    file = community_file("sd15", SOURCES[algorithm], algorithm, {"unet": models("sd15")["unet"]}, _part)
    assert file.modules
    try:
        target = _saved("sd15", file, tmp_path, format)
    except AdapterError as error:
        assert not algorithm.startswith(MUST[format]) and str(error)
        assert not (tmp_path / "target").exists() and not (tmp_path / "target.safetensors").exists()
        return
    found, report = changes("sd15", {"unet": models("sd15")["unet"]}, target)
    assert not report.problems and max(difference(found, file.expected).values()) < TOLERANCE


@pytest.mark.parametrize("format", ["kohya", "comfyui", "lycoris", "diffusers", "peft"])
@pytest.mark.parametrize("algorithm", ["lora", "lokr-w2", "lokr-full", "loha", "lora-dora-rows", "full-bias"])
@pytest.mark.parametrize("source", ["kohya", "kohya-diffusers"])
def test_fused_weights_both_ways(source, algorithm, format, tmp_path):
    """Flux.1: shares of a fused weight become one again, or stay shares; never an approximation."""
    file = community_file("flux", source, algorithm, {"transformer": models("flux")["transformer"]})
    try:
        target = _saved("flux", file, tmp_path, format)
    except AdapterError as error:
        # LoKr whose blocks cross the border of two shares can be said only where the weight is still whole
        crossing = format == "lycoris" and algorithm.startswith("lokr")
        assert "module" in str(error) and (crossing or format in ("diffusers", "peft") or source == "kohya-diffusers")
        return
    found, _ = changes("flux", {"transformer": models("flux")["transformer"]}, target)
    assert max(difference(found, file.expected).values()) < TOLERANCE
    if source == "kohya" and format == "kohya":  # a file must not grow by an order
        assert target.stat().st_size < 4 * (tmp_path / "source.safetensors").stat().st_size


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_text_encoders_keep_the_community_names(family, tmp_path):
    """transformers 5 has no ``text_model`` in CLIP-L; community files do, and other readers look for it."""
    parts = {c: m for c, m in models(family).items() if c.startswith("text_encoder")}
    file = community_file(family, "diffusers", "lora", parts, lambda p: "layers.1." in p or "block.0." in p)
    target = _saved(family, file, tmp_path, "kohya")
    with safe_open(target, "pt") as saved:
        names = list(saved.keys())
    prefixes = {"sd15": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"], "sd3": ["lora_te1_", "lora_te2_", "lora_te3_"]}[
        family
    ]
    for prefix in prefixes[:2]:
        assert f"{prefix}text_model_encoder_layers_1_mlp_fc1.lora_up.weight" in names
    assert all(name.startswith(tuple(prefixes)) for name in names)
    found, _ = changes(family, models(family), target)
    assert max(difference(found, file.expected).values()) < TOLERANCE


@pytest.mark.parametrize(
    "algorithm", ["lora", "lora-tucker", "lora-dora-rows", "loha", "loha-cp", "lokr-full", "glora", "full-bias", "boft"]
)
def test_lycoris_reads_what_we_write(algorithm, tmp_path):
    """LyCORIS' own loader and forward pass on a file converted to kohya's format."""
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    file = community_file("sd15", "kohya-ldm", algorithm, {"unet": models("sd15")["unet"]}, _part)
    target = _saved("sd15", file, tmp_path, "kohya")
    parts, trained = models("sd15", torch.float32), models("sd15", torch.float32)
    LycorisNetworkKohya.apply_preset({"unet_target_module": ["Transformer2DModel"], "unet_target_name": []})
    network, _ = create_network_from_weights(1.0, str(target), None, trained["text_encoder"], trained["unet"])
    network.apply_to(trained["text_encoder"], trained["unet"], True, True)
    assert len(network.unet_loras) == file.modules
    layers = dict(parts["unet"].named_modules())
    with torch.no_grad():
        for path, (dw, db) in file.expected["unet"].items():
            layers[path].weight.add_(dw.reshape(layers[path].weight.shape))
            if db is not None:
                layers[path].bias.add_(db)
    want, got = run(parts["unet"], "sd15"), run(trained["unet"].eval(), "sd15")
    base = run(models("sd15", torch.float32)["unet"], "sd15")
    assert (got - want).norm() < 1e-4 * (want - base).norm()


@pytest.mark.parametrize("algorithm", ["lora", "lora-dora-rows", "loha", "lokr-w2", "miss", "shira", "peft-oft"])
def test_peft_reads_what_we_write(algorithm, tmp_path):
    from peft import PeftModel

    unet = models("sd15", torch.float32)["unet"]
    source = "kohya-sd" if algorithm in ("lora", "lora-dora-rows", "loha", "lokr-w2") else "peft"
    only = lambda p: p == "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    file = community_file("sd15", source, algorithm, {"unet": models("sd15")["unet"]}, only)
    target = _saved("sd15", file, tmp_path, "peft")
    merged = PeftModel.from_pretrained(unet, target).merge_and_unload()
    ((path, (dw, _)),) = file.expected["unet"].items()
    want = models("sd15")["unet"].get_submodule(path).weight + dw
    torch.testing.assert_close(merged.get_submodule(path).weight.double(), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["lora", "lokr-w2"])
@pytest.mark.parametrize("family", ["sd15", "flux", "flux2", "zimage"])
def test_diffusers_reads_what_we_write(family, algorithm, tmp_path):
    """``load_lora_weights`` on what the "diffusers" format could say."""
    denoiser = DENOISER[family]
    select = _part if family == "sd15" else lambda p: "norm_out" not in p
    file = community_file(family, "diffusers-alpha", algorithm, {denoiser: models(family)[denoiser]}, select)
    try:
        target = _saved(family, file, tmp_path, "diffusers")
    except AdapterError:
        assert algorithm != "lora"
        return
    pipe = pipeline(family, parts=models(family, torch.float32))
    pipe.load_lora_weights(target)
    pipe.fuse_lora()
    model = getattr(pipe, denoiser)
    for path, (dw, _) in file.expected[denoiser].items():
        layer = model.get_submodule(path)
        want = models(family)[denoiser].get_submodule(path).weight + dw.reshape(layer.weight.shape)
        torch.testing.assert_close(layer.weight.double(), want, rtol=1e-4, atol=1e-4, msg=lambda m, p=path: f"{p}: {m}")


# --- 4: the real models' names and sizes, without their weights


def _meta(base: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 64, "layers_per_block": 2}
    config = {
        "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sd21": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "sdxl": {
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[base]
    if base == "sdxl":
        common["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        common["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    with torch.device("meta"):
        return UNet2DConditionModel(**common, **config)


def _names_only(base: str, scheme: str, skip: tuple[str, ...] = ()) -> CommunityFile:
    """Rank one LoRA in float16 for every module of a real UNet."""
    unet = _meta(base)
    layers, tensors, count = weights_of(unet), {}, 0
    for stem, (share,) in names_in(scheme, "sdxl" if base == "sdxl" else "sd15", "unet", unet).items():
        shape = layers[share.path].weight.shape
        if len(shape) == 1 or share.path.startswith(skip or ("-",)):
            continue
        one = (1,) * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = torch.ones(1, *shape[1:], dtype=torch.float16)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(shape[0], 1, *one, dtype=torch.float16)
        count += 1
    return CommunityFile(tensors, {}, {}, None, count)


STOCK = ("conv_in", "conv_out", "time_embedding", "add_embedding")


@pytest.mark.parametrize(
    ("base", "scheme", "skip", "count"),
    [
        ("sdxl", "kohya", STOCK, 788),
        ("sdxl", "kohya", (), 794),
        ("sdxl", "kohya-diffusers", ("add_embedding",), 792),
        ("sdxl", "lycoris", (), 794),
        ("sdxl", "diffusers", (), 794),
        ("sd15", "kohya-sd", (), 282),
        ("sd21", "kohya-sd", (), 282),
    ],
)
def test_real_files_map_completely(base, scheme, skip, count, tmp_path):
    """The base model is recognised from names and shapes, and every module finds its place."""
    file = _names_only(base, scheme, skip)
    assert file.modules == count
    ckpt = lycoris_diff.read_checkpoint(file.write(tmp_path / "file"))
    assert ckpt.base_model == base and not ckpt.unmatched and not ckpt.unknown
    assert {c: len(m) for c, m in ckpt.components.items()} == {"unet": count}


# Flux.1-dev has two layers for guidance more than the default configuration with its 502
COUNTS = {
    "sd15": 282,
    "sd21": 282,
    "sdxl": 794,
    "flux": 504,
    "qwen-image": 846,
    "z-image": 276,
    "lumina2": 244,
    "hunyuan-video": 548,
}


@pytest.mark.parametrize("base", COUNTS)
def test_counts_of_linear_and_convolution(base):
    """formats.md 2.2 and 2.3, default configurations."""
    (denoiser,) = (i for c, i in known_base(base).items() if c in ("unet", "transformer"))
    assert sum(site.kind in ("Linear", "Conv1d", "Conv2d", "Conv3d") for site in denoiser.sites.values()) == COUNTS[base]


# --- 10: PEFT's own files of convolutions


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_core_of_peft_conv1d_has_an_axis_more(algorithm, tmp_path):
    """PEFT keeps Tucker cores of Conv1d as (r, r, k, 1)."""
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    config = {"loha": LoHaConfig, "lokr": LoKrConfig}[algorithm]
    options = {"r": 2, "alpha": 3.0, "target_modules": ["conv1d"], "use_effective_conv2d": True, "init_weights": False}
    if algorithm == "lokr":
        options |= {"decompose_factor": 2}
    model = get_peft_model(models("layers", torch.float32)["unet"], config(**options))
    model.save_pretrained(tmp_path / "adapter")
    t = {k.rsplit(".", 1)[-1]: v.double() for k, v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    core = next(v for k, v in t.items() if k.endswith("t2"))
    assert core.shape == (2, 2, 3, 1)
    half = lambda t_, a, b: torch.einsum("ijk,io,jc->ock", t_.squeeze(-1), a, b)
    if algorithm == "loha":
        delta = half(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"]) * half(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
    else:
        second = half(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        delta = torch.einsum("ab,pqk->apbqk", t["lokr_w1"], second).reshape(16, 8, 3)
    file = CommunityFile({}, {}, {"unet": {"conv1d": (1.5 * delta, None)}}, None, 1)
    found, _ = changes("layers", models("layers"), tmp_path / "adapter")
    assert max(difference(found, file.expected).values()) < 1e-6
