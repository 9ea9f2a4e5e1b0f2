#!/usr/bin/env python3
"""Time and memory of loading a full SDXL LoKr (794 modules) onto an SDXL-size UNet in bfloat16.

The UNet has random weights and the LoKr random factors; no file but the LoKr is read. Reading is timed apart: it is what
`read_raw` needs for the same file. Attaching is everything else that `load_adapter` does: finding the modules, building and
checking 794 adapters, measuring their changes, and putting them in.

    python scripts/benchmark_loading.py                                  # about five minutes on two cores, 8 GB
    python scripts/benchmark_loading.py --rounds 5                       # quicker
    python scripts/benchmark_loading.py --markdown docs/benchmarks.md    # also renew the section in the document
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from lycoris_diff import delete_adapter, load_adapter, unload_adapters
from lycoris_diff.checkpoints.parse import read_raw
from lycoris_diff.functional.lokr import factorization
from lycoris_diff.naming import find, known_base, native_of

BEGIN, END = "<!-- benchmark_loading: begin -->", "<!-- benchmark_loading: end -->"
TARGET_SECONDS = 2.0
KEPT, SERIES = 10, 3


class Pipeline:
    """What `load_adapter` needs of a pipeline: its components."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}


def sdxl_unet() -> nn.Module:
    """A UNet of SDXL's size in bfloat16; the weights repeat one random block, which fills 5 GB in seconds."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    from lycoris_diff.naming import BASES

    logging.set_verbosity_error()

    _, fields = BASES["sdxl"].components["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**fields)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval()
    block = torch.randn(2**20).mul_(0.02).to(torch.bfloat16)
    for parameter in unet.parameters():
        flat = parameter.data.view(-1)
        for piece in flat.split(block.numel()):
            piece.copy_(block[: piece.numel()])
    return unet


def write_lokr(path: Path, factor: int = 8, rank: int = 16) -> int:
    """A LoKr on every Linear and convolution of SDXL in half precision, under the names kohya's trainers write."""
    index = known_base("sdxl")["unet"]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    layers = {path: site for path, site in index.sites.items() if not site.is_norm}
    for layer, site in layers.items():
        out, inp, *kernel = site.shape
        stem = "lora_unet_" + native_of(index, layer)[0].replace(".", "_")
        assert find(index, stem.removeprefix("lora_unet_"), flat=True)
        (a, b), (c, d) = factorization(out, factor), factorization(inp, factor)
        shapes = {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        for name, shape in shapes.items():
            tensors[f"{stem}.{name}"] = (torch.randn(shape, generator=generator) * 0.05).half()
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank)).half()
    save_file(tensors, path, metadata={"ss_network_module": "lycoris.kohya"})
    return len(layers)


def seconds(action: Callable[[], Any]) -> float:
    """How long a call takes."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident() -> float:
    """Memory of this process that is not mapped from files, in MiB."""
    gc.collect()
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


def measure(rounds: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl_lokr.safetensors"
        modules = write_lokr(path)
        pipe = Pipeline(sdxl_unet())
        read_raw(path)  # the modules are imported, the file is in the page cache
        reading = statistics.median(seconds(lambda: read_raw(path)) for _ in range(5))
        series, unloads = [], []
        for _ in range(SERIES):
            series.append([seconds(lambda name=f"kept_{i}": load_adapter(pipe, path, name)) for i in range(KEPT)])
            unloads.append(seconds(lambda: unload_adapters(pipe)))
        kept = [statistics.median(times) for times in zip(*series, strict=True)]
        unloading = statistics.median(unloads)
        load_adapter(pipe, path, "round")
        delete_adapter(pipe, "round")
        before, times, memory = resident(), [], []
        for _ in track(range(rounds), "loading and unloading", console=Console(stderr=True), transient=True):
            times.append(seconds(lambda: load_adapter(pipe, path, "round")))
            unload_adapters(pipe)
            memory.append(resident())
        return {
            "modules": modules,
            "file": path.stat().st_size / 2**20,
            "reading": reading,
            "kept": kept,
            "unloading": unloading,
            "times": times,
            "before": before,
            "memory": memory,
        }


def table(found: dict[str, Any]) -> str:
    """The figures as a section in markdown."""
    kept, times, reading = found["kept"], found["times"], found["reading"]
    attach = statistics.median(times) - reading
    drift = found["memory"][-1] - found["before"]
    later = kept[-1] / kept[0]
    rows = [
        (f"file of {found['file']:.0f} MiB, {found['modules']} modules: reading", f"{reading:.2f} s", "-", "-"),
        (
            f"attaching, beyond reading (median of {len(times)})",
            f"{attach:.2f} s",
            f"< {TARGET_SECONDS:g} s",
            attach < TARGET_SECONDS,
        ),
        (f"first load (median of {SERIES} series)", f"{kept[0]:.2f} s", "-", "-"),
        (f"{len(kept)}th load, the others kept", f"{kept[-1]:.2f} s, {later:.2f} of the first", "1.2", later <= 1.2),
        (f"taking {len(kept)} adapters off", f"{found['unloading']:.2f} s", "-", "-"),
        (f"memory after {len(times)} rounds of loading and unloading", f"{drift:+.1f} MiB", "5 MiB", abs(drift) <= 5),
    ]
    mark = lambda met: met if isinstance(met, str) else "yes" if met else "**no**"
    lines = [f"| {what} | {value} | {target} | {mark(met)} |" for what, value, target, met in rows]
    head = [
        f"- CPU: {_cpu()}, {torch.get_num_threads()} threads; torch {version('torch')}, diffusers {version('diffusers')}",
        "- a UNet of SDXL's size in bfloat16, a LoKr in float16 (factor 8, rank 16); `python scripts/benchmark_loading.py "
        "--markdown docs/benchmarks.md` renews this section",
        "",
        "| what | measured | target | met |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *lines])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.processor()


def renew(document: Path, text: str) -> None:
    """Put the section between its markers; a document without them gets them at its end."""
    section = f"{BEGIN}\n{text}\n{END}"
    old = document.read_text(encoding="utf-8") if document.exists() else ""
    if BEGIN in old:
        new = old[: old.index(BEGIN)] + section + old[old.index(END) + len(END) :]
    else:
        new = f"{old.rstrip()}\n\n## Loading\n\n{section}\n"
    document.write_text(new, encoding="utf-8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="rounds of loading and unloading")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="document whose section is renewed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = table(measure(args.rounds))
    print(text)
    if args.markdown:
        renew(args.markdown, text)


if __name__ == "__main__":
    main()
