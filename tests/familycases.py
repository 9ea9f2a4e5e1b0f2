"""What the tests of training's families share: tiny pipelines of every kind, adapters for all of their parts, runs."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import smallpipelines
import torch
from torch import nn
from trainingcases import ADAPTERS

from lycoris_diff import NormConfig
from lycoris_diff.training import DreamBoothConfig
from lycoris_diff.training.families import FAMILIES, Flux, StableDiffusion3, StableDiffusionXL

SIDE = 16
#: pipeline -> its family; Stable Diffusion 3 comes with T5 and without
KINDS = {"sdxl": StableDiffusionXL, "sd3": StableDiffusion3, "sd3-t5": StableDiffusion3, "flux": Flux}
UNET = ["to_q", "to_v", "conv1"]
TRANSFORMER = ["to_q", "to_v", "add_k_proj", "ff.net.2"]
CLIP = ["q_proj", "fc1"]
T5 = ["q", "wi"]
#: kohya's names have q, k and v as one weight; what cannot be put together goes elsewhere
UNFUSED = ["to_out.0", "ff.net.2"]
CANNOT_FUSE = ("dora", "lokr", "lokr-full", "boft", "glora", "tlora")
#: modules that block sizes of the tests do not divide, and convolutions that an algorithm, or its file, has no place for
LEFT_OUT = {"boft": {"fc1", "wi"}, "tlora": {"conv1"}, "miss": {"conv1"}}


def t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


@functools.cache
def _built(name: str) -> Any:
    pipe = smallpipelines.pipeline(name.removesuffix("-t5"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "sd3-t5":
            pipe.register_modules(text_encoder_3=t5(64), tokenizer_3=copy.deepcopy(pipe.tokenizer))
    if name != "sdxl":  # a shift that a latent without it is far from
        pipe.vae.register_to_config(shift_factor=0.3, scaling_factor=1.7)
        pipe.scheduler = type(pipe.scheduler)(shift=3.0, use_dynamic_shifting=name == "flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(name: str) -> Any:
    """A fresh pipeline; the same name has the same weights."""
    return copy.deepcopy(_built(name))


def family(pipe: Any) -> Any:
    return next(kind for kind in FAMILIES if kind.matches(pipe))(pipe)


def adapters(pipe: Any, name: str) -> dict[str, Any]:
    """Fresh configs of one algorithm for the denoiser and every text encoder."""
    found: dict[str, Any] = {}
    for component in family(pipe).components:
        model = type(getattr(pipe, component)).__name__
        targets = UNET if component == "unet" else TRANSFORMER if component == "transformer" else T5 if "T5" in model else CLIP
        if component == "transformer" and name in CANNOT_FUSE:
            targets = UNFUSED
        if name == "norm":
            if component == "unet":
                found[component] = NormConfig(target_modules=["norm1"])
            continue
        found[component] = ADAPTERS[name]([target for target in targets if target not in LEFT_OUT.get(name, ())])
    return found


def short_run(pipe: Any, pictures: Path, output: Path, name: str = "lora", **changes: Any) -> DreamBoothConfig:
    """A run of two steps with an adapter on every part, beside two pictures of the class."""
    settings: dict[str, Any] = {
        "instance_prompt": "a b",
        "class_prompt": "c",
        "class_data_dir": pictures,
        "num_class_images": 2,
        "resolution": SIDE,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "held_out_samples": 2,
        "trackers": (),
        "adapters": adapters(pipe, name),
    }
    return DreamBoothConfig(instance_data_dir=pictures, output_dir=output, **settings | changes)


def picture(pipe: Any, prompt: str = "a b", **call: Any) -> np.ndarray:
    """What the pipeline's own call draws, as numbers from 0 to 1."""
    given = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, **given | call).images[0]


def trained(pipe: Any) -> dict[str, torch.Tensor]:
    """Every trained value by name."""
    return {
        f"{component}.{name}": parameter.detach().clone()
        for component, part in pipe.components.items()
        if isinstance(part, nn.Module) and hasattr(part, "peft_config")
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
