"""Broken, foreign and hostile adapter files: a clear error, and nothing half done."""

from __future__ import annotations

import json

import pytest
import torch
from cases import Holder, assert_untouched, fingerprint, make_layer, randomize
from modelcases import CONFIGS, adapted_layers, wrapped
from safetensors.torch import load_file, save_file
from smallmodels import clip, unet

from lycoris_diff import (
    AdapterError,
    AdapterModel,
    CheckpointError,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


def saved(path, kind="lokr"):
    model = wrapped(kind, target_modules=["q_proj", "fc1"])
    model.save_pretrained(path)
    return path / "adapter_model.safetensors"


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first(tensors, part):
    return next(k for k in sorted(tensors) if part in k)


BROKEN = {
    "wrong shape": lambda t: t.update({first(t, "lokr_w1"): torch.zeros(3, 3)}),
    "transposed factor": lambda t: t.update({(k := first(t, "fc1.lokr_w2_a")): t[k].T.contiguous()}),
    "missing factor": lambda t: t.pop(first(t, "lokr_w2_b")),
    "missing layer": lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.fc1" in k],
    "unknown tensor": lambda t: t.update({first(t, "lokr_w1").replace("lokr_w1", "lokr_w9"): torch.zeros(2)}),
    "unknown layer": lambda t: t.update({"base_model.model.nowhere.lokr_w1": torch.zeros(2, 2)}),
    "empty": lambda t: t.clear(),
    "wrong dtype": lambda t: t.update({(k := first(t, "lokr_w1")): t[k].to(torch.int32)}),
    "other prefix": lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)],
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused_and_nothing_changes(case, tmp_path):
    path = saved(tmp_path)
    edit(path, BROKEN[case])
    base = clip()
    before = fingerprint(base)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors|layers\.|nowhere"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)
    model = wrapped("loha", target_modules=["q_proj"])
    before = fingerprint(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path, "second")
    assert_untouched(model, before)
    assert list(model.active_adapters) == ["default"] and list(model.peft_config) == ["default"]


def test_the_error_names_the_first_differences(tmp_path):
    path = saved(tmp_path)
    key = "base_model.model.encoder.layers.0.mlp.fc1.lokr_w1"
    edit(path, lambda t: t.update({first(t, "layers.0.mlp.fc1.lokr_w1"): torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError) as error:
        AdapterModel.from_pretrained(clip(), tmp_path)
    text = str(error.value)
    assert key.split("base_model.model.")[1].rsplit(".", 1)[0].split("encoder.")[1] in text
    assert "3" in text and "5" in text


@pytest.mark.parametrize("keep", [0, 5, 100, -40])
def test_truncated_files(keep, tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError), match="adapter_model"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"peft_type": 5}', '{"peft_type": "NOTHING", "r": 3}', "{}"])
def test_broken_config_files(text, tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError), match=r"adapter_config|NOTHING|peft_type"):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


@pytest.mark.parametrize("change", [{"r": 5}, {"r": "two"}, {"r": 0}, {"alpha": None}, {"peft_type": "LOHA"}], ids=str)
def test_config_files_that_contradict_the_tensors(change, tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    base = clip()
    before = fingerprint(base)
    with pytest.raises(AdapterError):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_nothing_there(tmp_path):
    base = clip()
    before = fingerprint(base)
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path / "missing")
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path)
    saved(tmp_path).unlink()
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_a_file_for_another_model(tmp_path):
    saved(tmp_path)
    base = unet()
    before = fingerprint(base)
    with pytest.raises(AdapterError):
        AdapterModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)
    small = Holder(make_layer("linear"))
    before = fingerprint(small)
    with pytest.raises(AdapterError):
        AdapterModel.from_pretrained(small, tmp_path)
    assert_untouched(small, before)


def test_shira_indices_out_of_range(tmp_path):
    path = saved(tmp_path, "shira")
    for bad in (10_000, -1):
        edit(path, lambda t, bad=bad: t[first(t, "shira_indices")].__setitem__((0, 0), bad))
        base = clip()
        before = fingerprint(base)
        with pytest.raises(CheckpointError, match=r"(?i)ind"):
            AdapterModel.from_pretrained(base, tmp_path)
        assert_untouched(base, before)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_files_with_non_finite_values_never_merge_safely(kind, value, tmp_path):
    """Such a file is refused at load, or loads and is refused by a safe merge; the base weights stay as they were."""
    path = saved(tmp_path, kind)
    edit(path, lambda t: t[next(k for k in sorted(t) if t[k].is_floating_point())].view(-1).__setitem__(0, value))
    base = clip()
    before = fingerprint(base)
    try:
        model = AdapterModel.from_pretrained(base, tmp_path)
    except AdapterError:
        assert_untouched(base, before)
        return
    with pytest.raises(AdapterError):
        model.merge_adapter(safe_merge=True)
    model.unload()
    assert_untouched(base, before, flags=False)


def test_state_dicts_that_do_not_fit():
    model = wrapped("lokr", target_modules=["q_proj"])
    good = get_peft_model_state_dict(model)
    before = fingerprint(model)
    key = sorted(good)[0]
    for change in (
        {k: v for k, v in good.items() if k != key},
        {**good, key: torch.zeros(1, 1)},
        {**good, "base_model.model.more.lokr_w1": torch.zeros(2)},
    ):
        with pytest.raises(AdapterError):
            set_peft_model_state_dict(model, change)
        assert_untouched(model, before)


def test_saving_is_atomic(tmp_path, monkeypatch):
    """A failure while writing leaves the older files whole and no half file behind."""
    import safetensors.torch

    path = saved(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = wrapped("lokr", target_modules=["q_proj", "fc1"])
    randomize(model, seed=77)

    def fail(*args, **kwargs):
        target = next((a for a in args[1:] if isinstance(a, (str, type(path)))), None) or kwargs.get("filename")
        if target:
            with open(target, "wb") as f:
                f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for module in list(__import__("sys").modules.values()):
        if getattr(module, "__name__", "").startswith("lycoris_diff") and hasattr(module, "save_file"):
            monkeypatch.setattr(module, "save_file", fail)
    try:
        model.save_pretrained(tmp_path)
    except OSError:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    else:
        assert load_file(path).keys() == get_peft_model_state_dict(model).keys()  # written some other way


def test_saving_where_a_file_stands(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises((AdapterError, OSError)):
        wrapped("lokr").save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_pickles_are_not_opened(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    path.unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({**tensors, "bomb": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises((AdapterError, OSError)):
        AdapterModel.from_pretrained(clip(), tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_loading_under_a_taken_name(tmp_path):
    saved(tmp_path)
    model = wrapped("lokr", target_modules=["q_proj"])
    before = fingerprint(model)
    for name in ("default", "a.b"):
        with pytest.raises(AdapterError):
            model.load_adapter(tmp_path, name)
        assert_untouched(model, before)
    assert len(adapted_layers(model)) == 3


def test_config_of_deep_or_endless_json(tmp_path):
    from lycoris_diff.files import MAX_JSON, read_json

    path = tmp_path / "adapter_config.json"
    for text, complaint in (("[" * 100_000, "is not JSON"), ("[]", "holds a list"), (" " * (MAX_JSON + 1), "bytes")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=complaint):
            read_json(path)
