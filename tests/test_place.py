"""Placing: each module of a file lands on the right layers, with exactly its share, in the shapes the layers take."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import tinymodels
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rebuild import change_weight
from test_algebra import Maker, assert_same
from torch import nn

from lycoris_diff.checkpoints.build import adapter_of, geometry_from_shape
from lycoris_diff.checkpoints.checkpoint import Entry, Named, RawCheckpoint
from lycoris_diff.checkpoints.fit import fit_entry
from lycoris_diff.checkpoints.place import place
from lycoris_diff.errors import CheckpointError
from lycoris_diff.naming import NameIndex, Part, Site, index_model

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DENOISER = ("unet", "transformer")


def module(name: str, *entries: Entry, prefix: str = "lora_unet_", components=DENOISER) -> Named:
    flat = prefix.endswith("_")
    return Named(name, flat, tuple(components), list(entries), [f"{prefix}{name}.{t}" for e in entries for t in e.tensors])


def raw(*modules: Named, **fields) -> RawCheckpoint:
    return RawCheckpoint(list(modules), "kohya", **fields)


def sites_index(component: str = "unet", native=None, **shapes) -> NameIndex:
    """An index with layers under the given names; ``__`` stands for a dot."""
    kinds = {1: "LayerNorm", 2: "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
    sites = {name.replace("__", "."): Site(kinds[len(shape)], shape, True) for name, shape in shapes.items()}
    return NameIndex(component, "", sites, native or {})


def assert_buildable(checkpoint, indexes) -> None:
    """Everything placed makes an adapter of its layer."""
    for component, modules in checkpoint.components.items():
        for path, entries in modules.items():
            shape = indexes[component].sites[path].shape
            if len(shape) > 1:
                adapter_of(entries, geometry_from_shape(shape), torch.float64)


# ---------------------------------------------------------------------------------------------------- fused projections
@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    return tinymodels.flux().double()


#: native name -> modules in the order of its rows; ~ has its halves exchanged
FLUX = {
    "double_blocks.1.img_attn.qkv": (
        "transformer_blocks.1.attn.to_q transformer_blocks.1.attn.to_k transformer_blocks.1.attn.to_v"
    ),
    "double_blocks.0.txt_attn.qkv": (
        "transformer_blocks.0.attn.add_q_proj transformer_blocks.0.attn.add_k_proj transformer_blocks.0.attn.add_v_proj"
    ),
    "single_blocks.1.linear1": (
        "single_transformer_blocks.1.attn.to_q single_transformer_blocks.1.attn.to_k single_transformer_blocks.1.attn.to_v "
        "single_transformer_blocks.1.proj_mlp"
    ),
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
    "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
}
ALGORITHMS = {
    "lora": lambda m: m.lora(),
    "lora rows": lambda m: m.lora(dora="out"),
    "loha": lambda m: m.loha(),
    "lokr -1": lambda m: m.lokr(12, c=6),
    "lokr 16": lambda m: m.lokr(16, "low w2", c=4),
    "lokr 2": lambda m: m.lokr(2, "low both", dora="out"),
    "glora": lambda m: m.glora(),
    "ia3": lambda m: m.ia3(),
    "full": lambda m: m.full(),
    "shira": lambda m: m.shira(),
    "miss": lambda m: m.miss(),
    "oft": lambda m: m.oft(4),
    "diag oft": lambda m: m.diag_oft(8, 0.01),
}


def native_weight(model: nn.Module, targets: str):
    """Weight and bias as the native model has them, and the rows of every diffusers module in them."""
    weights, biases, rows, start = [], [], {}, 0
    for target in targets.split():
        layer = model.get_submodule(target.removeprefix("~"))
        half = layer.out_features // 2 if target.startswith("~") else 0
        weights.append(layer.weight.detach().roll(half, 0))
        biases.append(layer.bias.detach().roll(half))
        rows[target] = slice(start, start + layer.out_features)
        start += layer.out_features
    return torch.cat(weights), torch.cat(biases), rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flux_projections_get_their_rows(flux, algorithm):
    """What the native model's weight becomes is what diffusers' weights become, row by row."""
    index = index_model(flux, "transformer")
    modules, expected = [], {}
    for seed, (name, targets) in enumerate(FLUX.items()):
        weight, bias, rows = native_weight(flux, targets)
        try:
            entry = ALGORITHMS[algorithm](Maker(tuple(weight.shape), seed))
        except AssertionError:  # the factor does not divide this layer
            continue
        changed, changed_bias = change_weight(entry, weight, bias)
        for target, share in rows.items():
            half = (share.stop - share.start) // 2 if target.startswith("~") else 0
            expected[target.removeprefix("~")] = changed[share].roll(half, 0), changed_bias[share].roll(half)
        modules.append(module(name.replace(".", "_"), entry))
    result = place(raw(*modules), {"transformer": index}, "flux")
    assert not result.wrong_shape and not result.unmatched and result.base_model == "flux"
    placed = result.components["transformer"]
    assert placed.keys() <= expected.keys() and (algorithm == "shira" or placed.keys() == expected.keys())
    for path, (weight, bias) in expected.items():
        layer = flux.get_submodule(path)
        found = layer.weight.detach(), layer.bias.detach()
        for entry in placed.get(path, []):
            found = change_weight(entry, *found)
        assert_same(found, (weight, bias))
        if path in placed:
            assert result.sources["transformer"][path]
    assert_buildable(result, {"transformer": index})


def test_every_scheme_means_the_same(flux):
    index = {"transformer": index_model(flux, "transformer")}
    entries = [Maker((48, 48), seed).lokr(6) for seed in range(3)]
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
    schemes = {
        "transformer.": (names, ("transformer",)),
        "lycoris_": ([n.replace(".", "_") for n in names], ()),
        "lora_unet_": ([n.replace(".", "_") for n in names], DENOISER),
        "unknown.": (names, ()),
        "diffusion_model.": ([f"double_blocks.0.img_attn.qkv.{k}" for k in range(3)], DENOISER),
    }
    for prefix, (spelled, components) in schemes.items():
        modules = [module(n, e, prefix=prefix, components=components) for n, e in zip(spelled, entries)]
        result = place(raw(*modules), index)
        assert list(result.components["transformer"]) == names, prefix
        for found, entry in zip(result.components["transformer"].values(), entries):
            assert all(torch.equal(v, entry.tensors[k]) for k, v in found[0].tensors.items())


def test_a_part_in_which_nothing_changes_is_left_out():
    native = {"qkv": (Part("q", (0, 4)), Part("k", (4, 8)))}
    index = sites_index(native=native, q=(4, 6), k=(4, 6))
    entry = Entry("SHIRA", {"shira_weight": torch.ones(2), "shira_indices": torch.tensor([[5, 7], [0, 1]])})
    result = place(raw(module("qkv", entry)), {"unet": index})
    assert list(result.components["unet"]) == ["k"]
    assert result.components["unet"]["k"][0].tensors["shira_indices"].tolist() == [[1, 3], [0, 1]]


def test_what_has_no_exact_share_is_listed_with_the_reason():
    native = {"qkv": (Part("q", (0, 8)), Part("k", (8, 16)), Part("v", (16, 24)))}
    index = sites_index(native=native, q=(8, 6), k=(8, 6), v=(8, 6), o=(8, 6))
    maker = Maker((24, 6))
    for entry, reason in [
        (maker.lora(dora="in"), "column-axis DoRA"),
        (maker.diag_oft(6), "cut a block"),
        (maker.tlora(), "SVD"),
        (Maker((20, 6)).lora(), "expected \\(24, 2\\)"),
    ]:
        result = place(raw(module("qkv", entry), module("o", Maker((8, 6)).lora())), {"unet": index})
        assert list(result.components["unet"]) == ["o"]
        ((name, found),) = result.wrong_shape.items()
        assert name == "lora_unet_qkv"
        with pytest.raises(CheckpointError, match=reason):
            raise CheckpointError(found)


def test_rows_of_an_index_that_cover_only_some_of_the_weight():
    """XLabs' qkv of single blocks: three of the four parts."""
    qkv = tuple(Part(n, (4 * i, 4 * i + 4)) for i, n in enumerate("qkv"))
    sites = {n: Site("Linear", (4, 6)) for n in "qkv"} | {"mlp": Site("Linear", (9, 6))}
    index = NameIndex("transformer", "flux", sites, {"linear1": (*qkv, Part("mlp", (12, 21)))}, {"qkv_lora": qkv})
    result = place(raw(module("qkv_lora", Maker((12, 6)).lora())), {"transformer": index})
    assert list(result.components["transformer"]) == ["q", "k", "v"]


