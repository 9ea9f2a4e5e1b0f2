"""Reading an adapter file of any dialect: tensors checked, names taken apart, algorithms decoded, strengths resolved."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..adapters.combined import CombinedConfig
from ..errors import AdapterError, CheckpointError
from ..files import CONFIG_NAME, DIFFUSERS_NAME, MAX_JSON, WEIGHTS_NAME
from ..naming.index import flatten
from ..naming.prefixes import split_prefix
from .alpha import SCALED, Notes, training_args
from .checkpoint import Entry, Named, RawCheckpoint
from .configs import FileConfig, directory_component, metadata_configs, read_config_file
from .decode import Found, Reading, decode, file_hints
from .dialects import Facts, find_dialect, guess_trainer, shows_ldm, shows_leaf
from .safety import PICKLE_SUFFIXES, read_safetensors
from .slices import strength_factor, times
from .suffixes import REFUSED, SUFFIXES, Split, is_harmless, split_key

#: file that SimpleTuner writes beside its weights, and the key its content has in the metadata
_LYCORIS_CONFIG, _LYCORIS_KEY = "lycoris_config.json", "lycoris_config"
#: parts of a weighted sum of adapters, as this library saves them
_PART = re.compile(r"(?P<stem>.+)\.parts\.(?P<part>\d{1,4})")


def read_raw(path: str | os.PathLike[str], dialect: str | None = None) -> RawCheckpoint:
    """Read an adapter file or directory; no model is needed.

    Args:
        path: a safetensors file; a directory of PEFT (with its config); a directory of such directories, one a component; or
            a directory with one safetensors file.
        dialect: row of `DIALECTS` to read it by; None detects it from the content.

    Returns:
        Modules under their names in the file. Tensors that cannot be used are listed in ``unknown`` with the reason.

    Raises:
        FileNotFoundError: there is nothing to read.
        CheckpointError: a pickle, a damaged file, an unknown dialect, a config that cannot be followed, or no adapter at all.
    """
    sources = _sources(Path(path))
    raws = []
    for file, config, components in sources:
        tensors, metadata = read_safetensors(file)
        metadata = _with_side_files(file, metadata, config, components if len(sources) > 1 else ())
        try:
            raws.append(raw_from_tensors(tensors, metadata, dialect, config, components))
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return raws[0] if len(raws) == 1 else _merged(raws)


def raw_from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dialect: str | None = None,
    config: FileConfig | None = None,
    components: tuple[str, ...] = (),
) -> RawCheckpoint:
    """What `read_raw` makes of a file's content.

    Args:
        tensors: by the file's names.
        metadata: of the file.
        dialect: as for `read_raw`.
        config: PEFT's config that came with the file.
        components: what a directory's name or config says about names without a prefix.

    Raises:
        CheckpointError: an unknown dialect, or no module with an adapter.
    """
    notes, text = Notes(), dict(metadata or {})
    facts = Facts(metadata=text, has_config=config is not None)
    modules, extras, unknown = _group(tensors, facts, config, components)
    row = find_dialect(facts, dialect)
    args = training_args(text)
    hints = file_hints((found for m in modules for found in m.parts.values()), args)
    reading = Reading(notes, args, hints, row.zero_is_rank)
    configs = metadata_configs(text, notes) if config is None else {}
    if config is not None and config.remark:
        notes.add(config.remark)
    named = []
    for module in modules:
        # diffusers' config goes by dotted names
        told = None if module.flat else next((configs[c] for c in module.components if c in configs), None)
        entries = _entries(module, reading, config or told, unknown)
        if entries:
            keys = [key for found in module.parts.values() for key in found.keys.values() if key not in unknown]
            named.append(Named(module.name, module.flat, module.components, entries, keys))
    if not named:
        raise CheckpointError(_nothing(unknown, tensors))
    if row.name == "peft" and config is None:
        notes.add(f"without {CONFIG_NAME} nothing tells the strength of PEFT's tensors; it counts as 1 where no alpha does")
    return RawCheckpoint(named, row.name, text, extras, unknown, notes.lines(), _trainer(facts, config))


# --- where the files are -----------------------------------------------------------------------------------------------------
def _sources(path: Path) -> list[tuple[Path, FileConfig | None, tuple[str, ...]]]:
    """Files to read, each with its config and the component it belongs to."""
    if not path.is_dir():
        beside = path.parent / CONFIG_NAME
        config = read_config_file(beside) if path.name == WEIGHTS_NAME and beside.is_file() else None
        return [(path, config, config.components if config else ())]
    if (path / CONFIG_NAME).is_file():
        config = read_config_file(path / CONFIG_NAME)
        return [(_weights_in(path), config, config.components or directory_component(path))]
    folders = sorted(p.parent for p in path.glob(f"*/{CONFIG_NAME}"))
    if folders:
        return [
            (
                _weights_in(folder),
                config := read_config_file(folder / CONFIG_NAME),
                directory_component(folder) or config.components,
            )
            for folder in folders
        ]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return [(files[0], None, ())]
    found = f"{len(files)} safetensors files: {', '.join(f.name for f in files[:5])}" if files else _pickles_in(path)
    raise CheckpointError(f"{path} has no {CONFIG_NAME} and {found}; pass one file")


def _weights_in(folder: Path) -> Path:
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{folder} has {CONFIG_NAME} but no {WEIGHTS_NAME}; it has {_pickles_in(folder)}")
    return folder / WEIGHTS_NAME


def _pickles_in(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    return f"a pickle, {pickles[0]}, which is not read: save it again as safetensors" if pickles else "no safetensors file"


def _with_side_files(
    file: Path, metadata: dict[str, str], config: FileConfig | None, components: tuple[str, ...]
) -> dict[str, str]:
    """Metadata with the configs that lie beside the file, as text."""
    out = dict(metadata)
    if config is not None:
        out[".".join(("adapter_config", *components))] = json.dumps(dict(config.values), sort_keys=True)
    beside = file.parent / _LYCORIS_CONFIG
    if _LYCORIS_KEY not in out and config is None and beside.is_file() and _is_about(file, beside):
        out[_LYCORIS_KEY] = beside.read_text(encoding="utf-8", errors="replace")
    return out


def _is_about(file: Path, beside: Path) -> bool:
    """Whether a config in the folder can only be this file's."""
    alone = file.name == DIFFUSERS_NAME or len(list(file.parent.glob("*.safetensors"))) == 1
    return alone and beside.stat().st_size <= MAX_JSON


