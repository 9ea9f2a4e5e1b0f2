"""Names of text encoders in projects other than the installed transformers."""

from __future__ import annotations

from .rows import SUBTREE, Block

_LAYER = {
    "attn.in_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_FINAL_NORM = {"final_layer_norm": "final_layer_norm"}

#: open_clip's names, which A1111 uses for SD2: with and without its own ``model`` and transformers' ``text_model``
OPEN_CLIP = tuple(
    block
    for native in ("model.", "")
    for path in ("", "text_model.")
    for block in (
        Block(f"{native}transformer.resblocks.{{i}}", f"{path}encoder.layers.{{i}}", _LAYER),
        Block(native.removesuffix("."), path.removesuffix("."), {"ln_final": "final_layer_norm"}),
    )
)
#: transformers 5 took the segment out of CLIPTextModel and left it in CLIPTextModelWithProjection
TEXT_MODEL = (
    Block("text_model.encoder", "encoder", SUBTREE),
    Block("encoder", "text_model.encoder", SUBTREE),
    Block("text_model", "", _FINAL_NORM),
    Block("", "text_model", _FINAL_NORM),
)
