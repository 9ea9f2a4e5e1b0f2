"""Names of modules in community files, family by family, written from the formats' documentation only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Share:
    """What one diffusers module holds of a native weight: its rows, and whether the halves are exchanged."""

    path: str
    start: int = 0
    stop: int = -1
    swapped: bool = False


# native name -> diffusers names that are its rows in order; a leading "~" marks exchanged halves. # is a block number.
FLUX = {
    "double_blocks.#.img_attn.qkv": [f"transformer_blocks.#.attn.to_{x}" for x in "qkv"],
    "double_blocks.#.txt_attn.qkv": [f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.#.img_attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks.#.txt_attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "double_blocks.#.img_mlp.0": ["transformer_blocks.#.ff.net.0.proj"],
    "double_blocks.#.img_mlp.2": ["transformer_blocks.#.ff.net.2"],
    "double_blocks.#.txt_mlp.0": ["transformer_blocks.#.ff_context.net.0.proj"],
    "double_blocks.#.txt_mlp.2": ["transformer_blocks.#.ff_context.net.2"],
    "double_blocks.#.img_mod.lin": ["transformer_blocks.#.norm1.linear"],
    "double_blocks.#.txt_mod.lin": ["transformer_blocks.#.norm1_context.linear"],
    "single_blocks.#.linear1": [
        *(f"single_transformer_blocks.#.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ],
    "single_blocks.#.linear2": ["single_transformer_blocks.#.proj_out"],
    "single_blocks.#.modulation.lin": ["single_transformer_blocks.#.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
}
FLUX2 = {
    **{native: parts for native, parts in FLUX.items() if "_attn" in native},
    "double_blocks.#.img_mlp.0": ["transformer_blocks.#.ff.linear_in"],
    "double_blocks.#.img_mlp.2": ["transformer_blocks.#.ff.linear_out"],
    "double_blocks.#.txt_mlp.0": ["transformer_blocks.#.ff_context.linear_in"],
    "double_blocks.#.txt_mlp.2": ["transformer_blocks.#.ff_context.linear_out"],
    "single_blocks.#.linear1": ["single_transformer_blocks.#.attn.to_qkv_mlp_proj"],
    "single_blocks.#.linear2": ["single_transformer_blocks.#.attn.to_out"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
}
SD3 = {
    "joint_blocks.#.x_block.attn.qkv": [f"transformer_blocks.#.attn.to_{x}" for x in "qkv"],
    "joint_blocks.#.context_block.attn.qkv": [f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"],
    "joint_blocks.#.x_block.attn2.qkv": [f"transformer_blocks.#.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.#.x_block.attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "joint_blocks.#.context_block.attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "joint_blocks.#.x_block.attn2.proj": ["transformer_blocks.#.attn2.to_out.0"],
    "joint_blocks.#.x_block.mlp.fc1": ["transformer_blocks.#.ff.net.0.proj"],
    "joint_blocks.#.x_block.mlp.fc2": ["transformer_blocks.#.ff.net.2"],
    "joint_blocks.#.context_block.mlp.fc1": ["transformer_blocks.#.ff_context.net.0.proj"],
    "joint_blocks.#.context_block.mlp.fc2": ["transformer_blocks.#.ff_context.net.2"],
    "joint_blocks.#.x_block.adaLN_modulation.1": ["transformer_blocks.#.norm1.linear"],
    "joint_blocks.#.context_block.adaLN_modulation.1": ["transformer_blocks.#.norm1_context.linear"],  # last block: below
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
}
WAN = {
    **{f"blocks.#.self_attn.{x}": [f"blocks.#.attn1.to_{x}"] for x in "qkv"},
    **{f"blocks.#.cross_attn.{x}": [f"blocks.#.attn2.to_{x}"] for x in "qkv"},
    "blocks.#.self_attn.o": ["blocks.#.attn1.to_out.0"],
    "blocks.#.cross_attn.o": ["blocks.#.attn2.to_out.0"],
    "blocks.#.cross_attn.k_img": ["blocks.#.attn2.add_k_proj"],
    "blocks.#.cross_attn.v_img": ["blocks.#.attn2.add_v_proj"],
    "blocks.#.ffn.0": ["blocks.#.ffn.net.0.proj"],
    "blocks.#.ffn.2": ["blocks.#.ffn.net.2"],
    "blocks.#.norm3": ["blocks.#.norm2"],
    "time_embedding.0": ["condition_embedder.time_embedder.linear_1"],
    "time_embedding.2": ["condition_embedder.time_embedder.linear_2"],
    "text_embedding.0": ["condition_embedder.text_embedder.linear_1"],
    "text_embedding.2": ["condition_embedder.text_embedder.linear_2"],
    "time_projection.1": ["condition_embedder.time_proj"],
    "img_emb.proj.0": ["condition_embedder.image_embedder.norm1"],
    "img_emb.proj.4": ["condition_embedder.image_embedder.norm2"],
    "img_emb.proj.1": ["condition_embedder.image_embedder.ff.net.0.proj"],
    "img_emb.proj.3": ["condition_embedder.image_embedder.ff.net.2"],
    "head.head": ["proj_out"],
    "patch_embedding": ["patch_embedding"],
}
_REFINER = "txt_in.individual_token_refiner.blocks.#"
_REFINED = "context_embedder.token_refiner.refiner_blocks.#"
HUNYUAN = {
    "double_blocks.#.img_attn_qkv": FLUX["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.txt_attn_qkv": FLUX["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.img_attn_proj": FLUX["double_blocks.#.img_attn.proj"],
    "double_blocks.#.txt_attn_proj": FLUX["double_blocks.#.txt_attn.proj"],
    "double_blocks.#.img_mlp.fc1": FLUX["double_blocks.#.img_mlp.0"],
    "double_blocks.#.img_mlp.fc2": FLUX["double_blocks.#.img_mlp.2"],
    "double_blocks.#.txt_mlp.fc1": FLUX["double_blocks.#.txt_mlp.0"],
    "double_blocks.#.txt_mlp.fc2": FLUX["double_blocks.#.txt_mlp.2"],
    "double_blocks.#.img_mod.linear": FLUX["double_blocks.#.img_mod.lin"],
    "double_blocks.#.txt_mod.linear": FLUX["double_blocks.#.txt_mod.lin"],
    "single_blocks.#.linear1": FLUX["single_blocks.#.linear1"],
    "single_blocks.#.linear2": FLUX["single_blocks.#.linear2"],
    "single_blocks.#.modulation.linear": FLUX["single_blocks.#.modulation.lin"],
    f"{_REFINER}.self_attn_qkv": [f"{_REFINED}.attn.to_{x}" for x in "qkv"],
    f"{_REFINER}.self_attn_proj": [f"{_REFINED}.attn.to_out.0"],
    f"{_REFINER}.mlp.fc1": [f"{_REFINED}.ff.net.0.proj"],
    f"{_REFINER}.mlp.fc2": [f"{_REFINED}.ff.net.2"],
    f"{_REFINER}.adaLN_modulation.1": [f"{_REFINED}.norm_out.linear"],
    f"{_REFINER}.norm1": [f"{_REFINED}.norm1"],
    f"{_REFINER}.norm2": [f"{_REFINED}.norm2"],
    "txt_in.input_embedder": ["context_embedder.proj_in"],
    "txt_in.t_embedder.mlp.0": ["context_embedder.time_text_embed.timestep_embedder.linear_1"],
    "txt_in.t_embedder.mlp.2": ["context_embedder.time_text_embed.timestep_embedder.linear_2"],
    "txt_in.c_embedder.linear_1": ["context_embedder.time_text_embed.text_embedder.linear_1"],
    "txt_in.c_embedder.linear_2": ["context_embedder.time_text_embed.text_embedder.linear_2"],
    "img_in.proj": ["x_embedder.proj"],
    "time_in.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.mlp.0": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.mlp.2": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
}
# ComfyUI's own modules for HunyuanVideo are those of Flux.
HUNYUAN_COMFY = {native: parts for native, parts in FLUX.items() if native.startswith(("double_blocks", "single_blocks"))}
LUMINA2 = {
    native.replace("layers.#", f"{stack}.#"): [p.replace("layers.#", f"{stack}.#") for p in parts]
    for stack in ("layers", "noise_refiner", "context_refiner")
    for native, parts in {
        "layers.#.attention.qkv": [f"layers.#.attn.to_{x}" for x in "qkv"],
        "layers.#.attention.out": ["layers.#.attn.to_out.0"],
        **{f"layers.#.feed_forward.w{n}": [f"layers.#.feed_forward.linear_{n}"] for n in (1, 2, 3)},
        "layers.#.adaLN_modulation.1": ["layers.#.norm1.linear"],
    }.items()
} | {
    "x_embedder": ["x_embedder"],
    "t_embedder.mlp.0": ["time_caption_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_caption_embed.timestep_embedder.linear_2"],
    "cap_embedder.1": ["time_caption_embed.caption_embedder.1"],
    "final_layer.linear": ["norm_out.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear_1"],
}
ZIMAGE = {
    native.replace("layers.#", f"{stack}.#"): [p.replace("layers.#", f"{stack}.#") for p in parts]
    for stack in ("layers", "noise_refiner", "context_refiner")
    for native, parts in {
        "layers.#.attention.qkv": [f"layers.#.attention.to_{x}" for x in "qkv"],
        "layers.#.attention.out": ["layers.#.attention.to_out.0"],
    }.items()
} | {
    "x_embedder": ["all_x_embedder.2-1"],
    "final_layer.linear": ["all_final_layer.2-1.linear"],
    "final_layer.adaLN_modulation.1": ["all_final_layer.2-1.adaLN_modulation.1"],
}
NATIVE = {
    "flux": FLUX,
    "flux2": FLUX2,
    "sd3": SD3,
    "wan": WAN,
    "hunyuan": HUNYUAN,
    "hunyuan_comfy": HUNYUAN_COMFY,
    "lumina2": LUMINA2,
    "zimage": ZIMAGE,
}


def _ldm(path: str, levels_with_attention: set[int], per_block: int = 2) -> str:
    """LDM's name of a diffusers UNet module."""
    plain = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if path in plain:
        return plain[path]
    for diffusers, ldm in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        if path.startswith(diffusers):
            return f"{ldm}.{0 if path.endswith('1') else 2}"
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        kind, i, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * i}.{resnet[rest]}" if kind == "resnets" else f"middle_block.1.{rest}"
    side, b, kind, i, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path).groups()  # type: ignore[union-attr]
    b, i = int(b), int(i)
    if side == "down":
        block = 1 + b * (per_block + 1) + i
        if kind == "downsamplers":
            return f"input_blocks.{(b + 1) * (per_block + 1)}.0.op"
        return f"input_blocks.{block}.0.{resnet[rest]}" if kind == "resnets" else f"input_blocks.{block}.1.{rest}"
    block = b * (per_block + 1) + i
    if kind == "upsamplers":
        return f"output_blocks.{b * (per_block + 1) + per_block}.{2 if b in levels_with_attention else 1}.conv"
    return f"output_blocks.{block}.0.{resnet[rest]}" if kind == "resnets" else f"output_blocks.{block}.1.{rest}"


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of everything that community adapters change: linear, convolution, LayerNorm, GroupNorm."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m.weight is not None}


