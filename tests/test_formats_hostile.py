"""Broken and hostile files: a typed refusal with a message, nothing of the model touched, no memory spent on promises."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from community import CommunityFile, community_file
from formats_run import changes, check, difference, models, pipeline, refused
from safetensors.torch import save_file

import lycoris_diff

LORA = {
    "lycoris_linear.lora_down.weight": lambda: torch.randn(2, 24),
    "lycoris_linear.lora_up.weight": lambda: torch.randn(16, 2),
    "lycoris_linear.alpha": lambda: torch.tensor(1.0),
}
LOKR = {
    "lycoris_linear.lokr_w1": lambda: torch.randn(4, 4),
    "lycoris_linear.lokr_w2_a": lambda: torch.randn(4, 2),
    "lycoris_linear.lokr_w2_b": lambda: torch.randn(2, 6),
    "lycoris_linear.alpha": lambda: torch.tensor(1.0),
}
LOHA = {
    "lycoris_linear.hada_w1_a": lambda: torch.randn(16, 2),
    "lycoris_linear.hada_w1_b": lambda: torch.randn(2, 24),
    "lycoris_linear.hada_w2_a": lambda: torch.randn(16, 2),
    "lycoris_linear.hada_w2_b": lambda: torch.randn(2, 24),
}


def _file(base, **changes):
    """Tensors of a good file with some replaced or, when None, left out."""
    tensors = {name: build() for name, build in base.items()}
    for suffix, value in changes.items():
        name = f"lycoris_linear.{suffix.replace('__', '.')}"
        tensors.pop(name, None) if value is None else tensors.update({name: value})
    return tensors


# what the tensors are -> file; every one must be refused under strict loading
BROKEN = {
    "wrong rows": lambda: _file(LORA, lora_up__weight=torch.randn(15, 2)),
    "wrong columns": lambda: _file(LORA, lora_down__weight=torch.randn(2, 23)),
    "other rank": lambda: _file(LORA, lora_up__weight=torch.randn(16, 3)),
    "rank one that would broadcast": lambda: _file(LORA, lora_up__weight=torch.randn(16, 1)),
    "one row that would broadcast": lambda: _file(LORA, lora_up__weight=torch.randn(1, 2)),
    "conv factors on a linear layer": lambda: _file(LORA, lora_down__weight=torch.randn(2, 24, 3, 3)),
    "transposed": lambda: _file(LORA, lora_down__weight=torch.randn(24, 2), lora_up__weight=torch.randn(2, 16)),
    "NaN factor": lambda: _file(LORA, lora_up__weight=torch.full((16, 2), float("nan"))),
    "infinite factor": lambda: _file(LORA, lora_down__weight=torch.full((2, 24), float("inf"))),
    "NaN alpha": lambda: _file(LORA, alpha=torch.tensor(float("nan"))),
    "infinite alpha": lambda: _file(LORA, alpha=torch.tensor(float("inf"))),
    "alpha of many numbers": lambda: _file(LORA, alpha=torch.ones(3)),
    "empty alpha": lambda: _file(LORA, alpha=torch.ones(0)),
    "rank zero": lambda: _file(LORA, lora_down__weight=torch.zeros(0, 24), lora_up__weight=torch.zeros(16, 0)),
    "up alone": lambda: _file(LORA, lora_down__weight=None),
    "down alone": lambda: _file(LORA, lora_up__weight=None),
    "alpha alone": lambda: _file(LORA, lora_up__weight=None, lora_down__weight=None),
    "core without kernel": lambda: _file(LORA, lora_mid__weight=torch.randn(2, 2, 3, 3)),
    "unknown suffix": lambda: _file(LORA, lora_sideways__weight=torch.randn(2, 2)),
    "only an unknown suffix": lambda: {"lycoris_linear.frobnicate": torch.randn(2, 2)},
    "no such module": lambda: {k.replace("linear", "linnear"): v for k, v in _file(LORA).items()},
    "dora of another size": lambda: _file(LORA, dora_scale=torch.ones(7, 1)),
    "LoKr w2_a alone": lambda: _file(LOKR, lokr_w2_b=None),
    "LoKr w2 without w1": lambda: _file(LOKR, lokr_w1=None),
    "LoKr w1 without w2": lambda: _file(LOKR, lokr_w2_a=None, lokr_w2_b=None),
    "LoKr w1_a alone": lambda: _file(LOKR, lokr_w1=None, lokr_w1_a=torch.randn(4, 2)),
    "LoKr of another size": lambda: _file(LOKR, lokr_w1=torch.randn(4, 3)),
    "LoKr both w2 and w2_a": lambda: _file(LOKR, lokr_w2=torch.randn(4, 6)),
    "LoKr low rank with infinite alpha": lambda: _file(LOKR, alpha=torch.tensor(float("inf"))),
    "LoKr with a Kronecker product of a billion numbers": lambda: _file(
        LOKR, lokr_w1=torch.ones(200, 200), lokr_w2=torch.ones(160, 160), lokr_w2_a=None, lokr_w2_b=None
    ),
    "LoHa half": lambda: _file(LOHA, hada_w2_a=None, hada_w2_b=None),
    "LoHa t1 alone": lambda: _file(LOHA, hada_t1=torch.randn(2, 2, 3, 3)),
    "IA3 without on_input": lambda: {"lycoris_linear.weight": torch.randn(16)},
    "IA3 of another size": lambda: {"lycoris_linear.weight": torch.randn(7), "lycoris_linear.on_input": torch.tensor(0)},
    "full of another size": lambda: {"lycoris_linear.diff": torch.randn(16, 23)},
    "full transposed": lambda: {"lycoris_linear.diff": torch.randn(24, 16)},
    "OFT blocks that do not divide": lambda: {"lycoris_linear.oft_blocks": torch.randn(3, 5, 5)},
    "BOFT of another size": lambda: {"lycoris_linear.oft_blocks": torch.randn(2, 4, 5, 5)},
    "GLoRA half": lambda: {"lycoris_linear.a1.weight": torch.randn(24, 2), "lycoris_linear.a2.weight": torch.randn(2, 24)},
    "T-LoRA half": lambda: {"lycoris_linear.lambda_layer": torch.ones(1, 2), "lycoris_linear.alpha": torch.tensor(1.0)},
    "norm of another size": lambda: {"lycoris_layernorm.w_norm": torch.randn(15)},
    "norm on a linear layer": lambda: {"lycoris_linear.w_norm": torch.randn(16)},
    "empty": lambda: {},
    "overflow when multiplied": lambda: _file(
        LORA, lora_up__weight=torch.full((16, 2), 3e38), lora_down__weight=torch.full((2, 24), 3e38)
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_contents_are_refused(name, tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(BROKEN[name](), path)
    message = refused("layers", path)
    assert len(message) > 20


@pytest.mark.parametrize("name", [n for n in BROKEN if n not in ("empty", "overflow when multiplied", "unknown suffix")])
def test_one_broken_module_among_good_ones(name, tmp_path):
    """The whole file is refused; without strict the good modules load and the bad one is reported."""
    good = community_file("layers", "lycoris", "lora", models("layers"), ["conv2d", "square"])
    file = CommunityFile({**good.tensors, **BROKEN[name]()}, {}, good.expected, None, 2)
    path = file.write(tmp_path / "file")
    refused("layers", path)
    found, report = changes("layers", models("layers"), path, strict=False)
    assert max(difference(found, good.expected).values()) < 1e-9 and report.problems


def _raw(path: Path, header: object, body: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)
    return path


def _entry(shape, start=0, stop=None, dtype="F32"):
    count = 4
    for n in shape:
        count *= n
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, count if stop is None else stop]}


HEADERS = {
    "header of a terabyte": lambda p: _raw(p, {}, size=1 << 40),
    "header longer than the file": lambda p: _raw(p, {}, size=1000),
    "no JSON": lambda p: _raw(p, b"not json at all!"),
    "JSON list": lambda p: _raw(p, [1, 2]),
    "a promise of 1e12 numbers": lambda p: _raw(p, {"lycoris_linear.lora_up.weight": _entry((10**6, 10**6))}),
    "overlapping": lambda p: _raw(p, {"a.lora_up.weight": _entry((4,)), "b.lora_up.weight": _entry((4,), 8, 24)}, bytes(24)),
    "negative size": lambda p: _raw(p, {"a.lora_up.weight": _entry((-4,), 0, 16)}, bytes(16)),
    "size and offsets differ": lambda p: _raw(p, {"a.lora_up.weight": _entry((5,), 0, 16)}, bytes(16)),
    "short body": lambda p: _raw(p, {"a.lora_up.weight": _entry((16,))}, bytes(10)),
    "trailing bytes": lambda p: _raw(p, {"a.lora_up.weight": _entry((4,))}, bytes(100)),
    "unknown dtype": lambda p: _raw(p, {"a.lora_up.weight": _entry((4,), dtype="Q7")}, bytes(16)),
    "duplicate names": lambda p: _raw(
        p,
        b'{"a.lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a.lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "no bytes at all": lambda p: (p.write_bytes(b"") and p) or p,
    "seven bytes": lambda p: p.write_bytes(b"1234567") and p,
}


@pytest.mark.parametrize("name", HEADERS)
def test_broken_headers_are_refused_without_memory(name, tmp_path):
    path = HEADERS[name](tmp_path / "file.safetensors")
    tracemalloc.start()
    try:
        refused("layers", path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_pickles_are_refused_and_never_run(suffix, tmp_path):
    marker = tmp_path / "run"
    path = tmp_path / f"file{suffix}"
    path.write_bytes(pickle.dumps({"lycoris_linear.lora_up.weight": _Bomb(marker)}))
    message = refused("layers", path)
    assert not marker.exists()
    assert suffix == ".safetensors" or "safetensors" in message


def test_pickle_in_a_peft_directory_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["linear"]}))
    torch.save({"base_model.model.linear.lora_A.weight": torch.randn(2, 24)}, tmp_path / "adapter_model.bin")
    assert "safetensors" in refused("layers", tmp_path)


def test_missing_file_is_an_os_error(tmp_path):
    assert refused("layers", tmp_path / "nowhere.safetensors")


def test_metadata_is_text_and_never_evaluated(tmp_path):
    marker = tmp_path / "evaluated"
    evil = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    names = ("ss_network_args", "ss_network_dim", "ss_network_alpha", "lycoris_config", "lora_adapter_metadata")
    metadata = dict.fromkeys(names, evil)
    file = community_file("layers", "lycoris", "lora", models("layers"), metadata=metadata)
    check("layers", file, tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 50_000])
def test_deeply_nested_metadata(deep, tmp_path):
    """JSON that overflows a recursive parser is text like any other."""
    metadata = {"ss_network_args": deep, "lycoris_config": deep}
    file = community_file("layers", "lycoris", "lora", models("layers"), metadata=metadata)
    check("layers", file, tmp_path)


def test_many_tensors_of_unknown_names_are_counted_not_listed(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({f"lycoris_nothing_{i}.lora_up.weight": torch.zeros(1) for i in range(20_000)}, path)
    assert len(refused("layers", path)) < 20_000


# --- unusual, but exact


def test_integer_factors_are_numbers(tmp_path):
    up = torch.arange(32).reshape(16, 2) - 16
    tensors = _file(LORA, lora_up__weight=up)
    expected = {"unet": {"linear": (up.double() @ tensors["lycoris_linear.lora_down.weight"].double() / 2, None)}}
    check("layers", CommunityFile(tensors, {}, expected, None, 1), tmp_path)


def test_a_bias_for_a_layer_without_one(tmp_path):
    """The layer then computes what it would with a bias, fused or not, and has none when the adapter is gone."""
    bias, x, parts = torch.randn(16), torch.randn(3, 24, dtype=torch.float64), models("layers")
    pipe, layer = pipeline("layers", parts=parts), lambda: parts["unet"].plain
    before = layer()(x)
    lycoris_diff.load_adapter(pipe, CommunityFile({"lycoris_plain.diff_b": bias}).write(tmp_path / "file"), "file")
    for step in (lambda pipe: None, lycoris_diff.fuse_adapters, lycoris_diff.unfuse_adapters):
        step(pipe)
        torch.testing.assert_close(layer()(x), before + bias)
    lycoris_diff.unload_adapters(pipe)
    assert layer().bias is None and torch.equal(layer()(x), before)
