"""`python -m lycoris_diff`: the same as the `lycoris-diff` command."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
