"""Checkpoints: complete or absent whenever the process dies, refused when damaged, and enough to go on from."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lycoris_diff import (
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    ShiraConfig,
    TLoraConfig,
    get_peft_model,
)
from lycoris_diff.errors import CheckpointError
from lycoris_diff.training.checkpointing import INFO_NAME, STATE_NAME, check_plain
from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.interrupts import Interrupts
from lycoris_diff.training.state import (
    MAY_DIFFER,
    Checkpoints,
    check_same_run,
    put_trained_tensors,
    rng_state,
    set_rng_state,
    trained_tensors,
)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def state(value: float = 0.0) -> dict:
    return {"weights": torch.full((200,), value), "losses": [value]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- saving and finding --------------------------------------------------------------------------------------------------
def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
    saved = {
        "weights": {"unet": {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int32)}},
        "half": torch.randn(3).to(torch.bfloat16),
        "plain": [1, 2.5, "text", None, True, (1, 2)],
        "ordered": OrderedDict(a=1),
        7: float("inf"),
    }
    path = checkpoints.save(42, saved, lambda folder: (folder / "adapter.txt").write_text("adapter"))
    assert path == tmp_path / "deep" / "checkpoints" / "checkpoint-000042"
    assert names(path) == ["adapter.txt", INFO_NAME, STATE_NAME]
    loaded = checkpoints.load(path)
    assert loaded.pop("step") == 42
    assert loaded["weights"]["unet"]["b"].dtype == torch.int32
    assert all(torch.equal(loaded["weights"]["unet"][name], saved["weights"]["unet"][name]) for name in "ab")
    assert torch.equal(loaded["half"], saved["half"]) and loaded["half"].dtype == torch.bfloat16
    assert all(loaded[name] == saved[name] for name in ("plain", "ordered", 7))
    assert (path / INFO_NAME).stat().st_mode & 0o077 == (tmp_path / "deep").stat().st_mode & 0o066
    assert path.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_the_newest_is_the_one_written_last(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (300, 1_000_000, 100):
        checkpoints.save(step, state(step))
    assert checkpoints.find("latest").name == "checkpoint-000100"
    assert Checkpoints(tmp_path).find("latest") == tmp_path / "checkpoint-000100"
    assert checkpoints.find("checkpoint-1000000") == tmp_path / "checkpoint-1000000"
    assert checkpoints.find(tmp_path / "checkpoint-000300") == tmp_path / "checkpoint-000300"


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=6), limit=st.integers(1, 3))
def test_the_limit_keeps_those_written_last(tmp_path_factory, steps, limit):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"), limit)
    for index, step in enumerate(steps):
        checkpoints.save(step, {"index": index})
    last = list(dict.fromkeys(reversed(steps)))[:limit]
    assert names(checkpoints.directory) == sorted(f"checkpoint-{step:06d}" for step in last)
    assert checkpoints.load(checkpoints.find("latest"))["index"] == len(steps) - 1


def test_a_step_saved_again_takes_the_place(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state(1.0), lambda folder: (folder / "old").write_text("old"))
    path = checkpoints.save(5, state(2.0))
    assert names(tmp_path) == ["checkpoint-000005"] and names(path) == [INFO_NAME, STATE_NAME]
    assert checkpoints.load(path)["losses"] == [2.0]


def test_a_failed_save_leaves_nothing_and_keeps_what_was(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, state(1.0))

    def full_disk(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(step, state(2.0), full_disk)
    assert names(tmp_path) == ["checkpoint-000001"]
    assert checkpoints.load(checkpoints.find("latest"))["losses"] == [1.0]


def test_other_directories_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "other", ".checkpoint-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000009").write_text("a file")
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, state())
    checkpoints.save(2, state())
    assert names(tmp_path) == [".checkpoint-notes", "checkpoint-000002", "checkpoint-000009", "checkpoint-best", "other"]
    assert checkpoints.find("latest").name == "checkpoint-000002"


# --- damage --------------------------------------------------------------------------------------------------------------
def two(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0))
    checkpoints.save(2, state(2.0))
    return checkpoints, tmp_path / "checkpoint-000002"


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: shorten(path / STATE_NAME), STATE_NAME),
        (lambda path: (path / STATE_NAME).write_bytes(b""), STATE_NAME),
        (lambda path: (path / STATE_NAME).unlink(), STATE_NAME),
        (lambda path: shorten(path / INFO_NAME), INFO_NAME),
        (lambda path: (path / INFO_NAME).unlink(), INFO_NAME),
        (lambda path: (path / INFO_NAME).write_text("[]"), INFO_NAME),
        (lambda path: (path / INFO_NAME).write_text('{"format": 1}'), INFO_NAME),
        (lambda path: (path / INFO_NAME).write_text('{"format": 99}'), "99"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_refused_by_name(tmp_path, damage, named):
    checkpoints, path = two(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match="continuing from .*checkpoint-000001; damaged: .*checkpoint-000002"):
        found = checkpoints.find("latest")
    assert checkpoints.load(found)["losses"] == [1.0]
    for refused in (checkpoints.find, checkpoints.load):
        with pytest.raises(CheckpointError) as error:
            refused(path)
        assert str(path) in str(error.value) and named in str(error.value)


def test_a_flipped_bit_is_found(tmp_path):
    checkpoints, path = two(tmp_path)
    content = bytearray((path / STATE_NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (path / STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{STATE_NAME} is damaged.*another checkpoint"):
        checkpoints.load(path)


def test_files_of_two_checkpoints_do_not_make_one(tmp_path):
    checkpoints, path = two(tmp_path)
    info = json.loads((path / INFO_NAME).read_text())
    (path / INFO_NAME).write_text(json.dumps(info | {"step": 3}))
    with pytest.raises(CheckpointError, match="says step 3"):
        checkpoints.load(path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoints, path = two(tmp_path)
    torch.save({"step": 2, "x": Run()}, path / STATE_NAME)
    from lycoris_diff.training.checkpointing import _digest

    info = json.loads((path / INFO_NAME).read_text())
    info |= {"sha256": _digest(path / STATE_NAME), "files": {STATE_NAME: (path / STATE_NAME).stat().st_size}}
    (path / INFO_NAME).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="not a training state"):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_said_with_what_is(tmp_path):
    empty = Checkpoints(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"nothing to resume: .*none has no checkpoints; leave resume out"):
        empty.find("latest")
    assert not (tmp_path / "none").exists()
    checkpoints, path = two(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"'checkpoint-7'; .*run has checkpoint-000001, checkpoint-000002"):
        checkpoints.find("checkpoint-7")
    with pytest.raises(CheckpointError, match=f"no {INFO_NAME}.*checkpoint-000001, checkpoint-000002"):
        checkpoints.find(tmp_path / "run")
    shorten(path / STATE_NAME)
    (path.parent / "checkpoint-000001" / INFO_NAME).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoints.find("latest")
    assert f"{INFO_NAME} is missing" in str(error.value) and f"{STATE_NAME} is damaged" in str(error.value)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"optimizer": {"state": {0: {"d": np.float64(1.0)}}}}, "state.optimizer.state.0.d is a numpy.float64"),
        ({"a": [1, {2}]}, "state.a.1 is a builtins.set"),
        ({"a": np.zeros(3)}, "numpy.ndarray"),
        ({"a": {(1, 2): 3}}, "the key (1, 2)"),
        ({"a": DreamBoothConfig("x", "y")}, "DreamBoothConfig"),
        ({"f": torch.nn.Linear(1, 1)}, "Linear"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value, where):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path).save(1, value)
    assert where in str(error.value)
    assert not list(tmp_path.iterdir())


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(value=_plain)
def test_whatever_passes_the_check_is_loaded(tmp_path_factory, value):
    check_plain(value, "value")
    file = tmp_path_factory.mktemp("plain") / "value.pt"
    torch.save(value, file)
    assert torch.load(file, weights_only=True) == value


# --- kill -9 -------------------------------------------------------------------------------------------------------------
def in_a_process(work):
    """Fork; the child's code never returns into the test."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@needs_fork
