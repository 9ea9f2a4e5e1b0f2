"""The cache of tensors: what comes out is what went in, or nothing, whatever happened to the file or the process."""

from __future__ import annotations

import copy
import hashlib
import math
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextModel

from lycoris_diff import AdapterError, LoraConfig, get_peft_model
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.data.cache import DiskCache, key_of, model_digest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
KEY = key_of("a key")


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].contiguous().reshape(-1).view(torch.uint8))
        for name in left
    )


def in_fork(work, *arguments):
    """Run `work` in a forked process, and return how it ended."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work, *arguments))
    process.start()
    process.join(60)
    return process.exitcode


def _alone(work, *arguments):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    work(*arguments)


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "some" / "cache")


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(0)


def test_absent_keys_are_none(cache):
    assert cache.get(KEY) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)),
        max_size=4,
    )
)
def test_any_tensors_come_back_as_they_were(cache, wanted):
    tensors = {name: (torch.randn(shape) * 3).to(dtype) for name, (dtype, shape) in wanted.items()}
    cache.put(KEY, tensors)
    found = DiskCache(cache.directory).get(KEY)
    assert same(found, tensors)
    for tensor in found.values():
        tensor.zero_()  # they are the caller's own
    assert same(cache.get(KEY), tensors)


def test_views_parameters_and_shared_tensors_are_kept_as_plain_ones(cache):
    base = torch.randn(4, 6)
    tensors = {"turned": base.t(), "part": base[1:3, ::2], "base": base, "weight": nn.Parameter(torch.ones(2))}
    cache.put(KEY, tensors)
    assert same(cache.get(KEY), {name: tensor.detach() for name, tensor in tensors.items()})


def test_the_last_put_wins_and_keys_are_apart(cache):
    other = key_of("another")
    cache.put(KEY, {"x": torch.zeros(3)})
    cache.put(other, {"x": torch.ones(3)})
    cache.put(KEY, {"y": torch.full((2,), 5.0)})
    assert same(cache.get(KEY), {"y": torch.full((2,), 5.0)})
    assert same(cache.get(other), {"x": torch.ones(3)})


def test_large_values_are_kept(cache):
    tensors = {"x": torch.tensor([1e300], dtype=torch.float64), "y": torch.tensor([60_000.0]).half()}
    cache.put(KEY, tensors)
    assert same(cache.get(KEY), tensors)


def test_values_that_are_not_finite_are_not_kept(cache):
    cache.put(KEY, {"x": torch.ones(2)})
    for bad in (math.nan, math.inf):
        with pytest.raises(AdapterError, match=r"'y'.*NaN"):
            cache.put(KEY, {"x": torch.zeros(2), "y": torch.tensor([bad], dtype=torch.bfloat16)})
    assert same(cache.get(KEY), {"x": torch.ones(2)})


@pytest.mark.parametrize("key", ["", "x", "../" + KEY, KEY.upper(), KEY + ".safetensors"])
def test_other_keys_are_refused(cache, key):
    with pytest.raises(AdapterError, match="key_of"):
        cache.get(key)
    with pytest.raises(AdapterError, match="key_of"):
        cache.put(key, {})


def test_files_of_any_length_short_of_whole_are_absent_and_replaced(cache):
    tensors = {"mean": torch.randn(2, 3), "std": torch.rand(2, 3).bfloat16()}
    cache.put(KEY, tensors)
    [path] = cache.directory.iterdir()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=rf"{KEY}.safetensors is damaged"):
            assert cache.get(KEY) is None
    cache.put(KEY, tensors)
    assert same(cache.get(KEY), tensors)
    assert path.read_bytes() == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_an_altered_byte_never_gives_other_tensors(cache, data):
    tensors = {"mean": torch.arange(6.0).reshape(2, 3), "std": torch.ones(3, dtype=torch.bfloat16)}
    cache.put(KEY, tensors)
    path = cache.directory / f"{KEY}.safetensors"
    altered = bytearray(path.read_bytes())
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(altered)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cache.get(KEY)
    assert found is None or same(found, tensors)


def test_the_file_of_another_key_is_not_taken(cache):
    cache.put(KEY, {"x": torch.zeros(3)})
    other = key_of("another")
    (cache.directory / f"{KEY}.safetensors").rename(cache.directory / f"{other}.safetensors")
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.get(other) is None


def test_a_failed_put_leaves_what_was_there(cache, monkeypatch):
    cache.put(KEY, {"x": torch.zeros(3)})

    def full(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        cache.put(KEY, {"x": torch.ones(3)})
    assert same(cache.get(KEY), {"x": torch.zeros(3)})
    assert len(list(cache.directory.iterdir())) == 1


def _killed_half_way(cache):
    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = half
    cache.put(KEY, {"x": torch.ones(100)})


def _killed_before_renaming(cache):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cache.put(KEY, {"x": torch.ones(100)})


@forks
@pytest.mark.parametrize("work", [_killed_half_way, _killed_before_renaming])
@pytest.mark.parametrize("before", [None, {"x": torch.zeros(100)}])
def test_kill_leaves_what_was_there(cache, work, before):
    if before is not None:
        cache.put(KEY, before)
    assert in_fork(work, cache) == -signal.SIGKILL
    [left] = [path for path in cache.directory.iterdir() if path.name.startswith(".")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = DiskCache(cache.directory).get(KEY)
    assert found is None if before is None else same(found, before)
    assert left.exists()  # it may be another process's, at work
    os.utime(left, (time.time() - 90_000,) * 2)
    DiskCache(cache.directory)
    assert not left.exists()
    cache.put(KEY, {"x": torch.ones(100)})
    assert same(cache.get(KEY), {"x": torch.ones(100)})


def _write_for_ever(cache, value):
    while True:
        cache.put(KEY, {"x": torch.full((20_000,), value)})


@forks
def test_readers_see_whole_files_of_writers_that_are_killed_at_any_moment(cache):
    cache.put(KEY, {"x": torch.full((20_000,), 1.0)})
    chance = random.Random(0)
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trial in range(4):
            values = (2.0 * trial + 1, 2.0 * trial + 2)
            context = multiprocessing.get_context("fork")
            writers = [context.Process(target=_alone, args=(_write_for_ever, cache, value)) for value in values]
            for writer in writers:
                writer.start()
            end = time.monotonic() + 0.1 + 0.05 * chance.random()
            while time.monotonic() < end:
                seen |= set(cache.get(KEY)["x"].unique().tolist()) if len(seen) < 99 else set()
            for writer in writers:
                writer.kill()
                writer.join()
            found = cache.get(KEY)["x"]
            assert len(found) == 20_000 and len(found.unique()) == 1
    assert len(seen) > 1


def test_keys_are_of_content_and_types():
    texts = [(), ("",), ("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ('a", "b',), ("1",)]
    parts = [*texts, (1,), (1.0,), (0.1 + 0.2,), (0.3,), (-0.0,), (0.0,)]
    keys = [key_of(*part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert keys == [key_of(*part) for part in parts]
    assert key_of("latents", 1, 0.5) == hashlib.sha256(b'["latents", 1, 0.5]').hexdigest()  # a cache outlives the program


@pytest.mark.parametrize("part", [None, True, b"x", torch.float32, Path("x"), (1, 2)])
def test_keys_of_other_things_are_refused(part):
    with pytest.raises(AdapterError, match=type(part).__name__):
        key_of("x", part)


def test_digest_is_of_the_content(pipe, tmp_path):
    """Where a model was loaded from, its modes and its memory layout do not count."""
    for name, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        model = getattr(pipe, name)
        assert model_digest(model) == model_digest(copy.deepcopy(model).train())
        model.save_pretrained(tmp_path / name)
        assert model_digest(kind.from_pretrained(tmp_path / name)) == model_digest(model)
    assert model_digest(copy.deepcopy(pipe.vae).to(memory_format=torch.channels_last)) == model_digest(pipe.vae)
    assert len({model_digest(getattr(pipe, name)) for name in ("vae", "text_encoder", "unet")}) == 3


def test_digest_notices_weights_precision_and_settings(pipe):
    def digest(change):
        vae = copy.deepcopy(pipe.vae)
        change(vae)
        return model_digest(vae)

    changes = [
        lambda vae: vae.encoder.conv_in.bias.data[0].add_(1e-3),
        lambda vae: vae.decoder.mid_block.resnets[0].conv1.weight.data.mul_(1.001),
        lambda vae: vae.half(),
        lambda vae: vae.register_to_config(scaling_factor=0.5),
        lambda vae: setattr(vae, "quant_conv", nn.Identity()),
    ]
    assert len({digest(change) for change in changes} | {model_digest(pipe.vae)}) == len(changes) + 1


def test_digest_notices_adapters_and_their_strength(pipe):
    encoder = copy.deepcopy(pipe.text_encoder)
    plain = model_digest(encoder)
    adapted = get_peft_model(encoder, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "default")
    full = model_digest(adapted)
    adapted.set_scale("default", 0.5)
    half = model_digest(adapted)
    assert len({plain, full, half}) == 3


@pytest.mark.parametrize("shape", [(4096, 4096), (3072, 3072), (1000, 4095), (320, 320, 3, 3), (2**22,)])
def test_digest_notices_a_merged_sparse_adapter_and_a_changed_part(shape):
    """A hundredth of the values at random, as SHiRA changes them; and a tenth of the rows, or of the columns."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape))
    digests = {model_digest(layer)}
    original = layer.weight.data
    tenth = max(1, shape[-1] // 10)
    for start in range(0, shape[-1] - tenth + 1, 3 * tenth):
        layer.weight.data = original.clone()
        layer.weight.data[..., start : start + tenth] += 1
        digests.add(model_digest(layer))
    layer.weight.data = original + (torch.rand(shape) < 0.01)
    digests.add(model_digest(layer))
    assert len(digests) == 2 + len(range(0, shape[-1] - tenth + 1, 3 * tenth))


def test_digest_of_quantized_weights():
    torchao = pytest.importorskip("torchao.quantization")

    def quantized(change):
        layer = nn.Sequential(nn.Linear(64, 64, bias=False))
        layer[0].weight.data = torch.linspace(-1, 1, 4096).reshape(64, 64) + change
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        return model_digest(layer)

    assert quantized(0) == quantized(0) != quantized(0.1)


def test_digest_of_absent_weights_is_refused():
    with pytest.raises(AdapterError, match=r"'weight'.*meta"):
        model_digest(nn.Linear(2, 2, bias=False, device="meta"))