# --------------------------------------------------------------------------------------------------------- components
def clip(component: str, width: int) -> NameIndex:
    name = "text_model__encoder__layers__0__mlp__fc1"
    return sites_index(component, **{name: (4 * width, width)})


def test_the_component_follows_from_prefix_and_size():
    indexes = {"text_encoder": clip("text_encoder", 8), "unet": sites_index(a=(4, 4)), "text_encoder_2": clip("x", 12)}
    name = "text_model_encoder_layers_0_mlp_fc1"
    small, large = Maker((32, 8)).lora(), Maker((48, 12)).lora()
    result = place(raw(module(name, large, prefix="lora_te2_", components=["text_encoder_2"])), indexes)
    assert list(result.components) == ["text_encoder_2"]
    # names that say nothing: the size tells the encoders apart
    for entry, component in ((small, "text_encoder"), (large, "text_encoder_2")):
        result = place(raw(module(name, entry, prefix="lycoris_", components=())), indexes)
        assert list(result.components) == [component] and not result.wrong_shape
    # neither fits: the first is blamed
    result = place(raw(module(name, Maker((20, 5)).lora(), prefix="lycoris_", components=())), indexes)
    assert "expected (2, 8)" in result.wrong_shape[f"lycoris_{name}"]


@pytest.mark.parametrize("available", [{"text_encoder_2"}, {"text_encoder_2", "text_encoder_3"}])
def test_t5_is_the_third_or_the_second_encoder(available):
    t5 = {"encoder__block__0__layer__0__SelfAttention__q": (6, 6)}
    indexes = {c: sites_index(c, **(t5 if c == max(available) else {"other": (6, 6)})) for c in available}
    named = module("encoder_block_0_layer_0_SelfAttention_q", Maker((6, 6)).lora(), prefix="lora_te3_")
    result = place(raw(replace(named, components=("text_encoder_3", "text_encoder_2"))), indexes)
    assert list(result.components) == [max(available)]


