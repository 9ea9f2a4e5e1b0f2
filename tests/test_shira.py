"""SHiRA's masks: different where they should differ, reproducible from a seed, user supplied, and small on disk."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from cases import Holder, adapt, assert_untouched, fingerprint, make_layer, randomize, relative_error
from safetensors.torch import load_file
from torch import nn

from lycoris_diff import AdapterModel, LoraConfig, ShiraConfig, get_peft_model


class Twins(nn.Module):
    """Layers of one shape, so that equal seeds would show as equal masks."""

    def __init__(self, width=24, out=None, n=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out or width) for _ in range(n))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def config(**fields):
    return ShiraConfig(**{"r": 2, "target_modules": ["0", "1", "2"], **fields})


def indices(model, name="default"):
    return [layer.adapters[name].shira_indices.clone() for layer in model.get_base_model().layers]


def as_sets(masks):
    return [frozenset(map(tuple, m.T.tolist())) for m in masks]


@pytest.mark.parametrize("seed", [0, 42, None])
def test_masks_differ_between_layers_and_adapters(seed):
    model = get_peft_model(Twins(), config(random_seed=seed))
    model.add_adapter("other", config(random_seed=seed))
    masks = as_sets(indices(model)) + as_sets(indices(model, "other"))
    assert len(set(masks)) == len(masks)
    for mask in masks:
        assert len(mask) == 2 * (24 + 24)  # no position twice


def test_masks_reproduce_from_the_seed_alone():
    first = indices(get_peft_model(Twins(), config(random_seed=5)))
    torch.manual_seed(999)
    torch.rand(10)
    second = indices(get_peft_model(Twins(), config(random_seed=5)))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    other = indices(get_peft_model(Twins(), config(random_seed=6)))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_a_seed_leaves_the_global_generator_alone():
    base = Twins()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    get_peft_model(base, config(random_seed=1))
    assert torch.equal(torch.rand(4), expected)


def test_without_a_seed_the_global_generator_decides():
    def draw(seed):
        base = Twins()
        torch.manual_seed(seed)
        return indices(get_peft_model(base, config(random_seed=None)))

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1)))
    assert not any(torch.equal(a, b) for a, b in zip(draw(1), draw(2)))


def test_masks_do_not_depend_on_what_else_is_targeted():
    """The mask of a layer follows from its own name, adapter and seed, so adding a target keeps the others'."""
    all_three = indices(get_peft_model(Twins(), config(random_seed=5)))
    model = get_peft_model(Twins(), config(random_seed=5, target_modules=["1"]))
    assert torch.equal(model.get_base_model().layers[1].adapters["default"].shira_indices, all_three[1])


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv1d-zeros", "conv2d-zeros", "conv3d-zeros", "conv2d-groups2"])
def test_counts_and_ranges(layer):
    """r * (out + in * K) entries of the weight seen as (out, in * K)."""
    model, adapted = adapt(make_layer(layer), ShiraConfig(r=2, target_modules=["layer"], random_seed=0))
    weight = oracles.canonical_weight(adapted.base_layer)
    out, columns = weight.shape[0], weight[0].numel()
    adapter = adapted.adapters["default"]
    assert adapter.shira_weight.shape == (2 * (out + columns),)
    assert adapter.shira_indices.shape == (2, 2 * (out + columns)) and adapter.shira_indices.dtype == torch.int32
    rows, cols = adapter.shira_indices.long()
    assert rows.min() >= 0 and rows.max() < out and cols.min() >= 0 and cols.max() < columns
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == ["adapters.default.shira_weight"]
    randomize(model)
    change = adapted.get_delta_weight("default")
    assert int((change != 0).sum()) == 2 * (out + columns)


def test_only_the_values_get_gradients_and_no_dense_one_is_kept():
    model, adapted = adapt(make_layer("linear"), ShiraConfig(r=2, target_modules=["layer"], random_seed=0))
    randomize(model)
    model(torch.randn(5, 24, dtype=torch.float64)).square().sum().backward()
    assert adapted.adapters["default"].shira_weight.grad.shape == (120,)
    assert adapted.base_layer.weight.grad is None
    before = adapted.base_layer.weight.clone()
    model(torch.randn(5, 24, dtype=torch.float64))
    assert torch.equal(adapted.base_layer.weight, before)


# ---------------------------------------------------------------------------------------------------- masks of the user


def block_mask(base_layer, r, **kwargs):
    """The first rows of the weight, as many entries as asked for."""
    mask = torch.zeros_like(base_layer.weight)
    flat = mask.view(-1)
    flat[: r * (base_layer.in_features + base_layer.out_features)] = 1
    return mask


def bare_mask(base_layer, r):
    return block_mask(base_layer, r)


def bool_mask(base_layer, r):
    return block_mask(base_layer, r).bool()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("function", [block_mask, bare_mask, bool_mask])
def test_user_masks(function, tmp_path):
    cfg = config(mask_type="mine")
    cfg.mask_fn = function
    model = get_peft_model(Twins(), cfg)
    randomize(model)
    for layer in model.get_base_model().layers:
        change = layer.get_delta_weight("default")
        assert (change.flatten()[:96] != 0).all() and not change.flatten()[96:].any()
    # the file holds the mask, the function is not needed again
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 24)
    again = AdapterModel.from_pretrained(copy.deepcopy(Twins().requires_grad_(False)), tmp_path)
    again.get_base_model().load_state_dict(model.get_base_model().state_dict(), strict=True)
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)  # bits depend on where the changed weight lies


