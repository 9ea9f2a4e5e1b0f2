#!/usr/bin/env python3
"""Which adapter? Train all of them on the embedded base model and measure, in pixels, what each learns and keeps.

    python scripts/compare_adapters.py --markdown docs/adapters-compared.md
    python scripts/compare_adapters.py --adapters lokr lora peft-lora --seeds 0 1 2 --out comparison-output

Every adapter first gets a small search for its learning rate, on a subject that is not compared: the recipe's rate, then the
doubled or halved one, until the best is not the last. Then it is trained on every other subject with every seed. The table has
means with 95 % bootstrap intervals over these runs, and the places that an adapter may have: one is ahead of another only where
a permutation test of the differences between runs of the same subject and seed says so. Full fine-tuning and three of PEFT's
adapters, trained by the same loop, are there to compare with.

What is done is kept in `--out`: an interrupted call goes on, and a call with more seeds or steps of its own adds to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarking import prepare_process
from comparison import CONTENDERS, PEFTS, Result, Run, execute, kept_result, prepare
from comparison_report import summarize, write_report
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lycoris_diff.tiny.subject import SUBJECTS

SEARCHED, *COMPARED = SUBJECTS  # rates are searched on the demo's subject, which the recipes come from
LIMIT = 3  # doublings or halvings of the recipe's learning rate that the search goes
STEPS = 120
FEWEST = 3, 8  # seeds and runs from which adapters are ranked: fewer runs cannot be certain


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and report."""
    options = parse(arguments)
    found = search(options)
    rates = {name: best_rate(searched_for(name), found) for name in options.adapters}
    runs = [
        Run(name, subject, seed, rates[name], options.steps)
        for subject in options.subjects
        for seed in options.seeds
        for name in options.adapters
    ]
    results = run_all(runs, options, "comparing")
    enough = (len(options.seeds), len(options.seeds) * len(options.subjects))
    summaries = summarize(results, ranked=all(have >= need for have, need in zip(enough, FEWEST)))
    write_report(summaries, found, results, options.out, options.markdown)


def search(options: argparse.Namespace) -> dict[Run, Result]:
    """Return the runs that look for every adapter's learning rate, each round with all adapters that still look."""
    found: dict[Run, Result] = {}
    names = dict.fromkeys(searched_for(name) for name in options.adapters)
    while trials := [run for name in names if (run := next_trial(name, found, options.steps)) is not None]:
        found |= run_all(trials, options, "searching learning rates")
    return found


def searched_for(contender: str) -> str:
    """Return the contender whose learning rate is taken: PEFT's adapters begin as ours and learn with the same one."""
    return contender.removeprefix(PEFTS)


def next_trial(contender: str, found: dict[Run, Result], steps: int) -> Run | None:
    """Return the run that the search for a learning rate needs next: none once the best rate has neighbours on both sides."""
    recipe = CONTENDERS[contender].recipe
    trials = {
        power: Run(contender, SEARCHED, 0, 2.0**power * recipe.learning_rate, steps) for power in range(-LIMIT, LIMIT + 1)
    }
    tried = {power: found[run].quality for power, run in trials.items() if run in found}
    best = max(tried, key=tried.__getitem__, default=0)
    wanted = (power for power in (best, best + 1, best - 1) if power in trials and power not in tried)
    return trials[power] if (power := next(wanted, None)) is not None else None


def best_rate(contender: str, found: dict[Run, Result]) -> float:
    """Return the learning rate of the search's best run."""
    return max((run for run in found if run.contender == contender), key=lambda run: found[run].quality).learning_rate


def run_all(runs: Sequence[Run], options: argparse.Namespace, title: str) -> dict[Run, Result]:
    """Return every run's result, in order; missing ones are executed, `--jobs` at once, each in a process of its own."""
    done = {run: result for run in runs if (result := kept_result(run, options.out)) is not None}
    missing = [run for run in runs if run not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # a process of its own for every run, whose memory is then its own; what they import is there when they begin
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["lycoris_diff.tiny.demo", "peft"])
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        context.Pool(options.jobs, initialize, (options.threads,), maxtasksperchild=1) as pool,
    ):
        seeds = sorted({run.seed for run in missing})
        for _ in progress.track(pool.imap(partial(prepare, root=options.out), seeds), len(seeds), description="base model"):
            continue
        task = progress.add_task(title, total=len(runs), completed=len(done))
        for run, result in zip(missing, pool.imap(partial(execute, root=options.out), missing)):
            done[run] = result
            progress.advance(task)
    return {run: done[run] for run in runs}


def initialize(threads: int) -> None:
    """Begin a process that executes a run."""
    prepare_process(threads)
    diffusers_logging.disable_progress_bar()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--subjects", nargs="+", default=COMPARED, choices=COMPARED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("comparison-output"), help="what is kept (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the document, and its pictures beside it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
