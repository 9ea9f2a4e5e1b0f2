"""Train every adapter on the embedded base model, and prove what the documentation says about training.

    python scripts/verify_training.py --markdown docs/training-results.md

For every adapter: the demo (is the subject learned, is the rest kept), a run that is killed with SIGKILL and goes on from its
checkpoint (are the weights those of an uninterrupted run, bit for bit), and the written files in the hands of others (does
PEFT compute the same from the directories, LyCORIS from the kohya file). Takes a few minutes an adapter on two cores; what is
done is kept in `--out`, so that an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import nn

from lycoris_diff.tiny import draw_subject_images, load_pipeline
from lycoris_diff.tiny.demo import demo_config, run_demo
from lycoris_diff.tiny.recipes import RECIPES, find_recipe
from lycoris_diff.training import train_dreambooth

RESUME_STEPS, KILLED_AT, CHECKPOINT_EVERY = 6, 5, 2
MARKERS = ("<!-- table -->", "<!-- end of table -->")


def main() -> int:
    """Fill the table; return 1 if something that is promised does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("verify-output"), help="results and pictures (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="document whose table is renewed")
    parser.add_argument("--child", nargs=2, metavar=("ADAPTER", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    if args.child:
        resume_run(args.child[0], Path(args.child[1]), killed=True)
    rows = {name: verify(name, args.out / name) for name in args.adapters}
    text = table(rows)
    print(text)
    if args.markdown:
        write_between(args.markdown, text)
    return 0 if all(holds(row) for row in rows.values()) else 1


def verify(adapter: str, folder: Path) -> dict[str, Any]:
    """All of one adapter's results; those of an earlier call where there are any."""
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    print(f"{adapter}: demo", file=sys.stderr, flush=True)
    report = run_demo(adapter, folder / "demo")
    print(f"{adapter}: kill -9 and resume", file=sys.stderr, flush=True)
    row = {
        "demo": report.to_dict(),
        "resumed": resumed_equals_whole(adapter, folder),
        "readers": readers(folder / "demo" / "adapter", report.training.paths),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    kept.write_text(json.dumps(row, indent=2))
    return row


# --- kill -9 -------------------------------------------------------------------------------------------------------------
def resumed_equals_whole(adapter: str, folder: Path) -> bool:
    """Whether a killed and resumed run writes the files of an uninterrupted one, byte for byte."""
    whole = resume_run(adapter, folder / "whole")
    command = [sys.executable, str(Path(__file__).resolve()), "--child", adapter, str(folder / "killed")]
    done = subprocess.run(command, check=False)
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"{adapter}: the run was to be killed, but ended with {done.returncode}")
    resumed = resume_run(adapter, folder / "killed", resume="latest")
    return whole == resumed


def resume_run(adapter: str, folder: Path, killed: bool = False, resume: str | None = None) -> dict[str, bytes]:
    """Train a few steps; with `killed` the process ends itself in the middle. The weights that were written, by component."""
    recipe = find_recipe(adapter)
    pictures = folder / "pictures"
    draw_subject_images(pictures, 3, name="sks creature")
    config = demo_config(recipe, pictures, pictures, folder / "adapter", RESUME_STEPS, seed=0)
    config = replace(config, checkpoint_every=CHECKPOINT_EVERY, resume=resume, held_out_samples=4)

    def on_step(step: Any) -> None:
        if killed and step.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    train_dreambooth(load_pipeline(), config, on_step)
    return {path.parent.name: path.read_bytes() for path in sorted((folder / "adapter").glob("*/adapter_model.safetensors"))}


# --- others' readers -----------------------------------------------------------------------------------------------------
def readers(folder: Path, paths: dict[str, Path]) -> dict[str, str]:
    """What PEFT and LyCORIS make of the files: the largest difference of their outputs from ours, or why they refuse."""
    return {"PEFT": peft_reads(folder), "LyCORIS": lycoris_reads(paths.get("kohya"))}


def answer(pipe: Any) -> torch.Tensor:
    """The denoiser's answer to a fixed question that goes through the text encoder as well."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = pipe.tokenizer("a sks creature", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(tokens)[0].expand(2, -1, -1)
        return pipe.unet(latents, torch.tensor([100, 700]), encoder_hidden_states=text).sample


def difference(pipe: Any, ours: torch.Tensor) -> str:
    """Largest difference over the largest value."""
    return f"{((answer(pipe) - ours).abs().max() / ours.abs().max()).item():.0e}"


def peft_reads(folder: Path) -> str:
    """PEFT's own models from the directories."""
    from peft import PeftModel

    from lycoris_diff.training import load_trained

    kinds = {json.loads(path.read_text())["peft_type"] for path in folder.glob("*/adapter_config.json")}
    if any(kind.startswith("LYCORIS_DIFF_") for kind in kinds):
        return "cannot express it"
    pipe = load_pipeline()
    load_trained(pipe, folder)
    ours, pipe = answer(pipe), load_pipeline()
    try:
        for part in ("unet", "text_encoder"):
            if (folder / part).is_dir():
                setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), str(folder / part)))
        return difference(pipe, ours)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        return f"no: {first_line(error)}"


