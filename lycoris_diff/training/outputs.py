"""The files of a finished run: all of them or none, in formats that other programs read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..bookkeeping import state_of
from ..diffusion.components import layers_of, models_of
from ..diffusion.saving import save_adapter
from ..errors import AdapterError, ConfigError
from ..files import CONFIG_NAME, WEIGHTS_NAME, replacing, save_adapter_directory
from ..peft_format import get_peft_model_state_dict, peft_gap
from .card import model_card
from .config import ADAPTER, DreamBoothConfig
from .filesize import blank_adapters, files_of
from .guard import check_finite_adapters
from .publish import Upload, upload
from .record import CARD, SETTINGS, RunFacts, run_metadata, settings_of, settings_text

__all__ = ["OutputPlan", "RunFacts", "Upload", "check_outputs", "save_outputs", "upload"]

_STAGING = ".writing-"


@dataclass(frozen=True)
class OutputPlan:
    """What a run will write.

    Attributes:
        formats: those of `config.formats` that can say the adapters.
        notes: what people should know before they train: a format left out, files that a program cannot read.
        peft: components whose directories PEFT itself reads.
        diffusers: diffusers' `load_lora_weights` reads the kohya file.
    """

    formats: tuple[str, ...]
    notes: tuple[str, ...]
    peft: tuple[str, ...]
    diffusers: bool


def check_outputs(pipe: Any, config: DreamBoothConfig, blank: Mapping[str, nn.Module] | None = None) -> OutputPlan:
    """Find out, before anything is read or trained, whether the adapters can be saved as wanted.

    Where one of two wanted formats cannot say the adapters, the other is written and a note tells; a file with only some
    of the components is never written.

    Args:
        pipe: the pipeline, with or without the adapters, on the meta device too; it is only looked at.
        config: the run's settings.
        blank: what `blank_adapters` makes of them, where that is there already.

    Raises:
        ConfigError: no wanted format can say the adapters; the output directory holds adapters of another run that would be
            read together with the new ones; `push_to_hub` is no name.
        AdapterError: an adapter does not fit its model.
    """
    _check_repository(config.push_to_hub)
    blank = blank_adapters(models_of(pipe), config.adapters) if blank is None else blank
    models = {component: blank[component] for component in config.adapters}
    formats, notes = list(config.formats), []
    problem = _kohya_gap(blank) if "kohya" in formats else None
    if problem is not None:
        if "peft" not in formats:
            raise ConfigError(f'formats is {formats}, but format "kohya" cannot say these adapters: {problem}; add "peft"')
        formats.remove("kohya")
        notes.append(f"only PEFT directories are written, no {config.adapter_file.name}: {problem}")
    gaps = {name: peft_gap(_config_on(model), model, ADAPTER) for name, model in models.items()}
    if "peft" in formats:
        notes += [f"PEFT itself cannot read {name}, lycoris_diff can: {gap}" for name, gap in gaps.items() if gap]
    miss = [name for name, adapter in config.adapters.items() if adapter.peft_name == "MISS"]
    if "kohya" in formats and miss:
        notes.append(f"{config.adapter_file.name} has the MiSS of {', '.join(miss)} as the LoRA that it is: the same change")
    plan = OutputPlan(
        tuple(formats),
        tuple(notes),
        tuple(name for name, gap in gaps.items() if gap is None) if "peft" in formats else (),
        "kohya" in formats and _known_to_diffusers(pipe, config, models),
    )
    _check_leftovers(config, plan)
    return plan


def save_outputs(
    pipe: Any,
    config: DreamBoothConfig,
    facts: RunFacts,
    on_note: Callable[[str], None] | None = None,
    plan: OutputPlan | None = None,
) -> dict[str, Path]:
    """Write the adapters in every wanted format, the model card and the settings that repeat the run.

    Everything is written beside its place first; files of an earlier run stay until all of the new ones are whole.

    Args:
        pipe: the pipeline with its trained adapters.
        config: the run's settings.
        facts: what the run knows of itself.
        on_note: called with what people should know: the plan's notes, values lost in `save_dtype`.
        plan: what `check_outputs` said before training; None asks it now.

    Returns:
        What was written: "kohya" (a file), every component (a directory), "card" and "settings".

    Raises:
        AdapterError: a component has no adapter; a value is not finite, or would not be in `save_dtype`. ConfigError: see
            `check_outputs`. OSError: the directory cannot be written. What was there before is still there then.
    """
    if plan is None:
        plan = check_outputs(pipe, config)
    else:
        _check_leftovers(config, plan)  # again: training took its time
    models, dtype = _trained_models(pipe, config), config.torch_save_dtype
    check_finite_adapters(models)
    notes = list(plan.notes)
    if dtype is not None:
        notes += _losses_in(dtype, models)
    with _staged(config.output) as folder:
        staged = replace(config, output_dir=folder, name=config.adapter_file.stem)
        if "kohya" in plan.formats:
            metadata = run_metadata(config, facts)
            save_adapter(pipe, staged.adapter_file, ADAPTER, "kohya", dtype=dtype, metadata=metadata)
        if "peft" in plan.formats:
            for component, model in models.items():
                _save_directory(model, folder / component, dtype)
        card = model_card(config, facts, "kohya" in plan.formats, plan.peft, plan.diffusers, notes)
        (folder / SETTINGS).write_text(settings_text(settings_of(config, facts), facts), encoding="utf-8")
        (folder / CARD).write_text(str(card), encoding="utf-8")
    for note in notes if on_note is not None else ():
        on_note(note)  # type: ignore[misc]
    written = {"kohya": config.adapter_file} if "kohya" in plan.formats else {}
    written |= {component: config.output / component for component in models if "peft" in plan.formats}
    return written | {"card": config.output / CARD, "settings": config.output / SETTINGS}


# --- what can be written -------------------------------------------------------------------------------------------------
def _trained_models(pipe: Any, config: DreamBoothConfig) -> dict[str, nn.Module]:
    """Base models of the components that are trained, by component."""
    models = models_of(pipe)
    for component in config.adapters:
        state = state_of(models[component]) if component in models else None
        if state is None or ADAPTER not in state.configs:
            raise AdapterError(
                f"{type(pipe).__name__} has no adapter {ADAPTER!r} on its {component}, which config.adapters names"
            )
    return {component: models[component] for component in config.adapters}


def _config_on(model: nn.Module) -> Any:
    state = state_of(model)
    assert state is not None
    return state.configs[ADAPTER]


def _kohya_gap(blank: Mapping[str, nn.Module]) -> str | None:
    """Why the adapters have no place in a kohya file, or None."""
    try:
        files_of(blank, "kohya")
    except AdapterError as error:
        return str(error)
    return None


def _known_to_diffusers(pipe: Any, config: DreamBoothConfig, models: Mapping[str, nn.Module]) -> bool:
    """Whether diffusers' own loader makes the same of a kohya file: plain LoRA on linear layers of Stable Diffusion's UNet.

    Of kohya files with text encoders it leaves layers out (0.42: their attention), with no more than a remark.
    """
    if models.keys() != {"unet"} or not hasattr(pipe, "load_lora_weights"):
        return False
    plain = all(a.peft_name in ("LORA", "MISS") and not getattr(a, "weight_decompose", False) for a in config.adapters.values())
    layers = [layer for model in models.values() for layer in layers_of(model).values() if ADAPTER in layer.adapters]
    return plain and all(isinstance(layer.base_layer, nn.Linear) for layer in layers)


def _check_leftovers(config: DreamBoothConfig, plan: OutputPlan) -> None:
    """Adapters of another run that would be taken for a part of this one."""
    ours = set(config.adapters) if "peft" in plan.formats else set()
    found = [path.parent for path in sorted(config.output.glob(f"*/{CONFIG_NAME}")) if path.parent.name not in ours]
    if "kohya" not in plan.formats and config.adapter_file.exists():
        found.append(config.adapter_file)
    if found:
        raise ConfigError(
            f"output_dir {str(config.output)!r} holds {found[0].name!r} of another run, which would be taken for a part of "
            "this one; give another output_dir, or remove it"
        )


def _check_repository(name: str | None) -> None:
    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub is {name!r}, which is no name of a repository: {error}") from error


# --- writing -------------------------------------------------------------------------------------------------------------
def _losses_in(dtype: torch.dtype, models: Mapping[str, nn.Module]) -> list[str]:
    """A note of the values that are rounded to zero in the files.

    Raises:
        AdapterError: a finite value would become infinite.
    """
    lost = values = 0
    for component, model in models.items():
        for name, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER).items():
            if not tensor.is_floating_point():
                continue
            narrow = tensor.to(dtype)
            if not bool(torch.isfinite(narrow).all()):
                raise AdapterError(
                    f"{component}: {name} holds values up to {float(tensor.abs().max()):g}, too large for save_dtype {dtype}; "
                    "take bfloat16 or None"
                )
            lost += int(((narrow == 0) & (tensor != 0)).sum())
            values += tensor.numel()
    return [f"{lost:,} of {values:,} values are too small for save_dtype {dtype} and were saved as 0"] if lost else []


def _save_directory(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    save_adapter_directory(model, ADAPTER, folder)
    if dtype is None:
        return
    path = folder / WEIGHTS_NAME
    tensors: dict[str, Tensor] = load_file(path)
    narrow = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(narrow, temporary, metadata={"format": "pt"})


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A directory whose entries take their places in `output` when the block ends well, and vanish otherwise."""
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob(f"{_STAGING}*"):  # of a run that was killed meanwhile
        shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=output))
    try:
        yield staging
        for file in (path for path in staging.rglob("*") if path.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        _exchange(sorted(staging.iterdir()), output, staging / "before")
    finally:
        shutil.rmtree(staging)


def _exchange(entries: list[Path], output: Path, before: Path) -> None:
    """Move entries to their places; what was there goes to `before`, and back when one cannot be moved."""
    before.mkdir()
    done: list[Path] = []
    try:
        for entry in entries:
            target = output / entry.name
            if target.exists():
                os.replace(target, before / entry.name)
            done.append(target)
            os.replace(entry, target)
    except BaseException:
        for target in done:
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
        for old in before.iterdir():
            os.replace(old, output / old.name)
        raise
