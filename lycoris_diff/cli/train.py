"""`lycoris-diff train`: DreamBooth from a YAML file, from flags, or from both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .pipelines import load_pipeline
from .quiet import quiet_libraries
from .train_tables import print_plan, print_report

if TYPE_CHECKING:
    from ..training import TrainStep
    from ..training.settings import TrainSettings
    from ..training.settings_help import Setting

DESCRIPTION = """\
Teaches a diffusers pipeline a subject from a folder of pictures (DreamBooth) and writes the adapter as one file in kohya's
format and as PEFT directories, with previews, checkpoints, a model card and the settings that repeat the run.

  %(prog)s --model tiny --instance_data_dir pictures --instance_prompt "a photo of sks dog" --output_dir out --adapter lokr
  %(prog)s run.yaml --learning_rate 5e-4 --unet.r 4 --dry-run

A YAML file has the same names: `learning_rate: 5e-4`, `adapters: {unet: {type: lokr, r: 4}}`. Flags go over it. Values that
start with [ or { are YAML; a truth value's flag may stand alone; a list's flag may be repeated."""
EPILOG = "Exit codes: 0 done, 1 refused or failed, 2 bad usage, 130 interrupted (a checkpoint was written; --resume goes on)."
_METAVARS = {
    "true": "BOOL",
    "a whole": "N",
    "a number": "X",
    "text": "TEXT",
    "a list": "LIST",
    "a mapping": "MAP",
    "null": "TEXT",
}
_SWITCHES = {"--dry-run": "dry_run", "--dry_run": "dry_run", "--json": "json"}
#: steps over which the shown loss is averaged: that of one step says little
_WINDOW = 50


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        settings: of the run.
        dry_run: tell what the run would do, and stop.
        json: print JSON instead of tables.
    """

    settings: TrainSettings
    dry_run: bool
    json: bool


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    # flags may be nested and belong to any algorithm, so argparse only hands them on: "-" begins no option here
    parser = subparsers.add_parser("train", help="train adapters on pictures of a subject", add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, or tell what training would do; return 0."""
    return train(parse_command(args.arguments, "lycoris-diff train"))


def parse_command(arguments: Sequence[str], prog: str) -> Command:
    """Read a command line; bad usage and `--help` leave through `SystemExit`, as argparse does it.

    Raises:
        ConfigError, OSError: as `lycoris_diff.training.settings.read_settings`.
    """
    from ..training.given import FlagError
    from ..training.settings import read_settings

    if any(argument in ("-h", "--help") for argument in arguments):
        help_parser(prog).parse_args(["--help"])
    try:
        path, flags, switches = split_arguments(arguments)
        settings = read_settings(path, flags)
    except FlagError as error:
        help_parser(prog).error(str(error))
    return Command(settings, "dry_run" in switches, "json" in switches)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str], set[str]]:
    """Return the YAML file, the settings' flags with their values, and the command's own switches.

    Raises:
        FlagError: more than one file.
    """
    from ..training.given import FlagError

    paths: list[str] = []
    flags: list[str] = []
    switches: set[str] = set()
    takes_value = False
    for argument in arguments:
        if argument in _SWITCHES:
            switches.add(_SWITCHES[argument])
            takes_value = False
        elif argument.startswith("-") and not (takes_value and not argument.startswith("--")):
            flags.append(argument)
            takes_value = "=" not in argument
        elif takes_value:
            flags.append(argument)
            takes_value = False
        else:
            paths.append(argument)
    if len(paths) > 1:
        raise FlagError(f"unexpected argument {paths[1]!r}; settings are given as --name value, after one YAML file at most")
    return paths[0] if paths else None, flags, switches


def train(command: Command) -> int:
    """Load the pipeline, train it or plan it, print what came of it; return 0.

    With several processes (`accelerate launch -m lycoris_diff train ...`) the first one prints.

    Raises:
        AdapterError, OSError, KeyboardInterrupt: as `train_dreambooth`.
    """
    from .. import training

    settings = command.settings
    with quiet_libraries(), shown_progress() as (on_stage, on_step):
        on_stage("loading the pipeline", 0, 0)
        pipe = load_pipeline(settings.model, settings.dtype, settings.revision, settings.variant)
        on_stage("preparing", 0, 0)
        result: Any
        if command.dry_run:
            result = training.plan_dreambooth(pipe, settings.config, base=settings.base)
        else:
            result = training.train_dreambooth(pipe, settings.config, on_step, on_stage, settings.base)
    if is_main_process():
        if command.json:
            name = "plan" if command.dry_run else "report"
            print(json.dumps({"settings": settings.to_dict(), name: result.to_dict()}, indent=2))
        elif command.dry_run:
            print_plan(result, settings)
        else:
            print_report(result, settings)
    return 0


@contextmanager
def shown_progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[TrainStep], None]]]:
    """Show a bar on standard error; gives what is called with stages of the preparation, and with training steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    losses: list[float] = []
    with Progress(*columns, console=console, transient=True, disable=not is_main_process()) as progress:
        task = progress.add_task("", total=None)
        shown = ""

        def begin(name: str, total: int | None, completed: int) -> None:
            nonlocal task, shown
            progress.remove_task(task)
            task, shown = progress.add_task(name, total=total, completed=completed), name

        def on_stage(name: str, done: int, total: int) -> None:
            if name != shown:
                begin(name, total or None, 0)
            progress.update(task, completed=done)

        def on_step(step: TrainStep) -> None:
            if shown != "training":
                begin("training", step.total, step.step - 1)  # a resumed run begins in the middle
            losses[:-_WINDOW] = []
            losses.append(step.loss)
            description = f"training, loss {sum(losses) / len(losses):.4f}"
            progress.update(task, completed=step.step, description=description)

        try:
            yield on_stage, on_step
        except BaseException:
            progress.update(task, visible=False)  # leaves the error message alone on the screen
            raise


def is_main_process() -> bool:
    """Whether this is the first of the processes that accelerate started, or the only one."""
    from ..training.processes import process_state

    return process_state().is_main_process


# --- help -----------------------------------------------------------------------------------------------------------------
def help_parser(prog: str) -> argparse.ArgumentParser:
    """Return a parser that knows every setting, for `--help` and for messages about usage."""
    from ..training.settings_help import list_adapter_fields, list_settings

    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [CONFIG.yaml] [--NAME VALUE]... [--dry-run] [--json]",
        description=DESCRIPTION.replace("%(prog)s", prog),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="file with settings")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan after a few measured steps, and stop: modules, parameters, file sizes, memory, time",
    )
    parser.add_argument("--json", action="store_true", help="print the report or the plan as JSON")
    settings = parser.add_argument_group("settings")
    for setting in list_settings():
        _add_setting(settings, setting)
    title = "fields of the denoiser's adapter"
    adapter = parser.add_argument_group(title, "of another component's adapter: --text_encoder.r 4, --text_encoder_2.type lokr")
    for setting in list_adapter_fields():
        _add_setting(adapter, setting)
    return parser


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    metavar = next(metavar for word, metavar in _METAVARS.items() if setting.kind.removeprefix("null or ").startswith(word))
    default = f" (default: {setting.default})" if setting.default not in ("", "null") else ""
    group.add_argument(f"--{setting.name}", metavar=metavar, help=f"{setting.help}{default}".replace("%", "%%"))
