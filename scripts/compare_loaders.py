#!/usr/bin/env python3
"""What the same adapter files do in lycoris_diff, diffusers, PEFT and LyCORIS, on small models with the real structure.

Every file is written by the tests' fixtures, whose expected changes of the weights are computed in float64 and owe nothing
to any of the four. For each reader the outputs of the pipeline's components are compared with those of models whose weights
were changed by hand: "exact" up to the rounding of float32, "silent no-op", "wrong by x %" of the intended change of the
output, or the error it raised. What would be unfair is left out: diffusers' converter for Flux.1 has the widths of the real
single blocks built in, so the files for Flux.1 leave those blocks alone; LyCORIS and PEFT choose the layout of LoKr's
factors from a layer's size, so the UNets are wide enough for the layouts they write themselves.

    python scripts/compare_loaders.py                                           # a table on the terminal, some two minutes
    python scripts/compare_loaders.py --markdown README.md --json loaders.json  # renew the table between the markers
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from community import CommunityFile, community_file
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tinymodels import MODELS, TEXT_ENCODERS, components, pipeline, run, tiny
from torch import Tensor, nn

import lycoris_diff

BEGIN, END = "<!-- compare_loaders: begin -->", "<!-- compare_loaders: end -->"
EXACT = 2e-4  # of the intended change of the output: float32 through a whole network
Parts = dict[str, nn.Module]
Reader = Callable[[str, Parts, Path], None]


@dataclass(frozen=True)
class Row:
    """One file: what a user would call it, and how the fixtures write it."""

    title: str
    family: str
    scheme: str
    algorithm: str
    text: bool = False


ROWS = (
    Row("LoRA, kohya names", "sd15", "kohya-sd", "lora"),
    Row("LoRA on UNet and text encoder, kohya names", "sd15", "kohya-sd", "lora", True),
    Row("LoRA on UNet and text encoder, without `text_model`", "sd15", "kohya-sd-no-text-model", "lora", True),
    Row("LoRA, diffusers names", "sd15", "diffusers", "lora"),
    Row("LoRA, old attention processors", "sd15", "processors", "lora"),
    Row("LoRA, Tucker convolutions", "sd15", "kohya-sd", "lora-tucker"),
    Row("LoRA with its sparse remainder", "sd15", "kohya-sd", "sparse-bias"),
    Row("DoRA by rows", "sd15", "kohya-sd", "lora-dora-rows"),
    Row("DoRA by columns", "sd15", "kohya-sd", "lora-dora-columns"),
    Row("LoHa", "sd15", "kohya-sd", "loha"),
    Row("LoHa, Tucker convolutions", "sd15", "kohya-sd", "loha-cp"),
    Row("LoHa, OneTrainer's half-dotted names", "sd15", "onetrainer-half-dotted", "loha"),
    Row("LoKr, second factor low-rank", "sd15", "kohya-sd", "lokr-w2"),
    Row("LoKr, both factors low-rank", "sd15", "kohya-sd", "lokr-both-rank-1"),
    Row("LoKr, first factor low-rank", "sd15", "kohya-sd", "lokr-w1"),
    Row("LoKr, whole factors", "sd15", "kohya-sd", "lokr-full"),
    Row("LoKr, whole factors, alpha 1e10", "sd15", "kohya-sd", "lokr-full-alpha-1e10"),
    Row("LoKr, Tucker convolutions", "sd15", "kohya-sd", "lokr-tucker"),
    Row("LoKr, unbalanced factors", "sd15", "kohya-sd", "lokr-unbalanced"),
    Row("LoKr with DoRA", "sd15", "kohya-sd", "lokr-dora-rows"),
    Row("GLoRA", "sd15", "kohya-sd", "glora"),
    Row("(IA)^3", "sd15", "kohya-sd", "ia3-out"),
    Row("full weights and biases", "sd15", "kohya-sd", "full-bias"),
    Row("norms", "sd15", "kohya-sd", "norm"),
    Row("diag-OFT", "sd15", "kohya-sd", "diag-oft"),
    Row("diag-OFT with constraint", "sd15", "kohya-sd", "diag-oft-constraint"),
    Row("BOFT", "sd15", "kohya-sd", "boft"),
    Row("T-LoRA", "sd15", "kohya-sd", "tlora-data"),
    Row("LoRA, kohya's LDM names", "sdxl", "kohya", "lora"),
    Row("LoRA on UNet and both text encoders", "sdxl", "kohya", "lora", True),
    Row("LoKr, kohya's LDM names", "sdxl", "kohya", "lokr-w2"),
    Row("LoKr, `lycoris_` names", "sdxl", "lycoris", "lokr-w2"),
    Row("LoRA, kohya names", "flux", "kohya", "lora"),
    Row("LoRA, `diffusion_model.` names", "flux", "diffusion_model-peft", "lora"),
    Row("LoRA, diffusers names", "flux", "diffusers", "lora"),
    Row("LoRA on transformer, CLIP and T5", "flux", "kohya-te3", "lora", True),
    Row("DoRA by rows, kohya names", "flux", "kohya", "lora-dora-rows"),
    Row("LoKr, kohya names", "flux", "kohya", "lokr-w2"),
    Row("LoKr, `lycoris_` names", "flux", "lycoris", "lokr-w2"),
    Row("LoHa, kohya names", "flux", "kohya", "loha"),
    Row("LoRA, `diffusion_model.` names", "flux2", "diffusion_model-peft", "lora"),
    Row("LoKr, `diffusion_model.` names", "flux2", "diffusion_model", "lokr-w2"),
    Row("LoRA, kohya names", "sd3", "kohya", "lora"),
    Row("LoKr, `lycoris_` names", "sd3", "lycoris", "lokr-w2"),
    Row("LoRA, `diffusion_model.` names", "wan", "diffusion_model-peft", "lora"),
    Row("LoKr, `diffusion_model.` names", "wan", "diffusion_model", "lokr-w2"),
    Row("PEFT directory, LoRA", "sd15", "peft", "lora"),
    Row("PEFT directory, DoRA", "sd15", "peft", "lora-dora-rows"),
    Row("PEFT directory, LoHa", "sd15", "peft", "loha"),
    Row("PEFT directory, LoKr", "sd15", "peft", "lokr-w2"),
    Row("PEFT directory, LoKr, both factors low-rank", "sd15", "peft", "lokr-both-rank-1"),
    Row("PEFT directory, MiSS", "sd15", "peft", "miss"),
    Row("PEFT directory, SHiRA", "sd15", "peft", "shira"),
    Row("PEFT directory, OFT", "sd15", "peft", "peft-oft"),
)
FAMILIES = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux": "Flux.1", "flux2": "Flux.2", "sd3": "SD 3.5", "wan": "Wan"}

# --- the readers; each changes the parts in place


def with_lycoris_diff(family: str, parts: Parts, path: Path) -> None:
    """Ours."""
    lycoris_diff.load_adapter(pipeline(family, parts=parts), path)


def with_diffusers(family: str, parts: Parts, path: Path) -> None:
    """The pipeline's own method."""
    pipe = pipeline(family, parts=parts)
    if path.is_dir():
        pipe.load_lora_weights(path, weight_name="adapter_model.safetensors")
    else:
        pipe.load_lora_weights(path)


