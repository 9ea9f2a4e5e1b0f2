"""An adapter directory as PEFT writes it: one config for all modules, and tensors under the modules' own names.

What PEFT cannot express gets a ``peft_type`` of this library, so that PEFT refuses it instead of misreading it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.combined import CombinedConfig
from ..adapters.config import AdapterConfig
from ..adapters.registry import ADAPTERS
from ..building import layer_config
from ..errors import AdapterError, CheckpointError, ConfigError
from ..execution.geometry import Geometry
from ..functional import oft
from ..naming import NameIndex
from ..peft_format import PREFIX, written_fields
from .build import algorithm, config_of, geometry_from_shape
from .checkpoint import Entry
from .fit import fit_entry
from .rewrite import portable_lokr, weight_shape, without_core

#: tensors that are no adapter, beside the adapter's own file
EXTRAS_NAME = "extras.safetensors"


@dataclass
class Directory:
    """Contents of an adapter directory.

    Attributes:
        tensors: by PEFT's names.
        config: fields of ``adapter_config.json``.
        gap: why PEFT cannot express the adapter, "" when it can.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    gap: str = ""


@dataclass
class _Module:
    path: str
    entry: Entry
    geometry: Geometry | None


def peft_directory(modules: Mapping[str, list[Entry]], index: NameIndex | None = None) -> Directory:
    """One component's adapter as a PEFT directory.

    Args:
        modules: algorithms by module path.
        index: of the component; without it the layers' shapes are taken from the factors as far as these tell.

    Raises:
        CheckpointError: an algorithm or an option that no adapter of this library has.
    """
    listed = [_module(path, entry, index) for path, entries in modules.items() for entry in entries]
    groups = _groups(listed)
    if len(groups) == 1 and len(listed) == len(modules):
        config, members, gap = _best(groups[0])
        fields = written_fields(config, bool(gap))
        tensors = {f"{m.path}.{k}": v for m in members for k, v in m.entry.tensors.items()}
    else:
        names = " and ".join(sorted({m.entry.algorithm for m in listed}))
        gap = f"a directory of PEFT has one kind of adapter with one set of options; this one has several ({names})"
        parts = [_config(members)[0].to_dict() for members in groups]
        fields = written_fields(CombinedConfig(parts=parts, weights=[1.0] * len(parts)), True)
        tensors = _numbered(groups)
    fields["target_modules"] = _targets(list(modules), index)
    return Directory({PREFIX + k: v.contiguous() for k, v in tensors.items()}, fields, gap)


