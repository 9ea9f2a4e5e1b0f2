"""LoKr on a window of the Kronecker product's rows: a share of a fused projection whose boundary cuts a block of w2."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import IN, OUT, Holder, as_function, make_input, make_layer, randomize, relative_error, trainable
from torch import nn

from lycoris_diff import AdapterModel, LoKrConfig
from lycoris_diff.bookkeeping import set_active
from lycoris_diff.errors import CheckpointError, ConfigError
from lycoris_diff.execution.geometry import geometry_of
from lycoris_diff.injection import attach, inject_adapter
from lycoris_diff.peft_format import adapter_from_tensors
from lycoris_diff.targets import Target

# OUT = 36 rows out of a * b; (start, a, b): in the middle of blocks, one block, up to the end, from the start
WINDOWS = {"middle": (3, 6, 8), "one block": (5, 1, 50), "to the end": (4, 5, 8), "from the start": (0, 4, 10)}
LAYERS = ["linear", "hf-conv1d", "conv1d-circular", "conv2d-1x1", "conv2d-zeros", "conv2d-groups2", "conv3d-stride2"]
LAYOUTS = ["full", "low w2", "low both", "core"]


def make_tensors(layout: str, layer: nn.Module, a: int, b: int, dora: str | None = None) -> dict[str, torch.Tensor]:
    geo = geometry_of(layer)
    c, d, r = 4, geo.inp // 4, 2
    taps = geo.columns // geo.inp
    shapes = {"lokr_w1": (a, c)} if layout != "low both" else {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
    if layout == "full":
        shapes["lokr_w2"] = (b, d, *geo.kernel)
    elif layout == "core":
        kernel = (*geo.kernel, 1) if len(geo.kernel) == 1 else geo.kernel
        shapes |= {"lokr_t2": (r, r, *kernel), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
    else:
        shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * taps)}
    generator = torch.Generator().manual_seed(4)
    tensors = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    if dora:
        ones = (1,) * len(geo.kernel)
        shape = (geo.out, 1, *ones) if dora == "out" else (1, geo.inp, *ones)
        tensors["dora_scale"] = 1 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return tensors


def build(layer_name: str, layout: str, window: str, dora: str | None = None):
    layer = make_layer(layer_name)
    start, a, b = WINDOWS[window]
    fields = {"weight_decompose": True, "dora_axis": dora} if dora else {}
    config = LoKrConfig(r=2, alpha=3, rows=(start, OUT), target_modules=["layer"], **fields)
    model = Holder(layer)
    target = Target("layer", layer, geometry_of(layer))
    adapter = adapter_from_tensors(target, config, make_tensors(layout, layer, a, b, dora), True, False)
    attach(model, config, "default", {"layer": (target, adapter)})
    set_active(model, ["default"])
    return model, model.layer, start, a * b


def expected_delta(adapted, start: int, total: int, leaves=None) -> torch.Tensor:
    """Rows of the whole product, by the oracle of whole products; DoRA on the rows that are left."""
    base, adapter = adapted.base_layer, adapted.adapters["default"]
    weight = oracles.canonical_weight(base)
    t = leaves or {k: v.detach() for k, v in trainable(adapted).items()}
    change = oracles.lokr(t, 1.5, (total, *weight.shape[1:]))[start : start + OUT]
    if "dora_scale" in t:
        change = oracles.dora(weight, change, t["dora_scale"], adapter.config.dora_axis)
    return oracles.to_layout(base, change)


CASES = [(n, y) for n in LAYERS for y in LAYOUTS if y != "core" or n.startswith("conv")]


@pytest.mark.parametrize("dora", [None, "out", "in"])
@pytest.mark.parametrize(("layer", "layout"), CASES)
def test_forward_gradient_and_merge(layer, layout, dora):
    for window in WINDOWS if dora is None else ["middle", "to the end"]:
        model, adapted, start, total = build(layer, layout, window, dora)
        for large in (False, True):
            x = make_input(adapted.base_layer, large).requires_grad_()
            leaves = {k: v.detach().clone().requires_grad_() for k, v in trainable(adapted).items()}
            dense = expected_delta(adapted, start, total, leaves)
            expected = oracles.forward(adapted.base_layer, x, [(1.0, dense)])
            assert relative_error(model(x), expected) < 1e-10
            with torch.no_grad():
                assert relative_error(model(x), expected) < 1e-10
            cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            wanted = torch.autograd.grad(expected, [x, *leaves.values()], cotangent)
            found = torch.autograd.grad(model(x), [x, *trainable(adapted).values()], cotangent)
            for name, f, w in zip(["input", *leaves], found, wanted):
                assert relative_error(f, w) < 1e-8, (name, window, large)
        x = x.detach()
        AdapterModel(model).merge_adapter()
        assert relative_error(model(x), expected) < 1e-10
        assert torch.allclose(adapted.get_delta_weight("default"), dense, atol=1e-12)


def test_both_ways_to_run_are_covered():
    """The tests above mean the factored form as well as the changed weight."""
    modes = set()
    for layer in LAYERS:
        _, adapted, *_ = build(layer, "low w2", "middle")
        modes |= {adapted.choices(make_input(adapted.base_layer, large))["default"].mode for large in (False, True)}
    assert modes == {"beside", "instead"}


@pytest.mark.parametrize(("layer", "layout"), [c for c in CASES if "groups" not in c[0]])
def test_factored_form_itself(layer, layout):
    """`Program.run`, whatever the cost model would choose."""
    _, adapted, start, total = build(layer, layout, "middle")
    adapter = adapted.adapter("default")
    x = make_input(adapted.base_layer)
    inner, lead = adapted.geometry.enter(x)
    f = adapter.inputs()
    y = adapted.geometry.leave(adapter.program(f).run(adapted.geometry, inner, f), lead)
    dense = expected_delta(adapted, start, total)
    assert relative_error(y, oracles.apply(adapted.base_layer, x, dense, bias=False)) < 1e-10


@pytest.mark.parametrize("layer", ["linear", "conv2d-zeros"])
def test_derivatives_of_first_and_second_order(layer):
    model, adapted, *_ = build(layer, "low w2", "middle")
    run, inputs = as_function(model, make_input(adapted.base_layer))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-5, rtol=1e-3)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-4, rtol=1e-2)


class Shared(nn.Module):
    """Three projections that one fused file feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(IN, 12, bias=False) for _ in range(3))


