#!/usr/bin/env python3
"""The table of settings in docs/training.md, from the docstrings of the code.

python scripts/make_training_settings.py           # rewrite the table
python scripts/make_training_settings.py --check   # compare only; exit code 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lycoris_diff.training.settings_help import Setting, list_adapter_fields, list_settings

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def table(settings: Iterable[Setting]) -> str:
    """A Markdown table of settings."""
    rows = [("setting", "takes", "default", "meaning"), ("---", "---", "---", "---")]
    for setting in settings:
        default = f"`{setting.default}`" if setting.default else ""
        rows.append((f"`{setting.name}`", setting.kind, default, setting.help.replace("|", "\\|")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def document() -> str:
    """The document with tables that are up to date."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    fields = "Of the adapters' configs, where only some algorithms have a field with their names:"
    return "\n\n".join(
        [before + BEGIN, table(list_settings()), fields, table(list_adapter_fields()), END + rest.partition(END)[2]]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(arguments)
    new = document()
    if args.check:
        return int(new != DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