def _numbered(groups: Iterable[list[_Module]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, members in enumerate(groups):
        tensors |= {f"{m.path}.parts.{number}.{k}": v for m in members for k, v in m.entry.tensors.items()}
    return tensors


def _module(path: str, entry: Entry, index: NameIndex | None) -> _Module:
    site = index.sites.get(path) if index is not None else None
    if site is not None and index is not None and index.family:
        return _Module(path, fit_entry(entry, site), replace(geometry_from_shape(site.shape), has_bias=site.bias))
    shape = weight_shape(entry)
    return _Module(path, entry, geometry_from_shape(shape) if shape is not None else None)


# --- one config for many modules ----------------------------------------------------------------------------------------------
def _groups(modules: list[_Module]) -> list[list[_Module]]:
    """Modules that one config can speak for, each path at most once in a group."""
    found: dict[tuple[Any, ...], list[_Module]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for module in modules:
        patterned = set(algorithm(module.entry).config_class.patterns.values())
        options = {k: v for k, v in module.entry.options.items() if v not in (None, False) and k not in patterned}
        if not (module.geometry is None or module.geometry.has_kernel):
            options.pop("use_effective_conv2d", None)
        key = module.entry.algorithm, *sorted((k, repr(v)) for k, v in options.items())
        seen[module.path, key] += 1
        found.setdefault((*key, seen[module.path, key]), []).append(module)
    return _merged(list(found.values()))


def _merged(groups: list[list[_Module]]) -> list[list[_Module]]:
    """Linear layers join the convolutions with cores, for which the option has no meaning on them."""
    kept: list[list[_Module]] = []
    for group in groups:
        first = group[0]
        home = next((g for g in kept if _joins(g, group)), None)
        if home is None:
            kept.append(group)
        elif any(m.entry.options.get("use_effective_conv2d") for m in group):
            kept[kept.index(home)] = [first, *home, *group[1:]]
        else:
            home.extend(group)
    return kept


def _joins(group: list[_Module], other: list[_Module]) -> bool:
    def settings(m: _Module) -> dict[str, Any]:
        return {
            k: v for k, v in m.entry.options.items() if k not in ("use_effective_conv2d", "rows") and v not in (None, False)
        }

    a, b = group[0], other[0]
    coreless = [g for g in (group, other) if not any(m.entry.options.get("use_effective_conv2d") for m in g)]
    plain = len(coreless) == 1 and all(m.geometry is not None and not m.geometry.has_kernel for m in coreless[0])
    apart = not {m.path for m in group} & {m.path for m in other}
    return plain and apart and a.entry.algorithm == b.entry.algorithm and settings(a) == settings(b)


#: forms with the same change in which PEFT can take an algorithm that it cannot take as it stands
_PLAINER: dict[str, Callable[[Entry, tuple[int, ...] | None], Entry]] = {
    "LOKR": portable_lokr,
    "LORA": lambda entry, shape: without_core(entry),
}


def _best(members: list[_Module]) -> tuple[AdapterConfig, list[_Module], str]:
    """The config of a group, the group in the form that PEFT takes where there is one, and why PEFT does not take it."""
    config, gap = _config(members)
    rewrite = _PLAINER.get(members[0].entry.algorithm)
    if gap and rewrite is not None:
        shapes = [None if m.geometry is None else m.geometry.shape for m in members]
        rewritten = [replace(m, entry=rewrite(m.entry, shape)) for m, shape in zip(members, shapes)]
        other, left = _config(rewritten)
        if not left:
            return other, rewritten, ""
    return config, members, gap


def _config(members: list[_Module]) -> tuple[AdapterConfig, str]:
    """The config of a group, and why PEFT does not take it ("" when it does)."""
    ranks = _ranks(members)
    cls = ADAPTERS[members[0].entry.algorithm]
    known = {f: p for p, f in cls.config_class.patterns.items()}
    configs = {m.path: config_of(replace(m.entry, rank=ranks[m.path])) for m in members}
    values: dict[str, dict[str, Any]] = {f: {p: getattr(c, f) for p, c in configs.items()} for f in known}
    config = configs[members[0].path].for_layer()
    for field, by_path in values.items():
        common = _most_common(by_path.values())
        setattr(config, field, common)
        setattr(config, known[field], _patterns({path: v for path, v in by_path.items() if v != common}))
    if any(m.entry.options.get("use_effective_conv2d") for m in members):
        config.use_effective_conv2d = True  # type: ignore[attr-defined]
    return _for_peft(cls, config, members)


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """One regular expression a value, for just these paths; PEFT would take a bare path for the end of others as well."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(path.replace(".", r"\."))
    return {"^" + found[0] if len(found) == 1 else f"^(?:{'|'.join(found)})": value for value, found in paths.items()}


def _ranks(members: list[_Module]) -> dict[str, int]:
    """Rank of every module as its config has to say it.

    A LoKr with two full halves has none; PEFT makes them full from a rank of half their size on.
    """
    full = [m for m in members if m.entry.algorithm == "LOKR" and {"lokr_w1", "lokr_w2"} <= m.entry.tensors.keys()]
    enough = max((-(-max(m.entry.tensors["lokr_w2"].shape[:2]) // 2) for m in full), default=1)
    ranks = {m.path: _own_rank(m) for m in members}
    return ranks | {m.path: max(enough, ranks[m.path]) for m in full}


def _own_rank(module: _Module) -> int:
    entry, geometry = module.entry, module.geometry
    if entry.algorithm == "SHIRA" and geometry is not None:
        return max(1, entry.tensors["shira_weight"].numel() // (geometry.out + geometry.columns))
    if entry.algorithm == "OFT":
        return 1  # the size of the blocks tells
    if entry.algorithm == "MISS":
        return entry.tensors["miss_block"].shape[-1 if entry.options.get("init_weights") == "bat" else 0]
    return max(entry.rank, 1)


# --- what PEFT takes ----------------------------------------------------------------------------------------------
def _for_peft(cls: type[Adapter], config: AdapterConfig, members: list[_Module]) -> tuple[AdapterConfig, str]:
    """The config with the settings from which PEFT derives just these shapes, where there are any."""
    gap = ""
    for settings in _candidates(config, members):
        candidate = config.for_layer(**settings)
        found = next((g for m in members if (g := _gap(cls, candidate, m))), "")
        if not found:
            return candidate, ""
        gap = gap or found
    return config, gap


def _candidates(config: AdapterConfig, members: list[_Module]) -> list[dict[str, Any]]:
    """Settings to try. PEFT makes LoKr's halves from a factor, which shows as the first half's size where it divides."""
    if config.peft_name == "OFT":
        triangles = {m.entry.tensors["oft_R.weight"].shape[1] for m in members}
        return [{"r": 0, "oft_block_size": oft.triangle_size(n)} for n in sorted(triangles)]
    if config.peft_name != "LOKR":
        return [{}]
    sizes = {n for m in members for k in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if k in m.entry.tensors
             for n in m.entry.tensors[k].shape}  # fmt: skip
    split = any("lokr_w1_a" in m.entry.tensors for m in members)
    return [{"decompose_factor": f, "decompose_both": split} for f in (-1, *sorted(sizes))]


def _gap(cls: type[Adapter], config: AdapterConfig, module: _Module) -> str:
    if module.geometry is None:
        return f"{module.path}: the layer's size is not known, so its shapes cannot be compared with PEFT's"
    own = layer_config(config, module.path)
    try:
        gap = cls.peft_gap(module.geometry, own)
        derived = {} if gap else cls.shapes(module.geometry, own)
    except AdapterError as error:
        return f"{module.path}: {error}"
    shapes = {k: tuple(v.shape) for k, v in module.entry.tensors.items()}
    if gap is None and shapes != derived:
        gap = "PEFT derives other factor shapes from the config"
    return f"{module.path}: {gap}" if gap else ""


def _targets(paths: list[str], index: NameIndex | None) -> list[str] | str:
    """Module paths; a regular expression where a path is also the end of another module's."""
    everything = set(paths) | (set(index.sites) if index is not None else set())
    chosen = set(paths)
    ambiguous = any(p not in chosen and any(p.endswith(f".{c}") for c in _tails(p) & chosen) for p in everything)
    if not ambiguous:
        return sorted(paths)
    return "|".join(p.replace(".", r"\.") for p in sorted(paths))


def _tails(path: str) -> set[str]:
    """Ends of a path that are whole names."""
    words = path.split(".")
    return {".".join(words[k:]) for k in range(1, len(words))}


def check_known(modules: Mapping[str, list[Entry]]) -> None:
    """Every algorithm must be one of this library's.

    Raises:
        CheckpointError: naming the module.
    """
    for path, entries in modules.items():
        for entry in entries:
            try:
                algorithm(entry)
            except (CheckpointError, ConfigError) as error:
                raise CheckpointError(f"{path}: {error}") from error
