"""Pipelines' directories of the tiny models, and what a checkpoint does to their weights, for the tests of writing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from community import CommunityFile, community_file, schemes_for
from tinymodels import components
from torch import Tensor, nn

from lycoris_diff.checkpoints.build import entry_delta
from lycoris_diff.checkpoints.checkpoint import Checkpoint

#: a few modules of every kind; in flux parts of fused weights, an incomplete one among them, and a swapped one
SELECTED = {
    "sd15": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.1.resnets.0.conv1",
        "up_blocks.1.resnets.0.norm1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "time_embedding.linear_1",
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.3.mlp.fc1",
    ),
    "sdxl": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.1.proj_in",
        "down_blocks.1.resnets.0.conv1",
        "mid_block.attentions.0.transformer_blocks.3.attn2.to_v",
        "up_blocks.0.upsamplers.0.conv",
        "encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.30.mlp.fc1",
    ),
    "flux": (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.ff.net.0.proj",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.proj_out",
        "norm_out.linear",
        "encoder.layers.3.mlp.fc1",
    ),
    "wan": ("patch_embedding", "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"),
    "zimage": ("layers.0.attention.to_k", "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_out.0"),
    "flux2": ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_qkv_mlp_proj", "norm_out.linear"),
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.norm1_context.linear", "transformer_blocks.1.ff.net.2"),
}
_PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}


@cache
def parts_of(family: str) -> dict[str, nn.Module]:
    """Tiny components in float64, not to be changed."""
    return components(family, torch.float64)


def pipeline_directory(family: str, folder: Path) -> Path:
    """The configurations of a family's tiny pipeline, without weights."""
    path = folder / family
    if path.exists():
        return path
    listed: dict[str, object] = {"_class_name": _PIPELINES.get(family, "DiffusionPipeline")}
    for component, model in parts_of(family).items():
        library = type(model).__module__.split(".")[0]
        listed[component] = [library, type(model).__name__]
        (path / component).mkdir(parents=True)
        config = dict(model.config) if library == "diffusers" else model.config.to_dict()
        (path / component / "config.json").write_text(json.dumps(config, default=str))
    (path / "model_index.json").write_text(json.dumps(listed))
    return path


def source_scheme(family: str, algorithm: str) -> str:
    """The scheme whose files come nearest to what trainers write."""
    known = schemes_for(family, algorithm)
    return next(s for s in ("kohya-sd", "kohya-te3", "kohya", "kohya-oft", "peft", "lycoris", *known) if s in known)


def community(family: str, algorithm: str, scheme: str = "", dtype: torch.dtype = torch.float32, **options) -> CommunityFile:
    """A small file of one algorithm."""
    scheme = scheme or source_scheme(family, algorithm)
    return community_file(family, scheme, algorithm, parts_of(family), SELECTED[family], dtype, **options)


def changes(ckpt: Checkpoint, family: str) -> dict[tuple[str, str], tuple[Tensor | None, Tensor | None]]:
    """What the checkpoint does to weight and bias of every module, in float64."""
    found = {}
    for component, modules in ckpt.components.items():
        layers = dict(parts_of(family)[component].named_modules())
        for path, entries in modules.items():
            weight = layers[path].weight.detach()
            dense = [e for e in entries if set(e.tensors) != {"diff_b"}]
            delta = entry_delta(dense, tuple(weight.shape), weight) if dense else None
            biases = [e.tensors[k].double() for e in entries for k in ("diff_b", "b_norm") if k in e.tensors]
            found[component, path] = (delta, sum(biases) if biases else None)
    return found


def worst(ckpt: Checkpoint, file: CommunityFile, family: str) -> float:
    """Largest relative error of a checkpoint's changes against the file's own formulas; infinite for one too many."""
    found = changes(ckpt, family)
    wanted = {(c, p): pair for c, modules in file.expected.items() for p, pair in modules.items()}
    errors = [0.0]
    for key in found.keys() | wanted.keys():
        for got, want in zip(found.get(key, (None, None)), wanted.get(key, (None, None))):
            if got is None and want is None:
                continue
            size = float(want.norm()) if want is not None else 0.0
            got = torch.zeros_like(want) if got is None else got
            if want is None or not size:
                errors.append(float("inf") if float(got.norm()) > 1e-12 else 0.0)
            else:
                errors.append(float((got.reshape(want.shape) - want).norm()) / size)
    return max(errors)
