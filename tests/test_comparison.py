"""The comparison of adapters: what its measures say of pictures made for it, when it ranks, and a short run of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lycoris_diff.tiny.subject import SUBJECTS, draw_subject

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytest.importorskip("lycoris")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_adapters
    import comparison
    import comparison_report

    yield {"main": compare_adapters, "runs": comparison, "report": comparison_report}
    for name in [name for name in sys.modules if name.startswith(("compar", "benchmark"))]:
        del sys.modules[name]


def result(scripts, **changes):
    values = {name: 0.5 for name in ("learned", "following", "kept", "drift", "copies", "leaked", "seconds")}
    values |= {"parameters": 10, "bytes": 2048, "peak": 2**20, "processor": "abacus"}
    return scripts["runs"].Result(**{**values, **changes})


def results(scripts, learned):
    """Runs of three subjects and three seeds; `learned` gives a contender's nine values."""
    keys = [(subject, seed) for subject in ("lime", "wine", "lavender") for seed in range(3)]
    return {
        scripts["runs"].Run(name, subject, seed, 1e-3, 4): result(scripts, learned=value)
        for name, values in learned.items()
        for (subject, seed), value in zip(keys, values, strict=True)
    }


class TestRanking:
    def test_what_is_certain_has_a_place(self, scripts):
        found = results(
            scripts,
            {
                "lora": [0.9, 0.8, 0.85, 0.6, 0.5, 0.55, 0.3, 0.4, 0.35],
                "lokr": [0.7, 0.6, 0.66, 0.4, 0.31, 0.34, 0.2, 0.3, 0.25],
                "loha": [0.1] * 9,
            },
        )
        summaries = scripts["report"].summarize(found, ranked=True)
        assert [summary.contender for summary in summaries] == ["lora", "lokr", "loha"]
        # the subjects differ more than the adapters: only pairs of the same subject and seed tell
        assert [summary.spreads["learned"].places for summary in summaries] == [(1, 1), (2, 2), (3, 3)]
        spread = summaries[0].spreads["learned"]
        assert spread.mean == pytest.approx(5.25 / 9) and spread.low < spread.mean < spread.high

    def test_what_overlaps_has_none(self, scripts):
        found = results(
            scripts,
            {
                "lora": [0.9, 0.5, 0.7, 0.6, 0.8, 0.7, 0.6, 0.7, 0.7],
                "lokr": [0.6, 0.8, 0.7, 0.7, 0.6, 0.7, 0.6, 0.7, 0.8],
                "loha": [0.1] * 9,
            },
        )
        places = {s.contender: s.spreads["learned"].places for s in scripts["report"].summarize(found, ranked=True)}
        assert places == {"lora": (1, 2), "lokr": (1, 2), "loha": (3, 3)}

    def test_less_may_be_better(self, scripts):
        report = scripts["report"]
        values, picked = {"a": np.full(9, 1.0), "b": np.full(9, 2.0)}, np.arange(9)[None]
        assert report.places_of("a", values, picked, more=False) == (1, 1)
        assert report.places_of("a", values, picked, more=True) == (2, 2)

    def test_intervals_that_overlap_are_not_ranked(self, scripts):
        """Not even where every single difference has the same sign."""
        lora = [0.2, 0.5, 0.8, 0.2, 0.5, 0.8, 0.2, 0.5, 0.8]
        found = results(scripts, {"lora": lora, "lokr": [value + 0.01 for value in lora]})
        assert [s.spreads["learned"].places for s in scripts["report"].summarize(found, ranked=True)] == [(1, 2), (1, 2)]

    def test_chance_is_that_of_signs(self, scripts):
        chance = scripts["report"].chance
        assert chance(np.ones(3)) == pytest.approx(2 / 8)  # three of a kind are no certainty
        assert chance(np.ones(9)) == pytest.approx(2 / 512)
        assert chance(np.array([1.0, -1.0, 1.0, -1.0])) == 1
        assert chance(np.random.default_rng(0).normal(1.0, 1.0, 40)) < 1e-3
        fair = [chance(np.random.default_rng(seed).normal(size=9)) < 0.05 for seed in range(400)]
        assert 0.02 < np.mean(fair) < 0.08

    def test_subjects_stay_in_resamples(self, scripts):
        picked = scripts["report"].resamples([("x", 0), ("x", 1), ("y", 0)])
        assert set(picked[:, :2].flat) == {0, 1} and set(picked[:, 2]) == {2}

    def test_few_runs_are_not_ranked(self, scripts):
        found = results(scripts, {"lora": [0.9] * 9, "lokr": [0.1] * 9})
        summaries = scripts["report"].summarize(found, ranked=False)
        assert all(s.spreads["learned"].places is None for s in summaries)
        assert [s.contender for s in summaries] == ["lokr", "lora"]  # by name

    def test_seconds_are_of_one_processor(self, scripts):
        found = results(scripts, {"lora": [0.9] * 9})
        values = ["sundial"] * 4 + ["abacus"] * 5
        for run, processor in zip(found, values, strict=True):
            found[run] = result(scripts, processor=processor, seconds=9.0 if processor == "sundial" else 2.0)
        assert scripts["report"].main_processor(found) == "abacus"
        (summary,) = scripts["report"].summarize(found, ranked=False)
        assert summary.seconds == 2.0 and summary.spreads["learned"].mean == 0.5

    def test_other_subjects_are_refused(self, scripts):
        found = results(scripts, {"lora": [0.9] * 9, "lokr": [0.1] * 9})
        del found[next(run for run in found if run.contender == "lokr")]
        with pytest.raises(ValueError, match="expected the same for all"):
            scripts["report"].summarize(found, ranked=True)


