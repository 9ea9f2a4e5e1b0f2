"""What a file says about itself: kohya's training metadata and hashes, and the model spec header.

What a file brought along is kept; what describes the tensors is written anew, because these have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone

import safetensors.torch
from torch import Tensor

from ..naming.bases import ALIASES, BASES
from .checkpoint import Checkpoint, Entry

#: describe the layout that a file had before
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata", "format")
#: beginning of the keys under which the reader keeps PEFT's configs
_CONFIG = "adapter_config"
#: base model -> kohya's word for it, and the model spec's
_VERSIONS: dict[str, tuple[str, str]] = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd21": ("sd_v2", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "sd3": ("sd3", "stable-diffusion-3-medium"),
    "sd35-medium": ("sd3.5-medium", "stable-diffusion-3.5-medium"),
    "sd35-large": ("sd3.5-large", "stable-diffusion-3.5-large"),
    "flux": ("flux1", "flux-1-dev"),
    "chroma": ("chroma", "chroma"),
    "flux2": ("flux_2_dev", "flux-2-dev"),
    "hunyuan-video": ("hunyuan_video", "hunyuan-video"),
    "wan": ("wan", "wan2.1"),
    "z-image": ("z_image", "Z-Image"),
    "qwen-image": ("qwen_image", "Qwen-Image"),
    "lumina2": ("lumina2", "lumina-2"),
}
#: algorithm -> the word LyCORIS and the model spec header use
WORDS = {
    "LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "GLORA": "glora", "IA3": "ia3", "FULL": "full", "NORM": "norm",
    "DIAG_OFT": "diag-oft", "LYCORIS_BOFT": "boft", "OFT": "oft", "TLORA": "tlora", "MISS": "miss", "SHIRA": "shira",
}  # fmt: skip
#: beside another algorithm these are what comes with it
_COMPANIONS = ("FULL", "NORM")


def entries_of(ckpt: Checkpoint) -> list[Entry]:
    """All entries of a checkpoint."""
    return [e for modules in ckpt.components.values() for entries in modules.values() for e in entries]


def main_algorithm(algorithms: list[str]) -> str:
    """The algorithm a file is called by: the one on most modules that does not merely accompany another, "" for none."""
    counts = Counter(algorithms)
    own = {a: n for a, n in counts.items() if a not in _COMPANIONS} or counts
    return max(own, key=lambda a: own[a], default="")


def kept_metadata(ckpt: Checkpoint) -> dict[str, str]:
    """What a file said, without what describes its old layout."""
    return {k: v for k, v in ckpt.metadata.items() if k not in _STALE and not k.startswith(_CONFIG)}


def file_metadata(
    ckpt: Checkpoint,
    algorithms: list[str],
    title: str,
    extra: Mapping[str, str] | None = None,
    kohya: bool = True,
) -> dict[str, str]:
    """Metadata of a new file: the old file's, completed.

    Args:
        ckpt: what is written.
        algorithms: as written, one a weight.
        title: of the model, for the header.
        extra: goes over everything else.
        kohya: write what kohya's readers and user interfaces look for.
    """
    out = kept_metadata(ckpt)
    name = main_algorithm(algorithms)
    if kohya:
        out = _training(ckpt, name) | out
    out |= _header(ckpt, name, title, out)
    return {**out, "format": "pt", **(extra or {})}


def _training(ckpt: Checkpoint, algorithm: str) -> dict[str, str]:
    """Kohya's least set, under ``--no_metadata``; only what the file did not say."""
    main = [e for e in entries_of(ckpt) if e.algorithm == algorithm]
    ranks, alphas = {e.rank for e in main if e.rank}, {round(e.scale * e.rank, 6) for e in main if e.rank}
    version, _ = _VERSIONS.get(_base(ckpt), ("", ""))
    values = {
        "ss_v2": str(_base(ckpt) == "sd21"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora" if all(_plain_lora(e) for e in entries_of(ckpt)) else "lycoris.kohya",
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one(alphas),
        "ss_network_args": json.dumps({"algo": WORDS.get(algorithm, algorithm.lower())}),
    }
    return {k: v for k, v in values.items() if v}


def _base(ckpt: Checkpoint) -> str:
    """Name of the base model; a directory's path is nobody else's business."""
    name = ALIASES.get(ckpt.base_model, ckpt.base_model)
    return name if name in BASES else ""


def _plain_lora(entry: Entry) -> bool:
    """What sd-scripts' own network can be."""
    return entry.algorithm == "LORA" and entry.tensors.keys() == {"lora_A.weight", "lora_B.weight"}


def _one(values: set) -> str:
    """The only value, or kohya's word for several."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic" if values else ""


def _header(ckpt: Checkpoint, algorithm: str, title: str, known: Mapping[str, str]) -> dict[str, str]:
    """The model spec's required fields; the architecture names the algorithm that is in the file."""
    word = WORDS.get(algorithm, algorithm.lower())
    said = known.get("modelspec.architecture", "").rpartition("/")[0]
    base = said or _VERSIONS.get(_base(ckpt), ("", _base(ckpt)))[1] or "unknown"
    return {
        "modelspec.sai_model_spec": known.get("modelspec.sai_model_spec", "1.0.1"),
        "modelspec.architecture": f"{base}/{word}",
        "modelspec.implementation": known.get("modelspec.implementation", "diffusers"),
        "modelspec.title": known.get("modelspec.title", title),
        "modelspec.date": known.get("modelspec.date", datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")),
    }


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Hashes by which A1111 recognises a file whatever its other metadata: of the body, and of a piece of the file.

    Both belong to the file as it would be with its ``ss_*`` metadata alone.
    """
    plain = safetensors.torch.save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]
    whole = hashlib.sha256(body).hexdigest()
    piece = hashlib.sha256(memoryview(plain)[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": whole, "sshs_legacy_hash": piece, "modelspec.hash_sha256": f"0x{whole}"}