def test_components_that_the_model_lacks():
    names = [module(f"x_{k}", Maker((4, 4)).lora(), prefix="lora_te2_", components=["text_encoder_2"]) for k in range(2)]
    result = place(raw(*names), {"unet": sites_index(a=(4, 4))})
    assert result.unmatched == {"lora_te2_x_0": "", "lora_te2_x_1": ""}
    assert result.notes == ["2 modules belong to text_encoder_2, which the model does not have"]


def test_unmatched_names_come_with_the_nearest():
    index = sites_index(down__0__to_q=(4, 4), down__1__to_q=(4, 4), up__to_v=(4, 4))
    entry = Maker((4, 4)).lora()
    modules = [module("down_7_to_q", entry), module("zzz", entry), module("up_to_v", entry)]
    result = place(raw(*modules), {"unet": index})
    assert result.unmatched == {"lora_unet_down_7_to_q": "down_1_to_q", "lora_unet_zzz": ""}
    assert list(result.components["unet"]) == ["up.to_v"]


def test_a_prefix_of_ones_own():
    index = sites_index(down__0__to_q=(4, 4), down__1__to_q=(4, 4))
    entry = Maker((4, 4)).lora()
    modules = [module(f"my_own_down_{k}_to_q", entry, prefix="", components=()) for k in range(2)]
    modules = [replace(m, flat=True) for m in modules]
    result = place(raw(*modules), {"unet": index})
    assert list(result.components["unet"]) == ["down.0.to_q", "down.1.to_q"]
    assert "'my_own_'" in result.notes[0] and not result.unmatched


def test_without_a_model_names_stay():
    entry = Maker((4, 4)).lora()
    modules = [module("a_b", entry), module("c.d", entry, prefix="lycoris.", components=())]
    result = place(raw(*modules, metadata={"k": "v"}, notes=["n"], trainer="t", unknown={"u": "why"}), {})
    assert result.components == {"unet": {"a_b": [entry], "c.d": [entry]}} and result.base_model == ""
    assert (result.metadata, result.notes, result.trainer, result.unknown) == ({"k": "v"}, ["n"], "t", {"u": "why"})


