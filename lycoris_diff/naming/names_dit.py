"""Native names of the other diffusion transformers."""

from __future__ import annotations

from .rows import Block

_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

# --- SD3 -----------------------------------------------------------------------------------------------------------------
SD3 = (
    Block(
        "joint_blocks.{i}.x_block",
        "transformer_blocks.{i}",
        {
            "attn.qkv": _QKV,
            "attn.proj": "attn.to_out.0",
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "attn2.proj": "attn2.to_out.0",
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        },
    ),
    Block(
        "joint_blocks.{i}.context_block",
        "transformer_blocks.{i}",
        {
            "attn.qkv": _ADDED_QKV,
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
            "adaLN_modulation.1": "~norm1_context.linear",  # the last block's has shift and scale only
        },
    ),
    Block(
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
        },
    ),
)

# --- Wan -----------------------------------------------------------------------------------------------------------------
_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_k_img": "norm_added_k",
}
WAN = (
    Block("blocks.{i}.self_attn", "blocks.{i}.attn1", _WAN_ATTENTION),
    Block("blocks.{i}.cross_attn", "blocks.{i}.attn2", _WAN_ATTENTION),
    Block("vace_blocks.{i}.self_attn", "vace_blocks.{i}.attn1", _WAN_ATTENTION),
    Block("vace_blocks.{i}.cross_attn", "vace_blocks.{i}.attn2", _WAN_ATTENTION),
    Block("blocks.{i}", "blocks.{i}", {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}),
    Block(
        "vace_blocks.{i}",
        "vace_blocks.{i}",
        {
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
            "before_proj": "proj_in",
            "after_proj": "proj_out",
        },
    ),
    Block(
        "",
        "",
        {
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.head": "proj_out",
        },
    ),
)

# --- Z-Image and Lumina 2 ------------------------------------------------------------------------------------------------
_LUMINA_STACKS = ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}")
_Z_IMAGE_LAYER = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
_Z_IMAGE_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
Z_IMAGE = (*(Block(s, s, _Z_IMAGE_LAYER) for s in _LUMINA_STACKS), Block("", "", _Z_IMAGE_ENDS))
_LUMINA2_LAYER = {
    "attention.qkv": _QKV,
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
}
LUMINA2 = (
    *(Block(s, s, _LUMINA2_LAYER) for s in _LUMINA_STACKS[:2]),
    Block(_LUMINA_STACKS[2], _LUMINA_STACKS[2], _LUMINA2_LAYER | {"attention_norm1": "norm1"}),
    Block("cap_embedder", "time_caption_embed.caption_embedder", {"0": "0", "1": "1"}),
    Block(
        "",
        "",
        {
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
    ),
)
