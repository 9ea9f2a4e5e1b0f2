"""Native names of transformers that differ from diffusers' in spelling more than in structure."""

from __future__ import annotations

from .rows import SUBTREE, Block

_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
_LTX_ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)
_LTX_MODULATIONS = {
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
}
LTX = (
    Block("", "", {"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in"}),
    *(Block(f"transformer_blocks.{{i}}.{a}", f"transformer_blocks.{{i}}.{a}", _NORMS) for a in _LTX_ATTENTIONS),
    *(Block(native, path, SUBTREE) for native, path in _LTX_MODULATIONS.items()),
)

_AURA_FEED_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
AURA_FLOW = (
    Block("double_layers.{i}.mlpX", "joint_transformer_blocks.{i}.ff", _AURA_FEED_FORWARD),
    Block("double_layers.{i}.mlpC", "joint_transformer_blocks.{i}.ff_context", _AURA_FEED_FORWARD),
    Block(
        "double_layers.{i}",
        "joint_transformer_blocks.{i}",
        {
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
            "attn.w2q": "attn.to_q",
            "attn.w2k": "attn.to_k",
            "attn.w2v": "attn.to_v",
            "attn.w2o": "attn.to_out.0",
            "attn.w1q": "attn.add_q_proj",
            "attn.w1k": "attn.add_k_proj",
            "attn.w1v": "attn.add_v_proj",
            "attn.w1o": "attn.to_add_out",
        },
    ),
    Block("single_layers.{i}.mlp", "single_transformer_blocks.{i}.ff", _AURA_FEED_FORWARD),
    Block(
        "single_layers.{i}",
        "single_transformer_blocks.{i}",
        {
            "modCX.1": "norm1.linear",
            "attn.w1q": "attn.to_q",
            "attn.w1k": "attn.to_k",
            "attn.w1v": "attn.to_v",
            "attn.w1o": "attn.to_out.0",
        },
    ),
    Block(
        "",
        "",
        {
            "init_x_linear": "pos_embed.proj",
            "cond_seq_linear": "context_embedder",
            "t_embedder.mlp.0": "time_step_proj.linear_1",
            "t_embedder.mlp.2": "time_step_proj.linear_2",
            "modF.1": "~norm_out.linear",
            "final_linear": "proj_out",
        },
    ),
)

SANA = (
    Block(
        "blocks.{i}",
        "transformer_blocks.{i}",
        {
            "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    Block(
        "",
        "",
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
            "t_block.1": "time_embed.linear",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "attention_y_norm": "caption_norm",
            "final_layer.linear": "proj_out",
        },
    ),
)

_KREA_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "mlp.{rest}": "ff.{rest}",
    "prenorm": "norm1",
    "postnorm": "norm2",
}
KREA2 = (
    Block("blocks.{i}", "transformer_blocks.{i}", _KREA_BLOCK),
    Block("txtfusion.layerwise_blocks.{i}", "text_fusion.layerwise_blocks.{i}", _KREA_BLOCK),
    Block("txtfusion.refiner_blocks.{i}", "text_fusion.refiner_blocks.{i}", _KREA_BLOCK),
    Block(
        "",
        "",
        {
            "txtfusion.projector": "text_fusion.projector",
            "first": "img_in",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.0": "txt_in.norm",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "last.linear": "final_layer.linear",
            "last.norm": "final_layer.norm",
        },
    ),
)

#: Cosmos 2 and the models built on it; the first Cosmos numbers its blocks differently
COSMOS = (
    *(
        Block(
            f"blocks.{{i}}.{native}",
            f"transformer_blocks.{{i}}.{path}",
            _NORMS | {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"},
        )
        for native, path in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    ),
    *(
        Block(
            f"blocks.{{i}}.adaln_modulation_{native}",
            f"transformer_blocks.{{i}}.{path}",
            {"1": "linear_1", "2": "linear_2"},
        )
        for native, path in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
    ),
    Block("blocks.{i}.mlp", "transformer_blocks.{i}.ff", {"layer1": "net.0.proj", "layer2": "net.2"}),
    Block("t_embedder.1", "time_embed.t_embedder", SUBTREE),
    Block(
        "",
        "",
        {
            "t_embedding_norm": "time_embed.norm",
            "x_embedder.proj.1": "patch_embed.proj",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
            "final_layer.linear": "proj_out",
        },
    ),
)

QWEN_IMAGE_21 = (
    Block(
        "transformer_blocks.{i}",
        "transformer_blocks.{i}",
        {"img_mlp.gate_up": "img_mlp.gate_layer img_mlp.proj"},
    ),
)