# ---------------------------------------------------------------------------------------------------------- conflicts
@pytest.mark.parametrize("order", [1, -1])
def test_one_naming_of_two(order):
    """A file with diffusers' and native names: the dotted names of diffusers count, whatever comes first."""
    native = {"block.qkv": (Part("b.to_q", (0, 4)), Part("b.to_k", (4, 8)))}
    index = sites_index(native=native, b__to_q=(4, 6), b__to_k=(4, 6))
    dotted = [module(f"b.to_{n}", Maker((4, 6), s).lora(), prefix="transformer.") for s, n in enumerate("qk")]
    flat = [module(f"b_to_{n}", Maker((4, 6), s + 2).lora()) for s, n in enumerate("qk")]
    fused = [module("block_qkv", Maker((8, 6), 5).lora())]
    result = place(raw(*(dotted + flat + fused)[::order]), {"unet": index})
    for named in dotted:
        assert result.components["unet"][named.name][0].tensors["lora_A.weight"] is not None
        found = result.components["unet"][named.name]
        assert len(found) == 1 and torch.equal(found[0].tensors["lora_A.weight"], named.entries[0].tensors["lora_A.weight"])
        assert result.sources["unet"][named.name] == named.keys
    assert result.conflicts.keys() == {"lora_unet_b_to_q", "lora_unet_b_to_k", "lora_unet_block_qkv"}
    assert result.conflicts["lora_unet_b_to_q"] == "transformer.b.to_q"
    assert "3 modules are in the file under two names" in result.notes[0]


def test_a_name_whose_factors_do_not_fit_leaves_the_module_to_the_other():
    index = sites_index(b__to_q=(4, 6))
    wrong, right = module("b.to_q", Maker((5, 6)).lora(), prefix="unet."), module("b_to_q", Maker((4, 6)).lora())
    result = place(raw(wrong, right), {"unet": index})
    assert result.sources["unet"]["b.to_q"] == right.keys
    assert list(result.wrong_shape) == ["unet.b.to_q"] and not result.conflicts


# -------------------------------------------------------------------------------------------------- shapes of factors
def reshaped(entry: Entry, **shapes) -> Entry:
    return replace(entry, tensors={k: v.reshape(shapes.get(k.split(".")[0], v.shape)) for k, v in entry.tensors.items()})


ONE = (16, 8, 1, 1)
KERNEL = (16, 8, 3, 3)
SHAPES = {
    "lora squeezed": (ONE, lambda m: reshaped(m.lora(), lora_A=(2, 8), lora_B=(16, 2))),
    "lora of a linear as conv": ((16, 8), lambda m: reshaped(m.lora(), lora_A=(2, 8, 1, 1), lora_B=(16, 2, 1, 1))),
    "lora flattened kernel": (KERNEL, lambda m: reshaped(m.lora(), lora_A=(2, 72), lora_B=(16, 2))),
    "lora core": (KERNEL, lambda m: reshaped(m.lora(core=True), lora_A=(2, 8), lora_B=(16, 2))),
    "lora conv1d as conv2d": ((16, 8, 3), lambda m: reshaped(m.lora(), lora_A=(2, 8, 3, 1), lora_B=(16, 2, 1, 1))),
    "loha 1x1 as conv": (ONE, lambda m: reshaped(m.loha(), hada_w1_a=(16, 2, 1, 1), hada_w2_b=(2, 8, 1, 1))),
    "loha kernel unfolded": (KERNEL, lambda m: reshaped(m.loha(), hada_w1_b=(2, 8, 3, 3), hada_w2_b=(2, 8, 3, 3))),
    "loha conv1d core": ((16, 8, 3), lambda m: reshaped(m.loha(core=True), hada_t1=(2, 2, 3), hada_t2=(2, 2, 3))),
    "lokr full 2-D": (ONE, lambda m: reshaped(m.lokr(4), lokr_w2=(4, 4))),
    "lokr full 4-D on linear": ((16, 8), lambda m: reshaped(m.lokr(4), lokr_w2=(4, 4, 1, 1))),
    "lokr full flattened": (KERNEL, lambda m: reshaped(m.lokr(4), lokr_w2=(4, 36))),
    "lokr low unfolded": (KERNEL, lambda m: reshaped(m.lokr(4, "low w2"), lokr_w2_b=(2, 4, 3, 3))),
    "lokr core conv1d": ((16, 8, 3), lambda m: reshaped(m.lokr(4, "core"), lokr_t2=(2, 2, 3))),
    "lokr 1-D w1 axes": (ONE, lambda m: reshaped(m.lokr(4), lokr_w1=(4, 2, 1, 1))),
    "glora as conv": (
        ONE,
        lambda m: reshaped(m.glora(), glora_a1=(8, 2, 1, 1), glora_a2=(2, 8, 1, 1), glora_b1=(16, 2, 1, 1), glora_b2=(2, 8)),
    ),
    "glora kernel": (KERNEL, lambda m: m.glora()),
    "ia3 out conv": (KERNEL, lambda m: reshaped(m.ia3(), ia3_weight=(1, 16, 1, 1))),
    "ia3 in conv": (KERNEL, lambda m: reshaped(m.ia3(True), ia3_weight=(1, 8, 1, 1))),
    "full squeezed": (ONE, lambda m: reshaped(m.full(), diff=(16, 8), diff_b=(16, 1))),
    "oft rescale": (KERNEL, lambda m: reshaped(m.diag_oft(4, 0.1, True), rescale=(16, 1))),
    "dora rows 1-D": (KERNEL, lambda m: reshaped(m.loha(dora="out"), dora_scale=(16,))),
    "dora rows of lora": (KERNEL, lambda m: reshaped(m.lora(dora="out"), lora_magnitude_vector=(16, 1, 1, 1))),
    "dora columns": (KERNEL, lambda m: reshaped(m.lokr(4, dora="in"), dora_scale=(1, 8))),
    "tlora": (ONE, lambda m: reshaped(Maker((16, 8)).tlora(), q_layer=(2, 8, 1, 1), p_layer=(16, 2, 1, 1))),
    "miss": (ONE, lambda m: reshaped(m.miss(), miss_block=(2, 16))),
}


