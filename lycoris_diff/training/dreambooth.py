"""DreamBooth training of adapters on a pipeline, on top of accelerate: the public functions."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..errors import AdapterError, ConfigError
from .activations import SavedForBackward
from .components import adapters_on, forked_rng, prepared, repeatable
from .config import DreamBoothConfig
from .data.cache import key_of, model_digest
from .data.pictures import PictureSet, count_picture_files
from .families import Family, family_of
from .loop import Loop, checkpoints_of
from .optimizers import check_optimizer, risky_learning_rate
from .outputs import RunFacts, check_outputs, save_outputs, upload
from .plan import Measured, TrainPlan, choose_size, plan_training
from .prepare import Data, OnStage, buckets_of, encode_data, find_data, prepare_data
from .processes import check_processes, move, process_state
from .record import UNKNOWN, run_metadata
from .report import TrainReport, TrainStep


def train_dreambooth(
    pipe: Any,
    config: DreamBoothConfig,
    on_step: Callable[[TrainStep], None] | None = None,
    on_stage: OnStage | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainReport:
    """Teach the pipeline a subject from a directory of pictures, and save the adapters.

    The components named in `config.adapters` are wrapped (`pipe.unet = get_peft_model(pipe.unet, ...)`), trained and
    saved. They stay on the pipeline afterwards, in evaluation mode. When anything fails, the pipeline has its own
    components back. torch's global random state is not changed. Where accelerate's configuration asks for FSDP2, the
    components stay sharded afterwards: load the pipeline anew to draw with it.

    Args:
        pipe: a pipeline of a kind in `families.FAMILIES`; moved to accelerate's device.
        config: see `DreamBoothConfig`.
        on_step: called after every optimizer step that changed something, on every process; it may raise to stop.
        on_stage: called with name, progress and total of what takes long before the first step.
        base: how the pipeline was loaded, `model`, `dtype`, `revision` and `variant`, for the settings that repeat the
            run; without it the pipeline's own name is written.

    Raises:
        AdapterError: a setting, picture, checkpoint or pipeline that cannot be used, before anything is trained; or a
            loss that is not finite, while training.
        OSError: the pictures cannot be opened, or the output directory cannot be written.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been written.
    """
    family = _check(pipe, config)
    asked = config.to_dict()
    pictures = find_data(config)
    size = choose_size(pipe, config, _planned_metadata(family, config, base, pictures))
    if size is not None:
        config = replace(config, adapters=size.configs)
    outputs = check_outputs(pipe, config)
    if config.resume is not None:
        config = replace(config, resume=str(checkpoints_of(config).find(config.resume)))
    config.output.mkdir(parents=True, exist_ok=True)
    accelerator = _make_accelerator(config)
    check_processes(accelerator, config.preview_prompts)
    move(pipe, family.denoiser, accelerator)
    base_digest = key_of(*(model_digest(getattr(pipe, name)) for name in (*family.components, "vae")))
    data = prepare_data(family, config, pictures, accelerator, config.cache, on_stage or _quiet)
    started, notes = time.time(), list(risky_learning_rate(config))
    with _ready(family, config, data, accelerator, base_digest) as loop, _tracked(accelerator, config):
        loop.start()
        resumed_from = loop.step
        loop.run(on_step)
        after = loop.held_out_loss()
        loop.finish()
        facts = replace(
            _facts(family, asked, base, pictures, data.digest, len(data.classes), accelerator.num_processes),
            steps=loop.step,
            losses=loop.losses,
            held_out_before=loop.held_out_before,
            held_out_after=after,
            started=started,
            seconds=loop.seconds,
            base_digest=base_digest,
            parameters={name: model.get_nb_trainable_parameters()[0] for name, model in loop.adapted.items()},
            previews=loop.previews,
        )
        paths: dict[str, Path] = {}
        if accelerator.is_main_process:
            paths = save_outputs(pipe, config, facts, notes.append, outputs)
        accelerator.wait_for_everyone()
    uploaded = None
    if config.push_to_hub and accelerator.is_main_process:
        outcome = upload(config)
        uploaded = outcome.url
        if outcome.error is not None:
            notes.append(f"nothing was uploaded to {outcome.repository}: {outcome.error}")
    return TrainReport(
        losses=loop.losses,
        held_out_before=loop.held_out_before,
        held_out_after=after,
        seconds_per_step=loop.seconds / max(loop.step - resumed_from, 1),
        parameters=dict(facts.parameters),
        bytes={name: _size(path) for name, path in paths.items() if name not in ("card", "settings")},
        paths=paths,
        images=facts.pictures,
        skipped_pictures=pictures.skipped + (data.class_pictures.skipped if data.class_pictures else ()),
        class_images=facts.class_pictures,
        generated=data.generated,
        resumed_from=resumed_from,
        skipped_steps=tuple(loop.skipped),
        previews=loop.previews,
        size=size,
        uploaded=uploaded,
        warnings=notes,
    )


def plan_dreambooth(
    pipe: Any, config: DreamBoothConfig, measure_steps: int = 3, base: Mapping[str, Any] | None = None
) -> TrainPlan:
    """Tell what `train_dreambooth` would do: modules, parameters, files, memory, time, and what to be warned of.

    Nothing is written, and no class pictures are drawn.

    Args:
        pipe: the pipeline; on the meta device nothing is measured, else it is moved to accelerate's device.
        config: see `DreamBoothConfig`.
        measure_steps: optimizer steps to take for the time a step takes, after one that is not counted; 0 takes none.
        base: as for `train_dreambooth`; it is part of the file whose size is told.

    Raises:
        AdapterError: as `train_dreambooth`. OSError: the pictures cannot be opened.
    """
    family = _check(pipe, config)
    pictures = find_data(config)
    metadata = _planned_metadata(family, config, base, pictures)
    size = choose_size(pipe, config, metadata)
    sized = replace(config, adapters=size.configs if size else config.adapters)
    check_outputs(pipe, sized)
    measured = None
    if measure_steps and getattr(pipe, family.denoiser).device.type != "meta":
        measured = _measure(family, sized, pictures, measure_steps)
    shown = sum(picture.repeats for picture in pictures.pictures)
    return plan_training(pipe, config, measured, metadata, size, shown, process_state().num_processes)


def _facts(
    family: Family,
    settings: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    pictures: PictureSet,
    digest: str,
    classes: int,
    processes: int,
) -> RunFacts:
    """What is known of a run before its first step."""
    loaded = dict(base or {})
    return RunFacts(
        model=loaded.get("model") or family.pipe.name_or_path or UNKNOWN,
        dtype=loaded.get("dtype") or str(family.dtype).removeprefix("torch."),
        revision=loaded.get("revision"),
        variant=loaded.get("variant"),
        steps=settings["max_train_steps"],
        pictures=len(pictures.pictures),
        dataset_digest=digest,
        prediction=family.pipe.scheduler.config.get("prediction_type", "flow"),
        class_pictures=classes,
        processes=processes,
        settings=settings,
    )


def _planned_metadata(
    family: Family, config: DreamBoothConfig, base: Mapping[str, Any] | None, pictures: PictureSet
) -> dict[str, str]:
    """Metadata as long as what the run will write; its values may differ."""
    folder = config.class_pictures
    present = count_picture_files(folder)
    classes = max(present, config.num_class_images if config.class_prompt is not None else 0) if folder else 0
    digest = pictures.digest * (2 if folder else 1)
    facts = _facts(family, config.to_dict(), base, pictures, digest, classes, process_state().num_processes)
    return run_metadata(config, replace(facts, started=time.time(), base_digest="0" * 64))


def _measure(family: Family, config: DreamBoothConfig, pictures: PictureSet, steps: int) -> Measured:
    """Take steps on a few of the pictures; those of the class, which may not exist yet, are the subject's own."""
    few = PictureSet(pictures.pictures[: config.train_batch_size], ())
    prior = few if config.class_pictures is not None else None
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, max_train_steps=steps + 1, output_dir=folder, resume=None, trackers=())
        accelerator = _make_accelerator(config)
        device = accelerator.device
        family.pipe.to(device)
        data = encode_data(family, config, few, prior, 0, Path(folder), _quiet)
        with _ready(family, config, data, accelerator, keep=False) as loop:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with SavedForBackward(loop.models.values()) as saved:
                loop.loss(loop.batches.batch(0).to(device))
            loop.take_step()
            began = time.perf_counter()
            for _ in range(steps):
                loop.take_step()
            seconds = (time.perf_counter() - began) / steps
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(seconds, saved.bytes, peak)


