"""LyCORIS 4.1 as oracle, through its modules' forward (its ``merge_to`` applies the scale twice, so never that).

Known to differ and left out: LyCORIS ignores ``padding_mode``, scales LoKr with two full factors by 1 instead of
alpha / r, and adds an epsilon of 1e-7 to DoRA's norm.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from cases import CONVS, IN, OUT, adapt, make_input, relative_error
from torch import nn

from lycoris_diff import LoHaConfig, LoKrConfig, LoraConfig

lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)
logging.getLogger("lycoris").setLevel(logging.ERROR)

from lycoris.functional import factorization as lycoris_factorization  # noqa: E402
from lycoris.functional import locon as locon_functional  # noqa: E402
from lycoris.functional import loha as loha_functional  # noqa: E402
from lycoris.functional import lokr as lokr_functional  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402

HOSTS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-nobias": lambda: nn.Linear(IN, OUT, bias=False),
}
for _n, _conv in CONVS.items():
    HOSTS |= {
        f"conv{_n}d": lambda c=_conv: c(IN, OUT, 3, padding=1),
        f"conv{_n}d-1x1": lambda c=_conv: c(IN, OUT, 1),
        f"conv{_n}d-strided": lambda c=_conv: c(IN, OUT, 3, stride=2, dilation=2, padding=2),
        f"conv{_n}d-groups": lambda c=_conv: c(IN, OUT, 3, groups=2, padding=1),
        f"conv{_n}d-uneven": lambda c=_conv, n=_n: c(IN, OUT, (3, 1, 2)[:n], padding=1),
    }

# their module, their arguments, our config
RECIPES = {
    "lokr": (LokrModule, {}, lambda **k: LoKrConfig(r=2, alpha=3, **k)),
    "lokr-both": (LokrModule, {"decompose_both": True}, lambda **k: LoKrConfig(r=2, alpha=3, decompose_both=True, **k)),
    "lokr-factor": (LokrModule, {"factor": 3}, lambda **k: LoKrConfig(r=2, alpha=3, decompose_factor=3, **k)),
    "lokr-full-matrix": (
        LokrModule,
        {"full_matrix": True},
        lambda **k: LoKrConfig(r=2, alpha=2, full_matrix=True, **k),
    ),
    "lokr-tucker": (
        LokrModule,
        {"use_tucker": True},
        lambda **k: LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, **k),
    ),
    "loha": (LohaModule, {}, lambda **k: LoHaConfig(r=3, alpha=2, **k)),
    "loha-tucker": (
        LohaModule,
        {"use_tucker": True},
        lambda **k: LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, **k),
    ),
    "lora": (LoConModule, {}, lambda **k: LoraConfig(r=3, lora_alpha=2, **k)),
    "lora-rs": (LoConModule, {"rs_lora": True}, lambda **k: LoraConfig(r=3, lora_alpha=2, use_rslora=True, **k)),
    "lora-tucker": (
        LoConModule,
        {"use_tucker": True},
        lambda **k: LoraConfig(r=3, lora_alpha=2, use_effective_conv2d=True, **k),
    ),
}
NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_mid.weight": "lora_mid.weight"}


def twins(recipe: str, host: str, axis: str | None):
    """Our layer and LyCORIS' module over the same base, holding the same tensors."""
    kind, arguments, make = RECIPES[recipe]
    torch.manual_seed(0)
    base = HOSTS[host]().double().requires_grad_(False)
    config = make(target_modules=["layer"], **({"weight_decompose": True, "dora_axis": axis} if axis else {}))
    model, adapted = adapt(copy.deepcopy(base), config)
    alpha = config.lora_alpha if recipe.startswith("lora") else config.alpha
    theirs = kind("name", base, 1.0, config.r, alpha, weight_decompose=axis is not None, wd_on_out=axis != "in", **arguments)
    generator = torch.Generator().manual_seed(1)
    own = dict(adapted.adapters["default"].named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            magnitude = name.startswith(("dora_scale", "lora_magnitude_vector"))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter * (1 + 0.2 * noise.tanh()) if magnitude else 0.4 * noise)
            path = "dora_scale" if magnitude else NAMES.get(name, name)
            owner, _, leaf = path.rpartition(".")
            module = theirs.get_submodule(owner)
            target = getattr(module, leaf)
            assert target.numel() == parameter.numel(), (name, tuple(target.shape), tuple(parameter.shape))
            if not magnitude and parameter.ndim == target.ndim:
                assert target.shape == parameter.shape, name
            value = parameter.detach().reshape(target.shape).clone()
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value)
            else:
                setattr(module, leaf, value.requires_grad_())  # dora_scale is no leaf there after .float()
    return model.eval(), adapted, theirs.double().eval()


CORES = ["lokr-tucker", "loha-tucker", "lora-tucker"]
DECOMPOSABLE = ["lokr", "loha", "lora", *CORES]
CASES = [
    (recipe, host, axis)
    for recipe in RECIPES
    for host in HOSTS
    for axis in (None, "out", "in")
    if not (recipe in CORES and host.startswith("linear")) and (axis is None or recipe in DECOMPOSABLE)
]
FEW = [c for c in CASES if c[0] in DECOMPOSABLE and c[1] in ("linear", "conv1d", "conv2d", "conv2d-groups")]


