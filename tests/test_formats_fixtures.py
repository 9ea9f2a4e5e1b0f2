"""The fixtures themselves: their formulas against LyCORIS and PEFT, their names against diffusers' converters, their counts."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from community import SCHEMES, community_file, names_in
from community_algorithms import ALGORITHMS, fits, make
from community_names import native_names, weights_of
from tinymodels import DENOISER, components, tiny
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (5, 24)),
    "square": (lambda: nn.Linear(16, 16), (5, 16)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3), (2, 8, 6)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 5, 5)),
    "conv2d-1x1": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 4, 4)),
    "conv2d-groups": (lambda: nn.Conv2d(16, 16, 3, groups=4), (2, 16, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 16, 3), (1, 8, 4, 4, 4)),
    "layernorm": (lambda: nn.LayerNorm(16), (3, 16)),
    "groupnorm": (lambda: nn.GroupNorm(4, 16), (2, 16, 4, 4)),
}
# LyCORIS' own loader cannot read these, or reads them wrong (formats.md, quirks 1-3, 14, 18 and 1.1, 1.2, 1.8, 1.11)
UNREADABLE = (
    *("lora-no-alpha", "lora-dora-columns", "loha-dora-columns", "loha-4d", "lokr-full-no-alpha", "diag-oft-no-alpha"),
    *(
        "lokr-w1",
        "lokr-w2",
        "lokr-both",
        "lokr-tucker",
        "lokr-unbalanced",
        "lokr-factor",
        "lokr-dora-rows",
        "lokr-dora-columns",
    ),
    *("ia3-out", "ia3-in", "tlora-random", "glora-old", "sparse-bias", "peft-oft", "peft-oft-scaled"),
    *("lokr-both-rank-1", "miss", "miss-odd", "miss-mini", "miss-bat", "shira", "shira-float-indices"),
)


def _changed(layer: nn.Module, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The layer with a fixture's change added to its parameters, and the fixture's tensors with alpha."""
    made = make(name, layer.weight.detach(), 3)
    dw, db = made.change(layer.weight.detach().double(), layer.bias.detach().double(), made.scale)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight.add_(dw)
        if db is not None:
            changed.bias.add_(db)
    return changed, made.tensors | ({} if made.alpha is None else {"alpha": made.alpha})


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in UNREADABLE])
def test_formulas_equal_lycoris_forward(name, kind):
    from lycoris.modules import get_module, make_module

    build, size = LAYERS[kind]
    layer = build()
    if not fits(name, tuple(layer.weight.shape)) or (name.startswith("glora") and kind == "conv2d-groups"):
        pytest.skip("no such file")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    changed, tensors = _changed(layer, name)
    cls, parameters = get_module({f"m.{k}": v.clone() for k, v in tensors.items()}, "m")
    x = torch.randn(size)
    with torch.no_grad():
        module = make_module(cls, parameters, "m", copy.deepcopy(layer)).eval()
        module.org_forward = module.org_module[0].forward
        got, want, base = module(x), changed(x), layer(x)
    assert (got - want).norm() < 1e-5 * (want - base).norm().clamp(min=want.norm() * 1e-2)


PEFT = [
    "lora",
    "lora-dora-rows",
    "loha",
    "lokr-full",
    "lokr-w2",
    "miss",
    "miss-odd",
    "miss-mini",
    "miss-bat",
    "shira",
    "peft-oft",
]


