"""The model card: what an adapter shows, how it is used and how it was made."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints.metadata import WORDS
from .config import DreamBoothConfig
from .previews import parse_preview_name
from .record import UNKNOWN, RunFacts

#: most columns of the table of samples
SAMPLE_STEPS = 4


def model_card(
    config: DreamBoothConfig,
    facts: RunFacts,
    kohya: bool,
    peft: Sequence[str] = (),
    diffusers: bool = False,
    notes: Sequence[str] = (),
) -> ModelCard:
    """The README of the output directory.

    Args:
        config: the run's settings.
        facts: the run.
        kohya: the adapter file was written.
        peft: components whose directories PEFT reads.
        diffusers: diffusers' `load_lora_weights` reads the adapter file.
        notes: what people should know about the files.
    """
    samples = _samples(config, facts)
    kinds = list(dict.fromkeys(_kind(adapter) for adapter in config.adapters.values()))
    prompt = config.instance_prompt
    data = ModelCardData(
        base_model=facts.repository,
        base_model_relation="adapter" if facts.repository else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "dreambooth", "lycoris_diff", *(kind.lower() for kind in kinds)],
        instance_prompt=prompt,
        widget=_widget(config, samples) or None,
    )
    name = config.adapter_file.stem
    sections = [
        f"# {_text(name)}",
        f"{' and '.join(kinds)} adapter of {_base(facts)}, trained by DreamBooth on {facts.pictures} pictures.",
        *([f"Its prompt: {_text(prompt)}"] if prompt else []),
        *(["## Samples", _sample_table(config, samples)] if samples else []),
        "## Use",
        *_usage(config, facts, kohya, peft, diffusers),
        "## Training",
        _table(("setting", "value"), _training_rows(config, facts)),
        *(["## Notes", "\n".join(f"- {_text(note)}" for note in notes)] if notes else []),
        "`settings.yaml` has every setting: `lycoris-diff train settings.yaml` repeats the run.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _base(facts: RunFacts) -> str:
    name = facts.repository
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{_text(facts.base_name)}`"


def _kind(adapter: Any) -> str:
    word = WORDS.get(adapter.peft_name, adapter.peft_name.lower())
    return f"{word}-dora" if getattr(adapter, "weight_decompose", False) else word


def _samples(config: DreamBoothConfig, facts: RunFacts) -> dict[int, dict[int, str]]:
    """Step -> number of the prompt -> path from the output directory; a few steps evenly, with the first and the last."""
    root = config.output.resolve()
    found: dict[int, dict[int, str]] = {}
    for path in facts.previews:
        key = parse_preview_name(Path(path).name)
        if key is not None and key[1] < len(config.preview_prompts) and Path(path).resolve().is_relative_to(root):
            found.setdefault(key[0], {})[key[1]] = Path(path).resolve().relative_to(root).as_posix()
    steps = sorted(found)
    last, count = len(steps) - 1, min(len(steps), SAMPLE_STEPS)
    chosen = [steps[round(i * last / max(count - 1, 1))] for i in range(count)] if count > 1 else steps
    return {step: found[step] for step in chosen}


def _widget(config: DreamBoothConfig, samples: Mapping[int, Mapping[int, str]]) -> list[dict[str, Any]]:
    newest = samples[max(samples)] if samples else {}
    return [{"text": config.preview_prompts[i], "output": {"url": path}} for i, path in sorted(newest.items())]


def _sample_table(config: DreamBoothConfig, samples: Mapping[int, Mapping[int, str]]) -> str:
    rows = [
        (_text(prompt), *(f"![]({columns[i]})" if i in columns else "" for columns in samples.values()))
        for i, prompt in enumerate(config.preview_prompts)
    ]
    return _table(("prompt", *(f"step {step}" for step in samples)), rows)


def _usage(config: DreamBoothConfig, facts: RunFacts, kohya: bool, peft: Sequence[str], diffusers: bool) -> list[str]:
    file, source = config.adapter_file.name, config.push_to_hub or "."
    prompt = next(iter(config.preview_prompts), None) or config.instance_prompt or "a photo"
    if facts.model == "tiny":
        start = ["from lycoris_diff.tiny import load_pipeline", "", "pipe = load_pipeline()"]
    elif facts.model == UNKNOWN:
        start = ["pipe = ...  # the base model; the run was not told its name"]
    else:
        options = "".join(f", {k}={v!r}" for k, v in (("revision", facts.revision), ("variant", facts.variant)) if v)
        load = f"pipe = DiffusionPipeline.from_pretrained({facts.base_name!r}{options})"
        start = ["from diffusers import DiffusionPipeline", "", load]
    draw = f"image = pipe({prompt!r}).images[0]"
    named = f", weight_name={file!r}" if kohya else ""
    blocks = ["With lycoris_diff:", _code([*_imports("lycoris_diff", "load_adapter", start),
              f"load_adapter(pipe, {source!r}{named})", draw])]  # fmt: skip
    if diffusers:
        blocks += ["With diffusers alone:", _code([*start, f"pipe.load_lora_weights({source!r}, weight_name={file!r})", draw])]
    if peft and len(peft) == len(config.adapters):
        wraps = [f"pipe.{c} = PeftModel.from_pretrained(pipe.{c}, {_peft_source(config, c)})" for c in peft]
        blocks += ["With PEFT:", _code([*_imports("peft", "PeftModel", start), *wraps, draw])]
    return blocks


def _imports(module: str, name: str, start: Sequence[str]) -> list[str]:
    first = [line for line in start if line.startswith("from ")]
    return [*first, f"from {module} import {name}", *start[len(first) :]]


def _peft_source(config: DreamBoothConfig, component: str) -> str:
    return f"{config.push_to_hub!r}, subfolder={component!r}" if config.push_to_hub else repr(component)


def _training_rows(config: DreamBoothConfig, facts: RunFacts) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [("base model", _base(facts)), ("steps", facts.steps)]
    for component, adapter in config.adapters.items():
        count = facts.parameters.get(component)
        size = f", {count:,} parameters" if count is not None else ""
        rate = f"learning rate {config.learning_rate_of(component):g}"
        rows.append((component, _text(f"{_kind(adapter)}, rank {adapter.r}, {rate}{size}")))
    rows += [
        ("pictures", f"{facts.pictures}, shown {config.repeats} times a round"),
        ("class pictures", facts.class_pictures or None),
        ("resolution", f"{config.resolution}{' in buckets' if config.aspect_buckets else ''}"),
        ("batch", f"{config.train_batch_size} x {config.gradient_accumulation_steps} x {facts.processes}"),
        ("optimizer", _text(config.optimizer)),
        ("schedule", _text(config.lr_scheduler)),
        ("mixed precision", config.mixed_precision),
        ("seed", config.seed),
        ("training loss, last tenth", _number(facts.last_loss)),
        ("held-out loss before", _number(facts.held_out_before)),
        ("held-out loss after", _number(facts.held_out_after)),
        ("time", f"{facts.seconds:.0f} s" if facts.seconds else None),
        ("dataset", f"sha256 `{facts.dataset_digest}`"),
        ("made with", _text(", ".join(f"{name} {version}" for name, version in facts.versions.items()))),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _text(text: str) -> str:
    """Words of others as they are read, not as Markdown or HTML."""
    flat = re.sub(r"([\\`*_\[\]#])", r"\\\1", " ".join(text.split()))
    return html.escape(flat, quote=False).replace("|", "&#124;")
