"""Factors from elsewhere: community layouts, misfits, LyCORIS' forward, PEFT."""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import more_oracles as dense
import oracles
import pytest
import torch
from cases import Holder, adapt, make_input, make_layer, relative_error
from more_adapters import CASES, HERE, factors_of, shake
from torch import nn

from lycoris_diff import (
    AdapterError,
    AdapterModel,
    BOFTConfig,
    CheckpointError,
    ConfigError,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    LoraConfig,
    NormConfig,
    OFTConfig,
    TLoraConfig,
    get_peft_model,
)
from lycoris_diff.checkpoints.build import adapter_of, entry_delta
from lycoris_diff.checkpoints.checkpoint import Entry
from lycoris_diff.execution.geometry import geometry_of


# ------------------------------------------------------------------------------------------------- files of other layouts
def test_community_layouts():
    """1x1 axes, alphas, and the neutral route of checkpoints; the strength and options of an entry are those of the config."""
    layer = make_layer("conv2d-1x1")
    geometry, weight = geometry_of(layer), layer.weight
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)

    glora = {
        "glora_a1": rand(24, 3, 1, 1),
        "glora_a2": rand(3, 24, 1, 1),
        "glora_b1": rand(36, 3, 1, 1),
        "glora_b2": rand(3, 24),
    }
    flat = {k: v.flatten(1) for k, v in glora.items()}
    cases = [
        (Entry("GLORA", glora, scale=0.5, rank=3), dense.glora(flat, weight, 0.5)),
        (Entry("IA3", {"ia3_weight": (w := rand(1, 36, 1, 1))}), dense.ia3({"ia3_weight": w.flatten()}, weight, False)),
        (
            Entry("IA3", {"ia3_weight": (w := rand(24))}, options={"on_input": True}),
            dense.ia3({"ia3_weight": w}, weight, True),
        ),
        (Entry("FULL", {"diff": (d := rand(36, 24, 1, 1))}), weight + d),
        (
            Entry("DIAG_OFT", {"oft_blocks": (q := rand(4, 9, 9)), "rescale": (s := rand(36))}, options={"constraint": 0.01}),
            dense.diag_oft({"oft_blocks": q, "rescale": s}, weight, 0.01),
        ),
        (Entry("LYCORIS_BOFT", {"oft_blocks": (q := rand(3, 4, 9, 9)[:, :2, :, :])[:2].repeat(1, 1, 2, 2)}), None),
        (Entry("OFT", {"oft_R.weight": (v := rand(2, 66))}, rank=2), dense.peft_oft({"oft_R.weight": v}, weight)),
        (
            Entry("OFT", {"oft_R.weight": v}, options={"scaled": True}),
            dense.peft_oft({"oft_R.weight": v}, weight, scaled=True),
        ),
    ]
    for entry, wanted in cases:
        if wanted is None:
            wanted = dense.boft(entry.tensors, weight)
        change = entry_delta(entry, tuple(weight.shape), weight)
        assert relative_error(change, wanted - weight) < 1e-9, entry.algorithm
        model, host = adapt(copy.deepcopy(layer), LoraConfig(r=1, **HERE))
        host.add("file", adapter_of(entry, geometry, torch.float64))
        model.peft_config["file"] = LoraConfig()
        model.set_adapter("file")
        x = make_input(layer)
        assert relative_error(model(x), oracles.forward(layer, x, [(1.0, wanted - weight)])) < 1e-9