def _merged(raws: list[RawCheckpoint]) -> RawCheckpoint:
    """Several components' directories as one checkpoint."""
    first = raws[0]
    metadata: dict[str, str] = {}
    for raw in reversed(raws):
        metadata |= raw.metadata
    notes = list(dict.fromkeys(note for raw in raws for note in raw.notes))
    extras = {k: v for raw in raws for k, v in raw.extras.items()}
    unknown = {k: v for raw in raws for k, v in raw.unknown.items()}
    modules = [module for raw in raws for module in raw.modules]
    return RawCheckpoint(modules, first.dialect, metadata, extras, unknown, notes, first.trainer)


# --- grouping by module ------------------------------------------------------------------------------------------------------
@dataclass
class _Module:
    """Tensors of one module; ``parts`` has one item, or one for each part of a weighted sum."""

    name: str
    flat: bool
    components: tuple[str, ...]
    parts: dict[int | None, Found] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def _group(
    tensors: Mapping[str, Tensor], facts: Facts, config: FileConfig | None, components: tuple[str, ...]
) -> tuple[list[_Module], dict[str, Tensor], dict[str, str]]:
    """Modules in the file's order, harmless extras, and tensors that no rule knows."""
    modules: dict[str, _Module] = {}
    extras: dict[str, Tensor] = {}
    unknown: dict[str, str] = {}
    sums = config is not None and isinstance(config.config, CombinedConfig)
    for key, value in tensors.items():
        if is_harmless(key):
            extras[key] = value
            continue
        split = split_key(key)
        trained = config.trains_fully(key) if config and split.suffix in ("", ".weight", ".bias") else ""
        if not split.suffix or trained:
            unknown[key] = trained or "it ends in nothing that any known kind of adapter has"
            continue
        stem, part = split.stem, None
        if sums and (summed := _PART.fullmatch(stem)):
            stem, part = summed["stem"], int(summed["part"])
        # some writers leave a few dots in flat names, but not before ".alpha"
        module = modules.get(flatten(stem))
        if module is None:
            module = modules[flatten(stem)] = _named(stem, facts, components)
        if split.suffix in REFUSED:
            module.refused[key] = REFUSED[split.suffix]
            continue
        _put(module, part, split, key, value, unknown)
        facts.spellings[SUFFIXES[split.suffix].spelling] += 1
    return list(modules.values()), extras, unknown