def test_user_mask_functions_receive_keywords_they_accept():
    seen = {}

    def mask(base_layer, r, random_seed=None):
        seen["seed"] = random_seed
        return block_mask(base_layer, r)

    cfg = config(random_seed=13)
    cfg.mask_fn = mask
    get_peft_model(Twins(), cfg)
    assert seen["seed"] == 13


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda layer, r: torch.zeros(3, 3), "shape"),
        (lambda layer, r: torch.zeros_like(layer.weight), "0"),
        (lambda layer, r: torch.ones_like(layer.weight), "576"),
        (lambda layer, r: 0.5 * block_mask(layer, r), "0|1|binary"),
        (lambda layer, r: None, "mask"),
        (lambda layer, r: block_mask(layer, r).view(-1), "shape"),
    ],
    ids=["shape", "empty", "full", "fractions", "nothing", "flat"],
)
def test_wrong_masks_are_refused(mask, words):
    base = Twins()
    before = fingerprint(base)
    cfg = config()
    cfg.mask_fn = mask
    with pytest.raises(ValueError, match=words):
        get_peft_model(base, cfg)
    assert_untouched(base, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_missing_mask_function_is_an_early_error():
    cfg = config(mask_type="mine")
    base = Twins()
    before = fingerprint(base)
    with pytest.raises(ValueError, match="mask_fn"):
        get_peft_model(base, cfg)
    assert_untouched(base, before)


def test_fan_in_fan_out_on_linear_warns_and_is_corrected():
    plain = get_peft_model(Twins(), config(random_seed=5))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(Twins(), config(random_seed=5, fan_in_fan_out=True))
    assert all(torch.equal(a, b) for a, b in zip(indices(model), indices(plain)))


# --------------------------------------------------------------------------------------------------------------- files


def sizes(width, out, r, tmp_path):
    base = Twins(width, out, 1)
    torch.manual_seed(0)
    shira = get_peft_model(copy.deepcopy(base), ShiraConfig(r=r, target_modules=["0"], random_seed=1))
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules=["0"]))
    assert shira.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]
    randomize(shira)
    shira.save_pretrained(tmp_path / "compact", compact=True)
    shira.save_pretrained(tmp_path / "plain")
    lora.save_pretrained(tmp_path / "lora")
    length = lambda name: (tmp_path / name / "adapter_model.safetensors").stat().st_size
    return base, shira, length("compact") / length("lora"), length("plain") / length("lora")


def delta(model):
    return model.get_base_model().layers[0].get_delta_weight("default")


@pytest.mark.parametrize(
    ("width", "out", "r", "limit"),
    [
        (640, 640, 2, 1.35),  # density 0.6 %
        (1280, 640, 8, 1.35),
        (320, 320, 8, 1.35),
        (2048, 1024, 32, 1.35),
        (1280, 1280, 2, 1.5),  # density 0.3 %
        (5120, 1280, 1, 1.5),
        (4096, 4096, 1, 1.5),
    ],
)
def test_compact_size_and_round_trip(width, out, r, limit, tmp_path):
    base, model, compact, plain = sizes(width, out, r, tmp_path)
    assert compact <= limit
    assert plain > 2.5  # PEFT's own layout
    x = torch.randn(2, width)
    expected, change = model(x), delta(model)
    for name in ("compact", "plain"):
        again = AdapterModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(delta(again), change), name
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)  # bits depend on where the changed weight lies


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv1d-zeros", "conv2d-groups2", "conv3d-zeros"])
@pytest.mark.parametrize("mask", ["random", "corner", "scattered"])
def test_compact_codes_any_mask(layer, mask, tmp_path):
    """First and last entry, long gaps, and dense runs all come back."""

    def function(base_layer, r):
        weight = oracles.canonical_weight(base_layer)
        n = r * (weight.shape[0] + weight[0].numel())
        flat = torch.zeros(weight.numel())
        chosen = torch.arange(n) if mask == "corner" else torch.arange(n) * (weight.numel() // n)
        flat[chosen] = 1
        if mask == "scattered":
            flat[chosen[-1]] = 0
            flat[-1] = 1
        return oracles.to_layout(base_layer, flat.reshape(weight.shape)).to(base_layer.weight)

    cfg = ShiraConfig(r=1, target_modules=["layer"], random_seed=3)
    if mask != "random":
        cfg.mask_fn = function
    model, adapted = adapt(make_layer(layer, torch.float32), cfg)
    randomize(model)
    expected = adapted.get_delta_weight("default").detach()
    for compact in (False, True):
        model.save_pretrained(tmp_path / str(compact), compact=compact)
        again = AdapterModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path / str(compact))
        assert torch.equal(again.get_base_model().layer.get_delta_weight("default"), expected)
    again.save_pretrained(tmp_path / "third")
    first, third = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("False", "third"))
    assert first.keys() == third.keys() and all(torch.equal(first[k], third[k]) for k in first)


def test_compact_files_are_refused_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = get_peft_model(Twins(), config(random_seed=5))
    randomize(model)
    model.save_pretrained(tmp_path, compact=True)
    with pytest.raises(Exception):  # noqa: B017
        peft.PeftModel.from_pretrained(Twins(), tmp_path)


def test_indices_of_windows_files_come_as_floats(tmp_path):
    """PEFT stores the indices as float32 on Windows; they are cast back."""
    from safetensors.torch import save_file

    model = get_peft_model(Twins(), config(random_seed=5))
    randomize(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: v.float() for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    torch.manual_seed(0)
    base = Twins()
    again = AdapterModel.from_pretrained(base, tmp_path)
    for a, b in zip(again.get_base_model().layers, model.get_base_model().layers):
        assert relative_error(a.get_delta_weight("default"), b.get_delta_weight("default")) == 0
