"""Tiny random pipelines of every family with the block structure, and hence the module names, of the real ones."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 16
SIDE = 16


def _vae(channels: int = 4, quantized: bool = True) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        use_quant_conv=quantized,
        use_post_quant_conv=quantized,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _clip(width: int = 32, projection: bool = False, layers: int = 2) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=WORDS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _tokenizer() -> Any:
    from smallmodels import tokenizer

    return tokenizer()


def small_unet(**fields: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16, 16, 16),
            "layers_per_block": 2,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **fields,
        }
    )


def sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        unet=small_unet(),
        scheduler=DDIMScheduler(num_train_timesteps=1000, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = small_unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(16, quantized=False),
        text_encoder=_clip(projection=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(quantized=False),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=_tokenizer(),
        transformer=transformer,
    )


BUILDERS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


@functools.cache
def _built(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe


def pipeline(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh pipeline; the same family has the same weights."""
    pipe = copy.deepcopy(_built(family))
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def latents(pipe: Any, seed: int = 0, steps: int = 2, **call: Any) -> Tensor:
    """A few steps of sampling from a fixed seed, as latents in float32."""
    generator = torch.Generator().manual_seed(seed)
    given = {"height": SIDE, "width": SIDE, "output_type": "latent", "max_sequence_length": WORDS}
    known = inspect.signature(pipe.__call__).parameters
    given = {k: v for k, v in given.items() if k in known} | {"num_inference_steps": steps, **call}
    out = pipe("a cat", generator=generator, **given)
    return out.images.detach().float().clone()


def weights_of(pipe: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by component and name."""
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, nn.Module)}
    return {f"{n}.{k}": v.detach().clone() for n, p in parts.items() for k, v in p.state_dict().items()}


def same_weights(pipe: Any, other: Any) -> bool:
    """Whether two pipelines have the same names and the same bits."""
    found, expected = weights_of(pipe), weights_of(other)
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
