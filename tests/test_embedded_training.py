"""From drawn pictures to measured ones on the embedded base model: a subject is learned, and the rest is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from lycoris_diff.tiny import demo
from lycoris_diff.tiny.demo import TRAIN_STEPS, run_demo
from lycoris_diff.tiny.measure import subject_score


@pytest.mark.parametrize(
    ("adapter", "steps", "batch"),
    [
        ("lora", 160, 2),  # the same in half of the time
        pytest.param("lora", TRAIN_STEPS, 4, marks=pytest.mark.slow),
        pytest.param("lokr", TRAIN_STEPS, 4, marks=pytest.mark.slow),
    ],
)
def test_subject_is_learned_and_the_rest_kept(adapter, steps, batch, tmp_path, monkeypatch):
    """The demo as users run it: trained, written, loaded into a fresh base model, and read from the pixels."""
    config = demo.demo_config
    monkeypatch.setattr(demo, "demo_config", lambda *given: replace(config(*given), train_batch_size=batch))
    report = run_demo(adapter, tmp_path, steps)
    training, outcome = report.training, report.outcome
    assert training.held_out_after < 0.6 * training.held_out_before
    assert outcome.subject_after > 0.5 and outcome.subject_after > outcome.subject_before + 0.15
    assert outcome.others_before.share >= 0.9 and outcome.others_subject < 0.2
    assert report.succeeded, outcome
    assert Image.open(report.files["pictures"]).width > 500
    assert subject_score(Image.open(tmp_path / "subject" / "subject-1.png")) > 0.95
