"""Train the embedded tiny base model from scratch, on pictures drawn here.

    python scripts/train_tiny_base.py --out tiny-base

Stages, each resumed where it stopped when the command is given again: the autoencoder, its decoder alone for sharper
pictures, the latents of a fixed set of scenes, then the UNet and the text encoder together. Everything is a function of the
step's number and of `--seed`, so that an interrupted run and an uninterrupted one give the same weights on the same machine
with the same number of threads. The result is `OUT/tiny_base.safetensors` in float16, which goes to
`lycoris_diff/tiny/weights/`; `scripts/measure_tiny_base.py` says how good it is.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from lycoris_diff.tiny.figures import SHAPES, Creature, draw_creature, shape_mask
from lycoris_diff.tiny.pipeline import PICTURE_SIZE, build_pipeline, save_weights
from lycoris_diff.tiny.scenes import draw_scene, random_caption, random_scene

SAVE_EVERY = 200  # steps
MIN_SNR = 5.0  # weights of noise levels: https://arxiv.org/abs/2303.09556
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
LATENT_NOISE = 0.05  # in the decoder's own stage: what the denoiser draws is not exact either
STAGES = ("autoencoder", "decoder", "denoiser")
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the result and of what is needed to resume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--vae-rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="run these only (default: all)")
    parser.add_argument("--scenes", type=int, default=24_000, help="pictures that the UNet is trained on")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = build_pipeline(args.seed).to(args.device)
    with Progress(*COLUMNS, refresh_per_second=1) as progress:
        train_autoencoder(pipe, args, progress)
        if "decoder" in args.stages:
            train_decoder(pipe, args, progress)
        if "denoiser" in args.stages:
            latents, scenes = encode_scenes(pipe, args, progress)
            train_denoiser(pipe, latents, scenes, args, progress)
    if set(args.stages) == set(STAGES):
        save_weights(pipe, args.out / "tiny_base.safetensors")


def train_autoencoder(pipe: StableDiffusionPipeline, args: argparse.Namespace, progress: Progress) -> None:
    """Train `pipe.vae` on scenes and doodles, then bring its latents to mean 0 and standard deviation 1 a channel."""
    vae = pipe.vae.to(memory_format=torch.channels_last).train()

    def loss_of(step: int) -> torch.Tensor:
        pictures = draw_pictures(f"autoencoder {args.seed} {step}", args.vae_batch).to(args.device)
        posterior = vae.encode(pictures).latent_dist
        again = vae.decode(posterior.sample(_generator(args.seed, step, args.device))).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(again, pictures) + 1e-4 * divergence

    state = args.out / "autoencoder.pt"
    _train({"vae": vae}, loss_of, state, args.vae_steps, args.vae_rate, args.device, progress, "autoencoder")
    vae.eval()
    rng = random.Random(f"latents {args.seed}")
    pictures = to_tensor([draw_scene(random_scene(rng), rng) for _ in range(512)]).to(args.device)
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])
        standardise(vae, means.mean((0, 2, 3)), means.std((0, 2, 3)))


def train_decoder(pipe: StableDiffusionPipeline, args: argparse.Namespace, progress: Progress) -> None:
    """Train the way from the latents back to pictures; the latents stay as they are."""
    vae = pipe.vae.to(memory_format=torch.channels_last)
    vae.decoder.train()

    def loss_of(step: int) -> torch.Tensor:
        pictures = draw_pictures(f"decoder {args.seed} {step}", args.vae_batch).to(args.device)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean
        noise = torch.randn(latents.shape, generator=_generator(args.seed, step, args.device), device=args.device)
        return reconstruction_loss(vae.decode(latents + LATENT_NOISE * noise).sample, pictures)

    models = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    _train(models, loss_of, args.out / "decoder.pt", args.decoder_steps, args.vae_rate, args.device, progress, "decoder")
    vae.eval()


def draw_pictures(seed: str, count: int) -> torch.Tensor:
    """Scenes and doodles for the autoencoder, `(count, 3, height, width)` from -1 to 1."""
    rng = random.Random(seed)
    return to_tensor([draw_scene(random_scene(rng), rng) if rng.random() < 0.6 else draw_doodle(rng) for _ in range(count)])


def reconstruction_loss(again: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error of the pixels, and absolute error of their differences, which sharpens edges."""
    error = again - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Change the 1x1 convolutions on both sides of the latents so that `mean` and `std` a channel become 0 and 1."""
    inner, outer = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.bias[channels:] -= 2 * std.log()


def encode_scenes(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, progress: Progress
) -> tuple[torch.Tensor, list[Any]]:
    """Draw the scenes of the denoiser's training; return their latents (float16) and the scenes."""
    task = progress.add_task("latents", total=args.scenes, note="")
    latents, scenes = [], []
    part = 48
    for start in range(0, args.scenes, part):
        rng = random.Random(f"scenes {args.seed} {start}")
        new = [random_scene(rng) for _ in range(min(part, args.scenes - start))]
        pictures = to_tensor([draw_scene(scene, rng) for scene in new]).to(args.device)
        with torch.no_grad():
            latents.append(pipe.vae.encode(pictures).latent_dist.mean.half().cpu())
        scenes += new
        progress.update(task, advance=len(new))
    return torch.cat(latents), scenes


