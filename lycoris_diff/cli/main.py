"""The `lycoris-diff` command: parses arguments, runs a subcommand, turns refusals into one message and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import AdapterError
from . import convert, demo, generate, inspect, merge, train

#: modules with `register(subparsers)`; the parser's default `run(args)` returns the exit code
COMMANDS = (demo, train, generate, inspect, convert, merge)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(
        prog="lycoris-diff",
        description="Train and use LoKr, LoHa, MiSS, SHiRA and LoRA adapters for diffusion models.",
        epilog="Exit codes: 0 done, 1 refused or failed, 2 bad usage, 130 interrupted.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit code.

    Bad usage and `--help` leave through `SystemExit`, as argparse does it.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (AdapterError, OSError) as error:
        print(f"lycoris-diff {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"lycoris-diff {args.command}: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
