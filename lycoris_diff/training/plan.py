"""What a run is going to train, write, hold in memory and take, told before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..bookkeeping import adapted_layers, saved_copies, state_of
from ..diffusion.components import models_of
from ..errors import ConfigError
from ..execution.norms import NormGeometry
from ..targets import base_modules, role_of
from .components import trainable
from .config import ADAPTER, DreamBoothConfig
from .filesize import FileSize, blank_adapters, files_of
from .optimizers import make_optimizer, risky_learning_rate
from .outputs import check_outputs
from .sizes import size_knob
from .sizing import SizeChoice, fit_size, parse_size


@dataclass(frozen=True)
class Measured:
    """What a few real steps showed.

    Attributes:
        seconds_per_step: wall-clock time of one optimizer step.
        saved_bytes: of the tensors kept for backward in one forward pass, without parameters (see
            `activations.SavedForBackward`).
        peak_bytes: the most memory the device held; None where the device does not tell.
    """

    seconds_per_step: float
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class PlanRow:
    """Modules of one kind.

    Attributes:
        component: of the pipeline.
        role: "attention", "mlp", "conv", "norm", "other", "trained in full" (`modules_to_save`) or "bias".
        modules: how many.
        parameters: values trained on them.
        bytes: of their tensors in a PEFT directory, SHiRA's positions included.
    """

    component: str
    role: str
    modules: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Setting:
    """What sets the size of one component's adapter.

    Attributes:
        component: of the pipeline.
        algorithm: PEFT's name of it.
        label: "rank", "factor" for a LoKr with full halves, "block size" ...; "" where nothing does.
        value: of it; None where nothing does. A factor of -1 is near the square root.
        varies: patterns give some layers another one.
    """

    component: str
    algorithm: str
    label: str
    value: int | None
    varies: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on the device during a step.

    Attributes:
        weights: of all of the pipeline's models.
        adapters: of everything trained.
        gradients: of the same.
        optimizer: its state after the first step; None when that cannot be had without the device.
        ema: of the averaged copy.
        activations: kept for backward, without parameters; None before anything was measured.
        peak: the most that was held in real steps; None before any. It holds what the sum of the others leaves out:
            temporaries, and what the allocator and the libraries keep.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int | None
    ema: int
    activations: int | None
    peak: int | None

    @property
    def total(self) -> int | None:
        """Sum of the parts; None when one is not known."""
        parts = (self.weights, self.adapters, self.gradients, self.optimizer, self.ema, self.activations)
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass(frozen=True)
class TrainPlan:
    """Everything that can be said about a run before it starts.

    Attributes:
        settings: what sets each component's size.
        rows: modules by component and role.
        parameters: trained values in all.
        files: what will be written, to the byte; the kohya file with the metadata that was given.
        memory: on the device during a step.
        steps: optimizer steps.
        samples: pictures of the subject that they show, on all processes.
        rounds: how often each picture is shown; None where the pictures are not known.
        seconds: of all steps; None before anything was measured.
        size: how the size was chosen; None where the run names none.
        warnings: what the user should know, in sentences.
    """

    settings: tuple[Setting, ...]
    rows: tuple[PlanRow, ...]
    parameters: int
    files: tuple[FileSize, ...]
    memory: Memory
    steps: int
    samples: int
    rounds: float | None
    seconds: float | None
    size: SizeChoice | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that `json.dumps` takes."""
        plain = asdict(replace(self, size=None))
        plain["memory"]["total"] = self.memory.total
        for name in ("settings", "rows", "files", "warnings"):
            plain[name] = list(plain[name])
        plain["size"] = self.size.to_dict() if self.size is not None else None
        return plain


