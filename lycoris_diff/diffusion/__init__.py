"""Adapters on diffusers pipelines: load, weigh, mix, fuse, unload and save."""

from .fusing import fuse_adapters, fused_adapters, merge_adapters, unfuse_adapters
from .hotswap import HotswapReport, prepare_hotswap
from .loading import (
    active_adapters,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    list_adapters,
    load_adapter,
    unload_adapters,
)
from .mixin import LycorisLoaderMixin
from .report import LoadError, LoadReport, ModuleReport
from .samples import adapters_per_sample
from .saving import checkpoint_of, save_adapter
from .weights import Explanation, Strength, explain, set_adapters

__all__ = [
    "Explanation",
    "HotswapReport",
    "LoadError",
    "LoadReport",
    "LycorisLoaderMixin",
    "ModuleReport",
    "Strength",
    "active_adapters",
    "adapters_per_sample",
    "checkpoint_of",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "explain",
    "fuse_adapters",
    "fused_adapters",
    "list_adapters",
    "load_adapter",
    "merge_adapters",
    "prepare_hotswap",
    "save_adapter",
    "set_adapters",
    "unfuse_adapters",
    "unload_adapters",
]
