"""What the benchmarks share: algorithms as three libraries spell them, paired rounds, spreads, bytes kept for backward."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn

MIB = 2**20
WIDEST = 0.03  # half width of an interval from which a ratio is called inconclusive


@dataclass(frozen=True)
class Algorithm:
    """One algorithm at one size: config class and fields, by the names that PEFT and we share, and what differs.

    Attributes:
        config: name of the config class in PEFT and here.
        fields: of both.
        ours: fields of ours that PEFT does not have.
        peft: fields of PEFT's that mean the same.
        lycoris: fields of LyCORIS' module that mean the same.
        conv: whether PEFT and LyCORIS have it on convolutions.
        tucker: whether convolutions get a Tucker core.
    """

    config: str
    fields: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    lycoris: Mapping[str, Any] = field(default_factory=dict)
    conv: bool = False
    tucker: bool = False

    def config_of(self, package: Any, targets: list[str], conv: bool, more: Mapping[str, Any]) -> Any:
        """Return the config of `package` for modules of these names; `conv` says whether there are convolutions among them."""
        core = {"use_effective_conv2d": True} if self.tucker and conv else {}
        return getattr(package, self.config)(target_modules=targets, **{**self.fields, **core, **more})


_FULL: Any = {"ours": {"full_matrix": True}, "peft": {"r": 100_000}, "lycoris": {"factor": 8, "full_matrix": True}}
ALGORITHMS = {
    "lora": Algorithm("LoraConfig", {"r": 8}, conv=True),
    "lokr": Algorithm("LoKrConfig", {"r": 8}, conv=True, tucker=True),
    "lokr-f8": Algorithm("LoKrConfig", {"r": 8, "decompose_factor": 8}, lycoris={"factor": 8}, conv=True, tucker=True),
    "lokr-f16": Algorithm("LoKrConfig", {"r": 8, "decompose_factor": 16}, lycoris={"factor": 16}, conv=True, tucker=True),
    "lokr-f8-full": Algorithm("LoKrConfig", {"r": 8, "decompose_factor": 8}, **_FULL),
    "loha": Algorithm("LoHaConfig", {"r": 8}, conv=True, tucker=True),
    "loha-r4": Algorithm("LoHaConfig", {"r": 4}),
    "loha-r32": Algorithm("LoHaConfig", {"r": 32}),
    "miss": Algorithm("MissConfig", {"r": 8}),
    "shira": Algorithm("ShiraConfig", {"r": 8, "random_seed": 0}),
    "dora": Algorithm("LoraConfig", {"r": 8, "use_dora": True}, lycoris={"weight_decompose": True}, conv=True),
    "oft": Algorithm("OFTConfig", {"r": 0, "oft_block_size": 32}, conv=True),
}


def prepare_process(threads: int, keep_memory: bool = True) -> None:
    """Set torch's threads, silence the peers' warnings, and have glibc keep freed memory, as allocators of accelerators do.

    Otherwise large temporaries are given back to the system and faulted in again in every step, a third of the time of a
    step of Stable Diffusion 1.5's UNet, whose amount varies from step to step. Elsewhere than on glibc that stays so.
    """
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    mallopt = _from_libc("mallopt") if keep_memory else None
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 256 * MIB)):
            if not mallopt(option, value):
                raise RuntimeError(f"mallopt({option}, {value}) was refused; expected glibc's options, see its manual page")


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)


def give_memory_back() -> None:
    """Give what was freed back to the system, between measurements: several processes share its memory."""
    gc.collect()
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _from_libc(name: str) -> Any:
    """Return a function of the C library, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def fill_factors(owners: nn.Module) -> list[nn.Parameter]:
    """Give every trained factor non-zero values; DoRA's magnitudes stay the norms they start from. Return the parameters."""
    trained = [(name, parameter) for name, parameter in owners.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for name, parameter in trained:
            if not re.search("magnitude|dora_scale", name):
                parameter.normal_(std=0.02)
    return [parameter for _, parameter in trained]


def saved_bytes(owners: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of the distinct storages that a forward keeps for backward, parameters and buffers left out."""
    owned = {address for tensor in chain(owners.parameters(), owners.buffers()) for address, _ in storages(tensor)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output  # alive until here, so that no address is given out twice
    return sum(size for address, size in saved.items() if address not in owned)


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of the storage of a tensor, or of both storages of a sparse one."""
    for part in (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,):
        yield part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, with a 95 % interval by the bootstrap, over so many rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float]) -> Ratio:
        """Return the ratio of values to those of the base in the same rounds, the first ones."""
        ratios = np.asarray(values) / np.asarray(base[: len(values)])
        return cls._bootstrapped(lambda rounds: np.median(ratios[rounds], axis=-1), len(ratios))

    @classmethod
    def of_turns(cls, values: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
        """Return the ratio of steps to those of the base in the same rounds, the first ones, measured in turns.

        Args:
            values: seconds of every turn, in the order of the step, of every round.
            base: the same of the base, of as many rounds or more.

        What a turn costs beyond the base's is the median over the rounds, so that a burst of the machine counts for the turn
        that it hit and not for its round; the ratio is of the sums of these medians.
        """
        paired = np.asarray(base[: len(values)])
        beyond = np.asarray(values) - paired

        def ratio(rounds: Any) -> Any:
            extra, whole = (np.median(times[rounds], axis=-2).sum(-1) for times in (beyond, paired))
            return 1 + extra / whole

        return cls._bootstrapped(ratio, len(paired))

    @classmethod
    def _bootstrapped(cls, ratio: Callable[[Any], Any], rounds: int) -> Ratio:
        """Return a ratio of all rounds, from a function of the indices of rounds along the last axis."""
        picked = np.random.default_rng(0).integers(0, rounds, (2000, rounds))
        low, high = np.percentile(ratio(picked), (2.5, 97.5))
        return cls(float(ratio(np.arange(rounds))), float(low), float(high), rounds)

    @property
    def conclusive(self) -> bool:
        """Whether the interval is narrow enough to be judged."""
        return max(self.high - self.median, self.median - self.low) <= WIDEST * self.median

    def __str__(self) -> str:
        text = f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"
        return text if self.conclusive else f"{text} ?"


def order(names: Sequence[str], index: int) -> list[str]:
    """Rotate by one more in each round and reverse every other one, so that nobody always follows the same one."""
    turn = index % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated[:: -1 if index % 2 else 1]


def now(device: str) -> float:
    """Return the time in seconds, after everything that was started on the device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: str = "cpu") -> dict[str, str]:
    """Return what the numbers depend on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    named = {"CPU": cpu[1] if cpu else platform.processor() or platform.machine()}
    named["cores"] = f"{os.cpu_count()}, {torch.get_num_threads()} threads used"
    if device != "cpu":
        named["device"] = torch.cuda.get_device_name(device)
    named["versions"] = f"torch {torch.__version__}, PEFT {version('peft')}, LyCORIS {version('lycoris-lora')}"
    return named


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headers, ["---"] * len(headers), *rows))


def write_section(path: Path, markers: tuple[str, str], title: str, text: str) -> None:
    """Put the text between the markers of the document, which is created or extended where they are missing."""
    begin, end = markers
    document = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if begin not in document:
        document = f"{document.rstrip()}\n\n{title}\n\n{begin}\n{end}\n"
    head, _, rest = document.partition(begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