@pytest.mark.parametrize("case", SHAPES)
def test_axes_of_size_one_do_not_matter(case):
    shape, make = SHAPES[case]
    entry = make(Maker(shape))
    plain = {name: tuple(t.shape) for name, t in entry.tensors.items()}
    result = place(raw(module("a", entry)), {"unet": sites_index(a=shape)})
    assert not result.wrong_shape, result.wrong_shape
    (fitted,) = result.components["unet"]["a"]
    if case != "tlora":  # it needs to start from the weight
        adapter_of(fitted, geometry_from_shape(shape), torch.float64)
    assert {name: tuple(t.shape) for name, t in entry.tensors.items()} == plain
    values = {name: t.flatten() for name, t in entry.tensors.items()}
    assert all(torch.equal(t.flatten(), values[name]) for name, t in fitted.tensors.items())
    assert_same(change_weight(fitted, *pair(shape)), change_weight(canonical(entry, case, shape), *pair(shape)))


def pair(shape):
    maker = Maker(shape, 3)
    return maker.weight(), maker.tensor(shape[0])


def canonical(entry: Entry, case: str, shape) -> Entry:
    """The entry as its maker had it."""
    made = Maker(shape)
    known = SHAPES[case][1](made)
    tensors = {}
    for name, value in known.tensors.items():
        flat = {"hada_w1_a": 1, "hada_w2_a": 1, "hada_w1_b": 1, "hada_w2_b": 1, "lokr_w2_b": 1, "lokr_w1": 1}
        keep = name in flat and "core" not in case
        value = value.flatten(1) if keep and value.dim() > 2 else value
        if name == "lokr_w2":
            value = value.reshape(value.shape[0], -1, *shape[2:])
        if name.startswith("glora") and name != "glora_b2":
            value = value.flatten(1)
        if name in ("ia3_weight", "diff_b"):
            value = value.flatten()
        if name in ("p_layer", "q_layer"):
            value = value.flatten(1)
        if name == "miss_block":
            value = value.reshape(*value.shape[:2], *shape[2:])
        tensors[name] = value
    return replace(known, tensors=tensors)


