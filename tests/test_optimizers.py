"""Optimizers by name: what they are told, what is refused, and that a saved run goes on to the same bits."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from lycoris_diff import FullConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, ShiraConfig
from lycoris_diff.errors import ConfigError
from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.optimizers import (
    OPTIMIZERS,
    SHORT_NAME_ARGS,
    describe_optimizer,
    make_lr_scheduler,
    make_optimizer,
    optimizer_eval,
    risky_learning_rate,
)
from lycoris_diff.training.state import Checkpoints

#: each with a package that may be absent
NAMES = {
    "adamw": "torch",
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "adafactor": "transformers",
    "torch.optim.SGD": "torch",
}


def settings(**fields):
    return DreamBoothConfig("pictures", "out", adapters={"unet": LoKrConfig()}, **fields)


def weights():
    """Factors like an adapter's: one of them zero, one large enough for 8-bit states."""
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(8, 4, generator=generator)),
        nn.Parameter(torch.zeros(4, 8)),
        nn.Parameter(torch.randn(64, 80, generator=generator)),
    ]


def groups_of(parameters, rate=1e-3, other=None):
    return [
        {"params": parameters[:2], "lr": rate, "name": "unet"},
        {"params": parameters[2:], "lr": rate if other is None else other, "name": "text_encoder"},
    ]


def take_steps(parameters, optimizer, schedule, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        a, b, c = parameters
        wanted = torch.randn(8, 8, generator=generator)
        loss = (a @ b - wanted).square().mean() + (c - torch.randn(c.shape, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def need(name):
    pytest.importorskip(NAMES[name])


def rate_of(name):
    return 1.0 if name == "prodigy" else 1e-2


# --- making them ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_takes_the_groups_and_moves_all_of_them(name):
    need(name)
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    groups = groups_of(parameters, rate_of(name))
    optimizer = make_optimizer(settings(optimizer=name), groups)
    path = OPTIMIZERS.get(name, name)
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}".startswith(path.split(".")[0])
    assert type(optimizer).__name__ == path.rpartition(".")[2]
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "text_encoder"]
    assert set(groups[0]) == {"params", "lr", "name"}
    take_steps(parameters, optimizer, make_lr_scheduler(settings(), optimizer), range(3))
    assert all(not torch.equal(a, b) for a, b in zip(parameters, before))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "schedulefree", "adafactor", "torch.optim.SGD"])
def test_each_group_learns_at_its_own_rate(name):
    need(name)
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    config = settings(optimizer=name, optimizer_args={"weight_decay": 0.0})
    optimizer = make_optimizer(config, groups_of(parameters, 1e-2, other=0.0))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.0]
    take_steps(parameters, optimizer, make_lr_scheduler(config, optimizer), range(2))
    assert not torch.equal(parameters[0], before[0])
    assert torch.equal(parameters[2], before[2])


def test_arguments_reach_the_optimizer():
    config = settings(optimizer_args={"betas": [0.5, 0.9], "weight_decay": 0.125})
    group = make_optimizer(config, groups_of(weights())).param_groups[0]
    assert tuple(group["betas"]) == (0.5, 0.9) and group["weight_decay"] == 0.125


@pytest.mark.parametrize("name", SHORT_NAME_ARGS)
def test_what_a_short_name_stands_for_can_be_overridden(name):
    need(name)
    key, value = next((k, v) for k, v in SHORT_NAME_ARGS[name].items() if k in ("use_bias_correction", "scale_parameter"))
    for override in ({}, {key: not value}):
        config = settings(optimizer=name, optimizer_args=override)
        assert make_optimizer(config, groups_of(weights(), 1.0)).param_groups[0][key] is (value if not override else not value)


@pytest.mark.parametrize(
    ("fields", "fused"),
    [
        ({}, True),
        ({"optimizer_args": {"fused": False}}, False),
        ({"optimizer_args": {"foreach": True}}, None),
        ({"mixed_precision": "fp16"}, None),
        ({"optimizer": "torch.optim.AdamW"}, None),
    ],
)
def test_adamw_is_one_operation_unless_it_may_not_be(fields, fused):
    assert make_optimizer(settings(**fields), groups_of(weights())).param_groups[0]["fused"] is fused


