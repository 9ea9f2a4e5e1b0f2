"""Shared set-up: offline, few threads, one seed a test, and nothing of a test left behind in torch's global state."""

from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts what runs in its background like this
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Under pytest-xdist every worker is a process of its own: one thread each is faster than two that fight.
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else max(1, min(2, os.cpu_count() or 1)))


def pytest_collection_finish():
    """The million objects of imported libraries are garbage never: looking through them took a third of a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def fused(monkeypatch):
    """Layers of any size run as one operation of ours where they can, as large ones do."""
    monkeypatch.setattr("lycoris_diff.layers.light.SMALL", 0)
    monkeypatch.setattr("lycoris_diff.layers.light.LITTLE", 0)


@pytest.fixture
def folded(fused, monkeypatch):
    """Their factored forms run through the weight, forward and backward, as those of layers with many tokens do."""
    from lycoris_diff.layers import choosing

    monkeypatch.setattr("lycoris_diff.execution.costs.FEW", 0)
    monkeypatch.setattr("lycoris_diff.execution.costs.FOLD", 0)
    choosing.remembered.cache_clear()
    yield
    choosing.remembered.cache_clear()
