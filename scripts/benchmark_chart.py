"""The whole-model benchmark as a picture: time of a training step by algorithm and library, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from benchmarking import Ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"ours": "#1f5fbf", "PEFT": "#c2541b", "LyCORIS": "#8a8f99", "LyCORIS bypass": "#1c8a4d"}


def step_chart(panels: Mapping[str, Mapping[str, Mapping[str, Ratio]]], path: Path) -> None:
    """Draw a panel for every model and set of targets.

    Args:
        panels: title -> algorithm -> contender -> ratio to the frozen base.
        path: the picture; replaced if it exists.
    """
    heights = [len(rows) + 1.5 for rows in panels.values()]
    size = (9, 0.36 * sum(heights) + 0.8)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained", sharex=True
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items()):
        _panel(axis, title, rows)
    _scale(axes[-1, 0], max(ratio.median for rows in panels.values() for row in rows.values() for ratio in row.values()))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    axes[-1, 0].set_xlabel("time of a training step, relative to the frozen base model (log scale; bars: 95 % interval)")
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