def test_kill_9_while_the_adapter_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, state(1.0))
    ready, tell = os.pipe()

    def slow(folder):
        (folder / "adapter.safetensors").write_bytes(b"half of it")
        os.write(tell, b"!")
        time.sleep(60)

    child = in_a_process(lambda: checkpoints.save(2, state(2.0), slow))
    assert os.read(ready, 1) == b"!"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2 and left[0].startswith(".checkpoint-000002.") and left[1] == "checkpoint-000001"
    assert (tmp_path / left[0] / "adapter.safetensors").read_bytes() == b"half of it"
    later = Checkpoints(tmp_path, limit=1)
    found = later.find("latest")
    assert found.name == "checkpoint-000001" and later.load(found)["losses"] == [1.0]
    assert names(tmp_path) == ["checkpoint-000001"]
    later.save(2, state())
    assert names(tmp_path) == ["checkpoint-000002"]


def _die_at(moment):
    """Patch everything that touches the disk, so that its n-th use is the last thing the process does."""
    left = [moment]

    def deadly(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        *((os, name) for name in ("rename", "fsync", "chmod", "mkdir", "unlink", "rmdir")),
        (torch, "save"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))


@needs_fork
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_kill_9_at_any_moment_leaves_a_complete_newest(tmp_path, again):
    first = Checkpoints(tmp_path / "first")
    first.save(1, state(1.0))
    first.save(2, state(2.0))
    seen = set()
    for moment in range(100):
        folder = tmp_path / str(moment)
        shutil.copytree(first.directory, folder)

        def work(moment=moment, folder=folder):
            _die_at(moment)
            Checkpoints(folder, limit=2).save(
                2 if again else 3, state(3.0), lambda path: (path / "adapter").write_text("whole")
            )

        status = os.waitpid(in_a_process(work), 0)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            later = Checkpoints(folder, limit=2)
            loaded = later.load(later.find("latest"))
        seen.add(loaded["losses"][0])
        assert not [name for name in names(folder) if name.startswith(".")]
        if os.WIFEXITED(status):
            break
    assert os.WIFEXITED(status) and moment > 10
    assert seen == {2.0, 3.0}


