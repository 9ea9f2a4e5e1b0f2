"""What loading a file did, or why it was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CheckpointError

_SHOWN = 5


@dataclass(frozen=True)
class ModuleReport:
    """One module of a file that found its place.

    Attributes:
        component: attribute of the pipeline.
        path: module in it, without adapters' wrappers.
        algorithm: of the file, joined by "+" when several add up on the module.
        rank: of the factors, 0 where the word has no meaning.
        scale: trained strength (alpha / rank where there is an alpha).
        alpha: the value found, None without one.
        alpha_source: where the scale comes from: "tensor", "metadata", "config", "default", "ignored" or "none".
        norm: Frobenius norm of the change of the weight as trained, LoHa of large rank estimated from some of its rows; None
            when it was not computed.
    """

    component: str
    path: str
    algorithm: str
    rank: int
    scale: float
    alpha: float | None
    alpha_source: str
    norm: float | None

    @property
    def zero(self) -> bool:
        """The change of the weight is exactly zero."""
        return self.norm == 0.0


@dataclass
class LoadReport:
    """Everything that was found in a file, grouped.

    Attributes:
        source: file, directory or repository.
        adapter_name: the adapter's name on the pipeline.
        matched: modules that are (or would be) adapted.
        skipped: component -> number of the file's modules that were left out because ``components`` does not name it.
        unmatched: names no module has -> nearest known name, "" when none is near.
        unused: tensors that no rule knows -> why.
        wrong_shape: modules whose factors do not make up the layer's weight -> why.
        non_finite: modules with NaN, infinite or unrepresentable factors -> which.
        zero: components whose weights the file does not change at all.
        extras: harmless tensors that are no adapter.
        notes: conventions chosen where projects disagree, and conflicts.
        dialect: naming scheme of the file.
        trainer: who seems to have written it, "" when nothing tells.
        base_model: the base model it seems to be for, "" when nothing fits.
        pipeline_model: the base model the pipeline seems to be, "" when unknown.
        loaded: the adapter is on the pipeline.
    """

    source: str
    adapter_name: str
    matched: list[ModuleReport] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, str] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dialect: str = ""
    trainer: str = ""
    base_model: str = ""
    pipeline_model: str = ""
    loaded: bool = False

    @property
    def components(self) -> dict[str, int]:
        """Number of adapted modules by component."""
        return dict(Counter(m.component for m in self.matched))

    @property
    def algorithms(self) -> dict[str, int]:
        """Number of modules by algorithm."""
        return dict(Counter(m.algorithm for m in self.matched))

    @property
    def alpha_sources(self) -> dict[str, int]:
        """Number of modules by where their strength comes from."""
        return dict(Counter(m.alpha_source for m in self.matched))

    @property
    def mismatch(self) -> str:
        """That the file is for another base model, in words; "" when nothing says so."""
        if not self.base_model or not self.pipeline_model or self.base_model == self.pipeline_model:
            return ""
        file, pipeline = title(self.base_model), title(self.pipeline_model)
        return f"this looks like {_article(file)} {file} file; the pipeline is {pipeline}"

    @property
    def problems(self) -> dict[str, list[str]]:
        """What strict loading refuses, by kind, one line each; empty when nothing is wrong."""
        groups = {
            "match no module": [n + (f" (nearest: {near})" if near else "") for n, near in self.unmatched.items()],
            "do not fit their layer": _pairs(self.wrong_shape),
            "are not finite": _pairs(self.non_finite),
            "are not understood": _pairs(self.unused),
            "would change nothing": [f"{c}: every change in the file is zero" for c in self.zero],
        }
        if not self.matched:
            groups["found nothing to do"] = ["no module of the pipeline gets an adapter"]
        return {kind: lines for kind, lines in groups.items() if lines}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        values = asdict(self)
        values |= {"components": self.components, "algorithms": self.algorithms, "mismatch": self.mismatch}
        return values | {"problems": self.problems}

    def __str__(self) -> str:
        """A few lines: what matched, how, and what did not."""
        verb = "loaded" if self.loaded else "not loaded"
        lines = [f"{self.adapter_name!r} from {self.source}: {verb}"]
        facts = {"dialect": self.dialect, "trainer": self.trainer, "base model": title(self.base_model)}
        lines += ["  " + ", ".join(f"{k} {v}" for k, v in facts.items() if v)] if any(facts.values()) else []
        for component in self.components:
            own = [m for m in self.matched if m.component == component]
            algorithms = ", ".join(f"{n} {a}" for a, n in Counter(m.algorithm for m in own).items())
            ranks = sorted({m.rank for m in own if m.rank})
            norms = sorted(m.norm for m in own if m.norm is not None)
            text = f"  {component}: {len(own)} modules ({algorithms})"
            text += f", rank {_span(ranks)}" if ranks else ""
            text += f", strength {_span(sorted({m.scale for m in own}))}"
            text += f", norm of the change {norms[0]:.3g} to {norms[-1]:.3g}" if norms else ""
            lines.append(text)
        if self.matched:
            lines.append("  alpha from " + ", ".join(f"{k} ({n})" for k, n in self.alpha_sources.items()))
        lines += [f"  left out on request: {n} modules of {c}" for c, n in self.skipped.items()]
        lines += [f"  ignored, harmless: {len(self.extras)} tensors ({_some(self.extras)})"] if self.extras else []
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, *self.problem_lines()])

    def problem_lines(self) -> list[str]:
        """The problems as indented text, at most a handful a kind, and what they hint at."""
        lines = [f"  {self.mismatch}"] if self.mismatch and self.problems else []
        for kind, found in self.problems.items():
            count = f"{len(found)} " if kind != "found nothing to do" else ""
            lines.append(f"  {count}{kind}:")
            lines += [f"    {line}" for line in found[:_SHOWN]]
            lines += [f"    and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        return lines


class LoadError(CheckpointError):
    """A file that strict loading refused; the pipeline is as it was.

    Attributes:
        report: everything that was found.
    """

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def refusal(report: LoadReport) -> LoadError:
    """The error that says what is wrong and what to do."""
    head = f"{report.source} does not fit the pipeline; nothing was loaded"
    head += f": {report.mismatch}" if report.mismatch else ""
    counts = (
        f"  {len(report.matched)} modules match ({_span_of(report.components)})" if report.matched else "  no module matches"
    )
    trainer = f"  written by {report.trainer}, dialect {report.dialect}" if report.trainer else f"  dialect {report.dialect}"
    skipped = [f"  left out on request: {n} modules of {c}" for c, n in report.skipped.items()]
    lines = [head, counts, *skipped, trainer, *[line for line in report.problem_lines() if line.strip() != report.mismatch]]
    hint = "  strict=False (--no-strict) loads what fits" if report.matched else ""
    return LoadError("\n".join(line for line in [*lines, hint] if line.strip()), report)


#: base models as people write them
_TITLES = {
    "sd15": "SD1.5", "sd21": "SD2.1", "sd": "SD1.x/2.x", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux.1", "flux2": "Flux.2",
    "wan": "Wan", "z-image": "Z-Image", "qwen-image": "Qwen-Image", "lumina2": "Lumina2", "hunyuan-video": "HunyuanVideo",
    "chroma": "Chroma", "sd35-medium": "SD3.5 medium", "sd35-large": "SD3.5 large",
}  # fmt: skip


def title(base_model: str) -> str:
    """A base model's name as people write it."""
    return _TITLES.get(base_model, base_model)


def _article(name: str) -> str:
    return "an" if name[:1] in "AEFHILMNORSX" and name[:2].isupper() else "a"


def _pairs(found: Mapping[str, str]) -> list[str]:
    return [f"{name}: {why}" if why else name for name, why in found.items()]


def _span(values: list[Any]) -> str:
    ends = [f"{v:.4g}" for v in (values[0], values[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _span_of(components: Mapping[str, int]) -> str:
    return ", ".join(f"{n} in {c}" for c, n in components.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
