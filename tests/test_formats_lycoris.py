"""Files that LyCORIS 4.1.3 writes itself load and compute what LyCORIS' own forward pass computes."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_run import models, parameters, pipeline, same
from tinymodels import TEXT_ENCODERS, run
from torch import nn

import lycoris_diff

lycoris = pytest.importorskip("lycoris")

# Options of LyCORIS' network for each algorithm it has; ranks of 2 and 3 keep factors of tiny layers decomposed.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora-tucker": {"algo": "lora", "use_tucker": True},
    "lora-rs": {"algo": "lora", "rs_lora": True},
    "lora-scalar": {"algo": "lora", "use_scalar": True},
    "lora-dora": {"algo": "lora", "dora_wd": True},
    "lora-dora-columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-rs": {"algo": "loha", "rs_lora": True},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-balanced": {"algo": "lokr"},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True, "network_dim": 1},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr-tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr-unbalanced": {"algo": "lokr", "factor": 2, "unbalanced_factorization": True},
    "lokr-scalar": {"algo": "lokr", "factor": 2, "use_scalar": True},
    "lokr-dora": {"algo": "lokr", "factor": 2, "dora_wd": True},
    "lokr-dora-columns": {"algo": "lokr", "factor": 2, "dora_wd": True, "wd_on_output": False},
    "dylora": {"algo": "dylora", "network_dim": 1, "block_size": 1},  # of more blocks, the forward pass draws some
    "glora": {"algo": "glora"},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft", "network_dim": 4},
    "diag-oft-constraint": {"algo": "diag-oft", "network_dim": 4, "constraint": 1e-3},
    "diag-oft-rescaled": {"algo": "diag-oft", "network_dim": 4, "rescaled": True},
    "boft": {"algo": "boft", "network_dim": 4},
    "boft-rescaled": {"algo": "boft", "network_dim": 4, "rescaled": True},
    "ia3": {"algo": "ia3"},
    "tlora": {"algo": "tlora", "linear": True},
    "norms": {"algo": "lora", "train_norm": True},
}
UNET_BLOCKS = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(importlib.import_module("lycoris.modules.tlora").gc, "collect", lambda: 0)  # once a layer
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _preset(folder: Path, linear_only: bool, everything: bool = False) -> str:
    """LyCORIS' stock "full" preset names one layer of diffusers UNets twice and stops; this is the same without that.

    Unless ``everything`` is asked for, only some blocks, to save time.
    """
    left_out = [] if everything else ["up_blocks", r"down_blocks\.[023]", r"encoder\.layers\.[1-9]"]
    blocks = UNET_BLOCKS[:1] if linear_only else UNET_BLOCKS
    path = folder / "preset.toml"
    path.write_text(
        f"enable_conv = {str(not linear_only).lower()}\n"
        f"unet_target_module = {blocks}\n"
        f"unet_target_name = {[] if linear_only else ['conv_in', 'conv_out']}\n"
        'text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]\n'
        "text_encoder_target_name = []\n"
        f"exclude_name = {left_out}\n".replace("'", '"')
    )
    return str(path)


def _randomised(network: nn.Module) -> None:
    """What training leaves: no factor is zero or one any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in network.named_parameters():
            spread = 0.02 if (name.endswith(("weight", "bias")) and p.ndim < 2) or "lora_" not in name else 0.1
            p.add_(spread * torch.randn(p.shape, generator=generator))


def _same_outputs(family: str, trained: dict[str, nn.Module], base: dict[str, torch.Tensor], path: Path, count: int) -> None:
    parts = models(family, torch.float32)
    before = parameters(parts)
    pipe = pipeline(family, parts=parts)
    report = lycoris_diff.load_adapter(pipe, path, "file")
    assert len(report.matched) == count and not report.problems
    for component, start in base.items():
        want, got = run(trained[component], _name(family, component)), run(parts[component], _name(family, component))
        assert (want - start).norm() > 1e-4 * start.norm(), "training did nothing"
        assert (got - want).norm() < 3e-4 * (want - start).norm() + 2e-6 * want.norm()
    lycoris_diff.unload_adapters(pipe)
    assert same(before, parameters(parts))


def _name(family: str, component: str) -> str:
    return TEXT_ENCODERS.get(family, {}).get(component, family)


def _options(variant: str) -> tuple[dict[str, Any], int, bool]:
    options = dict(VARIANTS[variant])
    return options, options.pop("network_dim", 2), options.pop("linear", False)