def train_denoiser(
    pipe: StableDiffusionPipeline, latents: torch.Tensor, scenes: list[Any], args: argparse.Namespace, progress: Progress
) -> None:
    """Train `pipe.unet` and `pipe.text_encoder`; they end with the exponential moving average of their weights."""
    unet = pipe.unet.to(memory_format=torch.channels_last).train()
    text_encoder = pipe.text_encoder.train()
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    # plain colours are decided where there is hardly any signal: there an error of the noise is 15 times one of the picture
    weights = ((MIN_SNR / snr).clamp(max=1.0) * snr.clamp(max=1.0).rsqrt()).to(args.device)

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"denoiser {args.seed} {step}")
        generator = _generator(args.seed, step, "cpu")
        indices = [rng.randrange(len(scenes)) for _ in range(args.batch)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else random_caption(scenes[index], rng) for index in indices]
        tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        clean = latents[indices].float()
        noise = torch.randn(clean.shape, generator=generator)
        # one timestep from each of as many equal parts: every batch sees all noise levels
        timesteps = ((torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch * len(alphas)).long()
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        text = text_encoder(tokens.to(args.device))[0]
        timesteps = timesteps.to(args.device)
        prediction = unet(noisy.to(args.device), timesteps, encoder_hidden_states=text).sample
        errors = F.mse_loss(prediction, noise.to(args.device), reduction="none").mean((1, 2, 3))
        return (weights[timesteps] * errors).mean()

    models = {"unet": unet, "text_encoder": text_encoder}
    _train(models, loss_of, args.out / "denoiser.pt", args.steps, args.rate, args.device, progress, "denoiser", ema=True)
    unet.eval()
    text_encoder.eval()


def _train(
    models: dict[str, nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    state_file: Path,
    steps: int,
    rate: float,
    device: str,
    progress: Progress,
    title: str,
    ema: bool = False,
) -> None:
    """Take `steps` steps of AdamW on `loss_of(step)` with a warmed-up cosine rate; resume from `state_file` if there."""
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    averages = [parameter.detach().clone() for parameter in parameters] if ema else []
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        start = state["step"]
        for name, model in models.items():
            model.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        averages = [average.to(device) for average in state["averages"]]
    task = progress.add_task(title, total=steps, completed=start, note="")
    recent = None
    for step in range(start, steps):
        warmup = min(1.0, (step + 1) / (0.03 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        loss = loss_of(step)
        if not loss.isfinite():
            raise SystemExit(f"the loss of step {step} is {loss.item()}; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        progress.update(task, completed=step + 1, note=f"loss {recent:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {name: model.state_dict() for name, model in models.items()}
            state |= {"optimizer": optimizer.state_dict(), "averages": averages, "step": step + 1}
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
            if not progress.console.is_terminal:
                print(f"{title}: step {step + 1} of {steps}, loss {recent:.4f}", flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=ema):
            parameter.copy_(average)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Return pictures as a float32 tensor `(pictures, 3, height, width)` from -1 to 1, channels last."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def draw_doodle(rng: random.Random, edge: int = PICTURE_SIZE) -> Image.Image:
    """Draw anything: gradients, figures, lines. The autoencoder must draw more than the scenes."""
    large = 2 * edge
    colours = _colours(rng)
    canvas = Image.new("RGB", (large, large), next(colours))
    if rng.random() < 0.5:
        ramp = Image.linear_gradient("L").resize(canvas.size).rotate(90 * rng.randint(0, 3))
        canvas = Image.composite(Image.new("RGB", canvas.size, next(colours)), canvas, ramp)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 8)):
        x, y, radius = rng.uniform(0, large), rng.uniform(0, large), large * rng.uniform(0.03, 0.35)
        box = [x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius * rng.uniform(0.4, 1)]
        kind = rng.randint(0, 5)
        if kind == 0:
            pen.ellipse(box, fill=next(colours), outline=next(colours), width=rng.choice([0, 2, 4, 6]))
        elif kind == 1:
            pen.rectangle(box, fill=next(colours))
        elif kind == 2:
            mask = shape_mask(rng.choice(SHAPES), large, (x / large, y / large), radius / large)
            canvas.paste(Image.new("RGB", canvas.size, next(colours)), (0, 0), mask.rotate(rng.uniform(0, 360)))
        elif kind == 3:
            pen.line([x, y, rng.uniform(0, large), rng.uniform(0, large)], fill=next(colours), width=rng.randint(2, 10))
        elif kind == 4:
            looks = Creature(*(next(colours) for _ in range(3)), rng.randint(1, 3), rng.random() < 0.5, rng.random() < 0.5)
            figure = draw_creature(looks, round(large * rng.uniform(0.4, 0.95)))
            canvas.paste(figure, (round(x - figure.width / 2), round(y - figure.height / 2)), figure)
        else:
            colour = next(colours)
            for index in range(rng.randint(2, 5)):
                pen.line([x - radius, y + 8 * index, x + radius, y + 8 * index], fill=colour, width=4)
    return canvas.resize((edge, edge), Image.Resampling.BOX)


def _colours(rng: random.Random) -> Iterator[tuple[int, int, int]]:
    while True:
        yield rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _generator(seed: int, step: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed << 32) + step)


if __name__ == "__main__":
    main()