WRONG = {
    "other width": ((16, 9), lambda m: Maker((16, 8)).lora(), "lora_A.weight.*expected \\(2, 9\\)"),
    "other rows": ((17, 8), lambda m: Maker((16, 8)).lora(), "lora_B.weight.*expected \\(17, 2\\)"),
    "ranks differ": ((16, 8), lambda m: cut(m.lora(4), "lora_B.weight", (16, 1)), "\\(16, 1\\), expected \\(16, 4\\)"),
    "no rank": ((16, 8), lambda m: m.lora(0), "shape \\(0, 8\\)"),
    "half a pair": ((16, 8), lambda m: without(m.lora(), "lora_B.weight"), "'lora_B.weight' is missing"),
    "one half of loha": ((16, 8), lambda m: without(m.loha(), "hada_w2_a"), "'hada_w2_a' is missing"),
    "foreign tensor": ((16, 8), lambda m: added(m.lora(), "lokr_w1", m.tensor(2, 2)), "'lokr_w1' does not belong"),
    "magnitude of another": (
        (16, 8),
        lambda m: added(m.glora(), "dora_scale", m.tensor(16, 1)),
        "'dora_scale' does not belong",
    ),
    "magnitude of no axis": ((16, 8), lambda m: added(m.loha(), "dora_scale", m.tensor(5, 1)), "16 rows or 8 columns"),
    "another kernel": ((16, 8, 5, 5), lambda m: Maker(KERNEL).lora(), "expected \\(r, 8, 5, 5\\)"),
    "core without kernel": (ONE, lambda m: Maker(ONE).lora(core=True), "has no kernel"),
    "lokr rows": ((18, 8), lambda m: Maker((16, 8)).lokr(4), "16 rows and 8 columns, the layer 18 and 8"),
    "lokr columns": ((16, 9), lambda m: Maker((16, 8)).lokr(4), "16 rows and 8 columns, the layer 16 and 9"),
    "lokr window": ((16, 8), lambda m: replace(Maker((32, 8)).lokr(8), options={"rows": (2, 16)}), "over the 8 blocks"),
    "lokr ranks": (
        (16, 8),
        lambda m: cut(cut(m.lokr(4, "low both"), "lokr_w1_a", (4, 1)), "lokr_w1_b", (1, 2)),
        "ranks 1 and 2",
    ),
    "ia3": ((16, 8), lambda m: Maker((8, 16)).ia3(), "8 factors for 16 output channels"),
    "ia3 input": ((16, 8), lambda m: Maker((8, 16)).ia3(True), "16 factors for 8 input channels"),
    "full": ((16, 8), lambda m: Maker((8, 16)).full(), "'diff' has shape \\(8, 16\\)"),
    "oft": ((18, 8), lambda m: Maker((16, 8)).diag_oft(4), "4 blocks of 4 do not make up 18"),
    "boft": ((16, 8), lambda m: Entry("LYCORIS_BOFT", {"oft_blocks": m.tensor(4, 4, 4, 4)}), "4 stages"),
    "peft oft": ((16, 9), lambda m: Maker((16, 8)).oft(4), "do not make up 9"),
    "peft oft triangle": ((16, 8), lambda m: Entry("OFT", {"oft_R.weight": m.tensor(2, 5)}), "no triangle"),
    "miss": ((16, 8), lambda m: Maker((12, 8)).miss(), "12 output channels"),
    "miss mini": ((16, 8), lambda m: m.miss("mini", mini_r=3), "3 output channels"),
    "miss wide": ((16, 8), lambda m: Maker((16, 9)).miss(r=9), "larger than"),
    "miss bat": ((16, 8), lambda m: Maker((16, 8)).miss("bat", r=16), "do not divide"),
    "shira row": ((4, 8), lambda m: Maker((16, 8)).shira(), "the weight has 4 rows"),
    "shira count": ((16, 8), lambda m: cut(m.shira(), "shira_weight", (3,)), "shira_weight|shira_indices"),
    "tlora kernel": (KERNEL, lambda m: Maker((16, 8)).tlora(), "without kernel"),
    "norm on linear": ((16, 8), lambda m: Entry("NORM", {"w_norm": m.tensor(16)}), "NORM is for"),
    "lora on norm": ((16,), lambda m: Maker((16, 8)).lora(), "not for LayerNorm"),
    "norm size": ((12,), lambda m: Entry("NORM", {"w_norm": m.tensor(16)}), "expected \\(12\\)"),
    "unknown": ((16, 8), lambda m: Entry("MINE", {"lokr_w1": m.tensor(2)}), "unknown algorithm 'MINE'"),
    "nothing": ((16, 8), lambda m: Entry("LORA", {}), "found nothing"),
}


def without(entry: Entry, name: str) -> Entry:
    return replace(entry, tensors={k: v for k, v in entry.tensors.items() if k != name})


def added(entry: Entry, name: str, value: torch.Tensor) -> Entry:
    return replace(entry, tensors={**entry.tensors, name: value})


def cut(entry: Entry, name: str, shape: tuple[int, ...]) -> Entry:
    return added(entry, name, entry.tensors[name][tuple(slice(0, n) for n in shape)])


@pytest.mark.parametrize("case", WRONG)
def test_factors_that_do_not_make_up_the_weight(case):
    shape, make, reason = WRONG[case]
    entry = make(Maker((16, 8) if len(shape) < 2 else shape))
    result = place(raw(module("a", entry), module("b", Maker((4, 4)).lora())), {"unet": sites_index(a=shape, b=(4, 4))})
    assert list(result.components["unet"]) == ["b"] and list(result.wrong_shape) == ["lora_unet_a" if entry.tensors else "a"]
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(next(iter(result.wrong_shape.values())))