@pytest.mark.parametrize(
    ("algorithm", "shapes", "options"),
    [
        ("GLORA", {"glora_a1": (24, 3), "glora_a2": (3, 24), "glora_b1": (36, 3)}, {}),
        ("GLORA", {"glora_a1": (3, 24), "glora_a2": (24, 3), "glora_b1": (36, 3), "glora_b2": (3, 24)}, {}),
        ("GLORA", {"glora_a1": (24,), "glora_a2": (3, 24), "glora_b1": (36, 3), "glora_b2": ()}, {}),
        ("IA3", {"ia3_weight": (24,)}, {}),
        ("IA3", {"ia3_weight": (36,)}, {"on_input": True}),
        ("IA3", {"ia3_weight": (36,)}, {"on_input": 1}),
        ("FULL", {"diff": (24, 36)}, {}),
        ("FULL", {"diff_b": (24,)}, {}),
        ("FULL", {}, {}),
        ("FULL", {"diff": (36, 24), "other": (2,)}, {}),
        ("DIAG_OFT", {"oft_blocks": (5, 6, 6)}, {}),
        ("DIAG_OFT", {"oft_blocks": (6, 6, 5)}, {}),
        ("DIAG_OFT", {"oft_blocks": (6, 6)}, {}),
        ("DIAG_OFT", {"oft_blocks": (1, 6, 6, 6)}, {}),
        ("DIAG_OFT", {"oft_blocks": (6, 6, 6), "rescale": (24, 1)}, {}),
        ("DIAG_OFT", {"oft_blocks": (6, 6, 6)}, {"constraint": -1.0}),
        ("DIAG_OFT", {"oft_blocks": (6, 6, 6)}, {"constraint": math.inf}),
        ("DIAG_OFT", {"rescale": (36, 1)}, {}),
        ("LYCORIS_BOFT", {"oft_blocks": (2, 4, 9, 9)}, {}),
        ("LYCORIS_BOFT", {"oft_blocks": (3, 2, 18, 18)}, {}),
        ("LYCORIS_BOFT", {"oft_blocks": (0, 2, 18, 18)}, {}),
        ("LYCORIS_BOFT", {"oft_blocks": (2, 18, 18)}, {}),
        ("OFT", {"oft_R.weight": (2, 65)}, {}),
        ("OFT", {"oft_R.weight": (3, 66)}, {}),
        ("OFT", {"oft_R.weight": (24, 0)}, {}),
        ("OFT", {"oft_R.weight": (66,)}, {}),
        ("TLORA", {"p_layer": (36, 4), "q_layer": (4, 24)}, {}),
        ("TLORA", {"p_layer": (36, 4), "q_layer": (4, 24), "lambda_layer": (4,)}, {}),
        ("TLORA", {"p_layer": (36, 4), "q_layer": (4, 24), "lambda_layer": (1, 4)}, {"sig_type": "random"}),
    ],
)
def test_factors_that_do_not_fit_are_refused(algorithm, shapes, options):
    entry = Entry(
        algorithm, {k: torch.zeros(v) for k, v in shapes.items()}, rank=3 if algorithm == "GLORA" else 4, options=options
    )
    with pytest.raises(CheckpointError):
        adapter_of(entry, geometry_of(nn.Linear(24, 36)))


def test_settings_that_cannot_be():
    linear, conv = nn.Linear(24, 36), nn.Conv2d(24, 36, 3)
    for layer, config in [
        (linear, FullConfig(train_weight=False, train_bias=False, **HERE)),
        (nn.Linear(24, 36, bias=False), FullConfig(train_weight=False, **HERE)),
        (nn.Linear(24, 37), DiagOFTConfig(r=8, **HERE)),
        (nn.Linear(24, 37), BOFTConfig(r=8, **HERE)),
        (linear, BOFTConfig(r=4, **HERE)),
        (nn.Linear(37, 24), OFTConfig(oft_block_size=8, **HERE)),
        (linear, OFTConfig(r=4, oft_block_size=6, **HERE)),
        (linear, OFTConfig(r=0, oft_block_size=0, **HERE)),
        (linear, IA3Config(on_input="yes", **HERE)),
        (conv, TLoraConfig(r=2, **HERE)),
        (linear, TLoraConfig(r=2, sig_type="first", **HERE)),
        (linear, TLoraConfig(r=2, init_weights=False, **HERE)),
        (linear, GLoraConfig(r=0, **HERE)),
    ]:
        with pytest.raises(ConfigError):
            get_peft_model(Holder(layer), config)
    with pytest.raises(ConfigError, match="coft"):
        OFTConfig(coft=True)
    quantized = nn.Linear(24, 36)
    quantized.weight = nn.Parameter(quantized.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match="quantized"):
        get_peft_model(Holder(quantized), CASES["tlora"][0]())