def test_adamw_as_one_operation_takes_the_same_steps():
    taken = []
    for given in ({}, {"fused": False, "foreach": False}):
        parameters = weights()
        config = settings(optimizer_args={"weight_decay": 0.1, **given})
        optimizer = make_optimizer(config, groups_of(parameters, 1e-2, other=1e-3))
        take_steps(parameters, optimizer, make_lr_scheduler(config, optimizer), range(5))
        taken.append(parameters)
    for one, other in zip(*taken):  # two orders of the same float32 operations, five steps of 1e-2
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_prodigy_prints_nothing():
    need("prodigy")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        make_optimizer(settings(optimizer="prodigy"), groups_of(weights(), 1.0))
    assert printed.getvalue() == ""


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"optimizer": "adamv"}, ["'adamv'", "Did you mean 'adamw'"]),
        ({"optimizer": "torch.optim.AdamV"}, ["torch.optim has no 'AdamV'", "'Adam'"]),
        ({"optimizer": "no_such_package_1.Thing"}, ["pip install no_such_package_1", "not installed"]),
        ({"optimizer": "torch.no_such_part.Thing"}, ["torch has no module 'torch.no_such_part'"]),
        ({"optimizer": "torch.nn.Linear"}, ["torch.nn.Linear", "subclass of torch.optim.Optimizer"]),
        ({"optimizer": "torch.optim.LBFGS"}, ["closure"]),
        ({"optimizer_args": {"weigth_decay": 0.1}}, ["'weigth_decay'", "'weight_decay'"]),
        ({"optimizer_args": {"lr": 0.1}}, ["'lr'", "learning_rate"]),
        ({"optimizer_args": {"eps": "1e-8"}}, ["'1e-8'", "torch.optim.AdamW refuses"]),
        ({"optimizer_args": {"betas": [2.0, 0.9]}}, ["2.0", "beta"]),
        ({"optimizer": "adafactor", "optimizer_args": {"relative_step": True}}, ["relative_step", "lr"]),
        ({"optimizer": "transformers.optimization.Adafactor"}, ["relative_step", "lr"]),
    ],
)
def test_what_cannot_be_made_is_refused(fields, names):
    with pytest.raises(ConfigError) as refused:
        make_optimizer(settings(**fields), groups_of(weights()))
    assert all(name in str(refused.value) for name in names), str(refused.value)


def test_a_broken_installation_is_not_called_absent(monkeypatch, tmp_path):
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('built for CUDA 99')")
    (tmp_path / "half_optimizers.py").write_text("import what_it_needs_1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="installed, but cannot be imported here: built for CUDA 99"):
        make_optimizer(settings(optimizer="broken_optimizers.Adam"), groups_of(weights()))
    with pytest.raises(ConfigError, match="pip install what_it_needs_1"):
        make_optimizer(settings(optimizer="half_optimizers.Adam"), groups_of(weights()))


def test_prodigy_needs_one_learning_rate():
    need("prodigy")
    with pytest.raises(ConfigError, match=r"one learning rate for all components.*0\.5"):
        make_optimizer(settings(optimizer="prodigy"), groups_of(weights(), 1.0, other=0.5))
    make_optimizer(settings(optimizer="prodigy"), groups_of(weights(), 1.0, other=0.0))


def test_a_component_without_parameters_is_named():
    with pytest.raises(ConfigError, match="'text_encoder' has nothing to train"):
        make_optimizer(settings(), [{"params": [], "lr": 1.0, "name": "text_encoder"}])


# --- schedules -----------------------------------------------------------------------------------------------------------
def rates_over(config, steps, rate=1.0):
    parameters = weights()
    optimizer = make_optimizer(config, groups_of(parameters, rate))
    schedule = make_lr_scheduler(config, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {"power": 2.0}),
    ],
)
def test_schedules_are_those_of_diffusers(name, more):
    config = settings(lr_scheduler=name, lr_warmup_steps=3, max_train_steps=20, lr_scheduler_args=more)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20, **more)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates_over(config, 20) == pytest.approx(expected)
    assert len(set(expected)) > 3