def choose_size(pipe: Any, config: DreamBoothConfig, metadata: Mapping[str, str] | None = None) -> SizeChoice | None:
    """Return what `target_params` or `target_size` asks for; None when neither is set.

    `target_size` is that of the kohya file, or of PEFT's weight files together where no kohya file is written.

    Raises:
        ConfigError: the size cannot be had, or is none. AdapterError: as `check_outputs`.
    """
    if config.target_params is None and config.target_size is None:
        return None
    size = None if config.target_size is None else parse_size(config.target_size)
    formats = config.formats if size is None else check_outputs(pipe, config).formats
    return fit_size(
        models_of(pipe),
        config.adapters,
        parameters=config.target_params,
        bytes=size,
        format="kohya" if "kohya" in formats else formats[0],
        title=config.adapter_file.stem,
        dtype=config.torch_save_dtype,
        metadata=metadata,
    )


def plan_training(
    pipe: Any,
    config: DreamBoothConfig,
    measured: Measured | None = None,
    metadata: Mapping[str, str] | None = None,
    size: SizeChoice | None = None,
    pictures: int | None = None,
    processes: int = 1,
) -> TrainPlan:
    """Tell what a run will do; the pipeline is only looked at, and its models may be on the meta device.

    Args:
        pipe: the pipeline, with or without adapters.
        config: settings of the run, with or without a target size.
        measured: what a few steps showed.
        metadata: what saving adds to the kohya file's header; its lengths decide the file's size.
        size: what `choose_size` returned, where it was asked already.
        pictures: of the subject, each counted as often as one round shows it.
        processes: that train together.

    Raises:
        AdapterError: a component or module that does not exist, or a config that does not fit; as `check_outputs`.
    """
    config.validate()
    models = models_of(pipe)
    missing = sorted(config.adapters.keys() - models.keys())
    if missing:
        raise ConfigError(f"adapters names {missing[0]!r}; {type(pipe).__name__} has {sorted(models)}")
    size = choose_size(pipe, config, metadata) if size is None else size
    if size is not None:
        config = replace(config, adapters=size.configs)
    dtype = config.torch_save_dtype
    blank = blank_adapters(models, config.adapters)
    warnings = list(risky_learning_rate(config)) + [line for name in config.adapters for line in _wasteful(name, blank[name])]
    outputs = check_outputs(pipe, config, blank)
    warnings += outputs.notes
    title = config.adapter_file.stem
    files = [file for format in outputs.formats for file in files_of(blank, format, title, dtype, metadata)]
    settings = tuple(_setting(name, blank[name], models[name]) for name in config.adapters)
    rows = tuple(row for name in config.adapters for row in _rows(name, blank[name], dtype))
    parameters = sum(p.numel() for name in config.adapters for p in trainable(blank[name]))
    memory = _memory(pipe, config, blank, measured)
    samples = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps * processes
    return TrainPlan(
        settings=settings,
        rows=rows,
        parameters=parameters,
        files=tuple(files),
        memory=memory,
        steps=config.max_train_steps,
        samples=samples,
        rounds=None if pictures is None else samples / pictures,
        seconds=None if measured is None else config.max_train_steps * measured.seconds_per_step,
        size=size,
        warnings=tuple(warnings),
    )


def _adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    return ((path, layer.adapter(ADAPTER)) for path, layer in adapted_layers(model))


# --- what is trained ----------------------------------------------------------------------------------------------------------
def _setting(component: str, blank: nn.Module, model: nn.Module) -> Setting:
    state = state_of(blank)
    assert state is not None
    config = state.configs[ADAPTER]
    knob = size_knob(model, config)
    if knob is None:
        return Setting(component, config.peft_name, "", None, False)
    values = {getattr(adapter.config, knob.field) for _, adapter in _adapters(blank)}
    value = getattr(config, knob.field)
    return Setting(component, config.peft_name, knob.label, value, values != {value})


