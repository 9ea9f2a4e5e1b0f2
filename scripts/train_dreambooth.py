#!/usr/bin/env python3
r"""DreamBooth with any adapter of lycoris_diff on any pipeline that it trains: the training function behind a command line.

    python scripts/train_dreambooth.py --model tiny --instance_data_dir pictures --instance_prompt "a photo of sks dog" \
        --output_dir out --adapter lokr --max_train_steps 500
    accelerate launch scripts/train_dreambooth.py run.yaml --learning_rate 5e-4

The same as `lycoris-diff train`, as a script to copy and change; `--help` lists all settings, docs/training.md explains them.
train_dreambooth_sdxl.py, train_dreambooth_sd3.py and train_dreambooth_flux.py are this one for one family of models each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lycoris_diff import AdapterError
from lycoris_diff.cli.pipelines import load_pipeline
from lycoris_diff.cli.quiet import quiet_libraries
from lycoris_diff.cli.train import is_main_process, parse_command, shown_progress
from lycoris_diff.cli.train_tables import print_plan, print_report
from lycoris_diff.training import families, plan_dreambooth, train_dreambooth

NAME = "train_dreambooth.py"


def main(arguments: Sequence[str] | None = None, family: type[families.Family] | None = None, name: str = NAME) -> int:
    """Train, or print the plan, and return the exit code: 0 done, 1 refused or failed, 130 interrupted.

    Args:
        arguments: of the command line; None takes this process's.
        family: the kind of pipeline that the model has to be; None trains every kind.
        name: of the script, for messages.
    """
    try:
        return run(sys.argv[1:] if arguments is None else arguments, family, name)
    except (AdapterError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted: {interrupt}", file=sys.stderr)
        return 130


def run(arguments: Sequence[str], family: type[families.Family] | None, name: str) -> int:
    """Do what the arguments say; bad usage and `--help` leave through `SystemExit`."""
    command = parse_command(arguments, name)
    settings = command.settings
    with quiet_libraries(), shown_progress() as (on_stage, on_step):
        pipe = load_pipeline(settings.model, settings.dtype, settings.revision, settings.variant)
        check_family(pipe, settings.model, family)
        if command.dry_run:
            plan = plan_dreambooth(pipe, settings.config, base=settings.base)
        else:
            report = train_dreambooth(pipe, settings.config, on_step, on_stage, settings.base)
    if not is_main_process():
        return 0
    if command.json:
        result = {"plan": plan.to_dict()} if command.dry_run else {"report": report.to_dict()}
        print(json.dumps({"settings": settings.to_dict()} | result, indent=2))
    elif command.dry_run:
        print_plan(plan, settings)
    else:
        print_report(report, settings)
    return 0


def check_family(pipe: Any, model: str, family: type[families.Family] | None) -> None:
    """Refuse a model of another kind than the script is for.

    Raises:
        AdapterError: it is of another kind, or of none.
    """
    if family is None:
        return
    found = families.family_of(pipe)
    if type(found) is not family:
        raise AdapterError(f"{model!r} is a model of {found.title}, and this script trains {family.title}; use {NAME}")


if __name__ == "__main__":
    sys.exit(main())
