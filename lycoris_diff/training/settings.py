"""The settings of a training command from a YAML file and from flags: every field of `DreamBoothConfig`, and which model.

Beside a field's own name there are shorthands, for files as well as for flags: `adapter` is the algorithm on the denoiser, a
field of that algorithm's config stands for the denoiser's (`r`, `alpha`, `target_modules`), a component's name for its adapter
(`text_encoder.r`), and `train_text_encoder` puts the same adapter on every text encoder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ConfigError, nearest
from .adapter_settings import DENOISERS, adapter_fields, kinds_of, open_adapter, read_adapters
from .config import DreamBoothConfig
from .given import Given, Tree, put, read, read_file, read_flags, refuse

TINY = "tiny"
DTYPES = ("auto", "float32", "float16", "bfloat16")
_COMPONENT = re.compile(r"unet|transformer|text_encoder(_\d)?")
#: what diffusers' and kohya's training scripts call the same thing
_ELSEWHERE = {
    "pretrained_model_name_or_path": "model",
    "checkpointing_steps": "checkpoint_every",
    "checkpoints_total_limit": "checkpoint_limit",
    "hub_model_id": "push_to_hub",
    "network_alpha": "alpha",
    "network_dim": "r",
    "rank": "r",
    "report_to": "trackers",
    "resume_from_checkpoint": "resume",
    "snr_gamma": "min_snr_gamma",
    "text_encoder_lr": "text_encoder.learning_rate",
    "train_data_dir": "instance_data_dir",
    "unet_lr": "unet.learning_rate",
    "validation_prompt": "preview_prompts",
    "with_prior_preservation": "class_prompt",
}
#: settings beside those of `DreamBoothConfig`, by name
OWN_KINDS: dict[str, Any] = {
    "model": str,
    "dtype": str,
    "revision": str | None,
    "variant": str | None,
    "adapter": str | None,
    "train_text_encoder": bool | None,
}
_OWN = ("model", "dtype", "revision", "variant")


@dataclass
class TrainSettings:
    """Everything a training command is told.

    Attributes:
        model: diffusers directory, Hub repository, or `"tiny"`.
        dtype: `"auto"`, `"float32"`, `"float16"` or `"bfloat16"`.
        config: the run's settings, checked.
        revision: of a Hub repository.
        variant: of the model's weight files.
    """

    model: str
    dtype: str
    config: DreamBoothConfig
    revision: str | None = None
    variant: str | None = None

    @property
    def base(self) -> dict[str, str | None]:
        """How the base model is loaded, as `train_dreambooth` takes it."""
        return {name: getattr(self, name) for name in _OWN}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; written as YAML, `read_settings` reads the same settings again."""
        return self.base | self.config.to_dict()


def read_settings(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read settings from a YAML file and from flags, which win.

    Args:
        path: a YAML mapping of settings; None reads no file. Relative paths in it are relative to the working directory.
        overrides: flags as a shell gives them: `--key value` or `--key=value`, dotted for what is nested
            (`--adapters.unet.r 4`); values that start with `[` or `{` are YAML. A truth value's flag may stand alone, a
            list's may be repeated. Dashes in names mean underscores.

    Raises:
        FlagError: a flag that is unknown, lacks its value, or has one of another type.
        ConfigError: the same in the file, a setting that is missing, or one that cannot be used.
        OSError: `path` cannot be opened, or a shorthand asks for the model's components and the model cannot be found.
    """
    given = [] if path is None else read_file(path)
    given += read_flags(overrides)
    for entry in given:
        _check_name(entry)
    named = {g.path: g for g in given}  # flags come last
    for name in ("model", "instance_data_dir", "output_dir"):
        if (name,) not in named:
            raise ConfigError(f"{name} is missing; give --{name}, or {name} in a YAML file")
    own = {name: named[name,].read(OWN_KINDS[name], name) for name in _OWN if (name,) in named}
    if own.setdefault("dtype", "auto") not in DTYPES:
        raise ConfigError(f"dtype is {own['dtype']!r}; expected one of {list(DTYPES)}")
    if own["model"] == TINY and (own.get("revision") or own.get("variant")):
        raise ConfigError(f"model {TINY!r} has no revisions and variants; leave them out")
    components = cache(lambda: components_of(own["model"], own.get("revision")))
    tree = _tree(given, components)
    adapters = read_adapters(tree, components)
    values: dict[str, Any] = {}
    for name, kind in kinds_of(DreamBoothConfig).items():
        if name in tree and name != "adapters":
            values[name] = read(tree[name], kind, name, alone="latest" if name == "resume" else None)
            if name.endswith("_dir") and values[name] is not None:
                values[name] = os.path.expanduser(values[name])
    config = DreamBoothConfig(**values, adapters=adapters)
    config.validate()
    return TrainSettings(**own, config=config)


def components_of(model: str, revision: str | None = None) -> list[str]:
    """Return the names of a model's components, without loading them.

    Raises:
        OSError: there is no such model here, or it cannot be reached.
    """
    if model == TINY:
        from ..tiny.pipeline import COMPONENTS

        return list(COMPONENTS)
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(model, revision=revision)
    return [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]


# --- names ------------------------------------------------------------------------------------------------------------
def _tree(given: Sequence[Given], components: Callable[[], list[str]]) -> Tree:
    """Everything under its full name."""
    tree: Tree = {}
    for entry in given:
        head = entry.path[0]
        path = entry.path
        if head not in OWN_KINDS and head not in kinds_of(DreamBoothConfig):
            if _COMPONENT.fullmatch(head):
                path = ("adapters", *path)
            else:
                path = ("adapters", _denoiser(given, components), *path)
        if head == "adapter":
            path = ("adapters", _denoiser(given, components), "type")
        if path[0] == "adapters" and len(path) > 2:
            open_adapter(tree, path[1])
        put(tree, path, entry)
    return tree


def _denoiser(given: Sequence[Given], components: Callable[[], list[str]]) -> str:
    """The name of the denoiser: as the settings call it, else as the model does."""
    named: set[str] = set()
    for entry in given:
        head, *below = entry.path
        if head in DENOISERS:
            named.add(head)
        elif head == "adapters":
            named |= set(below[:1] or entry.items() or ()) & set(DENOISERS)
    found = named or {name for name in components() if name in DENOISERS}
    if len(found) != 1:
        raise ConfigError(
            f"which component is meant by 'adapter' and its fields? found {sorted(found)}; name it: --adapters.unet.type lokr"
        )
    return found.pop()


def _check_name(entry: Given) -> None:
    name = entry.path[0]
    known = [*OWN_KINDS, *kinds_of(DreamBoothConfig), *adapter_fields()]
    if name not in known and not _COMPONENT.fullmatch(name):
        hint = f" It is called {_ELSEWHERE[name]!r} here." if name in _ELSEWHERE else nearest(name, known)
        refuse(entry, f"there is no setting {name!r}.{hint}")
