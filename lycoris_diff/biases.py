"""Base biases trained along with an adapter (config ``bias``): two sets of values that change places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters.config import AdapterConfig
from .errors import ConfigError
from .layers.layer import AdaptedLayer
from .layers.saved import SavedModule

_ONLY = {"LORA": "lora_only", "MISS": "MiSS_only", "OFT": "oft_only"}


@dataclass
class BiasSet:
    """Biases of one adapter; the model holds one set of values, this object the other.

    Attributes:
        owner: the adapter.
        keys: the parameters' names, as in PEFT's files (``…base_layer.bias`` for adapted layers).
        other: the values that are not in the model, by key.
        trained_inside: whether the model holds the trained values.
    """

    owner: str
    keys: list[str]
    other: dict[str, Tensor]
    trained_inside: bool = True

    @classmethod
    def begin(cls, model: nn.Module, config: AdapterConfig, name: str) -> BiasSet:
        """Note the original values of the biases a config trains."""
        found = dict(_selected(model, config, name))
        return cls(name, list(found), {k: p.detach().clone() for k, p in found.items()})

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The live parameters by key."""
        return {k: model.get_parameter(k) for k in self.keys}

    def use(self, model: nn.Module, trained: bool) -> None:
        """Have the trained or the original values in the model, exactly."""
        if trained == self.trained_inside:
            return
        with torch.no_grad():
            for key, parameter in self.parameters(model).items():
                held = self.other[key]
                self.other[key] = parameter.detach().clone()
                parameter.copy_(held)
        self.trained_inside = trained

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained values by key."""
        return {k: p.detach() for k, p in self.parameters(model).items()} if self.trained_inside else dict(self.other)


def bias_mode(config: AdapterConfig) -> str:
    """The config's ``bias``; "none" for algorithms without the field.

    Raises:
        ConfigError: an unknown value.
    """
    mode = getattr(config, "bias", "none")
    only = _ONLY.get(config.peft_name)
    if mode not in ("none", "all", only):
        raise ConfigError(f"{type(config).__name__}: bias is {mode!r}; expected 'none', 'all' or {only!r}")
    return mode


def _selected(model: nn.Module, config: AdapterConfig, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    every = bias_mode(config) == "all"
    layers = {p: m for p, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    copies = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, SavedModule))
    for key, parameter in model.named_parameters():
        owner = key.removesuffix(".base_layer.bias")
        if owner in layers:
            chosen = every or name in layers[owner].adapters
        else:
            inside = key.startswith((*copies, *(f"{p}." for p in layers)))
            chosen = every and key.rpartition(".")[2] == "bias" and not inside
        if chosen:
            yield key, parameter
