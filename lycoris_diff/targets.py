"""Which modules of a model are adapted: names, patterns, presets by role, defaults by architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapters.base import Adapter
from .adapters.config import AdapterConfig
from .adapters.registry import ADAPTERS
from .errors import TargetError, nearest
from .execution.geometry import Geometry, is_transformers_conv1d
from .layers.layer import AdaptedLayer
from .layers.saved import SavedModule

Host = Callable[[nn.Module], Geometry | None]
PRESETS = ("all-linear", "all", "attention", "mlp", "conv")

_UNET = ("proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_QKVO = ("q_proj", "v_proj")
#: transformers renamed these layers; a pattern covers both
_VISION = r".*attention.*\.(query|value|q_proj|v_proj)"
_CLIP = ("k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2")
#: default targets by the model's class (diffusers) or ``config.model_type`` (transformers); a string is a preset or a pattern
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "clip_text_model": _CLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "t5": ("q", "v"),
    "umt5": ("q", "v"),
    "mt5": ("q", "v"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "vit": _VISION,
    "dinov2": _VISION,
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gptj": _QKVO,
    "gpt_neo": _QKVO,
    "opt": _QKVO,
    "bart": _QKVO,
    "whisper": _QKVO,
    "llama": _QKVO,
    "mistral": _QKVO,
    "mixtral": _QKVO,
    "qwen2": _QKVO,
    "qwen3": _QKVO,
    "gemma": _QKVO,
    "gemma2": _QKVO,
    "gemma3_text": _QKVO,
    "phi3": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}


@dataclass(frozen=True)
class Target:
    """A module to adapt.

    Attributes:
        path: dotted path in the model.
        layer: the base layer, also when it already carries adapters.
        geometry: how it applies its weight.
    """

    path: str
    layer: nn.Module
    geometry: Geometry


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the base model under the base's own names; adapters are left out, adapted layers give their base."""
    skip: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if skip and path.startswith(skip):
            continue
        if isinstance(module, (AdaptedLayer, SavedModule)):
            skip = (f"{path}.",)  # the walk is depth first: one prefix at a time is enough
            yield path, module.base_layer if isinstance(module, AdaptedLayer) else module.original_module
        elif type(module).__module__ != "torch.nn.modules.container" or path:
            yield path, module