def test_tlora_belongs_to_its_weight():
    torch.manual_seed(0)
    model = get_peft_model(Holder(nn.Linear(64, 48)), TLoraConfig(r=2, alpha=2, **HERE))
    shake(model.get_base_model().layer.adapters["default"], std=0.02)
    tensors = {k: v.float() for k, v in factors_of(model.get_base_model().layer).items()}
    weight = model.get_base_model().layer.base_layer.weight.detach()
    geometry = model.get_base_model().layer.geometry

    def load(weight, **options):
        adapter = adapter_of(Entry("TLORA", tensors, rank=2, options=options), geometry)
        adapter.settle(lambda: weight)
        return adapter

    load(weight)
    for wrong, options in ((torch.randn_like(weight), {}), (weight, {"sig_type": "last"})):
        with pytest.raises(CheckpointError, match="singular"):
            load(wrong, **options)
        with pytest.raises(CheckpointError, match="singular"):
            entry_delta(Entry("TLORA", tensors, rank=2, options=options), (48, 64), wrong)


def test_a_new_tlora_starts_from_the_unmodified_weight():
    """Also where another adapter is merged."""
    model, layer = adapt(make_layer("linear"), FullConfig(**HERE), "full")
    weight = layer.base_layer.weight.detach().clone()
    shake(layer.adapters["full"])
    model.merge_adapter()
    model.add_adapter("tlora", TLoraConfig(r=4, **HERE))
    model.unmerge_adapter()
    model.set_adapter("tlora")
    p, values, q = (dict(layer.adapters["tlora"].named_parameters())[k] for k in ("p_layer", "lambda_layer", "q_layer"))
    u, s, vh = torch.linalg.svd(weight)
    assert relative_error((p * values) @ q, (u[:, :4] * s[:4]) @ vh[:4]) < 1e-9


