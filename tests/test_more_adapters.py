"""GLoRA, (IA)^3, full differences, the OFT family and T-LoRA: formulas, gradients, starts, sums, directories."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Holder, adapt, as_function, make_input, make_layer, relative_error
from more_adapters import CASES, PAIRS, adapted, expected, factors_of, shake
from torch import nn

from lycoris_diff import (
    AdapterModel,
    NormConfig,
    get_peft_model,
)
from lycoris_diff.functional import oft


# --------------------------------------------------------------------------------------------------------- the formulas
@pytest.mark.parametrize(("case", "host"), PAIRS)
def test_forward_merge_and_strength(case, host):
    config, model, layer = adapted(case, host)
    base = copy.deepcopy(layer.base_layer)
    x = make_input(base)
    full, plain = expected(case, config, layer, x), base(x)
    for strength in (1.0, 0.5, -1.5, 0.0):
        model.set_scale("default", strength)
        wanted = plain + strength * (full - plain)
        assert relative_error(model(x), wanted) < 1e-9
        with torch.no_grad():
            assert relative_error(model(x), wanted) < 1e-9
        model.merge_adapter(safe_merge=True)
        assert relative_error(model(x), wanted) < 1e-9
        model.unmerge_adapter()
        assert all(torch.equal(p, q) for p, q in zip(layer.base_layer.parameters(), base.parameters(), strict=True))
    assert torch.equal(model(x), base(x))
    model.set_scale("default", 1.0)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert relative_error(copy.deepcopy(model).merge_and_unload()(x), full) < 1e-9
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize("terms", range(1, 9))
def test_series_of_the_rotation(terms):
    """I + 2 Q + ... + 2 Q^(n-1) + Q^n from its powers; the last power of three terms is the third, as in PEFT."""
    q = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(terms)) / 4
    q = q - q.mT
    last = 3 if terms == 3 else terms - 1
    wanted = sum(
        (torch.linalg.matrix_power(q, n) * (1 if n == last and terms != 2 else 2) for n in range(1, last + 1)),
        torch.eye(4, dtype=q.dtype).expand_as(q),
    )
    torch.testing.assert_close(oft.neumann(q, terms), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("case", "host"), [(c, h) for c, h in PAIRS if h in ("linear", "conv2d-1x1", "conv2d-zeros")])
def test_a_new_adapter_changes_nothing_and_learns(case, host):
    model, layer = adapt(make_layer(host), CASES[case][0]())
    x = make_input(layer.base_layer)
    assert relative_error(model(x), layer.base_layer(x)) < (1e-12 if case.startswith("tlora") else 1e-15)
    before = {k: v.detach().clone() for k, v in layer.base_layer.named_parameters()}
    target = layer.base_layer(x) + torch.randn(model(x).shape, generator=torch.Generator().manual_seed(0)).to(x)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in layer.base_layer.named_parameters())


@pytest.mark.parametrize(
    ("case", "host"), [(c, h) for c, h in PAIRS if h in ("linear", "linear-nobias", "conv2d-groups2", "conv2d-1x1")]
)
def test_gradients_are_the_formulas_gradients(case, host):
    config, model, layer = adapted(case, host)
    x = make_input(layer.base_layer).requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in factors_of(layer).items()}
    wanted = expected(case, config, layer, x, t=leaves)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    reference = torch.autograd.grad(wanted, [*leaves.values(), x], cotangent)
    own = dict(layer.adapters["default"].named_parameters())
    found = torch.autograd.grad(model(x), [*[own[k] for k in leaves], x], cotangent)
    for name, a, b in zip([*leaves, "x"], found, reference, strict=True):
        assert relative_error(a, b) < 1e-8, name


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    host = nn.Conv2d(8, 8, 3 if case == "glora-core" else 1).double().requires_grad_(False)
    fields = {"glora": {"r": 2}, "ia3-i": {}, "full": {}, "diag-": {"r": 4}, "boft": {"r": 4}, "boft-": {"r": 4}}
    config = CASES[case][0]()
    for key, values in fields.items():
        if case.startswith(key):
            vars(config).update(values)
    if case.startswith("oft"):
        vars(config).update(r=0, oft_block_size=4)
    model, layer = adapt(host, config)
    shake(layer.adapters["default"])
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    run, inputs = as_function(model, x)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_other_dtypes(case, dtype):
    config, model, layer = adapted(case, "conv2d-zeros" if case == "glora-core" else "linear", dtype)
    x = make_input(layer.base_layer)
    tolerance = {torch.float32: 1e-4 if case.startswith("tlora") else 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    wanted = expected(case, config, layer, x)
    assert model(x).dtype == dtype
    assert relative_error(model(x), wanted) < tolerance
    model.merge_adapter()
    assert relative_error(model(x), wanted) < 2 * tolerance


@pytest.mark.parametrize("host", ["linear", "linear-nobias", "conv2d-1x1"])
def test_several_adapters_add_up(host):
    """Each change is taken against the unmodified base, in any order, also as one weighted sum."""
    cases = ["glora", "ia3", "full", "diag-oft", "boft", "oft", "tlora"]
    model, layer = adapt(make_layer(host), CASES[cases[0]][0](), cases[0])
    for name in cases[1:]:
        model.add_adapter(name, CASES[name][0]())
    for i, name in enumerate(cases):
        shake(layer.adapters[name], seed=i)
        model.set_scale(name, 0.2 + 0.3 * i)
    x, base = make_input(layer.base_layer), layer.base_layer
    plain = base(x)
    wanted, unit = plain.clone(), plain.clone()
    for i, name in enumerate(cases):
        change = expected(name, None, layer, x, t=factors_of(layer, name)) - plain
        wanted, unit = wanted + (0.2 + 0.3 * i) * change, unit + 0.5 * change
    before = [p.detach().clone() for p in base.parameters()]
    for order in (cases, cases[::-1]):
        model.set_adapter(order)
        assert relative_error(model(x), wanted) < 1e-9
        model.merge_adapter()
        assert relative_error(model(x), wanted) < 1e-9
        model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), before, strict=True))
    for name in cases:
        model.set_scale(name, 1.0)
    model.add_weighted_adapter(cases, [0.5] * len(cases), "sum")
    for name in cases:
        model.delete_adapter(name)
    model.set_adapter("sum")
    assert relative_error(model(x), unit) < 1e-9
    model.merge_adapter()
    assert relative_error(model(x), unit) < 1e-9
    assert relative_error(model.unload()(x), plain) == 0


@pytest.mark.parametrize("case", [*CASES, "norm"])
def test_directories_come_back(case, tmp_path):
    """Saved and loaded, trainable and not, on a bf16 base as well."""
    if case == "norm":
        make, config = lambda: nn.LayerNorm(24).double(), NormConfig()
    else:
        make, config = lambda: make_layer("conv2d-zeros" if case == "glora-core" else "linear"), CASES[case][0]()
    model = get_peft_model(Holder(make().requires_grad_(False)), config)
    layer = model.get_base_model().layer
    shake(layer.adapters["default"], std=0.1)
    model.save_pretrained(tmp_path)
    x = make_input(layer.base_layer) if case != "norm" else torch.randn(3, 24, dtype=torch.float64)
    for trainable in (False, True):
        again = AdapterModel.from_pretrained(Holder(make()), tmp_path, is_trainable=trainable)
        assert type(again) is not AdapterModel
        assert relative_error(again(x), model(x)) < 1e-6
    half = AdapterModel.from_pretrained(Holder(make().bfloat16()), tmp_path)
    assert relative_error(half(x.bfloat16()), model(x)) < 3e-2
    kept = torch.float32 if case.startswith("tlora") else torch.bfloat16
    assert {p.dtype for p in half.get_base_model().layer.adapters.parameters()} == {kept}


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_transformed(case):
    torch._dynamo.reset()
    config, model, layer = adapted(case, "conv2d-1x1" if case != "glora-core" else "conv2d-zeros")
    base, x = model.get_base_model(), make_input(layer.base_layer)
    wanted = expected(case, config, layer, x)
    assert relative_error(torch.compile(base, backend="eager", fullgraph=True)(x), wanted) < 1e-9
    assert relative_error(torch.func.vmap(base)(x.unsqueeze(0))[0], wanted) < 1e-9
    assert relative_error(copy.deepcopy(model)(x), wanted) < 1e-9


def test_factors_on_the_meta_device():
    for case in CASES:
        host = make_layer("linear" if case != "glora-core" else "conv2d-zeros")
        model = get_peft_model(Holder(host), CASES[case][0](), low_cpu_mem_usage=True)
        assert all(p.is_meta for p in model.get_base_model().layer.adapters.parameters())
