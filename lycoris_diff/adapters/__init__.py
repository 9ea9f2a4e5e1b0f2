"""Adapters: one file an algorithm, each with its config, its factors and its registration."""

from .base import ADAPTERS, Adapter, Site, adapter_class, register
from .combined import Combined, CombinedConfig
from .config import AdapterConfig, ScaledConfig
from .loha import LoHa, LoHaConfig
from .lokr import LoKr, LoKrConfig
from .lora import Lora, LoraConfig
from .miss import Miss, MissConfig
from .shira import Shira, ShiraConfig

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "Combined",
    "CombinedConfig",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "Lora",
    "LoraConfig",
    "Miss",
    "MissConfig",
    "ScaledConfig",
    "Shira",
    "ShiraConfig",
    "Site",
    "adapter_class",
    "register",
]
