"""lycoris_diff: LoKr, LoHa, MiSS, SHiRA, LoRA and DoRA adapters for diffusion models."""

from typing import Any

from .adapters import (
    AdapterConfig,
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    NormConfig,
    OFTConfig,
    ShiraConfig,
    TLoraConfig,
)
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.convert import ConvertReport, convert_checkpoint
from .checkpoints.inspect import InspectReport, inspect_checkpoint
from .checkpoints.read import read_checkpoint
from .checkpoints.write import WriteReport, write_checkpoint
from .diffusion import (
    HotswapReport,
    LoadError,
    LoadReport,
    LycorisLoaderMixin,
    adapters_per_sample,
    delete_adapter,
    explain,
    fuse_adapters,
    list_adapters,
    load_adapter,
    merge_adapters,
    prepare_hotswap,
    save_adapter,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)
from .errors import AdapterError, CheckpointError, ConfigError, TargetError
from .injection import InjectReport, inject_adapter
from .layers.layer import AdaptedLayer
from .merging import RequantizeReport
from .model import AdapterModel
from .peft_format import get_peft_model_state_dict, set_peft_model_state_dict
from .systems import (
    BOFTModel,
    DiagOFTModel,
    FullModel,
    GLoraModel,
    IA3Model,
    LoHaModel,
    LoKrModel,
    LoraModel,
    MissModel,
    NormModel,
    OFTModel,
    PeftModel,
    ShiraModel,
    TLoraModel,
    get_peft_model,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptedLayer",
    "AdapterConfig",
    "AdapterError",
    "AdapterModel",
    "BOFTConfig",
    "BOFTModel",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ConvertReport",
    "DiagOFTConfig",
    "DiagOFTModel",
    "FullConfig",
    "FullModel",
    "GLoraConfig",
    "GLoraModel",
    "HotswapReport",
    "IA3Config",
    "IA3Model",
    "InjectReport",
    "InspectReport",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoadError",
    "LoadReport",
    "LoraConfig",
    "LoraModel",
    "LycorisLoaderMixin",
    "MissConfig",
    "MissModel",
    "NormConfig",
    "NormModel",
    "OFTConfig",
    "OFTModel",
    "PeftModel",
    "RequantizeReport",
    "ShiraConfig",
    "ShiraModel",
    "TLoraConfig",
    "TLoraModel",
    "TargetError",
    "WriteReport",
    "adapters_per_sample",
    "convert_checkpoint",
    "delete_adapter",
    "explain",
    "fuse_adapters",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter",
    "inspect_checkpoint",
    "list_adapters",
    "load_adapter",
    "merge_adapters",
    "prepare_hotswap",
    "read_checkpoint",
    "save_adapter",
    "set_adapters",
    "set_peft_model_state_dict",
    "unfuse_adapters",
    "unload_adapters",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Pipeline classes are made when they are asked for: they need diffusers' own."""
    if name.endswith("LycorisPipeline"):
        from .diffusion import pipelines

        if hasattr(pipelines, name):
            return getattr(pipelines, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