@contextmanager
def _ready(
    family: Family, config: DreamBoothConfig, data: Data, accelerator: Accelerator, base_digest: str = "", keep: bool = True
) -> Iterator[Loop]:
    """The loop over a pipeline with its adapters on; on an error, or without `keep`, the pipeline is as it was afterwards."""
    objective = family.objective(config.min_snr_gamma)
    with (
        forked_rng(config.seed),
        repeatable(accelerator.device),
        adapters_on(family.pipe, config.adapters, keep),
        prepared(family, config, accelerator) as models,
    ):
        torch.manual_seed(config.seed + 1 + accelerator.process_index)  # of dropout, whatever was drawn before
        yield Loop(family, objective, config, data, accelerator, models, base_digest)


@contextmanager
def _tracked(accelerator: Accelerator, config: DreamBoothConfig) -> Iterator[None]:
    """Trackers, closed whatever happens."""
    if accelerator.log_with:
        accelerator.init_trackers("lycoris_diff", config=_flat(config.to_dict()))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # `end_training` would leave the process group as well, which is not ours
            tracker.finish()


def _check(pipe: Any, config: DreamBoothConfig) -> Family:
    """Refuse what cannot be trained, before anything is read or changed."""
    config.validate()
    family = family_of(pipe)
    family.check_components(list(config.adapters))
    family.objective(config.min_snr_gamma)
    check_optimizer(config)
    buckets_of(config, family.edge_factor)
    return family


def _make_accelerator(config: DreamBoothConfig) -> Accelerator:
    """Return accelerate's view of this process.

    Raises:
        ConfigError: the precision is not available here, or a tracker is not installed.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    trackers = [name for name in ("tensorboard",) if name in installed] if config.trackers is None else list(config.trackers)
    for tracker in trackers:
        if tracker not in installed:
            raise ConfigError(f"trackers names {tracker!r}, which is not installed; expected some of {sorted(installed)}")
    process_state()  # the accelerator takes it over, with how long processes wait for each other
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers or None,
            project_dir=str(config.output / "logs"),
        )
    except ValueError as error:  # precision not available here, or another one already chosen in this process
        raise AdapterError(f"accelerate refuses mixed_precision={config.mixed_precision!r}: {error}") from error


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, flags and text."""
    return {name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in settings.items()}


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _quiet(name: str, done: int, total: int) -> None:
    """Tell nobody about a stage."""
