"""Files that nobody vouches for: a typed error that names the thing, and no memory spent on what they promise."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lycoris_diff import convert_checkpoint, inspect_checkpoint
from lycoris_diff.checkpoints import safety
from lycoris_diff.checkpoints.parse import read_raw
from lycoris_diff.checkpoints.safety import non_finite_factors, read_header, read_safetensors
from lycoris_diff.errors import CheckpointError

DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"


def lora(dtype=torch.float32):
    return {DOWN: torch.randn(4, 8).to(dtype), UP: torch.randn(6, 4).to(dtype)}


def crafted(path, header, body=b"", length=None):
    """A file with any header: text, or an object for JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "1e12 elements": ({DOWN: entry([10**6, 10**6], 0, 4 * 10**12)}, b"\0" * 16, "the body has 16"),
    "1e12 elements in a small place": ({DOWN: entry([10**6, 10**6], 0, 16)}, b"\0" * 16, "needs 4000000000000 bytes"),
    "overlap": ({DOWN: entry([4], 0, 16), UP: entry([4], 8, 24)}, b"\0" * 24, "overlaps"),
    "gap": ({DOWN: entry([4], 0, 16), UP: entry([4], 20, 36)}, b"\0" * 36, "gap"),
    "trailing bytes": ({DOWN: entry([4], 0, 16)}, b"\0" * 20, "the body has 20"),
    "short body": ({DOWN: entry([4], 0, 16)}, b"\0" * 10, "the body has 10"),
    "backwards": ({DOWN: entry([4], 16, 0)}, b"\0" * 16, "its place is"),
    "negative shape": ({DOWN: entry([-4], 0, 16)}, b"\0" * 16, r"shape \[-4\]"),
    "float shape": ({DOWN: entry([4.0], 0, 16)}, b"\0" * 16, r"shape \[4.0\]"),
    "boolean shape": ({DOWN: entry([True], 0, 4)}, b"\0" * 4, r"shape \[True\]"),
    "many axes": ({DOWN: entry([1] * 9, 0, 4)}, b"\0" * 4, "shape"),
    "huge axis": ({DOWN: entry([2**64], 0, 0)}, b"", "shape"),
    "unknown type": ({DOWN: entry([4], 0, 16, "Q4_0")}, b"\0" * 16, "element type 'Q4_0'"),
    "packed type": ({DOWN: entry([8], 0, 4, "F4")}, b"\0" * 4, "element type 'F4'"),
    "three offsets": ({DOWN: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"\0" * 4, "offsets"),
    "missing field": ({DOWN: {"dtype": "F32", "shape": [1]}}, b"\0" * 4, "not described"),
    "a list": ([1, 2], b"", "not usable|JSON list"),
    "a number": (b"17", b"", "not usable|JSON int"),
    "no JSON": (b"{not json", b"", "not usable"),
    "no UTF-8": (b'{"\xff": 1}', b"", "not usable"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", "not usable"),
    "NaN in JSON": (b'{"a": NaN}', b"", "not usable"),
    "deep JSON": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "not usable"),
    "metadata is a list": ({"__metadata__": []}, b"", "metadata is a JSON list"),
    "metadata is a number": ({"__metadata__": {"a": 1}}, b"", "metadata 'a' is a int"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, b"", "holds no tensors"),
}


@pytest.mark.parametrize("case", list(HEADERS))
def test_a_header_that_lies_is_refused(case, tmp_path):
    header, body, words = HEADERS[case]
    path = crafted(tmp_path / "bad.safetensors", header, body)
    with pytest.raises(CheckpointError, match=words) as error:
        read_raw(path)
    assert "bad.safetensors" in str(error.value) and len(str(error.value)) < 600


def test_a_name_given_twice_is_refused(tmp_path):
    one = json.dumps(entry([4], 0, 16))
    text = f'{{"{DOWN}": {one}, "{DOWN}": {one}}}'.encode()
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_header(crafted(tmp_path / "twice.safetensors", text, b"\0" * 16))