def attach_shared() -> tuple[Shared, LoKrConfig]:
    model = Shared().requires_grad_(False)
    tensors = make_tensors("low w2", nn.Linear(IN, OUT), 4, 9)
    pattern = {"to_q": (0, 12), "to_k": (3, 12), "to_v": (6, 12)}
    blocks = {"to_q": (0, 2), "to_k": (1, 3), "to_v": (2, 4)}
    config = LoKrConfig(r=2, alpha=3, target_modules=list(pattern), rows_pattern=pattern)
    adapters = {}
    for name in pattern:
        target = Target(name, model.get_submodule(name), geometry_of(model.get_submodule(name)))
        own = tensors | {"lokr_w1": tensors["lokr_w1"][slice(*blocks[name])]}
        adapters[name] = target, adapter_from_tensors(target, config, own, True, True)
    attach(model, config, "default", adapters)
    set_active(model, ["default"])
    return model, config


def test_saved_with_windows_and_loaded_again(tmp_path):
    model, _ = attach_shared()
    wrapper = AdapterModel(model)
    randomize(model)
    wrapper.save_pretrained(tmp_path)
    assert '"LYCORIS_DIFF_LOKR"' in (tmp_path / "adapter_config.json").read_text()  # PEFT is to refuse it
    other = Shared().requires_grad_(False)
    other.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "adapters" not in k})
    again = AdapterModel.from_pretrained(other, tmp_path)
    for name in ("to_q", "to_k", "to_v"):
        first, second = (m.get_submodule(name).get_delta_weight("default") for m in (model, other))
        assert first.shape == (12, IN) and torch.equal(first, second)
    # a weighted sum keeps the windows
    again.add_weighted_adapter(["default"], [0.5], "blend")
    assert torch.allclose(other.to_k.get_delta_weight("blend"), 0.5 * other.to_k.get_delta_weight("default"))


@pytest.mark.parametrize("rows", [(0,), (-1, 3), (2, 0), (1, 2.0), "all", (0, True)])
def test_values_that_are_no_window(rows):
    with pytest.raises(ConfigError, match="rows"):
        LoKrConfig(rows=rows).check()
    with pytest.raises(ConfigError, match="rows_pattern"):
        LoKrConfig(rows_pattern={"to_q": rows}).check()


def test_a_new_adapter_has_no_window():
    with pytest.raises(ConfigError, match="new adapter"):
        inject_adapter(Holder(nn.Linear(IN, OUT)), LoKrConfig(rows=(0, OUT), target_modules=["layer"]))


@pytest.mark.parametrize(("rows", "a"), [((3, 36), 4), ((0, 35), 5), ((20, 36), 6)], ids=["too few", "not out", "past the end"])
def test_window_that_does_not_fit(rows, a):
    layer = nn.Linear(IN, OUT)
    target = Target("layer", layer, geometry_of(layer))
    with pytest.raises(CheckpointError, match="rows"):
        adapter_from_tensors(target, LoKrConfig(r=2, rows=rows), make_tensors("full", layer, a, 9), True, False)
