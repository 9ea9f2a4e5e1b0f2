"""What the adapters' comparison says: means with intervals, places where they are certain, tables and pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from benchmarking import MIB, machine, markdown_table
from comparison import CONTENDERS, TAKES, Result, Run, read_pictures
from rich.console import Console
from rich.table import Table

from lycoris_diff.tiny.charts import picture_rows
from lycoris_diff.tiny.subject import SUBJECTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESAMPLED = 4000
CERTAIN = 0.01
EXACT = 14  # pairs, up to which all signs are tried
#: measure -> heading, whether more is better, whether it is a share
MEASURES: dict[str, tuple[str, bool, bool]] = {
    "learned": ("subject learned", True, True),
    "following": ("prompt followed", True, True),
    "kept": ("other prompts kept", True, True),
    "copies": ("near copies", False, True),
    "drift": ("drift of other prompts", False, False),
}
#: measures that are drawn in the chart of two axes: across and up
PLANE = ("drift", "learned")


@dataclass(frozen=True)
class Spread:
    """A mean with its 95 % interval, and the places that its owner may have.

    Attributes:
        mean, low, high: over all runs.
        places: the best and the worst place that the measurements leave open, from 1; None without a ranking.
    """

    mean: float
    low: float
    high: float
    places: tuple[int, int] | None


@dataclass(frozen=True)
class Summary:
    """All of one contender's results.

    Attributes:
        contender: its name.
        learning_rate: with which it was trained.
        spreads: of every one of `MEASURES`.
        parameters, bytes: as in `Result`.
        seconds, peak: medians over the runs, of the seconds over those on `main_processor`.
        runs: how many there are.
    """

    contender: str
    learning_rate: float
    spreads: dict[str, Spread]
    parameters: int
    bytes: int
    seconds: float
    peak: float
    runs: int


def summarize(results: Mapping[Run, Result], ranked: bool) -> list[Summary]:
    """Return a summary of every contender: with places the one that learned most first, else by name.

    Args:
        results: of runs with every contender on the same subjects and seeds.
        ranked: whether there are enough runs for places.

    Raises:
        ValueError: contenders with different subjects or seeds.
    """
    cells: dict[str, dict[tuple[str, int], tuple[Run, Result]]] = {}
    for run, result in results.items():
        cells.setdefault(run.contender, {})[run.subject, run.seed] = run, result
    keys = next(iter(cells.values())).keys()
    for name, own in cells.items():
        if own.keys() != keys:
            raise ValueError(f"{name} has runs on {sorted(own)}, the others on {sorted(keys)}; expected the same for all")
    picked = resamples(sorted(keys))
    spreads: dict[str, dict[str, Spread]] = {name: {} for name in cells}
    for measure, (_, more, _) in MEASURES.items():
        values = {name: np.array([getattr(own[key][1], measure) for key in sorted(keys)]) for name, own in cells.items()}
        for name, own in values.items():
            places = places_of(name, values, picked, more) if ranked else None
            spreads[name][measure] = Spread(float(own.mean()), *interval(own, picked), places)
    processor = main_processor(results)
    summaries = [_summary(name, list(own.values()), spreads[name], processor) for name, own in cells.items()]
    if not ranked:
        return sorted(summaries, key=lambda summary: CONTENDERS[summary.contender].title.lower())
    return sorted(summaries, key=lambda summary: -summary.spreads["learned"].mean)


def resamples(keys: Sequence[tuple[str, int]]) -> np.ndarray:
    """Return bootstrap samples as indices into `keys`, pairs of subject and seed: seeds are drawn anew, subjects stay."""
    generator = np.random.default_rng(0)
    subjects = [subject for subject, _ in keys]
    groups = [np.flatnonzero([each == subject for each in subjects]) for subject in dict.fromkeys(subjects)]
    return np.concatenate([generator.choice(group, (RESAMPLED, len(group))) for group in groups], axis=1)


def interval(values: np.ndarray, picked: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean, over samples of `resamples`."""
    low, high = np.percentile(values[picked].mean(1), (2.5, 97.5))
    return float(low), float(high)