class TestKept:
    def keep(self, run, root, **changes):
        folder = run.folder(root)
        folder.mkdir(parents=True)
        values = {"settings": run.settings(), "result": dict(vars(changes.pop("result"))), **changes}
        (folder / "result.json").write_text(json.dumps(values))

    def test_only_the_same_run_is_known(self, scripts, tmp_path):
        runs = scripts["runs"]
        run, longer = (runs.Run("lora", "lime", 0, 1e-3, steps) for steps in (4, 8))
        assert runs.kept_result(run, tmp_path) is None
        self.keep(run, tmp_path, result=result(scripts))
        assert runs.kept_result(run, tmp_path) == result(scripts)
        assert run.folder(tmp_path) != longer.folder(tmp_path) and runs.kept_result(longer, tmp_path) is None

    def test_other_settings_are_another_run(self, scripts, tmp_path, monkeypatch):
        runs = scripts["runs"]
        run = runs.Run("lora", "lime", 0, 1e-3, 4)
        self.keep(run, tmp_path, result=result(scripts))
        monkeypatch.setattr(runs, "BATCH", runs.BATCH + 1)
        assert runs.kept_result(run, tmp_path) is None
        monkeypatch.undo()
        monkeypatch.setitem(runs.CONTENDERS["lora"].recipe.fields, "r", 5)
        assert runs.kept_result(run, tmp_path) is None

    def test_results_without_all_measures_are_made_anew(self, scripts, tmp_path):
        run = scripts["runs"].Run("lora", "lime", 0, 1e-3, 4)
        old = result(scripts)
        object.__delattr__(old, "processor")
        self.keep(run, tmp_path, result=old)
        assert scripts["runs"].kept_result(run, tmp_path) is None