# ------------------------------------------------------------------------------------------------------ other libraries
def lycoris_host(kind: str) -> nn.Module:
    torch.manual_seed(1)
    made = {
        "linear": lambda: nn.Linear(24, 32),
        "conv1d": lambda: nn.Conv1d(24, 32, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(24, 32, 3, padding=1),
        "conv2d-1x1": lambda: nn.Conv2d(24, 32, 1),
        "conv3d": lambda: nn.Conv3d(24, 32, 3, padding=1),
        "conv2d-groups": lambda: nn.Conv2d(24, 32, 3, groups=4),
    }
    return made[kind]().requires_grad_(False)


def lycoris_input(layer: nn.Module) -> torch.Tensor:
    axes = len(getattr(layer, "kernel_size", ()))
    return torch.randn(2, 24, *[5] * axes, generator=torch.Generator().manual_seed(2)) if axes else torch.randn(4, 24)


#: LyCORIS' class and arguments, our algorithm, our names for its tensors
FROM_LYCORIS = {
    "glora": ("glora.GLoRAModule", {"lora_dim": 4, "alpha": 2}, "GLORA", "glora_"),
    "ia3": ("ia3.IA3Module", {}, "IA3", ""),
    "ia3-in": ("ia3.IA3Module", {"train_on_input": True}, "IA3", ""),
    "diag-oft": ("diag_oft.DiagOFTModule", {"lora_dim": 4}, "DIAG_OFT", ""),
    "diag-oft-limit": ("diag_oft.DiagOFTModule", {"lora_dim": 8, "constraint": 0.01, "rescaled": True}, "DIAG_OFT", ""),
    "boft": ("boft.ButterflyOFTModule", {"lora_dim": 4}, "LYCORIS_BOFT", ""),
    "boft-limit": ("boft.ButterflyOFTModule", {"lora_dim": 8, "constraint": 0.01, "rescaled": True}, "LYCORIS_BOFT", ""),
    "tlora": ("tlora.TLoraModule", {"lora_dim": 4, "alpha": 2}, "TLORA", ""),
    "tlora-middle": ("tlora.TLoraModule", {"lora_dim": 4, "alpha": 2, "sig_type": "middle"}, "TLORA", ""),
}


def from_lycoris(case: str, state: dict, arguments: dict) -> Entry:
    """What a reader makes of LyCORIS' tensors: names, squeezed axes, strength, options."""
    _, _, algorithm, prefix = FROM_LYCORIS[case]
    tensors = {k.removesuffix(".weight"): v.detach().clone() for k, v in state.items()}
    alpha = tensors.pop("alpha", None)
    options, scale, rank = {}, 1.0, 0
    if algorithm in ("GLORA", "TLORA"):
        rank = arguments["lora_dim"]
        scale = float(alpha) / rank
        options = {"sig_type": arguments["sig_type"]} if "sig_type" in arguments else {}
    elif algorithm == "IA3":
        options, tensors = {"on_input": bool(tensors["on_input"])}, {"ia3_weight": state["weight"].detach().flatten()}
    else:
        options = {"constraint": float(alpha)}
    return Entry(algorithm, {prefix + k: v for k, v in tensors.items()}, scale, rank, options=options)


#: LyCORIS' T-LoRA fails on kernels, its GLoRA and input-side (IA)^3 on groups
BEYOND_LYCORIS = {
    *((c, k) for c in ("tlora", "tlora-middle") for k in ("conv1d", "conv2d", "conv3d", "conv2d-groups")),
    *((c, "conv2d-groups") for c in ("glora", "ia3-in")),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in FROM_LYCORIS
        for kind in ("linear", "conv1d", "conv2d", "conv2d-1x1", "conv3d", "conv2d-groups")
        if (case, kind) not in BEYOND_LYCORIS
    ],
)
def test_lycoris_forward(case, kind):
    where, arguments, _, _ = FROM_LYCORIS[case]
    module, _, name = where.partition(".")
    cls = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
    layer = lycoris_host(kind)
    theirs = cls("x", layer, **arguments)
    shake(theirs, std=0.02 if case.startswith("tlora") else 0.1)
    x = lycoris_input(layer)
    wanted = theirs(x).detach()
    state = theirs.custom_state_dict() or {k: v for k, v in theirs.state_dict().items()}
    state = {k: v for k, v in state.items() if k.partition(".")[0] not in ("org_module", "dtype_tensor")}
    entry = from_lycoris(case, state, arguments)
    assert relative_error(wanted, layer(x)) > 1e-3
    model, host = adapt(layer, LoraConfig(r=1, **HERE), "none")
    adapter = adapter_of(entry, host.geometry)
    adapter.settle(lambda: layer.weight)
    host.add("file", adapter)
    model.peft_config["file"] = LoraConfig()
    model.set_adapter("file")
    assert relative_error(model(x), wanted) < 2e-5
    model.merge_adapter()
    assert relative_error(model(x), wanted) < 2e-5


def test_lycoris_full_and_norm():
    from lycoris.modules.full import FullModule
    from lycoris.modules.norms import NormModule

    for kind in ("linear", "conv2d", "conv3d"):
        layer = lycoris_host(kind)
        plain, x = copy.deepcopy(layer), lycoris_input(layer)
        theirs = FullModule("x", layer)
        theirs.apply_to()
        shake(theirs, std=0.1)
        entry = Entry("FULL", {k: v.detach() for k, v in theirs.custom_state_dict().items()})
        assert set(entry.tensors) == {"diff", "diff_b"}
        model, host = adapt(plain, LoraConfig(r=1, **HERE), "none")
        host.add("file", adapter_of(entry, host.geometry))
        model.peft_config["file"] = LoraConfig()
        model.set_adapter("file")
        assert relative_error(model(x), theirs(x)) < 1e-5
    for norm, x in ((nn.LayerNorm(24), torch.randn(3, 24)), (nn.GroupNorm(4, 24), torch.randn(2, 24, 5, 5))):
        theirs = NormModule("x", norm.requires_grad_(False))
        shake(theirs)
        model = get_peft_model(Holder(norm), NormConfig())
        tensors = {k: v.detach() for k, v in theirs.state_dict().items() if k in ("w_norm", "b_norm")}
        model.get_base_model().layer.adapters["default"].load_state_dict(tensors)
        assert relative_error(model(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"oft_block_size": 7},
        {"r": 4, "oft_block_size": 0},
        {"oft_block_size": 8, "block_share": True},
        {"oft_block_size": 8, "use_cayley_neumann": False},
        {"oft_block_size": 8, "num_cayley_neumann_terms": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "conv2d-1x1"])
