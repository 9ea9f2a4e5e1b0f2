"""Argument types shared by the subcommands; a value they refuse is bad usage (exit code 2)."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole_number(text, least=1)


def seed_int(text: str) -> int:
    """Parse a seed: a whole number from 0 to 2^32 - 1."""
    value = _whole_number(text, least=0)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is too large; expected at most {2**32 - 1}")
    return value


def finite_float(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return value


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; expected at least {least}")
    return value
