"""The whole-model benchmark as a picture: time of a training step by algorithm and library, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from benchmarking import Ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist

COLOURS = {"ours": "#1f5fbf", "PEFT": "#c2541b", "LyCORIS": "#8a8f99", "LyCORIS bypass": "#1c8a4d"}


#: inches a row of a panel takes, and what a panel takes beside its rows, in rows
ROW, REST = 0.3, 1.8

Panels = Mapping[str, Mapping[str, Mapping[str, Ratio]]]


def step_chart(machines: Mapping[str, Panels], path: Path) -> None:
    """Draw a column for every machine, and in it a panel for every model and set of targets.

    Args:
        machines: machine -> title of the panel -> algorithm -> contender -> ratio to the frozen base.
        path: the picture; replaced if it exists.
    """
    heights = {name: [len(rows) + REST for rows in panels.values()] for name, panels in machines.items()}
    tallest = max(sum(column) for column in heights.values())
    figure = plt.figure(figsize=(6.5 * len(machines), ROW * tallest + 1.2), layout="constrained")
    columns = figure.subfigures(1, len(machines), squeeze=False)[0]
    ratios = [r for panels in machines.values() for rows in panels.values() for row in rows.values() for r in row.values()]
    named: dict[str, Artist] = {}
    for column, (name, panels) in zip(columns, machines.items()):
        rest = tallest - sum(heights[name])  # below the shorter columns, so that rows are as high everywhere
        shares = [*heights[name], *([rest] if rest else [])]
        axes = column.subplots(len(shares), 1, height_ratios=shares, squeeze=False)[:, 0]
        column.suptitle(name, fontsize=12)
        for axis, (title, rows) in zip(axes, panels.items()):
            _panel(axis, title, rows)
            _scale(axis, max(ratio.median for ratio in ratios))
            named |= dict(zip(*reversed(axis.get_legend_handles_labels())))
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
    labels = [label for label in COLOURS if label in named]
    figure.legend([named[label] for label in labels], labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.supxlabel("time of a training step, relative to the frozen base model (log scale; bars: 95 % interval)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: plt.Axes, title: str, rows: Mapping[str, Mapping[str, Ratio]]) -> None:
    names = list(rows)
    for index, (contender, colour) in enumerate(COLOURS.items()):
        found = [(row, rows[name][contender]) for row, name in enumerate(names) if contender in rows[name]]
        if not found:
            continue
        places = [row + (index - 1.5) * 0.17 for row, _ in found]
        ratios: Sequence[Ratio] = [ratio for _, ratio in found]
        spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        axis.errorbar([r.median for r in ratios], places, xerr=spread, fmt="o", ms=4.5, lw=1.4, color=colour, label=contender)
    axis.axvline(1.0, color="#20242c", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", color="#e3e6eb")
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _scale(axis: plt.Axes, largest: float) -> None:
    """One scale for all panels, as wide as the medians; intervals may leave it."""
    axis.set_xscale("log")
    axis.set_xlim(0.95, 1.15 * largest)
    marks = [mark for mark in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12) if mark <= 1.15 * largest]
    axis.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axis.minorticks_off()
