"""What the tests of training share: a very small Stable Diffusion pipeline, pictures, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import smallpipelines
import torch
from PIL import Image

from lycoris_diff import (
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    NormConfig,
    OFTConfig,
    ShiraConfig,
    TLoraConfig,
)
from lycoris_diff.training import DreamBoothConfig

SIDE = 16
UNET = ["to_q", "to_v", "conv1"]
TEXT = ["q_proj", "fc1"]
#: one config of every algorithm, by name; the text encoder's has no convolutions
ADAPTERS: dict[str, Any] = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets, lora_dropout=0.1),
    "dora": lambda targets: LoraConfig(r=2, target_modules=targets, use_dora=True),
    "lokr": lambda targets: LoKrConfig(r=2, target_modules=targets, use_effective_conv2d=True, module_dropout=0.2),
    "lokr-full": lambda targets: LoKrConfig(r=2, target_modules=targets, full_matrix=True),
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets, use_effective_conv2d=True, rank_dropout=0.2),
    "miss": lambda targets: MissConfig(r=4, target_modules=targets),
    "miss-bat": lambda targets: MissConfig(r=4, target_modules=targets, init_weights="bat"),
    "shira": lambda targets: ShiraConfig(r=2, target_modules=targets, random_seed=0),
    "oft": lambda targets: OFTConfig(oft_block_size=4, target_modules=targets),
    "diag-oft": lambda targets: DiagOFTConfig(r=4, target_modules=targets),
    "boft": lambda targets: BOFTConfig(r=4, target_modules=[t for t in targets if t != "fc1"]),
    "glora": lambda targets: GLoraConfig(r=2, target_modules=targets),
    "tlora": lambda targets: TLoraConfig(r=2, target_modules=[t for t in targets if t != "conv1"]),
    "ia3": lambda targets: IA3Config(target_modules=targets),
    "full": lambda targets: FullConfig(target_modules=targets),
}


def adapters(name: str) -> dict[str, Any]:
    """Fresh configs of one algorithm for both components; NormConfig has norm layers to go on."""
    if name == "norm":
        return {"unet": NormConfig(target_modules=["norm1"])}
    return {"unet": ADAPTERS[name](list(UNET)), "text_encoder": ADAPTERS[name](list(TEXT))}


def small_pipe() -> Any:
    """The same very small pipeline at every call: 16 x 16 pictures, latents 4 x 8 x 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = smallpipelines.sd15()
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval()
    return pipe


def draw(folder: Path, count: int = 3, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> Path:
    """Pictures of random rectangles."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        pixels = rng.integers(0, 255, (1, 1, 3), dtype=np.uint8).repeat(height, 0).repeat(width, 1)
        pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def short_run(pictures: Path, output: Path, name: str = "lora", **changes: Any) -> DreamBoothConfig:
    """A run of two steps."""
    settings: dict[str, Any] = {
        "instance_prompt": "a b",
        "resolution": SIDE,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "held_out_samples": 4,
        "trackers": (),
        "adapters": adapters(name),
    }
    return DreamBoothConfig(instance_data_dir=pictures, output_dir=output, **settings | changes)


def outputs(pipe: Any) -> torch.Tensor:
    """The denoiser's answer to a fixed question that goes through both components."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = pipe.tokenizer("a b", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(tokens)[0].expand(2, -1, -1)
        return pipe.unet(latents, torch.tensor([10, 700]), encoder_hidden_states=text).sample


def trained(pipe: Any) -> dict[str, torch.Tensor]:
    """Every trained value by name."""
    return {
        f"{component}.{name}": parameter.detach().clone()
        for component in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, component).named_parameters()
        if parameter.requires_grad
    }


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
