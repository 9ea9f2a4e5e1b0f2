"""Adding an algorithm: one class with its formula and one registration, and everything else works with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import LAYERS, Holder, adapt, as_function, make_input, make_layer, relative_error
from modelcases import adapted_layers
from smallmodels import clip, output_of, tokens
from torch import nn

from lycoris_diff import AdapterError, AdapterModel, LoKrConfig, get_peft_model
from lycoris_diff.adapters import ADAPTERS, Adapter, AdapterConfig, register


@dataclass(init=False)
class OuterConfig(AdapterConfig):
    peft_name: ClassVar[str] = "TOY_OUTER"


class Outer(Adapter):
    """The same outer product on every kernel position: ``dW[o, i, *k] = u[o] v[i]``."""

    config_class = OuterConfig
    factor_names = ("outer_u", "outer_v")

    @classmethod
    def shapes(cls, geometry, config):
        return {"outer_u": (geometry.out,), "outer_v": (geometry.inp,)}

    def reset(self, site):
        nn.init.zeros_(self.outer_u)
        nn.init.normal_(self.outer_v)

    def delta(self, f):
        change = f["scale"] * f["outer_u"].unsqueeze(1) * f["outer_v"]
        return change.reshape(*change.shape, *[1] * len(self.geometry.kernel)).expand(self.geometry.shape)


@dataclass(init=False)
class RowConfig(AdapterConfig):
    peft_name: ClassVar[str] = "TOY_ROWS"


class Rows(Adapter):
    """A multiplicative one: every output row is stretched, ``dW = row * W``."""

    config_class = RowConfig
    factor_names = ("row",)
    additive = False

    @classmethod
    def shapes(cls, geometry, config):
        return {"row": (geometry.out,)}

    def reset(self, site):
        nn.init.zeros_(self.row)

    def change(self, base, f):
        return f["row"].reshape(-1, *[1] * (base.ndim - 1)) * base


@pytest.fixture(autouse=True)
def registered():
    before = dict(ADAPTERS)
    register(Outer)
    register(Rows)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith(("outer_u", "outer_v", ".row")):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("layer", [*list(LAYERS)[:15], "conv2d-groups2", "conv3d-all-at-once"])
@pytest.mark.parametrize("config", [OuterConfig, RowConfig])
def test_a_new_algorithm_works_on_every_layer(config, layer):
    model, adapted = adapt(make_layer(layer), config(target_modules=["layer"]))
    x = make_input(adapted.base_layer)
    assert relative_error(model(x), adapted.base_layer(x)) < 1e-12
    fill(model)
    changed = model(x).detach()
    assert relative_error(changed, adapted.base_layer(x)) > 1e-3
    weight = adapted.base_layer.weight.clone()
    model.merge_adapter()
    assert relative_error(model(x), changed) < 1e-9
    model.unmerge_adapter()
    assert torch.equal(adapted.base_layer.weight, weight)
    model.set_scale("default", 0.0)
    assert torch.equal(model(x), adapted.base_layer(x))
    model.set_scale("default", 1.0)
    assert torch.autograd.gradcheck(*as_function(model, x), fast_mode=True)


def test_the_formula_is_what_runs():
    model, adapted = adapt(make_layer("linear"), OuterConfig(target_modules=["layer"]))
    fill(model)
    adapter = adapted.adapters["default"]
    assert torch.allclose(adapted.get_delta_weight("default"), torch.outer(adapter.outer_u, adapter.outer_v))
    model, adapted = adapt(make_layer("hf-conv1d"), RowConfig(target_modules=["layer"]))
    fill(model)
    expected = adapted.base_layer.weight * adapted.adapters["default"].row
    assert torch.allclose(adapted.get_delta_weight("default"), expected)


@pytest.mark.parametrize("config", [OuterConfig, RowConfig])
def test_a_new_algorithm_on_a_whole_model(config, tmp_path):
    model = get_peft_model(clip(), config(target_modules="all-linear"))
    fill(model)
    model.add_adapter("lokr", LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False))
    changed = output_of(model, tokens())
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(AdapterModel.from_pretrained(clip(), tmp_path), tokens()), changed)
    model.set_adapter(["default", "lokr"])
    both = output_of(model, tokens())
    model.set_adapter(["lokr", "default"])
    assert relative_error(output_of(model, tokens()), both) < 1e-5
    assert relative_error(output_of(model.merge_and_unload(), tokens()), both) < 1e-4
    assert not adapted_layers(model.get_base_model())


def test_peft_refuses_a_new_algorithm(tmp_path):
    peft = pytest.importorskip("peft")
    model = get_peft_model(clip(), OuterConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception):  # noqa: B017
        peft.PeftModel.from_pretrained(clip(), tmp_path)


def test_names_are_taken_once():
    class Other(Outer):
        config_class = OuterConfig

    with pytest.raises(AdapterError):
        register(Other)
    ADAPTERS.pop("TOY_OUTER")
    with pytest.raises(AdapterError):
        get_peft_model(Holder(make_layer("linear")), OuterConfig(target_modules=["layer"]))