def test_peft_oft_directories_both_ways(fields, kind, tmp_path):
    peft = pytest.importorskip("peft")
    layer = lycoris_host(kind)
    x = lycoris_input(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(Holder(copy.deepcopy(layer)), peft.OFTConfig(target_modules=["layer"], **fields)).eval()
        shake(theirs.base_model.model.layer.oft_R)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = AdapterModel.from_pretrained(Holder(copy.deepcopy(layer)), tmp_path / "theirs")
        assert relative_error(ours(x), theirs(x)) < 1e-5
        ours.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(Holder(copy.deepcopy(layer)), tmp_path / "ours").eval()
        assert relative_error(back(x), ours(x)) < 1e-5
        fresh = get_peft_model(Holder(copy.deepcopy(layer)), OFTConfig(target_modules=["layer"], **fields))
        expected_shapes = {k: tuple(v.shape) for k, v in theirs.base_model.model.layer.oft_R["default"].named_parameters()}
        assert fresh.get_base_model().layer.adapters["default"].factor_shapes["oft_R.weight"] == expected_shapes["weight"]


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])
def test_peft_ia3(kind, feedforward):
    """PEFT's factors are ours plus one. On the output it scales the bias as well, which a bias change expresses."""
    peft = pytest.importorskip("peft")
    layer = lycoris_host(kind)
    x = lycoris_input(layer)
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    theirs = peft.get_peft_model(Holder(copy.deepcopy(layer)), config)
    shake(theirs.base_model.model.layer.ia3_l)
    w = theirs.base_model.model.layer.ia3_l["default"].detach().flatten() - 1
    entries = [Entry("IA3", {"ia3_weight": w}, options={"on_input": feedforward})]
    if not feedforward:
        entries.append(Entry("FULL", {"diff_b": layer.bias * w}))
    model, host = adapt(copy.deepcopy(layer), LoraConfig(r=1, **HERE), "none")
    host.add("file", adapter_of(entries, host.geometry))
    model.peft_config["file"] = LoraConfig()
    model.set_adapter("file")
    assert relative_error(model(x), theirs(x)) < 1e-5
    model.merge_adapter()
    assert relative_error(model(x), theirs(x)) < 1e-5


def test_butterflies_of_many_stages():
    from lycoris.functional.boft import diff_weight

    g = torch.Generator().manual_seed(0)
    weight, blocks = torch.randn(64, 6, generator=g), 0.2 * torch.randn(5, 16, 4, 4, generator=g)
    model = get_peft_model(Holder(nn.Linear(6, 64)), BOFTConfig(r=4, **HERE))
    assert model.get_base_model().layer.adapters["default"].factor_shapes["oft_blocks"] == (5, 16, 4, 4)
    ours = entry_delta(Entry("LYCORIS_BOFT", {"oft_blocks": blocks}), (64, 6), weight)
    assert relative_error(ours, dense.boft({"oft_blocks": blocks.double()}, weight.double()) - weight.double()) < 1e-5
    assert relative_error(ours, diff_weight(weight, blocks, None)) < 1e-5


def test_models_are_named_after_their_algorithm():
    for case, (make, _) in CASES.items():
        host = Holder(make_layer("conv2d-zeros" if case == "glora-core" else "linear"))
        model = get_peft_model(host, make())
        assert type(model).__bases__[0].__name__ == type(make()).__name__.replace("Config", "Model")
    with pytest.raises(AdapterError):
        get_peft_model(Holder(nn.Linear(4, 4)), OFTConfig(scaled=True, r=0, oft_block_size=4, eps=1.0, **HERE))