def _named(stem: str, facts: Facts, components: tuple[str, ...]) -> _Module:
    told, name, flat = split_prefix(stem)
    facts.prefixes[stem[: len(stem) - len(name)]] += 1
    facts.ldm += shows_ldm(name)
    facts.leaves += shows_leaf(name)
    facts.half_dotted += flat and "." in name
    return _Module(flatten(name) if flat else name, flat, told or components)


def _put(module: _Module, part: int | None, split: Split, key: str, value: Tensor, unknown: dict[str, str]) -> None:
    group, role, _ = SUFFIXES[split.suffix]
    if split.part is not None:
        role = f"{role}.{split.part}"
    found = module.parts.setdefault(part, Found())
    roles = found.tensors.setdefault(group, {})
    if role in roles:
        unknown[key] = f"the same factor is there as {found.keys[group, role]!r}"
        return
    roles[role] = value
    found.keys[group, role] = key


# --- entries -----------------------------------------------------------------------------------------------------------------
def _entries(module: _Module, reading: Reading, config: FileConfig | None, unknown: dict[str, str]) -> list[Entry]:
    """A module's entries; what cannot be used goes to ``unknown``."""
    if module.refused:
        unknown |= module.refused
        reason = f"on the same module as {next(iter(module.refused))!r}, which cannot be read"
        unknown |= {key: reason for found in module.parts.values() for key in found.keys.values()}
        return []
    entries: list[Entry] = []
    for part, found in module.parts.items():
        layer, weight = None, 1.0
        if config is not None:
            try:
                layer, weight = config.layer(module.name, part)
            except AdapterError as error:
                unknown |= dict.fromkeys(found.keys.values(), str(error))
                continue
        more, left = decode(found, reading, module.name, layer)
        unknown |= left
        try:
            entries += [_weighed(entry, weight) for entry in more]
        except CheckpointError as error:
            unknown |= dict.fromkeys(found.keys.values(), str(error))
    return entries


def _weighed(entry: Entry, weight: float) -> Entry:
    """An entry at a part's weight in a sum."""
    if weight == 1:
        return entry
    name = strength_factor(entry)
    if name and entry.algorithm not in SCALED:
        return replace(entry, tensors={**entry.tensors, name: times(entry.tensors[name], weight)})
    if entry.algorithm in ("LORA", "LOHA", "LOKR") and not entry.options.get("weight_decompose"):
        alpha = None if entry.alpha is None else entry.alpha * weight
        return replace(entry, scale=entry.scale * weight, alpha=alpha)
    raise CheckpointError(f"{entry.algorithm} at weight {weight:g} in a sum cannot be one adapter; save it at weight 1")


# --- reports -----------------------------------------------------------------------------------------------------------------
def _nothing(unknown: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    if unknown:
        key, reason = next(iter(unknown.items()))
        return f"no adapter that can be read; {len(unknown)} tensors are left over, first {key[:200]!r}: {reason}"
    return f"it holds no adapter, only {len(tensors)} tensors such as {next(iter(tensors), '')[:200]!r}"


def _trainer(facts: Facts, config: FileConfig | None) -> str:
    own = config is not None and str(config.values.get("peft_type", "")).startswith("LYCORIS_DIFF_")
    return "lycoris_diff" if own else guess_trainer(facts)