def with_peft(family: str, parts: Parts, path: Path) -> None:
    """The denoiser from a directory."""
    from peft import PeftModel

    if not path.is_dir():
        raise NotForThisReader("reads directories only")
    (name,) = (n for n in parts if not n.startswith("text_encoder"))
    parts[name] = PeftModel.from_pretrained(parts[name], path)


def with_lycoris(family: str, parts: Parts, path: Path) -> None:
    """LyCORIS' own functions, by the prefix of the file; results are those of its forward pass."""
    from lycoris import create_lycoris_from_weights
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
    from safetensors import safe_open

    if path.is_dir():
        raise NotForThisReader("reads files only")
    (denoiser,) = (m for n, m in parts.items() if not n.startswith("text_encoder"))
    with safe_open(path, "pt") as file:
        kohya = any(key.startswith(("lora_unet", "lora_te")) for key in file.keys())  # noqa: SIM118
    if not kohya:
        network, _ = create_lycoris_from_weights(1.0, str(path), denoiser)
        network.apply_to()
        return
    # its stock targets name one layer of diffusers UNets twice, which stops it; a reader needs no targets at all
    LycorisNetworkKohya.apply_preset({"unet_target_module": ["Transformer2DModel"], "unet_target_name": []})
    encoders = [m for n, m in parts.items() if n.startswith("text_encoder")]
    text: Any = encoders[0] if family == "sd15" else encoders
    network, _ = create_network_from_weights(1.0, str(path), None, text, denoiser)
    network.apply_to(text, denoiser, True, True)


class NotForThisReader(Exception):
    """The reader makes no claim to know such files."""


READERS: dict[str, Reader] = {
    f"lycoris_diff {lycoris_diff.__version__}": with_lycoris_diff,
    f"diffusers {version('diffusers')}": with_diffusers,
    f"PEFT {version('peft')}": with_peft,
    f"LyCORIS {version('lycoris-lora')}": with_lycoris,
}

# --- measuring


def outputs(family: str, parts: Parts, names: list[str]) -> dict[str, Tensor]:
    """First output of each named component."""
    return {name: run(parts[name], TEXT_ENCODERS.get(family, {}).get(name, family)).double() for name in names}


def changed_by_hand(parts: Parts, file: CommunityFile) -> Parts:
    """Copies of the parts with the file's expected changes in their weights."""
    parts = copy.deepcopy(parts)
    with torch.no_grad():
        for component, own in file.expected.items():
            layers = dict(parts[component].named_modules())
            for path, (dw, db) in own.items():
                layers[path].weight.copy_(layers[path].weight.double() + dw.reshape(layers[path].weight.shape))
                if db is not None:
                    layers[path].bias.copy_(layers[path].bias.double() + db)
    return parts