def native_names(family: str, model: nn.Module) -> dict[str, list[Share]]:
    """Native name -> the diffusers modules that hold its rows; modules without a native name keep their own."""
    layers = weights_of(model)
    if family in ("sd15", "sdxl"):
        with_attention = {int(n.split(".")[1]) for n in layers if n.startswith("up_blocks") and ".attentions." in n}
        return {_ldm(path, with_attention): [Share(path)] for path in layers}
    found: dict[str, list[Share]] = {}
    taken: set[str] = set()
    for native, parts in NATIVE.get(family, {}).items():
        first = re.escape(parts[0].lstrip("~")).replace(r"\#", r"(\d+)").replace("#", r"(\d+)")
        numbers = [match.groups() for path in layers if (match := re.fullmatch(first, path))]
        for number in numbers:
            fill = lambda name, n=number: name.replace("#", n[0]) if n else name
            shares, row = [], 0
            for part in parts:
                path = fill(part.lstrip("~"))
                rows = layers[path].weight.shape[0]
                shares.append(Share(path, row, row + rows, part.startswith("~")))
                row += rows
                taken.add(path)
            found[fill(native)] = shares
    if family == "sd3":  # the last block's context modulation is that of a final layer: shift and scale are exchanged
        last = max(int(n.split(".")[1]) for n in layers if n.startswith("transformer_blocks."))
        name = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
        found[name] = [Share(s.path, s.start, s.stop, True) for s in found[name]]
    found.update({path: [Share(path)] for path in layers if path not in taken})
    return found


def diffusers_names(model: nn.Module) -> dict[str, list[Share]]:
    """Every module under its own name."""
    return {path: [Share(path)] for path in weights_of(model)}
