"""Dialects: the naming schemes and habits of the programs that write adapter files, as one table.

Every tensor is read by its own name, whatever the dialect, since files mix schemes. The dialect of the whole file says what
the names leave open (what an alpha of 0 means), what to report, and which scheme to write when the file is saved again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError, nearest


@dataclass
class Facts:
    """What the names and the metadata of a file show.

    Attributes:
        prefixes: prefix of a module's name ("lora_unet_", "transformer.", "" ...) -> number of modules.
        spellings: spelling of LoRA's factors ("kohya", "peft", "diffusers", "processor", "xlabs") -> number of tensors.
        ldm: modules with block names of the original Stable Diffusion code (``input_blocks_4_1_...``).
        half_dotted: flat names with a dot left in them.
        leaves: parts of fused weights under a number of their own (``qkv.0``).
        metadata: of the file.
        has_config: an ``adapter_config.json`` came with it.
    """

    prefixes: Counter[str] = field(default_factory=Counter)
    spellings: Counter[str] = field(default_factory=Counter)
    ldm: int = 0
    half_dotted: int = 0
    leaves: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    has_config: bool = False

    def count(self, *prefixes: str) -> int:
        """Modules whose prefix begins with one of these."""
        return sum(n for prefix, n in self.prefixes.items() if prefix.startswith(prefixes))

    def mostly(self, *prefixes: str) -> bool:
        """At least half of all modules have one of these prefixes."""
        return 2 * self.count(*prefixes) >= max(1, sum(self.prefixes.values()))

    def names(self, *keys: str) -> bool:
        """One of these keys, or keys beginning so where they end in an underscore, is in the metadata."""
        return any(k in self.metadata or (k.endswith("_") and any(m.startswith(k) for m in self.metadata)) for k in keys)


@dataclass(frozen=True)
class Dialect:
    """One row of the table; rows are tried in order.

    Attributes:
        name: for ``dialect=`` and reports.
        title: in words.
        detect: whether a file's facts show this dialect.
        zero_is_rank: an alpha of 0 means the rank, as for the trainers of the kohya family; otherwise it means 0.
    """

    name: str
    title: str
    detect: Callable[[Facts], bool]
    zero_is_rank: bool = False


_KOHYA = ("lora_unet_", "lora_te", "oft_unet_")
_LEGACY = ("lora_transformer_", "lora_prior_")
_DIFFUSERS = ("unet.", "transformer.", "transformer_2.", "prior.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_COMFYUI = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
_OMI = ("clip_l.", "clip_g.", "t5.", "t5xxl.")


def _by_ai_toolkit(facts: Facts) -> bool:
    return "ai-toolkit" in facts.metadata.get("software", "")


DIALECTS: dict[str, Dialect] = {
    row.name: row
    for row in (
        Dialect("peft", "directory of PEFT", lambda f: f.has_config or f.mostly("base_model.model.")),
        Dialect("xlabs", "Flux processors of XLabs", lambda f: f.spellings["xlabs"] > 0),
        Dialect("processors", "attention processors of old diffusers", lambda f: f.spellings["processor"] > 0),
        Dialect(
            "onetrainer-legacy",
            "OneTrainer, flat diffusers names",
            lambda f: f.half_dotted > 0 or f.count(*_LEGACY) > 0,
            zero_is_rank=True,
        ),
        Dialect("wan-fun", "Wan Fun, double underscore", lambda f: f.prefixes["lora_unet__"] > 0, zero_is_rank=True),
        Dialect("kohya-ldm", "kohya with original block names", lambda f: f.mostly(*_KOHYA) and f.ldm > 0, zero_is_rank=True),
        Dialect("kohya", "kohya, sd-scripts and LyCORIS' kohya entry", lambda f: f.mostly(*_KOHYA), zero_is_rank=True),
        Dialect(
            "simpletuner",
            "SimpleTuner, LyCORIS' wrapper with its config",
            lambda f: f.names("lycoris_config") and f.mostly("lycoris_"),
            zero_is_rank=True,
        ),
        Dialect("lycoris", "LyCORIS' wrapper", lambda f: f.mostly("lycoris_"), zero_is_rank=True),
        Dialect(
            "omi",
            "OMI: diffusers prefixes, native names, fused weights in leaves",
            lambda f: f.count(*_OMI) > 0 or f.leaves > 0,
        ),
        Dialect(
            "ai-toolkit",
            "ai-toolkit, dotted names",
            lambda f: _by_ai_toolkit(f) and f.mostly(*_DIFFUSERS, *_COMFYUI),
            zero_is_rank=True,
        ),
        Dialect(
            "onetrainer",
            "OneTrainer, dotted names",
            lambda f: f.names("ot_"),
        ),
        Dialect("comfyui", "dotted native names, as ComfyUI has them", lambda f: f.mostly(*_COMFYUI), zero_is_rank=True),
        Dialect("diffusers", "dotted diffusers names", lambda f: f.mostly(*_DIFFUSERS)),
        Dialect("bare", "module names without a prefix", lambda f: True, zero_is_rank=True),
    )
}

_LDM = re.compile(r"(input|output)_blocks[_.]\d|middle_block[_.]\d|time_embed[_.]\d|label_emb[_.]\d")
_LEAF = re.compile(r"(qkv|linear1)\.\d$")


def shows_ldm(name: str) -> bool:
    """Whether a module's name is one of the original Stable Diffusion code."""
    return _LDM.match(name) is not None


