"""Dropouts: what each drops, off in eval, never NaN, and the expectation kept where the setting says so."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, adapt, make_input, make_layer, randomize
from torch import nn

from lycoris_diff import LoHaConfig, LoKrConfig, LoraConfig, MissConfig

TARGET = {"target_modules": ["layer"]}


def build(config, layer="linear", dtype=torch.float64):
    model, adapted = adapt(make_layer(layer, dtype), config)
    randomize(model)
    return model, adapted


def changes(model, adapted, x, n):
    """n draws of what the adapter adds to the output, in training mode."""
    base = adapted.base_layer(x)
    model.train()
    with torch.no_grad():
        return torch.stack([model(x) - base for _ in range(n)])


ALL = {
    "lokr-rank": LoKrConfig(r=2, rank_dropout=0.5, **TARGET),
    "lokr-rank-scaled": LoKrConfig(r=2, rank_dropout=0.5, rank_dropout_scale=True, **TARGET),
    "lokr-module": LoKrConfig(r=2, module_dropout=0.5, **TARGET),
    "lokr-dora-rank": LoKrConfig(r=2, rank_dropout=0.5, weight_decompose=True, **TARGET),
    "loha-rank": LoHaConfig(r=2, rank_dropout=0.5, **TARGET),
    "loha-rank-scaled": LoHaConfig(r=2, rank_dropout=0.5, rank_dropout_scale=True, **TARGET),
    "loha-module": LoHaConfig(r=2, module_dropout=0.5, **TARGET),
    "lora": LoraConfig(r=2, lora_dropout=0.5, **TARGET),
    "lora-dora": LoraConfig(r=2, lora_dropout=0.5, use_dora=True, **TARGET),
    "miss": MissConfig(r=6, miss_dropout=0.5, **TARGET),
    "miss-odd": MissConfig(r=5, miss_dropout=0.5, **TARGET),
    "miss-mini": MissConfig(r=6, mini_r=4, init_weights="mini", miss_dropout=0.5, **TARGET),
    "miss-bat": MissConfig(r=6, init_weights="bat", miss_dropout=0.5, **TARGET),
}


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv1d-circular", "conv2d-stride2"])
@pytest.mark.parametrize("name", list(ALL))
def test_acts_in_training_and_is_off_in_eval(name, layer):
    model, adapted = build(ALL[name], layer)
    twin, _ = build(ALL[name], layer)
    x = make_input(adapted.base_layer)
    draws = changes(model, adapted, x, 40)
    assert torch.isfinite(draws).all()
    assert not all(torch.equal(draws[0], d) for d in draws[1:])
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), twin.eval()(x))
    model.train()
    torch.manual_seed(7)
    first = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)
    model(x).sum().backward()


@pytest.mark.parametrize("name", ["lokr-rank", "loha-rank"])  # DoRA's magnitude moves every row
@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv2d-zeros"])
def test_rank_dropout_drops_output_rows(name, layer):
    """One draw of a call keeps or drops whole output channels of the change, for all tokens alike."""
    model, adapted = build(ALL[name], layer)
    x = make_input(adapted.base_layer)
    model.eval()
    full = (model(x) - adapted.base_layer(x)).detach()
    axis = 1 if layer.startswith("conv") else -1
    rows = lambda t: t.movedim(axis, 0).flatten(1)
    dropped = 0
    for draw in changes(model, adapted, x, 20):
        for mine, whole in zip(rows(draw), rows(full)):
            zero, kept = mine.abs().max() < 1e-9, torch.allclose(mine, whole, rtol=1e-9, atol=1e-9)
            assert zero or kept
            dropped += int(zero)
    assert 0.4 < dropped / (20 * 36) < 0.6


@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
def test_rank_dropout_scale_keeps_the_mean_and_never_divides_by_zero(config):
    model, adapted = build(config(r=2, rank_dropout=0.5, rank_dropout_scale=True, **TARGET))
    x = make_input(adapted.base_layer)
    model.eval()
    full = (model(x) - adapted.base_layer(x)).detach()
    mean = changes(model, adapted, x, 3000).mean(0)
    assert (mean - full).norm() / full.norm() < 0.1

    narrow = nn.Linear(8, 2).double()  # with two rows, both are dropped in most draws
    model, adapted = adapt(narrow, config(r=1, rank_dropout=0.9, rank_dropout_scale=True, **TARGET))
    randomize(model)
    draws = changes(model, adapted, torch.randn(3, 8, dtype=torch.float64), 200)
    assert torch.isfinite(draws).all()
    assert any(not d.any() for d in draws)
    model.train()
    for _ in range(50):
        model.zero_grad()
        model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
def test_unscaled_rank_dropout_shrinks_the_mean(config):
    model, adapted = build(config(r=2, rank_dropout=0.25, **TARGET))
    x = make_input(adapted.base_layer)
    model.eval()
    full = (model(x) - adapted.base_layer(x)).detach()
    mean = changes(model, adapted, x, 2000).mean(0)
    assert (mean - 0.75 * full).norm() / full.norm() < 0.06


@pytest.mark.parametrize("name", ["lokr-module", "loha-module"])
def test_module_dropout_skips_the_whole_adapter(name):
    model, adapted = build(ALL[name])
    x = make_input(adapted.base_layer)
    model.eval()
    full = (model(x) - adapted.base_layer(x)).detach()
    skipped = 0
    for draw in changes(model, adapted, x, 400):
        assert not draw.any() or torch.allclose(draw, full, rtol=1e-9, atol=1e-9)
        skipped += int(not draw.any())
    assert 0.4 < skipped / 400 < 0.6


@pytest.mark.parametrize("name", ["lora", "miss", "miss-odd", "miss-mini", "miss-bat"])
@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros"])
def test_input_dropout_keeps_the_mean(name, layer):
    """An ordinary dropout on what the adapter sees; the base layer's own path is never dropped."""
    model, adapted = build(ALL[name], layer)
    x = make_input(adapted.base_layer)
    model.eval()
    full = (model(x) - adapted.base_layer(x)).detach()
    draws = changes(model, adapted, x, 2500)
    assert (draws.mean(0) - full).norm() / full.norm() < 0.1
    assert draws.std(0).mean() > 0.1 * full.abs().mean()