def test_products_are_never_built():
    """Factors of moderate size whose product has 1e12 elements and more; expanded, so that they take no memory here."""
    huge = lambda *shape: torch.zeros(1).expand(*shape)
    bombs = [
        Entry("LOKR", {"lokr_w1": huge(10**6, 10**6), "lokr_w2": huge(10**6, 10**6)}),
        Entry("LOKR", {"lokr_w1": huge(16, 8), "lokr_w2": huge(10**6, 10**6)}),
        Entry("LOKR", {"lokr_w1": huge(10**6, 8), "lokr_w2": huge(10**6, 1)}, options={"rows": (0, 16)}),
        Entry("LOKR", {"lokr_w1": huge(1, 8), "lokr_w2_a": huge(10**9, 1), "lokr_w2_b": huge(1, 1)}, options={"rows": (0, 16)}),
        Entry("LORA", {"lora_A.weight": huge(1, 10**9), "lora_B.weight": huge(10**9, 1)}),
        Entry("LOHA", dict.fromkeys(("hada_w1_a", "hada_w2_a", "hada_w1_b", "hada_w2_b"), huge(10**9, 10**6))),
        Entry("MISS", {"miss_block": huge(10**6, 10**6)}),
        Entry("DIAG_OFT", {"oft_blocks": huge(10**6, 10**6, 10**6)}),
        Entry("OFT", {"oft_R.weight": huge(10**6, 10**12)}),
        Entry("FULL", {"diff": huge(10**6, 10**6)}),
    ]
    start = time.perf_counter()
    result = place(
        raw(*[module(f"a_{k}", e) for k, e in enumerate(bombs)]),
        {"unet": sites_index(**{f"a__{k}": (16, 8) for k in range(10)})},
    )
    assert len(result.wrong_shape) == len(bombs) and not result.components
    assert time.perf_counter() - start < 1


def test_rank_and_strength_survive():
    entry = replace(Maker((16, 8)).lora(4), scale=0.5, rank=4, alpha=2.0, alpha_source="tensor")
    (found,) = place(raw(module("a", entry)), {"unet": sites_index(a=(16, 8))}).components["unet"]["a"]
    assert (found.scale, found.rank, found.alpha, found.alpha_source) == (0.5, 4, 2.0, "tensor")


# ------------------------------------------------------------------------------------------ what only the layer decides
@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (8, 8, 3, 3), (16, 16)])
def test_glora_in_either_order(shape):
    maker = Maker(shape)
    entry = maker.glora(3)
    t = entry.tensors
    old = {"glora_a1": t["glora_a2"], "glora_a2": t["glora_a1"], "glora_b1": t["glora_b2"], "glora_b2": t["glora_b1"]}
    wrongly_read = replace(entry, tensors=old, rank=shape[1], scale=6.0 / shape[1], alpha=6.0)
    index = {"unet": sites_index(a=shape)}
    for given_entry, scale in ((entry, 0.5), (wrongly_read, 2.0), (replace(entry, tensors=old), 0.5)):
        (found,) = place(raw(module("a", given_entry)), index).components["unet"]["a"]
        assert found.scale == pytest.approx(scale) and found.rank == 3
        assert all(torch.equal(found.tensors[k].flatten(), v.flatten()) for k, v in t.items())
        adapter_of(found, geometry_from_shape(shape), torch.float64)


def magnitude_entry(shape, count: int, axis: str = "") -> Entry:
    entry = Maker(shape).lora()
    options = {"dora_axis": axis} if axis else {}
    return replace(added(entry, "lora_magnitude_vector", torch.ones(count)), options=options)


def test_dora_axis_by_size_and_by_the_rest_of_the_file():
    index = {"unet": sites_index(tall=(16, 8), wide=(8, 16), square=(8, 8))}

    def axes(**counts) -> dict[str, str]:
        modules = [module(n, magnitude_entry(index["unet"].sites[n].shape, *c)) for n, c in counts.items()]
        result = place(raw(*modules), index)
        assert not result.wrong_shape
        return {n: e[0].options["dora_axis"] for n, e in result.components["unet"].items()}

    assert axes(tall=(16,), wide=(8,), square=(8,)) == {"tall": "out", "wide": "out", "square": "out"}
    assert axes(tall=(8,), wide=(16,), square=(8,)) == {"tall": "in", "wide": "in", "square": "in"}
    # what the size says wins over what the reader thought; only on square layers the reader's word counts
    assert axes(tall=(16, "in"), square=(8, "in")) == {"tall": "out", "square": "in"}
    assert axes(tall=(8, "out"), square=(8, "out")) == {"tall": "in", "square": "in"}
    assert axes(square=(8,)) == {"square": "out"}


