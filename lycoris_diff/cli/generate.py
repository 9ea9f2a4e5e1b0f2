"""`lycoris-diff generate`: pictures from a pipeline with adapters."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import AdapterError
from .options import finite_float, positive_int, seed_int
from .pipelines import add_pipeline_arguments, load_adapters, load_pipeline, show, summary
from .quiet import quiet_libraries

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")

DESCRIPTION = """\
Loads a diffusers pipeline and any number of adapter files, each with a weight, and writes pictures. A file that does not
fit the pipeline is refused with the reason, before anything is generated."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command's parser."""
    parser = subparsers.add_parser(
        "generate",
        help="make pictures with a pipeline and adapters",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pipeline_arguments(parser, adapter_required=False)
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid")
    parser.add_argument(
        "--out", required=True, metavar="PNG", type=picture, help="picture to write; with --count, a number is added"
    )
    parser.add_argument("--count", type=positive_int, default=1, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=30, metavar="N", help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=finite_float, metavar="X", help="guidance scale (default: the pipeline's)")
    parser.add_argument("--width", type=positive_int, metavar="N", help="in pixels (default: the model's)")
    parser.add_argument("--height", type=positive_int, metavar="N", help="in pixels (default: the model's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: an accelerator if there is one)")
    parser.add_argument(
        "--offload", choices=("none", "model", "sequential"), default="none", help="keep weights in host memory meanwhile"
    )
    parser.add_argument("--fuse", action="store_true", help="write the adapters into the weights first")
    parser.set_defaults(run=run)


def picture(text: str) -> str:
    """A path whose ending names a picture's format."""
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(_PICTURES)}")
    return text


def run(args: argparse.Namespace) -> int:
    """Generate; return 0."""
    import torch

    if (args.width is None) != (args.height is None):
        raise AdapterError("--width and --height go together; given one of them, pipelines take their own size for both")
    out = Path(args.out)
    if out.is_dir():
        raise IsADirectoryError(f"--out: {out} is a directory; name a picture in it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no directory {out.parent}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with quiet_libraries(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading the pipeline", total=None)
        pipe = load_pipeline(args.model, args.dtype)
        progress.update(task, description="loading adapters")
        reports = load_adapters(pipe, args.adapter, strict=not args.no_strict)
        if args.fuse and reports:
            from ..diffusion import fuse_adapters

            fuse_adapters(pipe)
        _to_device(pipe, args.device, args.offload)
        pipe.set_progress_bar_config(disable=True)
        progress.update(task, description="sampling", total=args.steps)

        def advance(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress.update(task, completed=step + 1)
            return tensors

        given = _optional(args, pipe)
        try:
            images = pipe(
                args.prompt,
                num_inference_steps=args.steps,
                num_images_per_prompt=args.count,
                generator=torch.Generator().manual_seed(args.seed),
                callback_on_step_end=advance,
                **given,
            ).images
        except ValueError as error:  # sizes and steps that the pipeline does not take
            raise AdapterError(f"{type(pipe).__name__} refuses: {error}") from error
    paths = [out if args.count == 1 else out.with_stem(f"{out.stem}-{i}") for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    seconds = round(time.perf_counter() - start, 3)
    if args.json:
        adapters = [summary(report) for report in reports]
        print(json.dumps({"images": [str(p) for p in paths], "seconds": seconds, "adapters": adapters}, indent=2))
    else:
        show(reports)
        print("\n".join(str(path) for path in paths))
    return 0


def _optional(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Arguments that were given.

    Raises:
        AdapterError: the pipeline does not know one of them.
    """
    import inspect

    values = {
        "negative_prompt": args.negative_prompt,
        "guidance_scale": args.guidance,
        "width": args.width,
        "height": args.height,
    }
    given = {name: value for name, value in values.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(pipe.__call__).parameters.keys())
    if unknown:
        raise AdapterError(f"{type(pipe).__name__} has no {unknown[0]}; leave the option out")
    return given


def _to_device(pipe: Any, device: str, offload: str) -> None:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    target = device if device != "auto" else "cpu" if found is None else found.type
    if offload == "sequential" and target.startswith("cpu"):
        raise AdapterError("--offload sequential brings weights from host memory to an accelerator; on the CPU leave it out")
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=target)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=target)
        else:
            pipe.to(target)
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(f"the pipeline cannot run on {target!r}: {error}") from error