def test_constant_with_warmup_steps_warms_up():
    assert rates_over(settings(lr_warmup_steps=4), 6) == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert rates_over(settings(), 3) == [1, 1, 1]


def test_steps_by_rules_and_schedules_of_transformers():
    rules = settings(lr_scheduler="piecewise_constant", lr_scheduler_args={"step_rules": "1:2,0.1:4,0.01"})
    assert rates_over(rules, 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    lowest = settings(lr_scheduler="cosine_with_min_lr", lr_scheduler_args={"min_lr_rate": 0.25}, max_train_steps=10)
    assert rates_over(lowest, 11)[-1] == pytest.approx(0.25)
    parts = {"num_stable_steps": 3, "num_decay_steps": 4}
    assert rates_over(settings(lr_scheduler="warmup_stable_decay", lr_scheduler_args=parts), 9)[:3] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"lr_scheduler": "cosin"}, ["'cosin'", "Did you mean 'cosine'"]),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, ["'reduce_lr_on_plateau'"]),
        ({"lr_scheduler": "linear", "lr_scheduler_args": {"num_cycles": 2}}, ["'num_cycles'", "linear"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": {"num_training_steps": 2}}, ["max_train_steps"]),
        ({"lr_scheduler": "piecewise_constant"}, ["step_rules"]),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "x:2"}}, ["'x:2'"]),
        ({"lr_scheduler": "piecewise_constant", "lr_warmup_steps": 2, "lr_scheduler_args": {"step_rules": "1"}}, ["warm-up"]),
    ],
)
def test_schedules_that_cannot_be_made_are_refused(fields, names):
    config = settings(**fields)
    with pytest.raises(ConfigError) as refused:
        make_lr_scheduler(config, make_optimizer(config, groups_of(weights())))
    assert all(name in str(refused.value) for name in names), str(refused.value)


# --- going on ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule_name", ["constant", "cosine", "polynomial"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_save_load_steps_is_all_steps(name, schedule_name, tmp_path):
    need(name)
    config = settings(optimizer=name, lr_scheduler=schedule_name, lr_warmup_steps=2, max_train_steps=10)

    def fresh():
        parameters = weights()
        optimizer = make_optimizer(config, groups_of(parameters, rate_of(name)))
        return parameters, optimizer, make_lr_scheduler(config, optimizer)

    whole = fresh()
    take_steps(*whole, range(10))

    first = fresh()
    take_steps(*first, range(5))
    state = {
        "weights": [p.detach().clone() for p in first[0]],
        "optimizer": first[1].state_dict(),
        "lr_scheduler": first[2].state_dict(),
    }
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(5, state)
    loaded = checkpoints.load(checkpoints.find("latest"))

    parameters, optimizer, schedule = second = fresh()
    with torch.no_grad():
        for parameter, value in zip(parameters, loaded["weights"]):
            parameter.copy_(value)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["lr_scheduler"])
    take_steps(*second, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(parameters, whole[0]))
    assert optimizer.param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
    assert not any(torch.equal(a, b) for a, b in zip(parameters, first[0]))


# --- weights to draw with ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_looking_at_the_saved_weights_changes_no_bit_of_the_run(name):
    need(name)
    config = settings(optimizer=name)
    ends = []
    for looks in (False, True):
        parameters = weights()
        optimizer = make_optimizer(config, groups_of(parameters, rate_of(name)))
        schedule = make_lr_scheduler(config, optimizer)
        for number in range(6):
            take_steps(parameters, optimizer, schedule, [number])
            if looks:
                with optimizer_eval(optimizer):
                    pass
        ends.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_schedule_free_weights_are_the_average_inside():
    need("schedulefree")
    config = settings(optimizer="schedulefree")
    parameters = weights()
    optimizer = make_optimizer(config, groups_of(parameters, 1e-2))
    take_steps(parameters, optimizer, make_lr_scheduler(config, optimizer), range(4))
    trained = parameters[2].detach().clone()
    beta = optimizer.param_groups[0]["betas"][0]
    z = optimizer.state[parameters[2]]["z"]
    with optimizer_eval(optimizer):
        # y = beta x + (1 - beta) z, with x the average (arXiv 2405.15682)
        average = (trained - (1 - beta) * z) / beta
        torch.testing.assert_close(parameters[2].detach(), average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameters[2], trained)
        with pytest.raises(Exception, match="train mode"):
            optimizer.step()
    assert torch.equal(parameters[2], trained)


