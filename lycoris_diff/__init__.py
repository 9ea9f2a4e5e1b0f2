"""lycoris_diff: LoKr, LoHa, MiSS, SHiRA, LoRA and DoRA adapters for diffusion models."""

from .adapters import (
    AdapterConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
)
from .errors import AdapterError, CheckpointError, ConfigError, TargetError
from .injection import InjectReport, inject_adapter
from .layers.layer import AdaptedLayer
from .model import (
    AdapterModel,
    LoHaModel,
    LoKrModel,
    LoraModel,
    MissModel,
    PeftModel,
    ShiraModel,
    get_peft_model,
)
from .peft_format import get_peft_model_state_dict, set_peft_model_state_dict

__version__ = "0.1.0"

__all__ = [
    "AdaptedLayer",
    "AdapterConfig",
    "AdapterError",
    "AdapterModel",
    "CheckpointError",
    "ConfigError",
    "InjectReport",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoraConfig",
    "LoraModel",
    "MissConfig",
    "MissModel",
    "PeftModel",
    "ShiraConfig",
    "ShiraModel",
    "TargetError",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter",
    "set_peft_model_state_dict",
]