def find_targets(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """Modules a config selects, in the model's order.

    Raises:
        TargetError: a name, pattern or index that selects nothing, a module that cannot be adapted, or nothing selected.
    """
    modules = dict(base_modules(model))
    host = host_of(config)
    wanted: Iterable[str] | str | None = config.target_modules
    if wanted is None:
        wanted = ADAPTERS.get(config.peft_name, Adapter).default_targets or default_targets(model)
    if isinstance(wanted, str):
        chosen = _by_pattern(model, modules, wanted, host)
        explicit = wanted not in PRESETS
    else:
        chosen = _by_names(modules, wanted, "target_modules")
        explicit = True
        _refuse_containers(modules, wanted, host)
    excluded = set(_excluded(modules, config))
    saved = set(_by_names(modules, config.modules_to_save, "modules_to_save")) if config.modules_to_save else set()
    chosen = [p for p in chosen if p not in excluded and not _inside(p, saved)]
    chosen = _by_layer_index(chosen, config)
    first = {module: path for path, module in reversed(modules.items())}  # a shared module is one target
    chosen = [p for p in chosen if first[modules[p]] == p or first[modules[p]] not in chosen]
    targets = [t for path in chosen if (t := _target(model, path, modules[path], explicit, host)) is not None]
    if not targets:
        raise TargetError(f"nothing to adapt in {type(model).__name__}: {_describe(config)} leaves no module")
    return targets


def saved_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of ``modules_to_save``.

    Raises:
        TargetError: a name that matches nothing.
    """
    modules = dict(base_modules(model))
    paths = _by_names(modules, config.modules_to_save, "modules_to_save") if config.modules_to_save else []
    return [p for p in paths if not _inside(p, set(paths) - {p})]


def selected_paths(model: nn.Module, config: AdapterConfig) -> set[str]:
    """Adaptable modules that a loaded config's names, pattern or preset select; what matches nothing is passed over.

    Selections by block index give nothing: libraries disagree about them.
    """
    modules = dict(base_modules(model))
    wanted = config.target_modules
    if wanted is None or config.layers_to_transform is not None:
        return set()
    try:
        if isinstance(wanted, str):
            chosen = _by_pattern(model, modules, wanted, host_of(config))
        else:
            present = [n for n in wanted if any(names_module(n, p) for p in modules)]
            chosen = _by_names(modules, present, "target_modules")
        outside = set(_excluded(modules, config))
    except TargetError:
        return set()
    saved = {p for p in modules if any(names_module(n, p) for n in config.modules_to_save or [])}
    owners = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return {
        p
        for p in chosen
        if host_of(config)(modules[p]) is not None
        and p not in outside
        and not _inside(p, saved)
        and not isinstance(modules.get(p.rpartition(".")[0]), owners)
    }


def host_of(config: AdapterConfig) -> Host:
    """What tells the layers that can carry a config's algorithm: their geometry, None for others."""
    return ADAPTERS.get(config.peft_name, Adapter).host


def default_targets(model: nn.Module) -> Iterable[str] | str:
    """Targets for ``target_modules=None``.

    Raises:
        TargetError: the architecture is not in the table.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for key in (type(model).__name__, model_type):
        if key in DEFAULT_TARGETS:
            return DEFAULT_TARGETS[key]
    if any(c.__module__.startswith("diffusers.models.transformers") for c in type(model).__mro__):
        return "attention"
    linears = sorted({p.rpartition(".")[2] for p, m in base_modules(model) if isinstance(m, nn.Linear)})[:12]
    raise TargetError(
        f"there are no default targets for {type(model).__name__} (model_type {model_type!r}); set target_modules to module "
        f"names such as {linears}, or to one of {', '.join(map(repr, PRESETS))}"
    )


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """Value of the first pattern that matches a path as a whole or as its end (PEFT's rule)."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def check_patterns(config: AdapterConfig, paths: Iterable[str]) -> None:
    """Every key of ``rank_pattern``, ``alpha_pattern`` and their like must match an adapted module.

    Raises:
        TargetError: naming the key and its nearest module.
    """
    paths = list(paths)
    for field in dict.fromkeys(("rank_pattern", "alpha_pattern", *config.patterns)):
        for pattern in getattr(config, field):
            try:
                matches = any(re.fullmatch(rf"(.*\.)?({pattern})", p) for p in paths)
            except re.error as error:
                raise TargetError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
            if not matches:
                raise TargetError(f"{field}: {pattern!r} matches none of the adapted modules.{nearest(pattern, paths)}")


# --- selection -----------------------------------------------------------------------------------------------------------
def names_module(name: str, path: str) -> bool:
    """Whether a name in a list means a module: its whole path, or the end of it after a dot."""
    return path == name or path.endswith(f".{name}")


def _by_pattern(model: nn.Module, modules: dict[str, nn.Module], wanted: str, host: Host) -> list[str]:
    if wanted in PRESETS:
        return _by_preset(model, modules, wanted, host)
    return _by_regex(modules, wanted, "target_modules")


def _by_names(modules: dict[str, nn.Module], names: Iterable[str], field: str) -> list[str]:
    chosen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise TargetError(f"{field}: {name!r} is not a module name")
        hits = {p for p in modules if names_module(name, p)}
        if not hits:
            raise TargetError(f"{field}: {name!r} matches no module.{nearest(name, modules)}")
        chosen |= hits
    return [p for p in modules if p in chosen]


def _refuse_containers(modules: dict[str, nn.Module], names: Iterable[str], host: Host) -> None:
    """A name that only reaches containers would adapt nothing."""
    for name in names:
        hits = [p for p in modules if names_module(name, p)]
        if all(host(modules[p]) is None and _has_children(modules[p]) for p in hits):
            inside = [p for p, m in modules.items() if p.startswith(f"{hits[0]}.") and host(m) is not None]
            raise TargetError(
                f"target_modules: {name!r} is {type(modules[hits[0]]).__name__}, which cannot be adapted itself; "
                f"adaptable inside it: {inside[:5] or 'nothing'}"
            )


def _by_regex(modules: dict[str, nn.Module], pattern: str, field: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    hits = [p for p in modules if compiled.fullmatch(p)]
    if not hits:
        raise TargetError(
            f"{field}: {pattern!r} matches no module as a whole. Presets are {', '.join(map(repr, PRESETS))}; "
            f"a list of names matches by suffix.{nearest(pattern, [*modules, *PRESETS])}"
        )
    return hits


def _by_preset(model: nn.Module, modules: dict[str, nn.Module], preset: str, host: Host) -> list[str]:
    head = _output_head(model)
    hits = []
    for path, module in modules.items():
        if not path or module is head or host(module) is None:
            continue
        linear = isinstance(module, nn.Linear) or is_transformers_conv1d(module)
        if preset == "all" or (preset == "all-linear" and linear) or preset == role_of(path, module, modules):
            hits.append(path)
    if not hits:
        raise TargetError(f"target_modules={preset!r}: {type(model).__name__} has no module of that kind")
    return hits


def _output_head(model: nn.Module) -> nn.Module | None:
    """A transformers model's language or classification head, which presets leave alone (PEFT's rule)."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None and type(model).__module__.startswith("transformers."):
        head = next((m for n, m in model.named_children() if n in ("score", "classifier")), None)
    return head


def role_of(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Role of an adaptable module, from the classes and names around it: "attention", "mlp", "conv" or "other"."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent = modules.get(".".join(parts[:depth]))
        cls = type(parent).__name__.lower() if parent is not None else ""
        name = parts[depth - 1].lower() if depth else ""
        if "attention" in cls or re.fullmatch(r"(self_|cross_)?attn\d*|.*attention", name):
            return "attention"
        if re.search(r"feedforward|mlp|densereludense|densegated", cls) or re.fullmatch(r"ff(_context|n)?|.*mlp", name):
            return "mlp"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    return "mlp" if parts[-1] in ("fc1", "fc2", "wi", "wo", "c_fc") else "other"


def _excluded(modules: dict[str, nn.Module], config: AdapterConfig) -> list[str]:
    exclude = config.exclude_modules
    if not exclude:
        return []
    if isinstance(exclude, str):
        return _by_regex(modules, exclude, "exclude_modules")
    return _by_names(modules, exclude, "exclude_modules")


def _by_layer_index(paths: list[str], config: AdapterConfig) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return paths
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or [])
    found = {p: _block_index(p, patterns) for p in paths}
    missing = sorted(indices - {i for i in found.values() if i is not None})
    if missing:
        known = sorted({i for i in found.values() if i is not None})
        raise TargetError(
            f"layers_to_transform: no target module in block {missing[0]} (layers_pattern={config.layers_pattern!r}); "
            f"blocks found: {known}"
        )
    return [p for p in paths if found[p] in indices]


def _block_index(path: str, patterns: list[str]) -> int | None:
    parts = path.split(".")
    for before, part in zip(["", *parts], parts):
        if part.isdigit() and (not patterns or before in patterns):
            return int(part)
    return None


def _target(model: nn.Module, path: str, module: nn.Module, explicit: bool, host: Host) -> Target | None:
    """The target at a path; None for what a preset or a container's name sweeps up by accident."""
    geometry = host(module)
    if geometry is None:
        if not explicit or _has_children(module):
            return None
        raise TargetError(f"{path!r} is {type(module).__name__}, which cannot be adapted; {_supported(host)}")
    if not path:
        raise TargetError(f"the model itself is {type(module).__name__}; put it into a module and name it in target_modules")
    weight: Any = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and type(module).__module__.startswith("torch.nn.modules")
    if plain and type(weight) in (nn.Parameter, Tensor) and not weight.is_floating_point():
        raise TargetError(f"the weight of {path!r} is {weight.dtype}; adapters need a floating-point weight")
    owner = model.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        # these read .weight of their children instead of calling them: an adapter there would do nothing, silently
        if not explicit:
            return None
        raise TargetError(f"{path!r} sits in {type(owner).__name__}, which never calls it; an adapter would have no effect")
    return Target(path, module, geometry)


def _supported(host: Host) -> str:
    if host(nn.LayerNorm(1)) is not None:
        return "supported are LayerNorm, GroupNorm and RMSNorm with a weight"
    return "supported are Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D"


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _inside(path: str, parents: set[str]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in parents)


def _describe(config: AdapterConfig) -> str:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    return ", ".join(f"{n}={getattr(config, n)!r}" for n in names if getattr(config, n) is not None)
