"""Adapters: one file an algorithm, each with its config, its factors and its registration."""

from .base import Adapter, Site
from .boft import BOFT, BOFTConfig
from .combined import Combined, CombinedConfig
from .config import AdapterConfig, AlphaConfig, ScaledConfig
from .full import Full, FullConfig
from .glora import GLora, GLoraConfig
from .ia3 import IA3, IA3Config
from .loha import LoHa, LoHaConfig
from .lokr import LoKr, LoKrConfig
from .lora import Lora, LoraConfig
from .miss import Miss, MissConfig
from .norm import Norm, NormConfig
from .oft import OFT, DiagOFT, DiagOFTConfig, OFTConfig
from .registry import ADAPTERS, adapter_class, register
from .shira import Shira, ShiraConfig
from .tlora import TLora, TLoraConfig

__all__ = [
    "ADAPTERS",
    "BOFT",
    "IA3",
    "OFT",
    "Adapter",
    "AdapterConfig",
    "AlphaConfig",
    "BOFTConfig",
    "Combined",
    "CombinedConfig",
    "DiagOFT",
    "DiagOFTConfig",
    "Full",
    "FullConfig",
    "GLora",
    "GLoraConfig",
    "IA3Config",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "Lora",
    "LoraConfig",
    "Miss",
    "MissConfig",
    "Norm",
    "NormConfig",
    "OFTConfig",
    "ScaledConfig",
    "Shira",
    "ShiraConfig",
    "Site",
    "TLora",
    "TLoraConfig",
    "adapter_class",
    "register",
]
