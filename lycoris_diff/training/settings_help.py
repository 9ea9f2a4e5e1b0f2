"""What every setting means, for `--help` and for documents: the docstrings of the dataclasses, read once."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, NamedTuple

from ..adapters.registry import ADAPTERS
from .adapter_settings import ALGORITHMS, kinds_of
from .config import DreamBoothConfig
from .settings import OWN_KINDS, TINY
from .values import describe

_HELP = {
    "model": f'diffusers directory or Hub repository, or "{TINY}" for the built-in one.',
    "dtype": 'precision in which the model is loaded: "float32", "float16" or "bfloat16"; "auto" leaves it to diffusers.',
    "revision": "branch, tag or commit of a Hub repository.",
    "variant": 'of the weight files, for example "fp16".',
    "adapter": f"algorithm on the denoiser, the UNet or the transformer: {', '.join(ALGORITHMS)}.",
    "train_text_encoder": "true puts the denoiser's adapter on every text encoder as well, false takes theirs away.",
}
_DEFAULTS = {"model": "", "dtype": "auto"}
#: fields that an adapter file keeps for PEFT, or that say what is in one: nothing to choose
_NO_CHOICE: tuple[str, ...] = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
_NO_CHOICE += ("rows", "rows_pattern", "fan_in_fan_out")


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: of the field, the YAML key and the flag.
        kind: what it takes, in words.
        default: as YAML writes it; empty for a setting that has to be given.
        help: what it means.
    """

    name: str
    kind: str
    default: str
    help: str


def list_settings() -> list[Setting]:
    """Return all settings: those of `TrainSettings`, the shorthands, and those of `DreamBoothConfig` in its order."""
    found = [Setting(name, describe(kind), _DEFAULTS.get(name, "null"), _HELP[name]) for name, kind in OWN_KINDS.items()]
    kinds, texts = kinds_of(DreamBoothConfig), documentation(DreamBoothConfig)
    for field in fields(DreamBoothConfig):
        found.append(Setting(field.name, describe(kinds[field.name]), _default(field), texts[field.name]))
    return found


def list_adapter_fields() -> list[Setting]:
    """Return the fields of all algorithms' configs; where only some have one, its help begins with their names."""
    found: dict[str, Setting] = {}
    owners: dict[str, list[str]] = {}
    configs: dict[str, Any] = {name.lower(): adapter.config_class for name, adapter in ADAPTERS.items() if name != "COMBINED"}
    for algorithm, cls in configs.items():
        kinds = kinds_of(cls)
        texts = {name: text for base in cls.__mro__ for name, text in documentation(base).items()}  # the most general
        for field in fields(cls):
            if field.name in texts and field.name not in _NO_CHOICE:
                setting = Setting(field.name, describe(kinds[field.name]), _default(field), texts[field.name])
                found.setdefault(field.name, setting)
                owners.setdefault(field.name, []).append("boft" if algorithm == "lycoris_boft" else algorithm)
    return [
        setting if len(owners[name]) == len(configs) else setting._replace(help=f"{', '.join(owners[name])}: {setting.help}")
        for name, setting in found.items()
    ]


@cache
def documentation(cls: Any) -> Mapping[str, str]:
    """Return what the `Attributes:` section of a class's own docstring says, by name, in YAML's words."""
    section = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nAttributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.split(r"\n(?=\S)", section)[0], re.MULTILINE)
    return {name: _in_yaml(" ".join(text.split())) for name, text in entries}


def _in_yaml(text: str) -> str:
    """Python's words for truth and nothing as YAML has them."""
    return re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)


def _default(field: Field[Any]) -> str:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return "" if default is MISSING else default if isinstance(default, str) else json.dumps(default)
