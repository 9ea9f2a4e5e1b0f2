"""Telling whether a tensor holds what it held when something was computed from it."""

from __future__ import annotations

from torch import Tensor


def mark(t: Tensor) -> tuple[int, int]:
    """Where a tensor's values are, and in which version. Good for as long as its storage is kept."""
    return t.data_ptr(), t._version
