"""The `lycoris-diff` command; one file a subcommand."""

from lycoris_diff.cli.main import main

__all__ = ["main"]