class TestSearch:
    @pytest.mark.parametrize(
        ("best", "tried"), [(0, [0, 1, -1]), (1, [0, 1, 2]), (-2, [0, 1, -1, -2, -3]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
    )
    def test_it_goes_on_until_the_best_has_neighbours(self, scripts, best, tried):
        main, found, powers = scripts["main"], {}, []
        recipe = scripts["runs"].CONTENDERS["lokr"].recipe
        while (run := main.next_trial("lokr", found, 4)) is not None:
            powers.append(round(np.log2(run.learning_rate / recipe.learning_rate)))
            found[run] = result(scripts, learned=0.9 - 0.05 * abs(powers[-1] - best))
        assert powers == tried
        assert main.best_rate("lokr", found) == pytest.approx(recipe.learning_rate * 2.0 ** min(best, 3))


class TestMeasures:
    def test_a_copy_is_nearer_than_fresh_drawings(self, scripts):
        runs, subject = scripts["runs"], SUBJECTS["wine"]
        photos = [draw_subject(seed=seed, subject=subject) for seed in range(5)]
        limit = runs.copy_distance(subject, 0, photos)
        noise = np.random.default_rng(0).integers(-3, 4, (64, 64, 3))
        copy = Image.fromarray((np.asarray(photos[0], np.int16) + noise).clip(0, 255).astype(np.uint8))
        assert runs.nearest(copy, photos) < limit
        fresh = [runs.nearest(draw_subject(seed=seed, subject=subject), photos) < limit for seed in range(20, 80)]
        assert np.mean(fresh) < 0.2

    def test_quality_needs_all_four(self, scripts):
        assert result(scripts, learned=0.9, following=0.9, kept=0.9, copies=0.1).quality == pytest.approx(0.9)
        assert result(scripts, learned=-0.1, following=1, kept=1, copies=0).quality < 0.01
        assert (
            result(scripts, learned=0.9, following=1, kept=0.3, copies=0.1).quality
            < result(scripts, learned=0.7, following=0.8, kept=0.8, copies=0.3).quality
        )

    def test_prompts_name_a_background_each(self, scripts):
        runs, subject = scripts["runs"], SUBJECTS["lime"]
        prompts, seeds = runs.prompts_of(subject, 1)
        assert len(prompts) == runs.TAKES * len(subject.backgrounds) == len(set(seeds))
        assert all(f"on a {name} background" in prompt for name, prompt in zip(subject.backgrounds, prompts[:: runs.TAKES]))


@pytest.mark.slow
def test_a_short_comparison(scripts, tmp_path, monkeypatch):
    """Our LoRA and PEFT's, one step: what is kept is not done again, PEFT trains from the same start, the page is whole."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    page, out = tmp_path / "docs" / "page.md", tmp_path / "out"
    page.parent.mkdir()
    given = ["--adapters", "lora", "peft-lora", "--subjects", "lime", "--seeds", "0", "--steps", "1", "--jobs", "1"]
    monkeypatch.setattr(scripts["main"], "LIMIT", 0)  # the recipes' learning rates, no search
    given += ["--out", str(out), "--markdown", str(page)]
    scripts["main"].main(given)
    kept = sorted(out.glob("*/*/result.json"))
    assert [path.parent.parent.name for path in kept] == ["lora", "lora", "peft-lora"]
    ours, theirs = (json.loads(kept[index].read_text())["result"] for index in (0, 2))
    assert ours["parameters"] == theirs["parameters"] > 0 and theirs["bytes"] > 0
    assert abs(ours["learned"] - theirs["learned"]) < 0.05 and 0.9 < ours["kept"] < 1.1
    times = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(scripts["main"], "execute", lambda run, root: pytest.fail(f"{run} is done already"))
    scripts["main"].main(given)
    assert times == [path.stat().st_mtime_ns for path in kept]
    text = page.read_text()
    assert text.count("| LoRA, PEFT's |") == 1 and text.count("| LoRA |") == 2 and "Too few runs" in text and "{" not in text
    values = json.loads(page.with_suffix(".json").read_text())
    assert [row["contender"] for row in values["runs"]] == ["lora", "peft-lora"] and len(values["adapters"]) == 2
    pictures = sorted(path.name for path in (page.parent / "images").glob("*.png"))
    assert pictures == ["adapters-measures.png", "adapters-pictures.png", "adapters-plane.png"]