def test_norms_go_by_their_layer():
    index = {"unet": sites_index(norm=(6,), bare=(6,))}
    index["unet"].sites["bare"] = Site("RMSNorm", (6,), False)
    maker = Maker((6, 6))
    comfy = Entry("FULL", {"diff": maker.tensor(6), "diff_b": maker.tensor(6)})
    bias = Entry("FULL", {"diff_b": maker.tensor(6)})
    native = Entry("NORM", {"w_norm": maker.tensor(6, 1), "b_norm": torch.zeros(6)})
    for entry, names in ((comfy, ["w_norm", "b_norm"]), (bias, ["b_norm", "w_norm"]), (native, ["w_norm", "b_norm"])):
        (found,) = place(raw(module("norm", entry)), index).components["unet"]["norm"]
        assert found.algorithm == "NORM" and sorted(found.tensors) == sorted(names)
        assert all(t.shape == (6,) for t in found.tensors.values())
    (found,) = place(raw(module("bare", native)), index).components["unet"]["bare"]
    assert list(found.tensors) == ["w_norm"]
    result = place(raw(module("bare", comfy)), index)
    assert "RMSNorm has none" in result.wrong_shape["lora_unet_bare"]


def test_compact_shira_positions():
    from lycoris_diff.functional import shira

    positions = torch.tensor([3, 17, 100])
    entry = Entry("SHIRA", {"shira_weight": torch.ones(3), "shira_gaps": shira.encode_gaps(positions)})
    (found,) = place(raw(module("a", entry)), {"unet": sites_index(a=(16, 8))}).components["unet"]["a"]
    assert found.tensors["shira_indices"].tolist() == [[0, 2, 12], [3, 1, 4]]


def test_a_block_as_wide_as_the_layer_is_balance():
    entry = Maker((16, 8)).miss("mini", mini_r=16)
    assert fit_entry(entry, Site("Linear", (16, 8))).options == {"init_weights": True}


# -------------------------------------------------------------------------------------------------------------- always
@given(st.data())
@quick
def test_nothing_is_raised_for_a_single_module(data):
    """Any shapes under any factor names: placed and buildable, or listed."""
    shape = data.draw(st.sampled_from([(6, 4), (4, 4), (4, 6, 3), (6, 4, 1, 1), (4, 4, 2, 2)]))
    factors = {
        "LORA": "lora_A.weight lora_B.weight lora_mid.weight lora_magnitude_vector",
        "LOHA": "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 dora_scale",
        "LOKR": "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 dora_scale",
        "GLORA": "glora_a1 glora_a2 glora_b1 glora_b2 glora_bm",
        "IA3": "ia3_weight", "FULL": "diff diff_b", "DIAG_OFT": "oft_blocks rescale", "LYCORIS_BOFT": "oft_blocks",
        "OFT": "oft_R.weight", "MISS": "miss_block", "NORM": "w_norm b_norm",
    }  # fmt: skip
    algorithm = data.draw(st.sampled_from(sorted(factors)))
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), max_size=5)
    names = data.draw(st.sets(st.sampled_from(factors[algorithm].split()), min_size=1))
    entry = Entry(algorithm, {name: torch.randn(data.draw(sizes)) for name in sorted(names)}, rank=1)
    native = {"ab": (Part("a", (0, shape[0]), True), Part("b", (shape[0], 2 * shape[0])))}
    index = sites_index(native=native, a=shape, b=shape)
    result = place(raw(module(data.draw(st.sampled_from(["a", "ab"])), entry)), {"unet": index})
    assert bool(result.components) != bool(result.wrong_shape)
    assert_buildable(result, {"unet": index})


def test_placing_a_large_file_is_fast():
    maker = Maker((64, 64))
    count = 2000
    index = {"unet": sites_index(**{f"blocks__{k}__to_q": (64, 64) for k in range(count)})}
    modules = [module(f"blocks_{k}_to_q", maker.lokr(8)) for k in range(count)]
    place(raw(modules[0]), index)  # the index makes its tables once
    start = time.perf_counter()
    result = place(raw(*modules), index)
    assert len(result.components["unet"]) == count
    assert time.perf_counter() - start < 2
