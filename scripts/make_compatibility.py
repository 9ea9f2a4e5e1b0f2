#!/usr/bin/env python3
"""docs/compatibility.md: what loads, as measured: every algorithm under every naming scheme, and on every model family.

Each cell is a file written by the tests' fixtures and loaded into a small model with the real structure; "exact" means that
every weight changed as computed in float64 beforehand, and none else.

    python scripts/make_compatibility.py           # rewrite the document
    python scripts/make_compatibility.py --check   # compare only; exit code 1 when it is out of date
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from community import CommunityFile, community_file, names_in, schemes_for
from community_algorithms import ALGORITHMS
from formats_run import changes, difference, models
from rich.console import Console
from rich.progress import track
from tinymodels import DENOISER

from lycoris_diff import AdapterError

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
FAMILIES = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd3": "SD 3.5",
    "flux": "Flux.1",
    "flux2": "Flux.2",
    "wan": "Wan",
    "zimage": "Z-Image",
    "qwen": "Qwen-Image",
    "lumina2": "Lumina 2",
    "hunyuan": "HunyuanVideo",
}
SCHEMES = {
    "kohya-diffusers": "kohya",
    "lycoris": "`lycoris_`",
    "diffusers-alpha": "`unet.` with alpha",
    "diffusers": "`unet.`, PEFT's suffixes",
    "diffusers-default": "`.default.`",
    "ai-toolkit": "ai-toolkit",
    "bare": "no prefix",
    "peft": "PEFT directory",
}
TITLES = {
    "lora": "LoRA",
    "dylora": "DyLoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "ia3": "(IA)^3",
    "full": "full",
    "norm": "norms",
    "diag-oft": "diag-OFT",
    "boft": "BOFT",
    "kohya-oft": "kohya's OFT",
    "peft-oft": "PEFT's OFT",
    "tlora": "T-LoRA",
    "miss": "MiSS",
    "shira": "SHiRA",
    "sparse-bias": "LoRA with LyCORIS' sparse remainder",
}
#: fewer modules of the big UNets: one block with everything in it
_PART = re.compile(r"(down_blocks\.1\.(resnets|attentions|downsamplers)\.0|up_blocks\.1\.upsamplers)\b")
#: what differs only in how a file spells its numbers is shown once, in the table of names
_SPELLINGS = ("alpha", "rs", "rank", "float")


def title(algorithm: str) -> str:
    """An algorithm as the table calls it: its name and the variant."""
    start = max((k for k in TITLES if algorithm == k or algorithm.startswith(f"{k}-")), key=len)
    variant = algorithm[len(start) + 1 :].replace("-", " ")
    return f"{TITLES[start]}, {variant}" if variant else TITLES[start]


def result(family: str, file: CommunityFile, folder: Path) -> str:
    """ "exact", "refused: …" or, which must not be, "wrong"; "" for a file that does not exist."""
    if not file.modules:
        return ""
    try:
        found, _ = changes(family, models(family), file.write(folder / "file"))
    except AdapterError as error:
        return f"refused: {error}"
    return "exact" if max(difference(found, file.expected).values()) < 1e-6 else "WRONG"


def scheme_cell(algorithm: str, scheme: str, folder: Path) -> str:
    """All kinds of layers under one naming scheme."""
    if scheme not in schemes_for("layers", algorithm) or algorithm == "tlora-random":
        return "–"
    return result("layers", community_file("layers", scheme, algorithm, models("layers")), folder).split(":")[0] or "–"


def family_cell(algorithm: str, family: str, folder: Path) -> str:
    """The denoiser under the names that its trainers use; weights that diffusers holds in another form are tried apart."""
    scheme = next((s for s in ("kohya", "kohya-sd", "kohya-oft", "peft") if s in schemes_for(family, algorithm)), None)
    if scheme is None or algorithm == "tlora-random":
        return "–"
    denoiser = DENOISER[family]
    parts = {denoiser: models(family)[denoiser]}
    kinds: dict[str, set[str]] = {"": set(), "halves": set(), "fused": set()}
    for shares in names_in(scheme, family, denoiser, parts[denoiser]).values():
        kind = "fused" if len(shares) > 1 else "halves" if shares[0].swapped else ""
        kinds[kind] |= {s.path for s in shares if family not in ("sd15", "sdxl") or _PART.search(s.path)}
    found: dict[str, list[str]] = {}
    for kind, paths in kinds.items():
        word = result(family, community_file(family, scheme, algorithm, parts, paths), folder).split(":")[0]
        if word:
            found.setdefault(word, []).append(kind)
    if len(found) < 2:
        return next(iter(found), "–")
    return "; ".join(word if "" in names else f"{' and '.join(names)} {word}" for word, names in found.items())


def rows(cell: Callable[[str, str, Path], str], columns: Iterable[str], algorithms: Iterable[str]) -> dict[str, list[str]]:
    """Algorithm -> its cells."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {a: [cell(a, column, Path(folder)) for column in columns] for a in algorithms}


def shown_by_family() -> list[str]:
    """Algorithms of the second table."""
    return [a for a in ALGORITHMS if not any(word in a.split("-") for word in _SPELLINGS)]


def table(head: Iterable[str], body: dict[str, list[str]]) -> str:
    """A Markdown table; algorithms without any file are left out."""
    head = ["algorithm", *head]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [f"| {title(a)} | " + " | ".join(cells) + " |" for a, cells in body.items() if set(cells) != {"–"}]
    return "\n".join(lines)


def document(progress: bool = False) -> str:
    """The whole text."""
    walk = lambda names: track(names, console=Console(stderr=True), disable=not progress)
    schemes = rows(scheme_cell, SCHEMES, walk(list(ALGORITHMS)))
    families = rows(family_cell, FAMILIES, walk(shown_by_family()))
    return _TEXT.format(schemes=table(SCHEMES.values(), schemes), families=table(FAMILIES.values(), families))


_TEXT = """# Compatibility

Made by `scripts/make_compatibility.py` from files that the tests write; not edited by hand. *exact*: every weight of the small
model with the real structure changed as computed in float64 beforehand, and none else. *refused*: loading raises an error that
says why, and changes nothing. *–*: no trainer writes such files.

## Algorithms and naming schemes

Linear with and without bias, square and not, Conv1d, Conv2d 1x1, 3x3 with stride and with groups, Conv3d; LayerNorm and
GroupNorm for norms.

{schemes}

T-LoRA from a random start is refused: what training began with is in no file.

## Algorithms and model families

Under the names that trainers use for the family: LDM names for SDXL, the original names for transformers. *fused* are the
weights there that diffusers splits: q, k and v, and the first layer of Flux.1's single blocks; *halves* are final modulations,
whose two halves diffusers exchanges. What is refused changes a share of the rows by something that only the whole weight knows:
norms of columns, rotations across the border of two shares, singular vectors. LoKr whose blocks end between two shares stays
exact.

{families}
"""


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    text = document(progress=True)
    if options.check:
        return int(not DOCUMENT.exists() or DOCUMENT.read_text() != text)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