def lycoris_reads(file: Path | None) -> str:
    """LyCORIS' own network from the kohya file; UNet and text encoder merged by it."""
    if file is None:
        return "no kohya file"
    from lycoris import create_lycoris_from_weights

    from lycoris_diff import load_adapter

    pipe = load_pipeline()
    load_adapter(pipe, str(file))
    ours, pipe = answer(pipe), load_pipeline()
    weights = load_file(file)
    try:
        for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
            own = {
                f"lycoris{key.removeprefix(prefix)}": value for key, value in weights.items() if key.startswith(prefix + "_")
            }
            model: nn.Module = getattr(pipe, part)
            if part == "text_encoder":  # the file has the module names of transformers 4
                own = {key.replace("lycoris_text_model_", "lycoris_"): value for key, value in own.items()}
            if own:
                network, _ = create_lycoris_from_weights(1.0, None, model, own)
                network.merge_to(1.0)
        return difference(pipe, ours)
    except (ValueError, KeyError, RuntimeError, TypeError, AssertionError, AttributeError) as error:
        return f"no: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:60]


# --- the table -----------------------------------------------------------------------------------------------------------
def holds(row: dict[str, Any]) -> bool:
    """Whether a row keeps what the documentation promises."""
    return row["demo"]["succeeded"] and row["resumed"]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    head = (
        "adapter",
        "parameters",
        "kohya / PEFT, KiB",
        "held-out loss",
        "subject score (drawn)",
        "other prompts, as asked",
        "learned / kept",
        "kill -9, resume",
        "PEFT",
        "LyCORIS",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows.values():
        training, outcome = row["demo"]["training"], row["demo"]["outcome"]
        peft = sum(size for name, size in training["bytes"].items() if name != "kohya")
        kohya = training["bytes"].get("kohya")
        cells = (
            row["demo"]["title"],
            f"{sum(training['parameters'].values()):,}",
            f"{'-' if kohya is None else round(kohya / 1024)} / {round(peft / 1024)}",
            f"{training['held_out_before']:.3f} → {training['held_out_after']:.3f}",
            f"{outcome['subject_before']:.2f} → {outcome['subject_after']:.2f} ({outcome['subject_drawn']:.2f})",
            f"{outcome['others_before']:.0%} → {outcome['others_after']:.0%}",
            " / ".join("yes" if outcome[name] else "**no**" for name in ("learned", "kept")),
            "same bits" if row["resumed"] else "**differs**",
            row["readers"]["PEFT"],
            row["readers"]["LyCORIS"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = next(iter(rows.values()))["versions"]
    today = time.strftime("%Y-%m-%d")
    lines += ["", f"Measured on {today}: {platform.machine()}, {os.cpu_count()} CPU cores, torch {versions['torch']}."]
    return "\n".join(lines) + "\n"


def write_between(path: Path, text: str) -> None:
    """Renew what stands between the markers of a document."""
    before = path.read_text(encoding="utf-8")
    start, end = MARKERS
    if start not in before or end not in before:
        raise SystemExit(f"{path} has no lines {start} and {end}")
    renewed = re.sub(f"{start}.*{end}", lambda _: f"{start}\n{text}{end}", before, flags=re.DOTALL)
    path.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
