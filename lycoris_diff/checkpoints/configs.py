"""What a config says of each layer: PEFT's ``adapter_config.json``, and the one diffusers writes into a file's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.combined import CombinedConfig
from ..adapters.config import AdapterConfig
from ..building import layer_config
from ..errors import CheckpointError
from ..files import read_json
from ..naming import COMPONENTS
from ..peft_format import config_from_dict
from .alpha import Notes, json_object
from .decode import LayerConfig

#: model class in ``auto_mapping`` -> component
_CLASSES = (
    ("UNet", "unet"),
    ("CLIPTextModelWithProjection", "text_encoder_2"),
    ("CLIPTextModel", "text_encoder"),
    ("T5EncoderModel", "text_encoder_3"),
    ("Transformer", "transformer"),
)
#: configs that diffusers writes, their fields prefixed by the component
_METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class FileConfig:
    """A config for all layers of a file, or of one component in it.

    Attributes:
        config: as read.
        source: "config" or "metadata".
        values: the JSON.
    """

    config: AdapterConfig
    source: str
    values: Mapping[str, Any]

    def layer(self, path: str, part: int | None = None) -> tuple[LayerConfig, float]:
        """Config and weight of one layer, or of a numbered part of a weighted sum on it.

        Raises:
            CheckpointError: the config lacks the part.
        """
        if isinstance(self.config, CombinedConfig):
            if part is None or part >= len(self.config.parts) or part >= len(self.config.weights):
                raise CheckpointError(f"part {part} has no config; the config lists {len(self.config.parts)}")
            own = layer_config(config_from_dict(self.config.parts[part]), path)
            weight = float(self.config.weights[part])
            if not math.isfinite(weight):
                raise CheckpointError(f"part {part} has weight {weight}; expected a finite number")
            return LayerConfig(own, self.source), weight
        return LayerConfig(layer_config(self.config, path), self.source), 1.0

    @property
    def remark(self) -> str:
        """What the report should say about the config, "" for nothing."""
        version = re.match(r"(\d+)\.(\d+)", str(self.values.get("peft_version") or "0.0"))
        old = version is not None and tuple(map(int, version.groups())) < (0, 18)
        if self.config.peft_name == "OFT" and old and getattr(self.config, "use_cayley_neumann", False):
            return "PEFT before 0.18 used a slightly different series for OFT; read as of 0.18"
        return ""

    @property
    def components(self) -> tuple[str, ...]:
        """The component that the model class in the config is, empty when it does not say."""
        mapping = self.values.get("auto_mapping")
        name = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
        return next(((component,) for part, component in _CLASSES if part in name), ())

    def trains_fully(self, key: str) -> str:
        """Why a tensor that is no factor is in the file, "" when the config does not say."""
        name = key.removeprefix("base_model.model.")
        saved = self.values.get("modules_to_save") or []
        if any(f".{module}." in f".{name}" for module in saved):
            return "a module that was trained in full (modules_to_save) replaces the base model's, which an adapter cannot say"
        if self.values.get("bias", "none") != "none" and name.endswith(".bias"):
            return "a bias that was trained in full replaces the base model's, which an adapter cannot say"
        return ""


def read_config_file(path: Path) -> FileConfig:
    """``adapter_config.json``.

    Raises:
        CheckpointError: it is not JSON, or says something that the factors cannot be read by.
    """
    values = read_json(path)
    return FileConfig(_config(values, str(path)), "config", values)


def metadata_configs(metadata: Mapping[str, str], notes: Notes) -> dict[str, FileConfig]:
    """Configs by component that diffusers wrote into the metadata; one that cannot be used is noted and left out."""
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in json_object(metadata.get(_METADATA_KEY, "")).items():
        component, _, field = key.partition(".")
        if field and component in COMPONENTS:
            by_component.setdefault(component, {})[field] = value
    found: dict[str, FileConfig] = {}
    for component, values in by_component.items():
        try:
            config = _config({"peft_type": "LORA", **values}, f"{_METADATA_KEY} of {component}")
            found[component] = FileConfig(config, "metadata", values)
        except CheckpointError as error:
            notes.add(f"{error}; read without it")
    return found


def directory_component(folder: Path) -> tuple[str, ...]:
    """The component a directory is named after, empty when it has another name."""
    return (folder.name,) if folder.name in COMPONENTS else ()


def _config(values: Mapping[str, Any], source: str) -> AdapterConfig:
    if values.get("peft_type") == "OFT" and "oft_block_size" not in values:
        raise CheckpointError(f"{source} is of PEFT's OFT before 0.14, which is another formula; train it again")
    # a bias of the up layer becomes an adapter of its own
    config = config_from_dict({k: v for k, v in values.items() if k != "lora_bias"}, source)
    if not isinstance(config, CombinedConfig):
        try:
            config.scaling()
        except ArithmeticError as error:
            raise CheckpointError(f"{source}: alpha and r make no strength: {error}") from error
    return config
