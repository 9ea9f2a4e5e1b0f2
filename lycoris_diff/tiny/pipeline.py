"""A complete Stable Diffusion 1.x pipeline in miniature, built offline in a second.

Every part has the class, the block layout and hence the module names of Stable Diffusion 1.5; only widths, depths of
the text encoder and the picture size (64 x 64, latents 4 x 16 x 16) are small. What works on this pipeline by module
name works on the real one.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..files import replacing
from .tokenizer import build_tokenizer

COMPONENTS = ("vae", "text_encoder", "unet")
WEIGHTS = Path(__file__).with_name("weights") / "tiny_base.safetensors"

PICTURE_SIZE = 64
LATENT_CHANNELS = 4
TEXT_WIDTH = 128


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Build the tiny pipeline with random weights, in float32 on the CPU and in evaluation mode.

    The same `seed` gives the same weights; torch's global random state is left as it was. The safety checker and the
    feature extractor are absent.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        text_encoder = _text_encoder(tokenizer)
        vae = _vae()
        unet = _unet()
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_pipeline() -> StableDiffusionPipeline:
    """Return the trained tiny base model in float32: it draws a shape or a creature of a colour on a plain background.

    `docs/tiny.md` says what it can draw, and how well.
    """
    pipe = build_pipeline()
    load_weights(pipe, WEIGHTS)
    pipe.register_to_config(_name_or_path="tiny")
    return pipe


def load_weights(pipe: StableDiffusionPipeline, path: str | PathLike[str]) -> None:
    """Put what `save_weights` wrote into a pipeline of the same architecture.

    Raises:
        OSError: `path` cannot be opened.
        RuntimeError: names or shapes differ from the pipeline's.
    """
    tensors = load_file(path)
    for component in COMPONENTS:
        prefix = component + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        getattr(pipe, component).load_state_dict(own)


def save_pipeline(directory: str | PathLike[str], seed: int = 0) -> None:
    """Write the tiny pipeline to `directory` (made if absent), for `StableDiffusionPipeline.from_pretrained`.

    Raises:
        OSError: `directory` cannot be written.
    """
    build_pipeline(seed).save_pretrained(directory)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _vae() -> AutoencoderKL:
    widths = (16, 32, 64)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        scaling_factor=1.0,  # training leaves latents of standard deviation 1 a channel
    )
    with torch.no_grad():  # a trained autoencoder is sure of its latents; a random one must be told to be
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -10
    return vae


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        attention_head_dim=4,  # the number of heads, as in SD 1.5's own configuration
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def save_weights(pipe: StableDiffusionPipeline, path: str | PathLike[str]) -> None:
    """Write the pipeline's weights to one safetensors file in float16, each named `component.parameter`."""
    tensors = {
        f"{component}.{name}": tensor.detach().to("cpu", torch.float16).contiguous()
        for component in COMPONENTS
        for name, tensor in getattr(pipe, component).state_dict().items()
    }
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