# the other variants differ from these in what one layer holds, which the wrapper's test looks at
QUICK = (
    *("lora", "lora-tucker", "lora-dora", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-full", "lokr-unbalanced"),
    *("dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora", "norms"),
)


@pytest.mark.parametrize("variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_kohya_network_of_sd15(variant, tmp_path):
    from lycoris.kohya import create_network

    options, rank, linear = _options(variant)
    trained = models("sd15", torch.float32)
    base = {c: run(m, _name("sd15", c)) for c, m in trained.items()}
    network = create_network(
        1.0, rank, 1.0, None, trained["text_encoder"], trained["unet"], False, preset=_preset(tmp_path, linear), **options
    )
    network.apply_to(trained["text_encoder"], trained["unet"], True, True)
    _randomised(network)
    path = tmp_path / "lycoris.safetensors"
    network.eval().save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    _same_outputs("sd15", trained, base, path, len(network.loras))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "lokr", "loha", "full", "norms"])
def test_kohya_network_of_all_of_sdxl(variant, tmp_path):
    from lycoris.kohya import create_network

    options, rank, linear = _options(variant)
    trained = models("sdxl", torch.float32)
    base = {c: run(m, _name("sdxl", c)) for c, m in trained.items()}
    encoders = [trained["text_encoder"], trained["text_encoder_2"]]
    network = create_network(
        1.0, rank, 1.0, None, encoders, trained["unet"], False, preset=_preset(tmp_path, linear), **options
    )
    network.apply_to(encoders, trained["unet"], True, True)
    _randomised(network)
    path = tmp_path / "lycoris.safetensors"
    network.eval().save_weights(str(path), torch.float32, None)
    _same_outputs("sdxl", trained, base, path, len(network.loras))


WRAPPED = {  # the wrapper puts adapters on every layer, three kinds of convolution among them
    name: options for name, options in VARIANTS.items() if name not in ("tlora", "glora", "norms", "lora-rs", "loha-rs")
}
SHAPES = {
    "linear": (3, 24),
    "plain": (3, 24),
    "square": (3, 16),
    "conv1d": (2, 8, 6),
    "pointwise": (2, 8, 4, 4),
    "conv2d": (2, 8, 6, 6),
    "grouped": (2, 16, 5, 5),
    "conv3d": (1, 8, 4, 4, 4),
}


@pytest.mark.parametrize("variant", WRAPPED)
def test_wrapper_on_every_kind_of_layer(variant, tmp_path):
    """Case 2: LyCORIS' forward pass, not its merging, is the reference."""
    from lycoris import LycorisNetwork, create_lycoris

    options, rank, _ = _options(variant)
    trained, parts = models("layers", torch.float32)["unet"], models("layers", torch.float32)
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"], "target_name": []})
    network = create_lycoris(trained, 1.0, rank, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    _randomised(network)
    path = tmp_path / "lycoris.safetensors"
    network.eval().save_weights(str(path), torch.float32, None)
    x = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    pipe = pipeline("layers", parts=parts)
    start = {name: getattr(parts["unet"], name)(x[name]) for name in SHAPES}
    report = lycoris_diff.load_adapter(pipe, path, "file")
    assert len(report.matched) == len(network.loras) == len(SHAPES)
    with torch.no_grad():
        for name, value in x.items():
            want, got = getattr(trained, name)(value), getattr(parts["unet"], name)(value)
            assert (want - start[name]).norm() > 1e-5 * want.norm(), name
            assert (got - want).norm() < 1e-4 * (want - start[name]).norm() + 2e-7 * want.norm(), name


@pytest.mark.parametrize("variant", ["glora", "tlora", "norms"])
def test_wrapper_on_the_layers_that_lycoris_can_do(variant, tmp_path):
    """GLoRA has no grouped convolutions, T-LoRA no kernels, norms are layers of their own."""
    from lycoris import LycorisNetwork, create_lycoris

    options, rank, _ = _options(variant)
    kinds = {"glora": ["linear", "plain", "conv1d", "conv2d", "conv3d"], "tlora": ["linear", "plain", "pointwise"]}
    names = kinds.get(variant, ["layernorm", "groupnorm", "linear"])
    trained, parts = models("layers", torch.float32)["unet"], models("layers", torch.float32)
    kinds_ = ["Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm"]
    LycorisNetwork.apply_preset({"target_module": kinds_, "target_name": []})
    for name in [n for n, _ in trained.named_children() if n not in names]:
        delattr(trained, name)
    network = create_lycoris(trained, 1.0, rank, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    _randomised(network)
    path = tmp_path / "lycoris.safetensors"
    network.eval().save_weights(str(path), torch.float32, None)
    shapes = SHAPES | {"layernorm": (3, 16), "groupnorm": (2, 16, 4, 4)}
    lycoris_diff.load_adapter(pipeline("layers", parts=parts), path, "file")
    with torch.no_grad():
        for name in names:
            x = torch.randn(shapes[name])
            want, got = getattr(trained, name)(x), getattr(parts["unet"], name)(x)
            start = getattr(models("layers", torch.float32)["unet"], name)(x)
            assert (want - start).norm() > 1e-4 * want.norm(), name
            assert (got - want).norm() < 1e-5 * want.norm(), name
