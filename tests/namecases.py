"""Indexes of models that are never built in memory, and files as read for them."""

from __future__ import annotations

import diffusers
import torch

from lycoris_diff import naming
from lycoris_diff.checkpoints.checkpoint import Entry, Named, RawCheckpoint
from lycoris_diff.naming import Site, index_model, known_base


def default_index(cls: str, **config: object) -> naming.NameIndex:
    """Index of a diffusers class with its default configuration."""
    with torch.device("meta"):
        return index_model(getattr(diffusers, cls).from_config(config), "transformer")


def layers(index: naming.NameIndex) -> dict[str, Site]:
    return {path: site for path, site in index.sites.items() if not site.is_norm}


def lora(rows: int, columns: tuple[int, ...]) -> Entry:
    down, up = torch.zeros(2, *columns, device="meta"), torch.zeros(rows, 2, device="meta")
    return Entry("LORA", {"lora_A.weight": down, "lora_B.weight": up}, rank=2)


def as_file(base: str, scheme: str, metadata: dict[str, str] | None = None, every: int = 1, only: str = "") -> RawCheckpoint:
    """A LoRA on every ``every``-th Linear and convolution of a base model's denoiser, or of the component ``only``."""
    indexes = known_base(base)
    component = only or next(iter(indexes))
    index, modules = indexes[component], {}
    for path in [path for path, site in index.sites.items() if not site.is_norm][::every]:
        stem, parts = naming.written_name(scheme, indexes, component, path)
        components, name, flat = naming.split_prefix(stem)
        shapes = [index.sites[part.path].shape for part in parts]
        modules[stem] = Named(name, flat, components, [lora(sum(s[0] for s in shapes), shapes[0][1:])])
    return RawCheckpoint(list(modules.values()), scheme, metadata or {})
