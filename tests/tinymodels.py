"""Small random models with the full structure of the families that community files are made for.

Every block type and the number of levels of the real networks are kept, and SD1.5, SDXL and the CLIP encoders have
all their modules, so that a file for the tiny model has the same names as one for the real model; only widths are
small. Widths of Flux are such that LoKr factors fall on and off the boundaries of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def sd15(widths: tuple[int, ...] = (8, 16, 32, 32)) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def sdxl(widths: tuple[int, ...] = (8, 16, 32)) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        norm_num_groups=4,
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )


def zimage() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[32, 32, 32],
    )


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=24,
    )


def hunyuan() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )


class Layers(nn.Module):
    """One layer of every kind that an adapter may meet, and two that none can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 16)
        self.plain = nn.Linear(24, 16, bias=False)
        self.square = nn.Linear(16, 16)
        self.conv1d = nn.Conv1d(8, 16, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.conv2d = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.conv3d = nn.Conv3d(8, 16, 3)
        self.layernorm = nn.LayerNorm(16)
        self.groupnorm = nn.GroupNorm(4, 16)
        self.rmsnorm = nn.RMSNorm(16)
        self.embedding = nn.Embedding(10, 16)


class AnyPipeline:
    """As much of a diffusers pipeline as adapters need: components by name."""

    def __init__(self, **parts: nn.Module) -> None:
        self.__dict__.update(parts)
        self._parts = parts

    @property
    def components(self) -> dict[str, nn.Module]:
        return self._parts


_CLIP = {
    "vocab_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def clip_l() -> nn.Module:
    """CLIP-L: twelve layers, 72 linear layers; transformers 5 has no ``text_model`` in its names."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=12, **_CLIP))


def clip_g() -> nn.Module:
    """CLIP-G: thirty-two layers, 192 linear layers and ``text_projection``; names with ``text_model``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=32, projection_dim=16, hidden_act="gelu", **_CLIP
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu")
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "wan": wan,
    "zimage": zimage,
    "qwen": qwen,
    "lumina2": lumina2,
    "hunyuan": hunyuan,
    "layers": Layers,
    "clip_l": clip_l,
    "clip_g": clip_g,
    "t5": t5,
    # wide enough for trainers to choose low-rank factors at rank 2, where they would keep smaller ones whole
    "sd15-wide": lambda: sd15((32, 64, 64, 64)),
    "sdxl-wide": lambda: sdxl((32, 64, 64)),
}

# Component of the pipeline that each model is, and the text encoders beside it.
DENOISER = {"sd15": "unet", "sdxl": "unet"} | dict.fromkeys(
    ("flux", "flux2", "sd3", "wan", "zimage", "qwen", "lumina2", "hunyuan"), "transformer"
)
TEXT_ENCODERS: dict[str, dict[str, str]] = {
    "sd15": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5"},
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model with its own fixed weights; zero and one initialised parameters are made random, so that nothing hides."""
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if dtype != torch.float32:
        model.to(dtype)
    return model.eval().requires_grad_(False)


def components(family: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Denoiser and text encoders of a family under the names that the pipeline gives them."""
    parts = {DENOISER.get(family, "unet"): family, **TEXT_ENCODERS.get(family, {})}
    return {component: tiny(model, dtype) for component, model in parts.items()}


def pipeline(family: str, dtype: torch.dtype = torch.float32, parts: dict[str, nn.Module] | None = None) -> Any:
    """A diffusers pipeline around the components; no tokenizer, autoencoder or scheduler, which no adapter touches."""
    import diffusers

    parts = components(family, dtype) if parts is None else parts
    if family == "layers":
        return AnyPipeline(**parts)
    name, empty = {
        "sd15": ("StableDiffusionPipeline", ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")),
        "sdxl": ("StableDiffusionXLPipeline", ("vae", "tokenizer", "tokenizer_2", "scheduler")),
        "sd3": ("StableDiffusion3Pipeline", ("vae", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")),
        "flux": ("FluxPipeline", ("vae", "tokenizer", "tokenizer_2", "scheduler")),
        "flux2": ("Flux2Pipeline", ("vae", "tokenizer", "text_encoder", "scheduler")),
        "wan": ("WanPipeline", ("vae", "tokenizer", "text_encoder", "scheduler")),
        "zimage": ("ZImagePipeline", ("vae", "tokenizer", "text_encoder", "scheduler")),
        "qwen": ("QwenImagePipeline", ("vae", "tokenizer", "text_encoder", "scheduler")),
        "lumina2": ("Lumina2Pipeline", ("vae", "tokenizer", "text_encoder", "scheduler")),
        "hunyuan": ("HunyuanVideoPipeline", ("vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "scheduler")),
    }[family]
    empty = (*empty, *(c for c in TEXT_ENCODERS.get(family, {}) if c not in parts))
    extra = {"requires_safety_checker": False} if family == "sd15" else {}
    return getattr(diffusers, name)(**parts, **dict.fromkeys(empty), **extra)


# --- inputs of one forward pass


def _noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str) -> dict[str, Any]:
    """Inputs for one small forward pass of a tiny model, float32."""
    text = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(1))
    return {
        "sd15": lambda: {
            "sample": _noise(1, 4, 8, 8),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": _noise(1, 5, 24),
        },
        "sdxl": lambda: {
            "sample": _noise(1, 4, 8, 8),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": _noise(1, 5, 24),
            "added_cond_kwargs": {"text_embeds": _noise(1, 16), "time_ids": torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])},
        },
        "flux": lambda: {
            "hidden_states": _noise(1, 4, 16),
            "encoder_hidden_states": _noise(1, 5, 32),
            "pooled_projections": _noise(1, 24),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        "flux2": lambda: {
            "hidden_states": _noise(1, 4, 16),
            "encoder_hidden_states": _noise(1, 5, 32),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(4, 4),
            "txt_ids": torch.zeros(5, 4),
        },
        "sd3": lambda: {
            "hidden_states": _noise(1, 4, 8, 8),
            "encoder_hidden_states": _noise(1, 5, 24),
            "pooled_projections": _noise(1, 16),
            "timestep": torch.tensor([3.0]),
        },
        "wan": lambda: {
            "hidden_states": _noise(1, 4, 1, 4, 4),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": _noise(1, 5, 16),
            "encoder_hidden_states_image": _noise(1, 3, 20),
        },
        "clip_l": lambda: {"input_ids": text},
        "clip_g": lambda: {"input_ids": text},
        "t5": lambda: {"input_ids": text},
    }[name]()


def run(model: nn.Module, name: str) -> torch.Tensor:
    """The first tensor a tiny model returns on its inputs, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    values = inputs(name)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        result = model(**{k: cast(v) for k, v in values.items()})
    return result if isinstance(result, torch.Tensor) else result[0]
