"""The neutral form of an adapter file. Knows no naming scheme, no module and no forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Entry:
    """One algorithm's factors on one weight, in the library's own terms.

    Attributes:
        algorithm: name in the registry of adapters ("LORA", "LOHA", "LOKR", "GLORA", "FULL" ...).
        tensors: factors under the names and in the shapes that the adapter takes, in the file's dtype.
        scale: strength as trained; alpha / rank where the algorithm has an alpha, 1 otherwise.
        rank: of the factors; 0 where the word has no meaning.
        alpha: the value found, None when there was none.
        alpha_source: where ``scale`` comes from: "tensor", "metadata", "config", "default", "ignored" or "none".
        options: fields of the algorithm's config beyond ``r`` and ``alpha``.
    """

    algorithm: str
    tensors: dict[str, Tensor]
    scale: float = 1.0
    rank: int = 0
    alpha: float | None = None
    alpha_source: str = "none"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Named:
    """What a file holds under one module's name, before anybody knows which module that is.

    Attributes:
        name: as found, without the component's prefix: ``down_blocks_0_attentions_0_proj_in`` or
            ``double_blocks.0.img_attn.qkv``.
        flat: dots of the name are written as underscores.
        components: components the prefix allows, most likely first; empty when the prefix says nothing (the denoiser then).
        entries: algorithms on this weight; their changes add up.
        keys: the file's own tensor names, for reports.
    """

    name: str
    flat: bool
    components: tuple[str, ...]
    entries: list[Entry]
    keys: list[str] = field(default_factory=list)


@dataclass
class RawCheckpoint:
    """A file as read: algorithms and strengths are known, modules are still names.

    Attributes:
        modules: everything that belongs to an adapter.
        dialect: naming scheme it was read by.
        metadata: the file's own, text to text, never evaluated.
        extras: tensors that are no adapter and do no harm (bundled embeddings, position ids), by their names.
        unknown: names of tensors that no rule knows, with the reason.
        notes: choices where projects disagree, and conflicts, in words.
        trainer: who seems to have written it, "" when nothing tells.
    """

    modules: list[Named]
    dialect: str
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trainer: str = ""


@dataclass
class Checkpoint:
    """A file with every name placed: component -> module path -> algorithms.

    Attributes:
        components: ``{"unet": {"down_blocks.0.attentions.0.proj_in": [Entry, ...]}}``; paths as in diffusers and transformers
            models of the installed version.
        base_model: name of the base model whose modules the paths belong to ("sd15", "sdxl", "flux" ...), "" when unknown.
        unmatched: names that no module has, with the nearest known name ("" when none is near).
        wrong_shape: names that a module has but whose factors are not for it, with the reason: another shape, an algorithm
            that such a layer cannot have, or a share of a fused weight that has no exact form of its own.
        conflicts: names left out because the file holds the same module under a preferred name, with that name.
        sources: component -> module path -> the file's tensor names that went into it.
        other attributes: as in `RawCheckpoint`.
    """

    components: dict[str, dict[str, list[Entry]]]
    base_model: str = ""
    dialect: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trainer: str = ""
