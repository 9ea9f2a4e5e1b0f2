"""The model class of every algorithm, and the function that picks one from a config."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters.boft import BOFTConfig
from .adapters.config import AdapterConfig
from .adapters.full import FullConfig
from .adapters.glora import GLoraConfig
from .adapters.ia3 import IA3Config
from .adapters.loha import LoHaConfig
from .adapters.lokr import LoKrConfig
from .adapters.lora import LoraConfig
from .adapters.miss import MissConfig
from .adapters.norm import NormConfig
from .adapters.oft import DiagOFTConfig, OFTConfig
from .adapters.shira import ShiraConfig
from .adapters.tlora import TLoraConfig
from .errors import ConfigError
from .model import AdapterModel, class_for


class LoraModel(AdapterModel):
    """A model with LoRA / LoCon adapters first (arXiv 2106.09685); others may be added."""

    config_class = LoraConfig


class LoKrModel(AdapterModel):
    """A model with LoKr adapters first (arXiv 2309.14859); others may be added."""

    config_class = LoKrConfig


class LoHaModel(AdapterModel):
    """A model with LoHa adapters first (arXiv 2108.06098); others may be added."""

    config_class = LoHaConfig


class MissModel(AdapterModel):
    """A model with MiSS adapters first (arXiv 2409.15371); others may be added."""

    config_class = MissConfig


class ShiraModel(AdapterModel):
    """A model with SHiRA adapters first (arXiv 2406.13175); others may be added."""

    config_class = ShiraConfig


class GLoraModel(AdapterModel):
    """A model with GLoRA adapters first (arXiv 2306.07967); others may be added."""

    config_class = GLoraConfig


class IA3Model(AdapterModel):
    """A model with (IA)^3 adapters first (arXiv 2205.05638); others may be added."""

    config_class = IA3Config


class FullModel(AdapterModel):
    """A model with full differences of weights and biases first; others may be added."""

    config_class = FullConfig


class NormModel(AdapterModel):
    """A model with trained normalisation layers first; others may be added."""

    config_class = NormConfig


class DiagOFTModel(AdapterModel):
    """A model with LyCORIS' OFT adapters first (arXiv 2306.07280); others may be added."""

    config_class = DiagOFTConfig


class BOFTModel(AdapterModel):
    """A model with LyCORIS' BOFT adapters first (arXiv 2311.06243); others may be added."""

    config_class = BOFTConfig


class OFTModel(AdapterModel):
    """A model with PEFT's OFT adapters first (arXiv 2306.07280); others may be added."""

    config_class = OFTConfig


class TLoraModel(AdapterModel):
    """A model with T-LoRA adapters first (arXiv 2507.05964); others may be added."""

    config_class = TLoraConfig


PeftModel = AdapterModel


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    **kwargs: Any,
) -> AdapterModel:
    """Wrap a model with a new adapter; the wrapper's class follows the config.

    Raises:
        AdapterError: as `AdapterModel`; also for keywords that PEFT has and this library does not support.
    """
    if kwargs:
        raise ConfigError(f"get_peft_model does not support {sorted(kwargs)}")
    wrapper = class_for(getattr(peft_config, "peft_name", ""))
    return wrapper(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