def _rows(component: str, model: nn.Module, dtype: torch.dtype | None) -> list[PlanRow]:
    modules = dict(base_modules(model))
    found: dict[str, list[tuple[int, int]]] = {}
    for path, adapter in _adapters(model):
        role = "norm" if isinstance(adapter.geometry, NormGeometry) else role_of(path, modules[path], modules)
        size = sum(_stored(value, dtype) for value in adapter.exact_factors().values())
        found.setdefault(role, []).append((sum(p.numel() for p in adapter.parameters()), size))
    for _, saved in saved_copies(model):
        copy = saved.modules_to_save[ADAPTER]
        size = sum(_stored(value, dtype) for value in copy.state_dict().values())
        found.setdefault("trained in full", []).append((sum(p.numel() for p in copy.parameters()), size))
    state = state_of(model)
    assert state is not None
    if state.biases is not None:
        found["bias"] = [(p.numel(), _stored(p, dtype)) for p in state.biases.parameters(model).values()]
    return [PlanRow(component, role, len(each), *map(sum, zip(*each))) for role, each in sorted(found.items())]


def _stored(value: Tensor, dtype: torch.dtype | None) -> int:
    width = dtype.itemsize if dtype is not None and value.is_floating_point() else value.element_size()
    return value.numel() * width


def _wasteful(component: str, model: nn.Module) -> list[str]:
    """Layers on which a smaller rank, or full halves, could say as much with fewer parameters."""
    excess, larger = 0, 0
    for _, adapter in _adapters(model):
        shapes, geometry = adapter.factor_shapes, adapter.geometry
        if adapter.config.peft_name == "LORA":
            excess += adapter.config.r > min(geometry.out, geometry.columns)
        if {"lokr_w2_a", "lokr_w2_b"} <= shapes.keys() and "lokr_t2" not in shapes:
            (b, r), (_, columns) = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
            larger += r * (b + columns) > b * columns
    out = []
    if excess:
        out.append(f"{component}: the rank is larger than a side of the weight on {excess} modules, which cannot use it")
    if larger:
        out.append(f"{component}: on {larger} modules the low-rank second half of LoKr is larger than a full one would be")
    return out


# --- memory -------------------------------------------------------------------------------------------------------------------
def _memory(pipe: Any, config: DreamBoothConfig, blank: Mapping[str, nn.Module], measured: Measured | None) -> Memory:
    others = [part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in blank]
    trained = [parameter for name in config.adapters for parameter in trainable(blank[name])]
    size = sum(_nbytes(parameter) for parameter in trained)
    indices = sum(_nbytes(b) for name in config.adapters for _, adapter in _adapters(blank[name]) for b in adapter.buffers())
    everything = sum(_nbytes(t) for part in (*blank.values(), *others) for t in (*part.parameters(), *part.buffers()))
    inside = sum(_nbytes(p) for name in config.adapters for p in _biases(blank[name]))  # trained, and weights all the same
    weights = everything - (size - inside) - indices
    optimizer = _optimizer_bytes(config, trained)
    return Memory(
        weights=weights,
        adapters=size - inside + indices,
        gradients=size,
        optimizer=optimizer,
        ema=0 if config.ema_decay is None else size,
        activations=None if measured is None else measured.saved_bytes,
        peak=None if measured is None else measured.peak_bytes,
    )


def _biases(model: nn.Module) -> list[nn.Parameter]:
    state = state_of(model)
    return [] if state is None or state.biases is None else list(state.biases.parameters(model).values())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(config: DreamBoothConfig, trained: list[nn.Parameter]) -> int | None:
    """Bytes of the optimizer's state: one step of the optimizer itself, on one tensor of every shape."""
    shapes = Counter((parameter.shape, parameter.dtype) for parameter in trained)
    sample = {key: nn.Parameter(torch.zeros(key[0], dtype=key[1])) for key in shapes}
    for parameter in sample.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = make_optimizer(config, [{"params": list(sample.values()), "lr": config.learning_rate, "name": "sample"}])
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # what runs on a GPU only says so here
        return None
    return sum(
        count * sum(_nbytes(value) for value in optimizer.state[sample[key]].values() if isinstance(value, Tensor))
        for key, count in shapes.items()
    )
