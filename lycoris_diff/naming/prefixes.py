"""Prefixes of tensor names: which pipeline component a name belongs to, and whether its dots are underscores."""

from __future__ import annotations

from typing import NamedTuple


class Prefix(NamedTuple):
    """What the beginning of a name says.

    Attributes:
        text: the prefix itself, separator included.
        flat: the dots of what follows are written as underscores.
        components: attributes of the pipeline it may mean, most likely first; empty when it says nothing.
        dialect: naming scheme that uses it.
    """

    text: str
    flat: bool
    components: tuple[str, ...]
    dialect: str


_DENOISER = ("unet", "transformer")
# The T5 of SD3 is its third text encoder, that of Flux its second, that of PixArt and Wan the only one. OneTrainer counts
# Flux' T5 as te2, sd-scripts as te3.
_CLIP_L = ("text_encoder", "text_encoder_2")
_CLIP_G = ("text_encoder_2", "text_encoder")
_T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")

# Which row applies is decided by the longest matching text, not by the order.
PREFIXES: tuple[Prefix, ...] = (
    Prefix("lora_unet_", True, _DENOISER, "kohya"),
    Prefix("lora_unet__", True, ("transformer", "unet"), "wan-fun"),
    Prefix("lora_te_", True, ("text_encoder",), "kohya"),
    Prefix("lora_te1_", True, ("text_encoder",), "kohya"),
    Prefix("lora_te2_", True, ("text_encoder_2",), "kohya"),
    Prefix("lora_te3_", True, ("text_encoder_3", "text_encoder_2"), "kohya"),
    Prefix("oft_unet_", True, _DENOISER, "kohya-oft"),
    Prefix("lycoris_", True, (), "lycoris"),
    Prefix("lora_transformer_", True, ("transformer",), "onetrainer-legacy"),
    Prefix("lora_prior_unet_", True, ("prior", "prior_prior"), "onetrainer-legacy"),
    Prefix("lora_prior_te_", True, ("text_encoder", "prior_text_encoder"), "onetrainer-legacy"),
    Prefix("diffusion_model.", False, _DENOISER, "comfyui"),
    Prefix("model.diffusion_model.", False, _DENOISER, "comfyui"),
    Prefix("text_encoders.clip_l.transformer.", False, _CLIP_L, "comfyui"),
    Prefix("text_encoders.clip_g.transformer.", False, _CLIP_G, "comfyui"),
    Prefix("text_encoders.clip_h.transformer.", False, ("text_encoder",), "comfyui"),
    Prefix("text_encoders.t5xxl.transformer.", False, _T5, "comfyui"),
    Prefix("text_encoders.umt5xxl.transformer.", False, ("text_encoder",), "comfyui"),
    Prefix("unet.", False, ("unet",), "diffusers"),
    Prefix("transformer.", False, ("transformer",), "diffusers"),
    Prefix("transformer_2.", False, ("transformer_2",), "diffusers"),
    Prefix("prior.", False, ("prior", "prior_prior"), "diffusers"),
    Prefix("text_encoder.", False, ("text_encoder",), "diffusers"),
    Prefix("text_encoder_2.", False, ("text_encoder_2",), "diffusers"),
    Prefix("text_encoder_3.", False, ("text_encoder_3",), "diffusers"),
    Prefix("base_model.model.", False, (), "peft"),
    Prefix("clip_l.", False, _CLIP_L, "omi"),
    Prefix("clip_l.transformer.", False, _CLIP_L, "omi"),
    Prefix("clip_g.", False, _CLIP_G, "omi"),
    Prefix("clip_g.transformer.", False, _CLIP_G, "omi"),
    Prefix("clip_h.", False, ("text_encoder",), "omi"),
    Prefix("t5.", False, _T5, "omi"),
    Prefix("t5xxl.transformer.", False, _T5, "omi"),
)

_LONGEST_FIRST = sorted(PREFIXES, key=lambda row: -len(row.text))
# PEFT's wrapper also occurs behind a component's name: "unet.base_model.model.down_blocks..."
_WRAPPER = "base_model.model."


def prefix_of(stem: str) -> Prefix:
    """The row of `PREFIXES` that a tensor's name, without its factor's suffix, begins with.

    A name without a known prefix has the empty one: no components, dialect "bare", flat when there is no dot in the name.
    """
    for row in _LONGEST_FIRST:
        if stem.startswith(row.text):
            return row
    return Prefix("", "." not in stem, (), "bare")


def split_prefix(stem: str) -> tuple[tuple[str, ...], str, bool]:
    """Split a tensor's name, already without its factor's suffix, into component and module.

    Returns:
        ``(components, name, flat)``: attributes of the pipeline it may belong to, most likely first and none when the prefix
        does not say; the module's name; whether its underscores may be dots.
    """
    row = prefix_of(stem)
    name = stem[len(row.text) :]
    return row.components, name if row.flat else name.removeprefix(_WRAPPER), row.flat