@pytest.mark.parametrize("name", list(ALL))
def test_merging_ignores_dropout(name):
    model, adapted = build(ALL[name])
    x = make_input(adapted.base_layer)
    expected = model.eval()(x).detach()
    model.train()
    model.merge_adapter()
    assert torch.allclose(model(x), expected, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert adapted.get_delta_weight("default").equal(adapted.get_delta_weight("default"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: LoKrConfig(rank_dropout=p, **TARGET),
        lambda p: LoKrConfig(module_dropout=p, **TARGET),
        lambda p: LoHaConfig(rank_dropout=p, **TARGET),
        lambda p: LoraConfig(lora_dropout=p, **TARGET),
        lambda p: MissConfig(r=6, miss_dropout=p, **TARGET),
    ],
)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_rates_outside_zero_and_one_are_refused(make, p):
    with pytest.raises(ValueError):
        adapt(make_layer("linear"), make(p))


def test_certain_dropout_is_finite():
    for config in (
        LoKrConfig(r=2, rank_dropout=1.0, rank_dropout_scale=True, **TARGET),
        LoHaConfig(r=2, module_dropout=1.0, **TARGET),
    ):
        try:
            model, adapted = build(config)
        except ValueError:
            continue  # refusing is fine as well
        x = make_input(adapted.base_layer)
        assert not changes(model, adapted, x, 5).any()


def test_every_algorithm_without_dropout_is_the_same_in_both_modes():
    for name in ALGORITHMS:
        model, adapted = adapt(make_layer("conv2d-zeros"), ALGORITHMS[name]())
        randomize(model)
        x = make_input(adapted.base_layer)
        assert torch.equal(model.train()(x), model.eval()(x)), name
