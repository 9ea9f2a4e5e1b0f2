"""Optimizers by name or import path, learning rate schedules, and what is known to go wrong with their settings."""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..adapters.config import AdapterConfig
from ..errors import ConfigError, nearest
from .config import DreamBoothConfig

#: short name -> import path
OPTIMIZERS: dict[str, str] = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
    "schedulefree": "schedulefree.AdamWScheduleFree",
    "adafactor": "transformers.optimization.Adafactor",
}
#: arguments that a short name stands for besides its class; `optimizer_args` goes over them
SHORT_NAME_ARGS: dict[str, dict[str, Any]] = {
    # what its author recommends for diffusion models (README of prodigyopt)
    "prodigy": {"safeguard_warmup": True, "use_bias_correction": True, "weight_decay": 0.01},
    # without these it would ignore the learning rate, or scale it by the size of factors that begin at zero
    "adafactor": {"relative_step": False, "scale_parameter": False},
}
#: where torch's AdamW is one operation for all parameters, instead of a dozen for each
FUSED_ON = ("cpu", "cuda")
#: optimizers that find the step size themselves: the learning rate is a factor on it, the same for all components
SELF_TUNING = ("prodigyopt.", "dadaptation.")

_OURS = ("params", "lr", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
_CONSTANT = ("constant", "constant_with_warmup")
#: optimizers whose step moves every value by about the learning rate, whatever the size of the gradient
_STEP_IS_RATE = ("adam", "adafactor", "lion")
_FACTORED = (1e-2, "factors begin at about 0.03, and every step moves them by it")
#: algorithm -> from which learning rate of such an optimizer on to warn, and why
_LIMITS: dict[str, tuple[float, str]] = {
    **dict.fromkeys(("LORA", "LOKR", "LOHA", "MISS", "TLORA", "GLORA"), _FACTORED),
    "SHIRA": (1e-2, "every step moves entries of the weight, which are about 0.03 large, by it"),
    "FULL": (1e-4, "every step moves the whole weight by it; DreamBooth of whole models takes about 5e-6"),
}
_ANY = (1e-1, "every step moves every value by it")
#: schedule-free optimizers average their steps and take up to ten times as much (README of schedulefree)
_AVERAGED = 10.0


def make_optimizer(config: DreamBoothConfig, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """Return the optimizer that `config.optimizer` and `config.optimizer_args` describe, ready to train.

    Args:
        config: its `optimizer` is a key of `OPTIMIZERS` or the import path of an optimizer class.
        groups: one a component: `"params"` (trained tensors), `"lr"`, `"name"` (the component); left as they are.

    Raises:
        ConfigError: unknown, not installed, needs a closure, refuses its arguments, or cannot have the groups' learning rates.
    """
    path = OPTIMIZERS.get(config.optimizer, config.optimizer)
    kind: Any = _optimizer_class(config.optimizer, path)
    given = dict(config.optimizer_args)
    _check_arguments("optimizer_args", given, kind.__init__, path)
    for group in groups:
        if not group["params"]:
            raise ConfigError(f"component {group['name']!r} has nothing to train; give it an adapter with target modules")
    rates = {group["name"]: group["lr"] for group in groups}
    if path.startswith(SELF_TUNING) and len({rate for rate in rates.values() if rate}) > 1:
        raise ConfigError(
            f"{path} takes one learning rate for all components, got {rates}; leave learning_rates empty, or set some to 0"
        )
    arguments = SHORT_NAME_ARGS.get(config.optimizer, {}) | _fused(config, groups) | given
    try:
        with redirect_stdout(io.StringIO()):  # Prodigy prints, where the report may be JSON
            optimizer: Any = kind([dict(group) for group in groups], lr=max(rates.values()), **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"{path} refuses learning rates {rates} with optimizer_args {given}: {error}") from error
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def _fused(config: DreamBoothConfig, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments that make "adamw" one operation. Not with float16, where accelerate would not see that a step was skipped."""
    wanted = config.optimizer == "adamw" and "foreach" not in config.optimizer_args and config.mixed_precision != "fp16"
    return {"fused": True} if wanted and all(p.device.type in FUSED_ON for g in groups for p in g["params"]) else {}


def make_lr_scheduler(config: DreamBoothConfig, optimizer: Optimizer) -> LRScheduler:
    """Return the schedule of `config.lr_scheduler`, to be stepped once after every optimizer step.

    Its length is `config.max_train_steps`. `"constant"` with warm-up steps is `"constant_with_warmup"`. Besides diffusers'
    schedules there are those of transformers that need nothing but the number of the step.

    Raises:
        ConfigError: an unknown name, or arguments that this schedule does not have.
    """
    schedules = _schedules()
    name = config.lr_scheduler
    if name not in schedules:
        raise ConfigError(f"lr_scheduler is {name!r}; expected one of {sorted(schedules)}.{nearest(str(name), schedules)}")
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    make = schedules[name]
    given = dict(config.lr_scheduler_args)
    _check_arguments("lr_scheduler_args", given, make, f"lr_scheduler {name!r}")
    takes = inspect.signature(make).parameters
    if "num_warmup_steps" in takes:
        given["num_warmup_steps"] = config.lr_warmup_steps
    elif config.lr_warmup_steps:
        raise ConfigError(f"lr_warmup_steps is {config.lr_warmup_steps}, and lr_scheduler {name!r} has no warm-up; set it to 0")
    if "num_training_steps" in takes and given.get("num_stable_steps") is None:
        given["num_training_steps"] = config.max_train_steps
    try:
        return make(optimizer, **given)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(f"lr_scheduler {name!r} refuses {given}: {error}") from error


def check_optimizer(config: DreamBoothConfig) -> None:
    """Make optimizer and schedule once on nothing, so that what is wrong with them is known before anything is prepared.

    Raises:
        ConfigError: as `make_optimizer` and `make_lr_scheduler`.
    """
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": config.learning_rate_of(component), "name": component}
        for component in config.adapters
    ]
    make_lr_scheduler(config, make_optimizer(config, groups))


@contextmanager
def optimizer_eval(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are those to draw with and to save: the average, for schedule-free optimizers.

    Afterwards the weights are those before, bit for bit: leaving it to the optimizer's own arithmetic would round them, and a
    run with previews would differ from one without. What the block itself writes into them is undone as well. For all
    other optimizers, and for one in evaluation mode already, this does nothing.

    Args:
        optimizer: may be accelerate's wrapper.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    switches = callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))
    if not switches or not all(group.get("train_mode", True) for group in inner.param_groups):
        yield
        return
    trained = [parameter for group in inner.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in trained]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for parameter, value in zip(trained, before):
                parameter.copy_(value)


def describe_optimizer(config: DreamBoothConfig) -> str:
    """Return one line: the class, what it is told, learning rates by component, and the schedule."""
    arguments = SHORT_NAME_ARGS.get(config.optimizer, {}) | dict(config.optimizer_args)
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    rates = ", ".join(f"{component} {config.learning_rate_of(component):g}" for component in config.adapters)
    warmup = f" after {config.lr_warmup_steps} warm-up steps" if config.lr_warmup_steps else ""
    path = OPTIMIZERS.get(config.optimizer, config.optimizer)
    return f"{path}({told}), learning rate {rates}, {config.lr_scheduler}{warmup}"


def risky_learning_rate(config: DreamBoothConfig) -> list[str]:
    """Return warnings about learning rates and strengths, one sentence each; empty when nothing is known against them."""
    path = OPTIMIZERS.get(config.optimizer, config.optimizer).lower()
    rates = {component: config.learning_rate_of(component) for component in config.adapters}
    found = [f"learning rate 0: the adapter of {component} will not change" for component, rate in rates.items() if not rate]
    if path.startswith(SELF_TUNING):
        found += _self_tuning_risks(config, path, rates)
    elif any(word in path.rpartition(".")[2] for word in _STEP_IS_RATE):
        for component, adapter in config.adapters.items():
            limit, why = _LIMITS.get(adapter.peft_name, _ANY)
            limit *= _AVERAGED if "schedulefree" in path else 1
            if rates[component] >= limit:
                found.append(f"learning rate {rates[component]:g} for {component} is high ({limit:g} or more): {why}")
    for component, adapter in config.adapters.items():
        found += _strength_risks(component, adapter)
    if "schedulefree" in path and config.lr_scheduler not in _CONSTANT:
        found.append(f"lr_scheduler {config.lr_scheduler!r}: schedule-free optimizers need none, take 'constant'")
    if config.lr_warmup_steps >= config.max_train_steps:
        found.append(
            f"lr_warmup_steps is {config.lr_warmup_steps} of {config.max_train_steps} steps: the learning rate is never reached"
        )
    return found


def _self_tuning_risks(config: DreamBoothConfig, path: str, rates: Mapping[str, float]) -> list[str]:
    found = [
        f"learning rate {rate:g} for {component}: {path} finds the step size itself and takes 1; d_coef is there for tuning"
        for component, rate in rates.items()
        if rate and not 0.5 <= rate <= 2
    ]
    arguments = SHORT_NAME_ARGS.get(config.optimizer, {}) | dict(config.optimizer_args)
    if "prodigy" in path and config.lr_warmup_steps and not arguments.get("safeguard_warmup"):
        found.append("lr_warmup_steps with Prodigy spoils its estimate of the step size; set safeguard_warmup=True")
    if "restarts" in config.lr_scheduler:
        found.append(f"lr_scheduler {config.lr_scheduler!r}: the authors of {path} advise against restarts")
    return found


def _strength_risks(component: str, adapter: AdapterConfig) -> list[str]:
    """What alpha / r does to a learning rate: it multiplies the change."""
    strength = abs(adapter.scaling())
    if getattr(adapter, "full_matrix", False) and strength != 1:
        return [
            f"full_matrix with alpha / r = {strength:g} for {component}: r limits nothing here, but still divides the change; "
            "LyCORIS takes 1 there, set alpha to r"
        ]
    if strength < 0.005:
        return [
            f"alpha / r = {strength:g} for {component}: the adapter acts at this strength and hardly learns; "
            "raise alpha, or lower r (for whole LoKr matrices there is full_matrix)"
        ]
    return []


def _optimizer_class(name: str, path: str) -> type[Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ConfigError(
            f"optimizer is {name!r}; expected one of {sorted(OPTIMIZERS)} or an import path such as 'torch.optim.AdamW'."
            f"{nearest(name, OPTIMIZERS)}"
        )
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or package
        if f"{module_name}.".startswith(f"{missing}.") and missing != package:
            raise ConfigError(f"optimizer is {name!r}: {package} has no module {missing!r}") from error
        raise ConfigError(f"optimizer {name!r} needs {missing}, which is not installed: pip install {missing}") from error
    except (ImportError, OSError, RuntimeError) as error:  # for instance a library of the wrong CUDA version
        raise ConfigError(f"optimizer {name!r}: {package} is installed, but cannot be imported here: {error}") from error
    kind = getattr(module, class_name, None)
    if kind is None:
        raise ConfigError(f"optimizer is {name!r}: {module_name} has no {class_name!r}.{nearest(class_name, dir(module))}")
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"optimizer is {name!r}: {path} is {kind!r}; expected a subclass of torch.optim.Optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"optimizer is {name!r}: it calls the model itself (step needs a closure); choose another one")
    return kind


def _check_arguments(setting: str, given: Mapping[str, Any], function: Callable[..., Any], owner: str) -> None:
    takes = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    names = [name for name in takes if name not in (*_OURS, "self")]
    for name in given:
        if name in _OURS:
            raise ConfigError(f"{setting} has {name!r}, which learning_rate, lr_warmup_steps and max_train_steps decide")
        if name not in takes and not open_ended:
            raise ConfigError(f"{setting} has {name!r}; {owner} takes {names}.{nearest(name, names)}")


def _schedules() -> dict[str, Callable[..., LRScheduler]]:
    """By name; without those that want to see a metric, which take anything by keyword."""
    from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION as DIFFUSERS
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as TRANSFORMERS

    found = {kind.value: make for kind, make in TRANSFORMERS.items()} | {kind.value: make for kind, make in DIFFUSERS.items()}
    return {
        name: make
        for name, make in found.items()
        if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(make).parameters.values())
    }