def places_of(name: str, values: Mapping[str, np.ndarray], picked: np.ndarray, more: bool) -> tuple[int, int]:
    """Return the best and the worst place that one contender may have.

    Another one is ahead, or behind, only if the intervals do not overlap, and `chance` of the differences in the same
    subjects and seeds is below `CERTAIN`.
    """
    ahead = behind = 0
    low, high = interval(values[name], picked)
    for theirs in values.values():
        their_low, their_high = interval(theirs, picked)
        apart = their_low > high or their_high < low
        difference = (theirs - values[name]) * (1 if more else -1)
        if apart and chance(difference) < CERTAIN:
            ahead += bool(difference.mean() > 0)
            behind += bool(difference.mean() < 0)
    return 1 + ahead, len(values) - behind


def chance(differences: np.ndarray) -> float:
    """Return how often differences with these sizes have so large a mean if their signs are by chance.

    A permutation test, exact up to 14 pairs; few pairs can never be certain, which the bootstrap would not notice.
    """
    count = len(differences)
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (2**EXACT, count))
    means = np.abs((signs * differences).mean(1))
    return float((means >= abs(differences.mean()) - 1e-12).mean())


def main_processor(results: Mapping[Run, Result]) -> str:
    """Return the processor that most runs were on: times of others are not comparable with its."""
    return Counter(result.processor for result in results.values()).most_common(1)[0][0]


def _summary(name: str, runs: Sequence[tuple[Run, Result]], spreads: dict[str, Spread], processor: str) -> Summary:
    results = [result for _, result in runs]
    return Summary(
        name,
        runs[0][0].learning_rate,
        spreads,
        results[0].parameters,
        results[0].bytes,
        float(np.median([result.seconds for result in results if result.processor == processor])),
        float(np.median([result.peak for result in results])),
        len(results),
    )


# ------------------------------------------------------------------------------------------------------------- writing


def write_report(
    summaries: Sequence[Summary],
    searches: Mapping[Run, Result],
    results: Mapping[Run, Result],
    root: Path,
    document: Path | None,
) -> None:
    """Print the table; write the document and its pictures if one is named."""
    rows = [row(summary) for summary in summaries]
    table = Table("adapter", *MEASURES, "file KiB", "s / step", title="which adapter? means")
    for summary, cells in zip(summaries, rows):
        means = [f"{summary.spreads[name].mean:{'.0%' if share else '.0f'}}" for name, (_, _, share) in MEASURES.items()]
        table.add_row(cells[0], *means, *cells[-3:-1])
    Console().print(table)
    if document is None:
        return
    images = document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    measure_chart(summaries, images / "adapters-measures.png")
    plane_chart(summaries, images / "adapters-plane.png")
    picture_sheet(results, root, images / "adapters-pictures.png")
    document.write_text(page(summaries, searches, results, rows), encoding="utf-8")
    document.with_suffix(".json").write_text(as_json(summaries, searches, results), encoding="utf-8")