# --- random numbers ------------------------------------------------------------------------------------------------------
def draws():
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), torch.randn(3).tolist()]


def test_random_numbers_go_on_after_a_checkpoint(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second value for the next call
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"rng": rng_state()})
    expected = [draws(), draws()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_rng_state(checkpoints.load(path)["rng"])
    assert [draws(), draws()] == expected


@pytest.mark.parametrize(
    "broken",
    [
        {"python": [3, [1, 2], None]},
        {"numpy": ["MT19937", [1, 2], 0, 0, 0.0]},
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"torch": None},
    ],
)
def test_a_broken_random_state_changes_nothing(broken):
    before = rng_state()
    with pytest.raises(CheckpointError, match="random generators"):
        set_rng_state({**before, **broken})
    with pytest.raises(CheckpointError, match="python"):
        set_rng_state({})
    expected = draws()
    set_rng_state(before)
    assert draws() == expected


def test_another_number_of_devices_is_warned_about():
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    more = [torch.zeros(16, dtype=torch.uint8)] * (devices + 1) if not devices else torch.cuda.get_rng_state_all() * 2
    with pytest.warns(UserWarning, match=f"of {len(more)} CUDA devices, here are {devices}"):
        set_rng_state({**rng_state(), "cuda": more})


# --- trained tensors -----------------------------------------------------------------------------------------------------
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(self.first(x).view(-1, 8, 3, 1)).flatten(1)


def adapted(config, seed):
    torch.manual_seed(0)
    base = Small()
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


CONFIGS = {
    "lora": LoraConfig,
    "dora": lambda **f: LoraConfig(weight_decompose=True, **f),
    "lokr": LoKrConfig,
    "loha": LoHaConfig,
    "miss": MissConfig,
    "shira": ShiraConfig,
    "full": FullConfig,
    "ia3": IA3Config,
    "oft": OFTConfig,
    "boft": BOFTConfig,
    "diag-oft": DiagOFTConfig,
    "glora": GLoraConfig,
    "tlora": TLoraConfig,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_trained_tensors_make_another_model_the_same(kind, tmp_path):
    targets = ["first"] if kind == "tlora" else ["first", "conv"]
    config = CONFIGS[kind](target_modules=targets, r={"shira": 1, "boft": 8}.get(kind, 4))
    x = torch.randn(5, 16)
    model = adapted(config, seed=1)
    randomize(model)
    tensors = trained_tensors(model)
    assert tensors and all(name.startswith(("first.adapters.default.", "conv.adapters.default.")) for name in tensors)
    other = adapted(config, seed=2)
    assert not torch.equal(other(x), model(x))
    other(x)  # what is kept from one call to the next must not outlive the old tensors
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"adapters": tensors})
    put_trained_tensors(other, checkpoints.load(path)["adapters"])
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(trained_tensors(other).values(), tensors.values()))