def test_weights_come_back_when_the_block_raises_and_stay_when_training_is_over():
    need("schedulefree")
    config = settings(optimizer="schedulefree")
    parameters = weights()
    optimizer = make_optimizer(config, groups_of(parameters, 1e-2))
    take_steps(parameters, optimizer, make_lr_scheduler(config, optimizer), range(3))
    trained = parameters[0].detach().clone()
    with pytest.raises(ZeroDivisionError), optimizer_eval(optimizer):
        raise ZeroDivisionError
    assert torch.equal(parameters[0], trained) and optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    average = parameters[0].detach().clone()
    with optimizer_eval(optimizer):
        assert torch.equal(parameters[0], average)
    assert torch.equal(parameters[0], average) and not optimizer.param_groups[0]["train_mode"]


# --- words ---------------------------------------------------------------------------------------------------------------
def test_one_line_says_what_is_used():
    line = describe_optimizer(
        DreamBoothConfig(
            "pictures",
            "out",
            adapters={"unet": LoKrConfig(), "text_encoder": LoraConfig()},
            learning_rates={"text_encoder": 5e-5},
            optimizer="prodigy",
            optimizer_args={"d_coef": 2.0},
            lr_scheduler="cosine",
            lr_warmup_steps=7,
        )
    )
    for part in (
        "prodigyopt.Prodigy",
        "d_coef=2.0",
        "safeguard_warmup=True",
        "unet 0.0001",
        "text_encoder 5e-05",
        "cosine",
        "7 warm",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("adapter", "fields", "said"),
    [
        (LoraConfig(), {}, None),
        (LoraConfig(), {"learning_rate": 9e-3}, None),
        (LoraConfig(), {"learning_rate": 1e-2}, "0.01 for unet is high"),
        (LoHaConfig(), {"optimizer": "adamw8bit", "learning_rate": 1.0}, "1 for unet is high"),
        (LoHaConfig(), {"optimizer": "adafactor", "learning_rate": 1e-2}, "is high"),
        (LoHaConfig(), {"optimizer": "schedulefree", "learning_rate": 2e-2}, None),
        (LoHaConfig(), {"optimizer": "schedulefree", "learning_rate": 1e-1}, "is high"),
        (LoHaConfig(), {"optimizer": "torch.optim.SGD", "learning_rate": 1.0}, None),
        (FullConfig(), {"learning_rate": 1e-4}, "about 5e-6"),
        (FullConfig(), {"learning_rate": 5e-6}, None),
        (ShiraConfig(), {"learning_rate": 1e-2}, "entries of the weight"),
        (IA3Config(), {"learning_rate": 1e-2}, None),
        (LoraConfig(), {"learning_rate": 0.0}, "will not change"),
        (LoKrConfig(full_matrix=True), {}, None),
        (LoKrConfig(full_matrix=True, r=1, alpha=8), {}, "full_matrix with alpha / r = 8"),
        (LoKrConfig(r=10000), {}, "alpha / r = 0.0008"),
        (LoraConfig(r=128, alpha=1), {}, None),
        (LoraConfig(), {"optimizer": "prodigy"}, "takes 1"),
        (LoraConfig(), {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": 5}, None),
        (
            LoraConfig(),
            {"optimizer": "prodigyopt.Prodigy", "learning_rate": 1.0, "lr_warmup_steps": 5},
            "safeguard_warmup=True",
        ),
        (LoraConfig(), {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "cosine_with_restarts"}, "restarts"),
        (LoraConfig(), {"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "take 'constant'"),
        (LoraConfig(), {"lr_warmup_steps": 500}, "never reached"),
    ],
)
def test_risks_are_named_and_nothing_else_is(adapter, fields, said):
    config = DreamBoothConfig("pictures", "out", adapters={"unet": adapter}, **fields)
    risks = risky_learning_rate(config)
    assert len(risks) == (said is not None), risks
    assert said is None or said in risks[0]