@pytest.mark.parametrize("name", PEFT)
def test_formulas_equal_peft(name, tmp_path):
    from peft import PeftModel

    # large enough for PEFT to choose the same layout of factors as the fixture
    model = nn.ModuleDict({"layer": nn.Linear(24, 16)})
    model["layer"].weight.requires_grad_(False)
    file = community_file("sd15", "peft", name, {"unet": model})
    path = file.write(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(copy.deepcopy(model), path).merge_and_unload()
    dw, _ = file.expected["unet"]["layer"]
    want = model["layer"].weight.double() + dw
    torch.testing.assert_close(merged["layer"].weight.detach().double(), want, rtol=2e-5, atol=2e-6)


CONVERTERS = {
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "zimage": "convert_z_image_transformer_checkpoint_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "hunyuan": "convert_hunyuan_video_transformer_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
}
# diffusers' converters know the real widths only: rows of the real model, one column
WIDTHS = {"flux": 3072, "hunyuan": 3072, "lumina2": 2304}


def _native_state(family: str, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Native weights numbered by rows, and what they are under diffusers' names."""
    layers, native, own = weights_of(model), {}, {}
    factor = 1 if family not in WIDTHS else WIDTHS[family] / {"flux": 48, "hunyuan": 32, "lumina2": 48}[family]
    for n, (name, shares) in enumerate(native_names(family, model).items()):
        for attribute in ("weight", "bias"):
            if getattr(layers[shares[0].path], attribute, None) is None:
                continue
            parts = []
            for i, share in enumerate(shares):
                rows = round(getattr(layers[share.path], attribute).shape[0] * factor)
                value = torch.arange(rows, dtype=torch.float64) + 1e6 * (2 * n + 1e3 * i + (attribute == "bias"))
                own[f"{share.path}.{attribute}"] = value
                parts.append(torch.cat(value.chunk(2)[::-1]) if share.swapped else value)
            native[f"{name}.{attribute}"] = torch.cat(parts)
    return native, own


@pytest.mark.parametrize("family", CONVERTERS)
def test_names_equal_diffusers_converters(family):
    from diffusers.loaders import single_file_utils

    native, own = _native_state(family, tiny(family))
    blocks = [(f"double_blocks.{i}.{side}_attn", 1) for i in range(2) for side in ("img", "txt")]
    if family == "flux":  # what the converter takes for granted beside the weights
        for name in [*(b for b, _ in blocks), "single_blocks.0", "single_blocks.1"]:
            native[f"{name}.norm.query_norm.scale"] = native[f"{name}.norm.key_norm.scale"] = torch.zeros(1)
    if family == "sd3":
        native["pos_embed"] = torch.zeros(1)
    converted = getattr(single_file_utils, CONVERTERS[family])(dict(native))
    wrong = [name for name, value in own.items() if name not in converted or not torch.equal(converted[name], value)]
    assert not wrong


def test_counts_of_the_families():
    """Linear and convolution modules, norms, and names per component as documented (formats.md 2.3)."""
    counts = {}
    for family in ("sd15", "sdxl"):
        layers = weights_of(components(family)["unet"])
        counts[family] = (
            sum(isinstance(m, nn.Linear) for m in layers.values()),
            sum(isinstance(m, nn.Conv2d) for m in layers.values()),
            sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in layers.values()),
            sum(isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for m in layers.values()),
        )
    assert counts == {"sd15": (184, 98, 46, 109), "sdxl": (743, 51, 11, 256)}
    encoders = components("sdxl")
    linears = lambda c: sum(isinstance(m, nn.Linear) for m in weights_of(encoders[c]).values())
    assert (linears("text_encoder"), linears("text_encoder_2")) == (72, 193)


@pytest.mark.parametrize("family", DENOISER)
def test_names_are_unique_and_complete(family):
    """Every scheme names every module of the denoiser once, flattened or not."""
    parts = components(family)
    model = parts[DENOISER[family]]
    for scheme, rules in SCHEMES.items():
        if (rules.families and family not in rules.families) or scheme == "processors":
            continue
        names = names_in(scheme, family, DENOISER[family], model)
        held = [share.path for shares in names.values() for share in shares]
        assert sorted(held) == sorted(weights_of(model)), scheme


def test_a_file_changes_what_it_says():
    """The bookkeeping of fused and swapped weights: a dense change of the native weight arrives at the right rows."""
    parts = {"transformer": tiny("flux")}
    file = community_file("flux", "kohya", "full", parts)
    diff = file.tensors["lora_unet_single_blocks_1_linear1.diff"].double()
    names = [f"single_transformer_blocks.1.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    torch.testing.assert_close(torch.cat([file.expected["transformer"][n][0] for n in names]), diff)
    swapped = file.tensors["lora_unet_final_layer_adaLN_modulation_1.diff"].double()
    shift, scale = swapped.chunk(2)
    torch.testing.assert_close(file.expected["transformer"]["norm_out.linear"][0], torch.cat([scale, shift]))
    assert F.cosine_similarity(shift.flatten(), scale.flatten(), 0) < 0.5