def test_trained_tensors_are_copies():
    model = adapted(LoraConfig(r=2, target_modules=["first"]), 0)
    tensors = trained_tensors(model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    randomize(model)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("first.adapters.default.lora_A.weight"),
            "lacks 'first.adapters.default.lora_A.weight', and has nothing too many",
        ),
        (lambda t: t.update(other=torch.zeros(1)), "lacks nothing, and has 'other' too many"),
        (lambda t: t.update({"first.adapters.default.lora_B.weight": torch.zeros(24, 3)}), r"has shape \(24, 3\)"),
        (
            lambda t: t.update({"first.adapters.default.lora_B.weight": torch.zeros(24, 2).half()}),
            "torch.float16 in the checkpoint",
        ),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(change, said):
    model = adapted(LoraConfig(r=2, target_modules=["first"]), 0)
    randomize(model)
    before = trained_tensors(model)
    other = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    change(other)
    with pytest.raises(CheckpointError, match=said):
        put_trained_tensors(model, other)
    assert all(torch.equal(a, b) for a, b in zip(trained_tensors(model).values(), before.values()))


def test_moving_average_and_scaler_survive(tmp_path):
    parameters = [nn.Parameter(torch.randn(3))]
    average = EMAModel(parameters, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            parameters[0].add_(1.0)
        average.step(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler.scale(parameters[0].sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load(checkpoints.save(1, {"ema": average.state_dict(), "scaler": scaler.state_dict()}))
    other = EMAModel([nn.Parameter(torch.zeros(3))], decay=0.5)
    other.load_state_dict(loaded["ema"])
    average.step(parameters)
    other.step(parameters)
    assert torch.equal(other.shadow_params[0], average.shadow_params[0])
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(loaded["scaler"])
    assert again.get_scale() == 16.0


# --- the same run --------------------------------------------------------------------------------------------------------
def run(**fields):
    fields = {
        "adapters": {"unet": LoKrConfig(r=8, target_modules=["a", "b"])},
        "optimizer_args": {"betas": (0.9, 0.99)},
        **fields,
    }
    return {"settings": DreamBoothConfig("pictures", "out", **fields).to_dict(), "data": "d1g357"}


def test_a_saved_run_is_the_same_run(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load(checkpoints.save(3, {**run(), "weights": torch.zeros(2), "losses": [1.0]}))
    check_same_run(loaded, run())
    check_same_run(json.loads(json.dumps(run())), run())


def test_every_difference_is_named_with_both_values():
    now = run(learning_rate=0.5, adapters={"unet": LoKrConfig(r=4)}, optimizer="prodigy", max_train_steps=9)
    with pytest.raises(CheckpointError) as error:
        check_same_run(run(), {**now, "data": "07h3r", "base": "new"})
    text = str(error.value)
    for part in (
        "learning_rate: 0.0001 then, 0.5 now",
        "adapters.unet.r: absent then, 4 now",
        "adapters.unet.target_modules: ['a', 'b'] then, absent now",
        "optimizer: 'adamw' then, 'prodigy' now",
        "data: 'd1g357' then, '07h3r' now",
        "base: absent then, 'new' now",
    ):
        assert part in text
    assert "max_train_steps" not in text and text.count("\n") == 6


def test_the_table_of_settings_that_may_differ():
    defaults = run()["settings"]
    assert set(defaults) >= MAY_DIFFER
    for name in defaults:
        now = run()
        now["settings"] = {**defaults, name: "another"}
        if name in MAY_DIFFER:
            check_same_run(run(), now)
        else:
            with pytest.raises(CheckpointError, match=name):
                check_same_run(run(), now)


# --- interrupts ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in Interrupts.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", Interrupts.SIGNALS)
def test_the_first_signal_only_asks(handlers, number):
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert interrupts.requested
    assert {n: signal.getsignal(n) for n in Interrupts.SIGNALS} == handlers


def test_a_second_ctrl_c_is_not_waited_for(handlers):
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested
        signal.raise_signal(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in Interrupts.SIGNALS} == handlers


def test_ignored_signals_stay_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert not interrupts.requested
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_change_no_handlers(handlers):
    found = []

    def work():
        with Interrupts() as interrupts:
            found.append((interrupts.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, handlers[signal.SIGINT])]
