"""A pipeline as training leaves it, without the training: adapters with values, and what they answer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from lycoris_diff import LoHaConfig, LoKrConfig, LoraConfig, MissConfig, ShiraConfig, get_peft_model
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.outputs import RunFacts

LINEAR = ["to_q", "to_v"]
CONVS = ["to_q", "to_v", "conv1"]
TEXT = ["q_proj", "fc1"]
#: algorithm -> config for a list of targets, and whether it goes on convolutions here
CASES: dict[str, tuple[Any, list[str]]] = {
    "lora": (lambda t: LoraConfig(r=4, lora_alpha=2, target_modules=t), LINEAR),
    "lora-conv": (lambda t: LoraConfig(r=4, lora_alpha=8, target_modules=t), CONVS),
    "dora": (lambda t: LoraConfig(r=4, lora_alpha=4, target_modules=t, use_dora=True), LINEAR),
    "lokr": (lambda t: LoKrConfig(r=2, alpha=2, target_modules=t), LINEAR),
    "lokr-full": (lambda t: LoKrConfig(r=8, alpha=8, target_modules=t, decompose_factor=4, full_matrix=True), CONVS),
    "lokr-dora": (lambda t: LoKrConfig(r=2, alpha=2, target_modules=t, weight_decompose=True), LINEAR),
    "loha": (lambda t: LoHaConfig(r=4, alpha=4, target_modules=t), LINEAR),
    "loha-conv": (lambda t: LoHaConfig(r=4, alpha=4, target_modules=t, use_effective_conv2d=True), CONVS),
    "miss": (lambda t: MissConfig(r=8, target_modules=t), LINEAR),
    "shira": (lambda t: ShiraConfig(r=4, target_modules=t, random_seed=0), LINEAR),
}
PROMPT = "a red circle"


def config_for(output: Path, name: str = "lora", **changes: Any) -> DreamBoothConfig:
    """A run with one algorithm on the UNet and the text encoder."""
    make, targets = CASES[name]
    values: dict[str, Any] = {
        "instance_data_dir": "pictures/of-sks",
        "output_dir": output,
        "instance_prompt": "a sks circle",
        "adapters": {"unet": make(targets), "text_encoder": make(TEXT)},
        "resolution": 64,
        "preview_prompts": (PROMPT, "a blue square"),
        "preview_steps": 2,
        "preview_seed": 7,
    }
    return DreamBoothConfig(**values | changes)


def trained_pipeline(config: DreamBoothConfig, seed: int = 1) -> Any:
    """The tiny pipeline with the run's adapters, every trained value moved."""
    pipe = fresh_pipeline()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for component, adapter in config.adapters.items():
        model = get_peft_model(getattr(pipe, component), copy.deepcopy(adapter), "default")
        setattr(pipe, component, model)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return pipe


_base = functools.cache(build_pipeline)


def fresh_pipeline() -> Any:
    """The tiny pipeline without adapters, another one at every call."""
    parts = {name: copy.deepcopy(part) for name, part in _base(0).components.items()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def facts_for(config: DreamBoothConfig, **changes: Any) -> RunFacts:
    values: dict[str, Any] = {"model": "tiny", "steps": 20, "pictures": 3, "dataset_digest": "ab" * 32, "prediction": "epsilon"}
    return RunFacts(**values | changes)


@torch.no_grad()
def answer(pipe: Any) -> torch.Tensor:
    """What the denoiser says to a fixed question that goes through the text encoder."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    pipe.unet.eval(), pipe.text_encoder.eval()
    text = pipe.text_encoder(tokens)[0].expand(2, -1, -1)
    return pipe.unet(latents, torch.tensor([10, 700]), encoder_hidden_states=text).sample