def verdict(base: dict[str, Tensor], want: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[str, float]:
    """In words, and the relative error of the worst component; words of single components where they differ."""
    words, worst = {}, 0.0
    for name, start in base.items():
        intended = (want[name] - start).norm()
        error = float((got[name] - want[name]).norm() / intended)
        worst = max(worst, error) if error == error else error
        if (got[name] - start).norm() <= EXACT * intended:
            words[name] = "silent no-op"
        elif error <= EXACT:
            words[name] = "exact"
        else:
            words[name] = f"wrong by {error:.0%}" if error >= 0.01 else f"wrong by {error:.2%}"
    if len(set(words.values())) == 1:
        return next(iter(words.values())), worst
    return ", ".join(f"{name}: {word}" for name, word in words.items()), worst


def attempt(reader: Reader, row: Row, parts: Parts, path: Path, base: Any, want: Any) -> tuple[str, float | None]:
    """Result of one reader on one file."""
    parts = copy.deepcopy(parts)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            reader(row.family, parts, path)
            return verdict(base, want, outputs(row.family, parts, list(base)))
    except NotForThisReader as reason:
        return f"– ({reason})", None
    except Exception as error:
        text = " ".join(str(error).split())
        return f"error: {type(error).__name__}: {text[:90]}{'…' if len(text) > 90 else ''}", None


def measure(rows: list[Row]) -> list[dict[str, Any]]:
    """Every reader on every file."""
    logging.disable(logging.CRITICAL)
    models: dict[str, Parts] = {}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n, row in enumerate(track(rows, "reading", console=Console(stderr=True))):
            if row.family not in models:
                models[row.family] = components(row.family)
                if f"{row.family}-wide" in MODELS:
                    models[row.family]["unet"] = tiny(f"{row.family}-wide")
            parts = models[row.family]
            chosen = {name: m for name, m in parts.items() if row.text or not name.startswith("text_encoder")}
            file = community_file(row.family, row.scheme, row.algorithm, chosen, _some(row))
            path = file.write(Path(folder) / str(n))
            names = list(file.expected)
            base, want = outputs(row.family, parts, names), outputs(row.family, changed_by_hand(parts, file), names)
            results = {name: attempt(reader, row, parts, path, base, want) for name, reader in READERS.items()}
            words = {name: {"verdict": word, "error": error} for name, (word, error) in results.items()}
            found.append({**asdict(row), "modules": file.modules, "results": words})
    return found


def _some(row: Row) -> Callable[[str], bool]:
    """A part of the modules: enough to go wrong on, and few enough that random changes do not drown the signal."""
    skipped = "single_transformer_blocks" if row.family == "flux" else " "
    wanted = re.compile(r"(down_blocks\.1|mid_block|blocks\.0|layers\.[01]|block\.0|norm_out|proj_out)\b")
    return lambda path: bool(wanted.search(path)) and skipped not in path


# --- showing


def short(text: str) -> str:
    """A verdict as a table's cell."""
    return f"**{text}**" if text == "exact" else text.replace("|", "\\|").replace("<", "\\<")


def markdown(found: list[dict[str, Any]]) -> str:
    """The table, with a count of exact rows under each reader."""
    lines = ["| base | file | " + " | ".join(READERS) + " |", "|---|---|" + "---|" * len(READERS)]
    for row in found:
        cells = [_summary(row["results"][name]["verdict"]) for name in READERS]
        lines.append(f"| {FAMILIES[row['family']]} | {row['title']} | " + " | ".join(cells) + " |")
    exact = [sum(row["results"][name]["verdict"] == "exact" for row in found) for name in READERS]
    lines.append(f"| | **exact of {len(found)}** | " + " | ".join(f"**{n}**" for n in exact) + " |")
    return "\n".join(lines)


def _summary(text: str) -> str:
    """Without the error's text, which the JSON has."""
    if text.startswith("–"):
        return "–"
    match = re.match(r"error: (\w+)", text)
    return f"error: {match[1]}" if match else short(text)


def put(document: Path, text: str) -> None:
    """Put the table between the markers of a document; a document without them gets them at its end."""
    whole = document.read_text() if document.exists() else ""
    block = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in whole:
        whole = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, whole, flags=re.DOTALL)
    else:
        whole = f"{whole.rstrip()}\n\n{block}\n"
    document.write_text(whole)


def main() -> None:
    """Measure, show, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose base, names or algorithm contain this text")
    parser.add_argument("--markdown", type=Path, help="document whose table is renewed")
    parser.add_argument("--json", type=Path, help="file for all results, error texts included")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.only in f"{row.family} {row.scheme} {row.algorithm} {row.title}"]
    found = measure(rows)
    table = Table("base", "file", *READERS)
    for row in found:
        table.add_row(FAMILIES[row["family"]], row["title"], *(row["results"][name]["verdict"] for name in READERS))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        put(options.markdown, markdown(found))


if __name__ == "__main__":
    main()
