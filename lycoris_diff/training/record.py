"""What is known of a run, as the adapter file's metadata and as the settings that repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from .config import DreamBoothConfig

#: names of a run's files beside the adapters
CARD, SETTINGS, PREVIEWS = "README.md", "settings.yaml", "previews"
LIBRARIES = ("lycoris_diff", "torch", "diffusers", "transformers", "accelerate", "safetensors", "peft", "huggingface_hub")
UNKNOWN = "unknown"  # the base of a run that was given a pipeline without a name
#: settings that are paths; of these only the last part is published
PATHS = ("instance_data_dir", "output_dir", "cache_dir", "class_data_dir")

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a run depends on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class RunFacts:
    """What only the run knows.

    Attributes:
        model: what the base was loaded from: a repository, a directory, "tiny" or `UNKNOWN`.
        steps: optimizer steps taken.
        pictures: how many pictures of the subject were trained on.
        dataset_digest: hash of the pictures and captions.
        dtype: in which the base was loaded, as it stands in the settings file.
        revision: of the base's repository.
        variant: of the base's files.
        base_digest: hash of the base's weights.
        prediction: what the denoiser predicts: "epsilon", "v_prediction", "flow".
        class_pictures: how many pictures of the class were trained on.
        processes: how many trained together.
        losses: training loss of every step.
        held_out_before: loss on fixed noise before the first step.
        held_out_after: the same after the last step.
        started: when training began, seconds since 1970.
        seconds: how long it took.
        parameters: trained values by component.
        previews: pictures drawn by `draw_previews`.
        versions: of the libraries.
        settings: `DreamBoothConfig.to_dict()` as the run was asked for; None takes that of the config at hand.
    """

    model: str
    steps: int
    pictures: int
    dataset_digest: str
    dtype: str = "auto"
    revision: str | None = None
    variant: str | None = None
    base_digest: str = ""
    prediction: str = ""
    class_pictures: int = 0
    processes: int = 1
    losses: Sequence[float] = ()
    held_out_before: float | None = None
    held_out_after: float | None = None
    started: float | None = None
    seconds: float = 0.0
    parameters: Mapping[str, int] = field(default_factory=dict)
    previews: Sequence[Path] = ()
    versions: Mapping[str, str] = field(default_factory=library_versions)
    settings: Mapping[str, Any] | None = None

    @property
    def repository(self) -> str | None:
        """The base's repository on the Hub; None when it came from elsewhere."""
        return self.model if _is_repository(self.model) else None

    @property
    def base_name(self) -> str:
        """The base's name for others to read: of a directory only the last part."""
        return public_name(self.model)

    @property
    def last_loss(self) -> float | None:
        """Mean training loss over the last tenth of the steps."""
        tail = list(self.losses)[-max(len(self.losses) // 10, 1) :]
        return sum(tail) / len(tail) if tail else None


def public_name(model: str) -> str:
    """A base's name for others to read: of a directory only the last part."""
    return model if _is_repository(model) else Path(model).name


def _is_repository(model: str) -> bool:
    return _REPOSITORY.fullmatch(model) is not None and not Path(model).exists()


# --- the settings --------------------------------------------------------------------------------------------------------
def settings_of(config: DreamBoothConfig, facts: RunFacts, public: bool = False) -> dict[str, Any]:
    """All settings of a run, in the words of the settings file; `public` leaves the directories of paths out."""
    base: dict[str, Any] = {"model": facts.model, "dtype": facts.dtype}
    base |= {name: value for name, value in (("revision", facts.revision), ("variant", facts.variant)) if value is not None}
    settings = base | dict(facts.settings if facts.settings is not None else config.to_dict()) | {"resume": None}
    return public_settings(settings) if public else settings


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the directories that their paths are in, which are nobody else's business."""
    public = dict(settings)
    if "model" in public:
        public["model"] = public_name(public["model"])
    for name in PATHS:
        if public.get(name) is not None:
            public[name] = Path(public[name]).name
    return public


def settings_text(settings: Mapping[str, Any], facts: RunFacts) -> str:
    """The file with which `lycoris-diff train` repeats the run, what has to be the same for that in comments."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines = [
        "# Repeats the run: lycoris-diff train settings.yaml",
        f"# made with {versions}",
        f"# from {facts.pictures} pictures, dataset sha256 {facts.dataset_digest}",
        *([f"# base model weights {facts.base_digest}"] if facts.base_digest else []),
    ]
    body = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True, width=120)
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n" + body


def plain(value: Any) -> Any:
    """Mappings, sequences, sets and paths as what YAML and JSON have; sets sorted."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- the adapter file's metadata -----------------------------------------------------------------------------------------
def run_metadata(config: DreamBoothConfig, facts: RunFacts) -> dict[str, str]:
    """Metadata of the adapter file: kohya's keys where there is one, the model spec's, and under `lycoris_diff.` what is
    needed to repeat the run.
    """
    per_round = facts.pictures * config.repeats
    batch = config.train_batch_size * facts.processes
    encoders = [name for name in config.adapters if name.startswith("text_encoder")]
    denoisers = [name for name in config.adapters if name not in encoders]
    folder = Path(config.instance_data_dir).name
    values = {
        "ss_output_name": config.adapter_file.stem,
        "ss_sd_model_name": facts.base_name,
        "ss_training_comment": "trained with lycoris_diff",
        "ss_training_started_at": _stamp(facts.started),
        "ss_training_finished_at": _stamp(facts.started, facts.seconds),
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate_of(denoisers[0]) if denoisers else None,
        "ss_text_encoder_lr": config.learning_rate_of(encoders[0]) if encoders else None,
        "ss_num_train_images": per_round,
        "ss_num_reg_images": facts.class_pictures,
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": config.repeats, "img_count": facts.pictures}}),
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": batch * config.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_max_train_steps": config.max_train_steps,
        "ss_steps": facts.steps,
        "ss_optimizer": config.optimizer + _arguments(config.optimizer_args),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_mixed_precision": config.mixed_precision,
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_enable_bucket": config.aspect_buckets,
        "ss_seed": config.seed,
        "ss_noise_offset": config.noise_offset or None,
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_prior_loss_weight": config.prior_loss_weight,
        "ss_caption_dropout_rate": config.caption_dropout,
        "modelspec.title": config.adapter_file.stem,
        "modelspec.trigger_phrase": config.instance_prompt,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.prediction_type": _PREDICTIONS.get(facts.prediction),
        "modelspec.date": _date(facts),
        "lycoris_diff.settings": json.dumps(plain(settings_of(config, facts, public=True)), sort_keys=True),
        "lycoris_diff.dataset": facts.dataset_digest,
        "lycoris_diff.base": facts.base_digest or None,
        "lycoris_diff.versions": json.dumps(dict(facts.versions)),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _arguments(given: Mapping[str, Any]) -> str:
    return f"({','.join(f'{name}={value}' for name, value in given.items())})" if given else ""


def _stamp(started: float | None, seconds: float = 0.0) -> str | None:
    """Seconds since 1970, always of the same length: the file's size is told before the run."""
    return None if started is None else f"{started + seconds:.3f}"


def _date(facts: RunFacts) -> str | None:
    if facts.started is None:
        return None
    return datetime.fromtimestamp(facts.started + facts.seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