def as_json(summaries: Sequence[Summary], searches: Mapping[Run, Result], results: Mapping[Run, Result]) -> str:
    """Return everything as JSON: the summaries, and a line for every run."""
    runs = {"searches": searches, "runs": results}
    lines = {
        name: [json.dumps(_rounded(asdict(run) | asdict(result))) for run, result in of.items()] for name, of in runs.items()
    }
    lines["adapters"] = [json.dumps({"title": CONTENDERS[s.contender].title} | _rounded(asdict(s))) for s in summaries]
    parts = [f'"{name}": [\n' + ",\n".join(own) + "\n]" for name, own in lines.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(plain: Any) -> Any:
    """Four significant digits are more than the intervals warrant."""
    if isinstance(plain, dict):
        return {name: _rounded(value) for name, value in plain.items()}
    return float(f"{plain:.4g}") if isinstance(plain, float) else plain


HEADERS = ["adapter", "learning rate", *[title for title, _, _ in MEASURES.values()]]
HEADERS += ["parameters", "file KiB", "s / step", "peak MiB"]


def row(summary: Summary) -> list[str]:
    """Return one line of the table, under `HEADERS`."""
    return [
        CONTENDERS[summary.contender].title,
        f"{summary.learning_rate:.1e}",
        *[_cell(summary.spreads[name], share) for name, (_, _, share) in MEASURES.items()],
        f"{summary.parameters:,}",
        f"{summary.bytes / 1024:,.0f}",
        f"{summary.seconds:.2f}",
        f"{summary.peak / MIB:,.0f}",
    ]


def _cell(spread: Spread, share: bool) -> str:
    scale, unit = (100, " %") if share else (1, "")
    text = f"{scale * spread.mean:.0f}{unit} ({scale * spread.low:.0f}-{scale * spread.high:.0f})"
    if spread.places is None:
        return text
    best, worst = spread.places
    return f"{text}, {best}." if best == worst else f"{text}, {best}.-{worst}."


def page(
    summaries: Sequence[Summary],
    searches: Mapping[Run, Result],
    results: Mapping[Run, Result],
    rows: Sequence[Sequence[str]],
) -> str:
    """Return the document."""
    some = next(iter(searches))
    powers = sorted({_power(run) for run in searches})
    quality = []
    for summary in summaries:
        tried = {_power(run): (run, result) for run, result in searches.items() if run.contender == summary.contender}
        texts = {power: f"{result.quality:.2f} at {run.learning_rate:.1e}" for power, (run, result) in tried.items()}
        best = [power for power, (run, _) in tried.items() if run.learning_rate == summary.learning_rate]
        texts |= {power: f"**{texts[power]}**" for power in best}
        if texts:
            quality.append([CONTENDERS[summary.contender].title, *[texts.get(power, "") for power in powers]])
    return PAGE.format(
        runs=summaries[0].runs,
        subjects=len({run.subject for run in results}),
        seeds=len({run.seed for run in results}),
        steps=some.steps,
        searched=some.subject,
        takes=TAKES,
        places=RANKED if summaries[0].spreads["learned"].places else UNRANKED,
        table=markdown_table(HEADERS, rows),
        rates=markdown_table(["adapter", *[f"{2.0**power:g} x recipe" for power in powers]], quality),
        processor=main_processor(results),
        versions=machine()["versions"],
    )


def _power(run: Run) -> int:
    """Return how often a run's learning rate is the recipe's doubled."""
    return round(math.log2(run.learning_rate / CONTENDERS[run.contender].recipe.learning_rate))


RANKED = """After the comma, the
places that are left open: another adapter is ahead only where the intervals do not overlap, and the differences, subject by
subject and seed by seed, would be so large in less than one of a hundred cases if their signs were by chance (a permutation
test; nothing is corrected for how many pairs there are). "1.-9." means that nothing more can be said."""
UNRANKED = "Too few runs to say which adapter is ahead of which."

PAGE = """# Adapters compared

`python scripts/compare_adapters.py --markdown docs/adapters-compared.md` wrote this page: every adapter trained by the same
loop on the embedded base model, and measured in the pixels of what it draws. It says what these adapters do to this small
model in {steps} steps, with sizes as in `lycoris_diff/tiny/recipes.py`; a large model may order them otherwise. A run is a
minute or two of one core, drawing and measuring included; with three subjects and seeds all take some three hours on two.

![What each adapter learns and keeps](images/adapters-measures.png)

{table}

Means over {runs} runs (drawn creatures: {subjects}, seeds: {seeds}) with 95 % bootstrap intervals over the seeds, of just these
creatures. {places}

- *Subject learned*: 0 % is what the base model draws for the prompt, 100 % what the autoencoder can show of the drawn pictures.
- *Prompt followed*: of the subject's pictures ({takes} on each of six backgrounds, one of which was not in training), those
  with the background asked for.
- *Other prompts kept*: backgrounds, colours and shapes that are as asked, of those that were before; *drift*: how much the
  pixels of these pictures changed, of 255.
- *Near copies*: of the subject's pictures, those that are nearer to a training picture than 19 of 20 fresh drawings are.
- *File*: the kohya file where the adapter has one, else the PEFT directories. *Peak*: memory of the process while it trains,
  beyond what it had before.
- *Full weights*: those of the linear and convolution layers; embeddings, norms and biases stay.

![Learned and kept](images/adapters-plane.png)

![What they draw](images/adapters-pictures.png)

## Learning rates

Each adapter was first trained on a subject that is not compared ("{searched}"): with the rate of its recipe, then with the
doubled or halved one, on until the best had a worse one on both sides. Best is the highest harmonic mean of learned, followed,
kept, and the part of the pictures that is no near copy, in one run each. PEFT's adapters begin as ours and take ours.

{rates}

Seconds are of the processor ({processor}), one thread a run, whatever ran beside it; {versions}.
"""


# -------------------------------------------------------------------------------------------------------------- charts


def measure_chart(summaries: Sequence[Summary], path: Path) -> None:
    """Draw a panel for every measure: contenders one below the other, means with intervals."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(13, 0.32 * len(summaries) + 1.3), sharey=True, layout="constrained")
    for axis, (measure, (_, _, share)) in zip(axes, MEASURES.items()):
        for place, summary in enumerate(summaries):
            spread = summary.spreads[measure]
            scale = 100 if share else 1
            bars = [[scale * (spread.mean - spread.low)], [scale * (spread.high - spread.mean)]]
            colour = _colour(summary.contender)
            axis.errorbar([scale * spread.mean], [place], xerr=bars, fmt="o", ms=5, lw=1.5, color=colour)
        axis.set_title(_heading(measure, "\n"), fontsize=9)
        if share:  # no tick where there is no share
            low, high = axis.get_xlim()
            axis.set_xlim(max(low, -2), min(high, 101))
        axis.grid(axis="x", color="#e3e6eb")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(summaries)), [CONTENDERS[summary.contender].title for summary in summaries])
    axes[0].set_ylim(len(summaries) - 0.5, -0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plane_chart(summaries: Sequence[Summary], path: Path) -> None:
    """Draw every contender by two measures, as large as its parameters."""
    (across, across_scale), (up, up_scale) = ((name, 100 if MEASURES[name][2] else 1) for name in PLANE)
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    for summary in summaries:
        x, y = across_scale * summary.spreads[across].mean, up_scale * summary.spreads[up].mean
        colour = _colour(summary.contender)
        axis.scatter([x], [y], s=24 + 12 * np.log2(summary.parameters / 10_000 + 1), color=colour, alpha=0.75)
        beside = (6, -11) if CONTENDERS[summary.contender].peft else (6, 4)  # PEFT's are near ours
        axis.annotate(CONTENDERS[summary.contender].title, (x, y), beside, textcoords="offset points", fontsize=8)
    axis.set_xlabel(_heading(across))
    axis.set_ylabel(_heading(up))
    axis.set_title("means; dots grow with the number of parameters", fontsize=9, loc="left")
    axis.grid(color="#e3e6eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _heading(measure: str, between: str = " ") -> str:
    title, more, share = MEASURES[measure]
    return f"{title}{', %' if share else ''}{between}({'more' if more else 'less'} is better)"


def _colour(contender: str) -> str:
    if CONTENDERS[contender].peft:
        return "#c2541b"
    return "#20242c" if contender == "full" else "#1f5fbf"


def picture_sheet(results: Mapping[Run, Result], root: Path, path: Path) -> None:
    """Lay out what every contender draws of one subject with one seed, a row each, a picture a background."""
    first = next(iter(results))
    rows = []
    for run, result in results.items():
        if (run.subject, run.seed) == (first.subject, first.seed):
            pictures = read_pictures(run.folder(root) / "pictures")[::TAKES]
            label = f"{CONTENDERS[run.contender].title}: learned {result.learned:.0%}".replace("³", "^3")  # not in the font
            rows.append((label, pictures, [] if rows else [f"on {name}" for name in SUBJECTS[run.subject].backgrounds]))
    photos = read_pictures(first.folder(root) / "photos")
    picture_rows([("trained on", photos, []), *rows], "the same prompts and noise", cell=72).save(path)