@pytest.mark.parametrize(("recipe", "host", "axis"), CASES)
def test_forward_equals_lycoris(recipe, host, axis):
    model, adapted, theirs = twins(recipe, host, axis)
    for large in (False, True):
        x = make_input(adapted.base_layer, large)
        with torch.no_grad():
            assert relative_error(model(x), theirs(x)) < (1e-6 if axis else 1e-10)


@pytest.mark.parametrize(("recipe", "host", "axis"), FEW)
def test_gradients_equal_lycoris(recipe, host, axis):
    """LyCORIS keeps DoRA's norm in the graph, as we do."""
    model, adapted, theirs = twins(recipe, host, axis)
    x = make_input(adapted.base_layer)
    cotangent = torch.randn(model(x).shape, dtype=torch.float64)
    ours = dict(adapted.adapters["default"].named_parameters())
    own = torch.autograd.grad(model(x), list(ours.values()), cotangent)
    wanted = []
    for name in ours:
        path = "dora_scale" if name.startswith(("dora_scale", "lora_magnitude_vector")) else NAMES.get(name, name)
        owner, _, leaf = path.rpartition(".")
        wanted.append(getattr(theirs.get_submodule(owner), leaf))
    expected = torch.autograd.grad(theirs(x), wanted, cotangent)
    for name, a, b in zip(ours, own, expected):
        assert relative_error(a.reshape(b.shape), b) < 1e-5, name


@pytest.mark.parametrize("host", ["linear", "conv1d", "conv2d", "conv3d", "conv2d-groups"])
def test_functional_deltas(host):
    """LyCORIS' functional API gives our delta weight; it takes the rank of a LoKr core from the wrong axis, so not that."""
    for recipe in ("lora", "loha", "lokr", "loha-tucker"):
        if "tucker" in recipe and host == "linear":
            continue
        _, adapted, _ = twins(recipe, host, None)
        t = {k: v.detach() for k, v in adapted.adapters["default"].named_parameters()}
        shape = adapted.base_layer.weight.shape
        if recipe == "lora":
            theirs = locon_functional.diff_weight(t["lora_A.weight"], t["lora_B.weight"], None, gamma=2 / 3)
        elif recipe.startswith("loha"):
            theirs = loha_functional.diff_weight(
                t["hada_w1_b"],
                t["hada_w1_a"],
                t["hada_w2_b"],
                t["hada_w2_a"],
                t.get("hada_t1"),
                t.get("hada_t2"),
                gamma=torch.tensor(2 / 3, dtype=torch.float64),
            )
        else:
            core = t.get("lokr_t2")
            theirs = lokr_functional.diff_weight(
                t["lokr_w1"], None, None, None, t["lokr_w2_a"], t["lokr_w2_b"],
                None if core is None else core.reshape(*core.shape[:2], *shape[2:]), gamma=3,
            )  # fmt: skip
        assert relative_error(adapted.get_delta_weight("default").detach(), theirs.reshape(shape)) < 1e-6, recipe


@pytest.mark.parametrize("host", ["linear", "conv2d"])
def test_strength_between_zero_and_one(host):
    """For additive algorithms LyCORIS' multiplier is our scale."""
    for recipe in ("lokr", "loha", "lora"):
        model, adapted, theirs = twins(recipe, host, None)
        x = make_input(adapted.base_layer)
        for strength in (0.5, 2.0, -1.0):
            model.set_scale("default", strength)
            theirs.multiplier = strength
            assert relative_error(model(x).detach(), theirs(x).detach()) < 1e-10


def test_factorizations_differ_only_above_the_square_root():
    """New adapters follow PEFT's rule; LyCORIS orders the pair, which is the same thing up to the square root."""
    import oracles

    for dimension in (1, 2, 36, 64, 127, 250, 320, 512, 1280):
        for factor in (-1, 1, 2, 4, 5, 8, 16, 64):
            ours, theirs = (
                oracles.peft_factorization(dimension, factor),
                tuple(lycoris_factorization(dimension, factor)),
            )
            assert sorted(ours) == sorted(theirs), (dimension, factor)
            if factor == -1 or factor * factor <= dimension:
                assert ours == theirs


def test_lycoris_start():
    """init_weights="lycoris" leaves the same factors at zero as LyCORIS does."""
    for recipe in ("lokr", "lokr-both", "lokr-full-matrix", "lokr-tucker"):
        kind, arguments, make = RECIPES[recipe]
        base = nn.Conv2d(IN, OUT, 3)
        _, adapted = adapt(copy.deepcopy(base), make(target_modules=["layer"], init_weights="lycoris"))
        theirs = kind("name", base, 1.0, 2, 3, **arguments)
        zero = {n for n, p in adapted.adapters["default"].named_parameters() if not p.any()}
        assert zero == {n for n, p in theirs.named_parameters() if not p.any()}
        for name, parameter in adapted.adapters["default"].named_parameters():
            spread = dict(theirs.named_parameters())[name].std()
            assert name in zero or 0.4 < parameter.std() / spread < 2.5, name
