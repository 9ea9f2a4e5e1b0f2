"""PEFT 0.21 as oracle: files go both ways with equal outputs where PEFT is right, and PEFT never misreads ours.

Where PEFT's own formula is wrong (LoKr on Conv1d with a full second factor or a core, ``padding_mode`` of LoKr, LoHa
and LoRA convolutions, dilation of LoRA ones) its files are still read, and the result is the dense float64 rebuild.
"""

from __future__ import annotations

import copy
import warnings

import oracles
import pytest
import torch
from cases import (
    ALGORITHMS,
    LAYERS,
    Holder,
    adapt,
    factors,
    fits,
    make_input,
    make_layer,
    randomize,
    reference,
    relative_error,
)
from safetensors.torch import load_file
from torch import nn

from lycoris_diff import (
    AdapterModel,
    LoKrConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

peft = pytest.importorskip("peft")

KINDS = {"lokr": "LoKrConfig", "loha": "LoHaConfig", "miss": "MissConfig", "shira": "ShiraConfig", "lora": "LoraConfig"}
CONV2D = ["conv2d-zeros", "conv2d-1x1", "conv2d-stride2", "conv2d-same", "conv2d-nobias", "conv2d-3x1"]
CONV2D_ANY = [*CONV2D, "conv2d-dilation2", "conv2d-groups2"]
CONV1D_ANY = ["conv1d-zeros", "conv1d-1x1", "conv1d-stride2", "conv1d-dilation2", "conv1d-groups2", "conv1d-same"]
LINEAR = ["linear", "linear-nobias"]

# (algorithm, layers) PEFT supports and computes rightly.
RIGHT_IN_PEFT = {
    "lokr": LINEAR + CONV2D_ANY + CONV1D_ANY,
    "lokr-full-w2": LINEAR + CONV2D_ANY,
    "lokr-both": LINEAR + CONV2D_ANY + CONV1D_ANY,
    "lokr-factor": LINEAR + CONV2D_ANY + CONV1D_ANY[:4],
    "lokr-w1-only": LINEAR + CONV2D_ANY[:7],
    "lokr-tucker": CONV2D_ANY,
    "loha": LINEAR + CONV2D_ANY + CONV1D_ANY,
    "loha-wide": LINEAR,
    "loha-tucker": CONV2D_ANY,
    "miss": LINEAR,
    "miss-odd": LINEAR,
    "miss-mini": LINEAR,
    "miss-mini-odd": LINEAR,
    "miss-bat": LINEAR,
    "shira": LINEAR,
    "lora": [*LINEAR, "hf-conv1d", *CONV2D, "conv1d-zeros", "conv1d-stride2", "conv3d-zeros", "conv3d-stride2"],
    "lora-rs": [*LINEAR, "hf-conv1d", "conv2d-zeros"],
    "lora-dora": [*LINEAR, "conv2d-zeros", "conv2d-stride2", "conv1d-zeros", "conv3d-zeros"],
}
SHARED = [(a, name) for a, layers in RIGHT_IN_PEFT.items() for name in layers]

# What PEFT has no words for: it must refuse the directory, whatever it would have made of the tensors.
BEYOND_PEFT = [
    ("miss", "conv2d-zeros"),
    ("miss-mini", "conv1d-zeros"),
    ("miss-bat", "conv3d-zeros"),
    ("miss", "hf-conv1d"),
    ("shira", "conv2d-zeros"),
    ("shira", "hf-conv1d"),
    ("lokr", "conv3d-zeros"),
    ("loha-tucker", "conv3d-zeros"),
    ("lokr", "hf-conv1d"),
    ("loha", "hf-conv1d"),
    ("lokr-full-matrix", "linear"),
    ("lokr-full-matrix", "conv2d-zeros"),
    ("loha-dora", "linear"),
    ("lokr-dora", "conv2d-zeros"),
    ("lokr-dora-in", "linear"),
    ("lora-dora-in", "linear"),
    ("lora-tucker", "conv2d-zeros"),
    ("lora-tucker-dora", "conv2d-zeros"),
    ("lokr", "conv2d-reflect"),
    ("loha", "conv2d-circular"),
    ("lora", "conv2d-replicate"),
    ("loha-tucker", "conv1d-reflect"),
    ("lora", "conv2d-dilation2"),
    ("lora", "conv2d-groups2"),
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def float32(algorithm: str, layer: str):
    config = ALGORITHMS[algorithm]()
    model, adapted = adapt(make_layer(layer, torch.float32), config)
    randomize(model)
    return config, model.eval(), adapted


def peft_config(algorithm: str):
    """The same configuration as a PEFT object."""
    ours = ALGORITHMS[algorithm]()
    kind = getattr(peft, KINDS[algorithm.split("-")[0]])
    names = {f for f in kind.__dataclass_fields__ if f not in ("peft_type", "auto_mapping", "peft_version", "task_type")}
    fields = {n: getattr(ours, n) for n in names if hasattr(ours, n) and n not in ("runtime_config", "loftq_config")}
    if "lora" in algorithm:
        fields = {n: fields[n] for n in ("r", "use_rslora", "target_modules") if n in fields}
        fields["lora_alpha"] = oracles_alpha(ours)
        fields["use_dora"] = "dora" in algorithm
    return kind(**{**fields, "target_modules": ["layer"]})


def oracles_alpha(config) -> float:
    return config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha


def peft_model(algorithm: str, layer: str):
    model = peft.get_peft_model(Holder(make_layer(layer, torch.float32)), peft_config(algorithm))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize(("algorithm", "layer"), SHARED)
def test_peft_loads_what_we_write(algorithm, layer, tmp_path):
    _, model, adapted = float32(algorithm, layer)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path).eval()
    for large in (False, True):
        x = make_input(adapted.base_layer, large)
        with torch.no_grad():
            assert relative_error(theirs(x), model(x)) < 2e-5


@pytest.mark.parametrize(("algorithm", "layer"), SHARED)
def test_we_load_what_peft_writes(algorithm, layer, tmp_path):
    theirs = peft_model(algorithm, layer)
    theirs.save_pretrained(tmp_path)
    base = Holder(make_layer(layer, torch.float32))
    model = AdapterModel.from_pretrained(base, tmp_path)
    x = make_input(model.get_base_model().layer.base_layer)
    with torch.no_grad():
        assert relative_error(model(x), theirs(x)) < 2e-5
    # and back again, tensor for tensor
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


@pytest.mark.parametrize(("algorithm", "layer"), SHARED)
def test_keys_and_shapes_of_a_new_adapter(algorithm, layer):
    _, model, _ = float32(algorithm, layer)
    ours = get_peft_model_state_dict(model)
    theirs = peft.get_peft_model_state_dict(peft_model(algorithm, layer))
    assert {k: (tuple(v.shape), v.dtype) for k, v in ours.items()} == {k: (tuple(v.shape), v.dtype) for k, v in theirs.items()}


@pytest.mark.parametrize(("algorithm", "layer"), BEYOND_PEFT)
def test_peft_refuses_what_it_cannot_express(algorithm, layer, tmp_path):
    _, model, adapted = float32(algorithm, layer)
    x = make_input(adapted.base_layer)
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception):  # noqa: B017  PEFT has no common error; any refusal will do
        peft.PeftModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path)
    again = AdapterModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)  # memory may be aligned otherwise


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    [(a, n) for a in ALGORITHMS for n in LAYERS if fits(a, n) and "3d" not in n and (a, n) not in SHARED + BEYOND_PEFT],
)
def test_peft_is_right_or_refuses(algorithm, layer, tmp_path):
    """Whatever we write, PEFT either raises or computes the same: it never reads something else."""
    _, model, adapted = float32(algorithm, layer)
    x = make_input(adapted.base_layer)
    model.save_pretrained(tmp_path)
    try:
        theirs = peft.PeftModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path).eval()
    except Exception:
        return
    with torch.no_grad():
        assert relative_error(theirs(x), model(x)) < 2e-5


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    [
        ("lokr-full-w2", "conv1d-zeros"),
        ("lokr-tucker", "conv1d-zeros"),
        ("loha-tucker", "conv1d-zeros"),
        ("lokr", "conv2d-reflect"),
        ("loha", "conv2d-circular"),
        ("loha-tucker", "conv2d-replicate"),
        ("lora", "conv2d-reflect"),
        ("lora", "conv2d-dilation2"),
    ],
)
def test_files_peft_computes_wrongly_are_read_rightly(algorithm, layer, tmp_path):
    """PEFT writes the file; we read it as the formula says, on the layer as it is."""
    try:
        theirs = peft_model(algorithm, layer)
        theirs.save_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"this PEFT cannot build it: {error}")
    model = AdapterModel.from_pretrained(Holder(make_layer(layer, torch.float32)), tmp_path)
    adapted = model.get_base_model().layer
    x = make_input(adapted.base_layer)
    raw = {k.split("layer.", 1)[1]: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    expected = oracles.forward(adapted.base_layer, x, [(1.0, oracles.delta(ALGORITHMS[algorithm](), raw, adapted.base_layer))])
    assert relative_error(model(x).detach(), expected) < 1e-5


SIZES = [(1, 1), (1, 7), (127, 64), (64, 64), (128, 250), (320, 320), (360, 512), (96, 1)]
SHAPE_FIELDS = [
    {"r": r, "decompose_factor": factor, "decompose_both": both}
    for r in (1, 4, 16)
    for factor in (-1, 2, 8, 16, 7)
    for both in (False, True)
]


@pytest.mark.parametrize(("inp", "out"), SIZES)
def test_lokr_shapes(inp, out):
    """Our new LoKr adapters have PEFT's shapes for every size, rank and factor, also factors above the square root."""
    for fields in SHAPE_FIELDS:
        layer = Holder(nn.Linear(inp, out))
        expected = oracles.lokr_shapes(out, inp, (), fields["r"], fields["decompose_factor"], fields["decompose_both"])
        theirs = peft.get_peft_model(copy.deepcopy(layer), peft.LoKrConfig(target_modules=["layer"], **fields))
        ours = get_peft_model(copy.deepcopy(layer), LoKrConfig(target_modules=["layer"], **fields))
        own = {k: tuple(v.shape) for k, v in factors(ours.get_base_model().layer).items()}
        assert own == expected, fields
        assert set(own.values()) == {tuple(v.shape) for v in peft.get_peft_model_state_dict(theirs).values()}, fields
        for tensor in factors(ours.get_base_model().layer).values():
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("core", [False, True], ids=["plain", "core"])
@pytest.mark.parametrize("kernel", [1, 3, (3, 1)], ids=str)
def test_lokr_convolution_shapes(kernel, core):
    for inp, out, r, factor in [(12, 20, 1, -1), (64, 96, 4, -1), (64, 96, 4, 16), (64, 96, 40, 2), (30, 7, 2, 5)]:
        layer = nn.Conv2d(inp, out, kernel)
        fields = {"r": r, "decompose_factor": factor, "use_effective_conv2d": core}
        _, adapted = adapt(layer, LoKrConfig(target_modules=["layer"], **fields))
        own = {k: tuple(v.shape) for k, v in factors(adapted).items()}
        assert own == oracles.lokr_shapes(out, inp, layer.kernel_size, r, factor, core=core), (inp, out, fields)
        theirs = peft.get_peft_model(Holder(nn.Conv2d(inp, out, kernel)), peft.LoKrConfig(target_modules=["layer"], **fields))
        shapes = {k.split("layer.")[1]: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(theirs).items()}
        assert own == shapes


def test_reference_of_this_file_agrees_with_peft_itself():
    """The dense rebuild and PEFT agree where both are right, so neither is the only judge."""
    for algorithm, layer in [("lokr", "linear"), ("loha-tucker", "conv2d-zeros"), ("lokr-tucker", "conv2d-zeros")]:
        config, model, adapted = float32(algorithm, layer)
        theirs = peft_model(algorithm, layer)
        raw = {k.split("layer.")[1]: v for k, v in peft.get_peft_model_state_dict(theirs).items()}
        x = make_input(adapted.base_layer)
        dense = oracles.forward(adapted.base_layer, x, [(1.0, oracles.delta(config, raw, adapted.base_layer))])
        assert relative_error(theirs(x).detach(), dense) < 1e-5
        assert relative_error(model(x).detach(), reference(adapted, config, x)) < 1e-5
