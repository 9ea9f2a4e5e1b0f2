"""Native names of Flux.1, Chroma, Flux.2 and HunyuanVideo."""

from __future__ import annotations

from .rows import SUBTREE, Block

_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

_FLUX_DOUBLE = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": _ADDED_QKV,
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX_SINGLE = {
    "linear1": f"{_QKV} proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "modulation.lin": "norm.linear",
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
FLUX = (
    Block("double_blocks.{i}", "transformer_blocks.{i}", _FLUX_DOUBLE),
    Block("single_blocks.{i}", "single_transformer_blocks.{i}", _FLUX_SINGLE),
    Block("", "", _FLUX_ENDS),
)
# XLabs' attention processors; the qkv of its single blocks leaves out the MLP's rows.
XLABS = (
    Block(
        "double_blocks.{i}.processor",
        "transformer_blocks.{i}",
        {
            "qkv_lora1": _QKV,
            "qkv_lora2": _ADDED_QKV,
            "proj_lora1": "attn.to_out.0",
            "proj_lora2": "attn.to_add_out",
        },
    ),
    Block(
        "single_blocks.{i}.processor",
        "single_transformer_blocks.{i}",
        {"qkv_lora": _QKV, "qkv": _QKV, "proj_lora": "proj_out", "proj": "proj_out"},
    ),
)
CHROMA_GUIDANCE = Block(
    "distilled_guidance_layer.layers.{i}",
    "distilled_guidance_layer.layers.{i}",
    {"in_layer": "linear_1", "out_layer": "linear_2"},
)
FLUX2 = (
    Block(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        _FLUX_DOUBLE
        | {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    Block(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
        _FLUX_SINGLE | {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    Block(
        "",
        "",
        _FLUX_ENDS
        | {
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        },
    ),
)
# some exports lost the beginning of diffusers' names together with kohya's prefix
CUT_OFF = (Block("sformer_blocks", "transformer_blocks", SUBTREE),)
HUNYUAN_VIDEO = (
    Block(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        {
            "img_attn_qkv": _QKV,
            "img_attn_proj": "attn.to_out.0",
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_attn_qkv": _ADDED_QKV,
            "txt_attn_proj": "attn.to_add_out",
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    Block(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
        {
            "linear1": f"{_QKV} proj_mlp",
            "linear2": "proj_out",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
            "modulation.linear": "norm.linear",
        },
    ),
    Block(
        "txt_in.individual_token_refiner.blocks.{i}",
        "context_embedder.token_refiner.refiner_blocks.{i}",
        {
            "self_attn_qkv": _QKV,
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",  # two gates: nothing to exchange
            "norm1": "norm1",
            "norm2": "norm2",
        },
    ),
    Block(
        "",
        "",
        {
            "img_in.proj": "x_embedder.proj",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
        },
    ),
)
# ComfyUI runs HunyuanVideo with Flux' modules; names that flatten alike need no row.
HUNYUAN_COMFYUI = (
    Block("double_blocks.{i}", "transformer_blocks.{i}", _FLUX_DOUBLE),
    Block("single_blocks.{i}", "single_transformer_blocks.{i}", {"modulation.lin": "norm.linear"}),
    Block(
        "txt_in.individual_token_refiner.blocks.{i}",
        "context_embedder.token_refiner.refiner_blocks.{i}",
        {"self_attn.qkv": _QKV, "self_attn.proj": "attn.to_out.0", "mlp.0": "ff.net.0.proj", "mlp.2": "ff.net.2"},
    ),
    Block(
        "",
        "",
        {name: path for name, path in _FLUX_ENDS.items() if name.startswith(("time_in", "guidance_in"))}
        | {
            "txt_in.t_embedder.in_layer": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.out_layer": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.in_layer": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.out_layer": "context_embedder.time_text_embed.text_embedder.linear_2",
        },
    ),
)