def shows_leaf(name: str) -> bool:
    """Whether a module's name is a numbered part of a fused weight."""
    return _LEAF.search(name) is not None


def find_dialect(facts: Facts, wanted: str | None = None) -> Dialect:
    """The first row that the facts show, or the wanted one.

    Raises:
        CheckpointError: no row has the wanted name.
    """
    if wanted is not None:
        if wanted not in DIALECTS:
            raise CheckpointError(f"unknown dialect {wanted!r}; known are {', '.join(DIALECTS)}.{nearest(wanted, DIALECTS)}")
        return DIALECTS[wanted]
    return next(row for row in DIALECTS.values() if row.detect(facts))


# --- who wrote it ----------------------------------------------------------------------------------------------------------
_MUSUBI_BASES = ("wan", "qwen", "z_image", "zimage", "flux_2", "flux2", "hunyuan", "framepack", "kandinsky5")


def _network(facts: Facts) -> str:
    return facts.metadata.get("ss_network_module", "")


def _implementation(facts: Facts) -> str:
    return facts.metadata.get("modelspec.implementation", "").lower()


def _by_musubi(facts: Facts) -> bool:
    version = facts.metadata.get("ss_base_model_version", "").lower()
    return "musubi" in _implementation(facts) or (_network(facts).startswith("networks.") and version.startswith(_MUSUBI_BASES))


#: trainer or program -> whether the facts show it; tried in order
TRAINERS: dict[str, Callable[[Facts], bool]] = {
    "lycoris_diff": lambda f: f.names("lycoris_diff.settings"),
    "OneTrainer": lambda f: f.names("ot_") or f.count(*_LEGACY) > 0 or f.half_dotted > 0,
    "ai-toolkit": _by_ai_toolkit,
    "SimpleTuner": lambda f: f.names("lycoris_config") or "simpletuner" in _implementation(f),
    "musubi-tuner": _by_musubi,
    "sd-scripts with LyCORIS": lambda f: _network(f).startswith("lycoris"),
    "sd-scripts": lambda f: _network(f).startswith("networks."),
    "XLabs": lambda f: f.spellings["xlabs"] > 0,
    "diffusers": lambda f: f.names("lora_adapter_metadata") or f.spellings["processor"] > 0,
    "PEFT": lambda f: f.has_config,
    "LyCORIS": lambda f: f.mostly("lycoris_"),
}


def guess_trainer(facts: Facts) -> str:
    """The program that seems to have written a file, "" when nothing tells."""
    return next((name for name, shows in TRAINERS.items() if shows(facts)), "")