def test_promises_cost_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, length in (("short", 2**40), ("long", 2**63)):
        with pytest.raises(CheckpointError, match="header claims"):
            read_header(crafted(tmp_path / name, b"{}", length=length))
    for case in ("1e12 elements", "1e12 elements in a small place", "huge axis"):
        with pytest.raises(CheckpointError):
            read_header(crafted(tmp_path / "big", *HEADERS[case][:2]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_zero_sized_tensors_make_no_adapter(tmp_path):
    header = {DOWN: entry([0, 10**12], 0, 0), UP: entry([6, 0], 0, 0)}
    with pytest.raises(CheckpointError, match="holds nothing"):
        read_raw(crafted(tmp_path / "empty.safetensors", header))


X = "transformer.nowhere.x"
#: small factors of changes with 2e8 values and more, on a layer that nobody knows -> norm of the change
LARGE = {
    "LoHa": (
        {f"{X}.hada_w{k}_{x}": torch.ones((15_000, 25) if x == "a" else (25, 15_000)) for k in "12" for x in "ab"},
        625 * 1.5e4,
    ),
    "LoRA of large rank": ({f"{X}.lora_up.weight": torch.ones(1, 40_000), f"{X}.lora_down.weight": torch.ones(40_000, 1)}, 4e4),
    "LoKr": (
        {f"{X}.lokr_w1_a": torch.ones(40_000, 1), f"{X}.lokr_w1_b": torch.ones(1, 40_000), f"{X}.lokr_w2": torch.ones(1, 1)},
        4e4,
    ),
    "core": (
        {
            f"{X}.lora_up.weight": torch.ones(4, 10, 1, 1),
            f"{X}.lora_down.weight": torch.ones(10, 40_000, 1, 1),
            f"{X}.lora_mid.weight": torch.ones(10, 10, 200, 20),
        },
        100 * (4 * 40_000 * 4000) ** 0.5,
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_small_factors_of_large_products_cost_no_memory(kind, tmp_path):
    tensors, norm = LARGE[kind]
    save_file(tensors, tmp_path / "large.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = inspect_checkpoint(tmp_path / "large.safetensors")
    assert report.base_model == "" and report.blocks[0].norm == pytest.approx(norm, rel=1e-5)
    if kind in ("LoKr", "core"):
        with pytest.raises(CheckpointError, match="more than the"):
            convert_checkpoint(tmp_path / "large.safetensors", tmp_path / "out.safetensors", "onetrainer")
        assert not (tmp_path / "out.safetensors").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB


def test_oft_lists_cannot_ask_for_large_blocks(tmp_path, monkeypatch):
    stem = "oft_unet_single_blocks_0_linear1.oft_blocks"
    save_file({f"{stem}.0": torch.randn(1, 8, 8), f"{stem}.1": torch.randn(16, 2, 2)}, tmp_path / "lists.safetensors")
    assert read_raw(tmp_path / "lists.safetensors").modules[0].entries[0].tensors["oft_blocks"].shape == (5, 8, 8)
    monkeypatch.setattr(safety, "MAX_PRODUCT", 5 * 8 * 8 - 1)
    with pytest.raises(CheckpointError, match="more than the"):
        read_raw(tmp_path / "lists.safetensors")


def test_too_large_a_header_and_too_many_tensors(tmp_path, monkeypatch):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", safety.MAX_HEADER + 1) + b"{")
        file.truncate(safety.MAX_HEADER + 100)
    with pytest.raises(CheckpointError, match="more than the"):
        read_header(path)
    monkeypatch.setattr(safety, "MAX_TENSORS", 3)
    many = {f"t{i}": entry([0], 0, 0) for i in range(4)}
    with pytest.raises(CheckpointError, match="4 tensors"):
        read_header(crafted(tmp_path / "many.safetensors", many))


@pytest.mark.parametrize("size", [0, 3, 7, 8, 20, -1, -100])
def test_truncated_files(size, tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(lora(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size] if size >= 0 else whole[: len(whole) + size])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_raw(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".pkl", ".safetensors"])
def test_pickles_are_refused_with_the_way_out(suffix, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    torch.save(lora(), path)
    with pytest.raises(CheckpointError, match="save_file"):
        read_raw(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="save_file"):
        read_raw(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for protocol in range(6):
        path = tmp_path / "file.safetensors"
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(CheckpointError):
            read_raw(path)
    assert not (tmp_path / "ran").exists()


OTHERS = {
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "json": (b'{"error": "not found"}', "JSON text"),
}


@pytest.mark.parametrize("case", list(OTHERS))
def test_other_kinds_of_files_are_named(case, tmp_path):
    content, words = OTHERS[case]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_raw(path)


def test_a_zip_and_a_missing_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("data.pkl", "x")
    with pytest.raises(CheckpointError, match="zip archive"):
        read_raw(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_raw(tmp_path / "nowhere.safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """0x80 0x02 ... is how a pickle begins, and how a header of 640 bytes does."""
    header = {DOWN: entry([4, 8], 0, 128), UP: entry([6, 4], 128, 224)}
    text = json.dumps(header).encode().ljust(0x0280)
    tensors, _ = read_safetensors(crafted(tmp_path / "odd.safetensors", text, b"\0" * 224))
    assert set(tensors) == {DOWN, UP}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read_exactly(dtype, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = every[every.float().isfinite()]
    save_file({DOWN: values[None], UP: torch.ones(6, 1, dtype=dtype)}, tmp_path / "f8.safetensors")
    down = read_raw(tmp_path / "f8.safetensors").modules[0].entries[0].tensors["lora_A.weight"]
    assert down.dtype == torch.float16 and torch.equal(down.double(), values[None].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_modules_with_non_finite_factors_are_named(dtype, bad, tmp_path):
    tensors = {k: v.to(torch.float32) for k, v in lora().items()}
    tensors |= {k.replace("_x.", "_y."): v.clone() for k, v in tensors.items()}
    tensors["lora_unet_y.lora_up.weight"][3, 2] = bad
    save_file({k: v.to(dtype) for k, v in tensors.items()}, tmp_path / "bad.safetensors")
    found = {m.name: non_finite_factors(m.entries[0]) for m in read_raw(tmp_path / "bad.safetensors").modules}
    assert found == {"x": [], "y": ["lora_B.weight"]}


def test_whole_files_are_finite(tmp_path):
    save_file(lora() | {"lora_unet_x.alpha": torch.tensor(4)}, tmp_path / "good.safetensors", metadata={"a": "b"})
    raw = read_raw(tmp_path / "good.safetensors")
    assert non_finite_factors(raw.modules[0].entries[0]) == [] and raw.metadata == {"a": "b"}
