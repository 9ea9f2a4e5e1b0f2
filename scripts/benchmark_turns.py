"""Contenders in processes of their own that take their steps at once, in turns of a block of the model.

The speed of shared cores drifts by a tenth within seconds, and a step of a whole model takes seconds: steps that follow one
another meet another machine each. So everybody stops after every block, forward and backward, and lets the next one run; what
is compared was measured within tenths of a second, and only a contender's own turns count.

They are processes and not threads because OpenMP's workers, once there are more of them than cores, sleep between operations,
which makes small operations, that is adapters, half as slow again.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from benchmark_models import BLOCKS, Contender, base_model
from benchmark_results import Case
from benchmarking import give_memory_back, now, prepare_process
from torch import Tensor, nn

PATIENCE = 600  # seconds to wait for a turn or an answer before something must be wrong
# Idle workers of OpenMP look for work for some milliseconds, on the core of whoever has the turn. This many looks are
# longer than the Python between two operations and a hundredth of a turn.
SPINS = "30000"


class Crew:
    """A process for each contender, from the first case on; leave the context to end them.

    Args:
        names: of all contenders, the base among them.
        threads: of torch in every process.
    """

    def __init__(self, names: Sequence[str], threads: int):
        self._names, self._threads = names, threads
        self._gates: dict[str, Semaphore] = {}
        self._pipes: dict[str, Connection] = {}
        self._processes: list[BaseProcess] = []
        # in memory where there is such a place: cached pages of a disk may have to be read again
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._weights = tempfile.TemporaryDirectory(prefix="benchmark-", dir=memory)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.terminate()  # some may be waiting for a turn that nobody passes on any more
            process.join()
        self._weights.cleanup()

    def prepare(self, case: Case) -> dict[str, int]:
        """Have everybody make the case's model and adapter. Return the trained parameters of those who can."""
        if not self._pipes:
            self._start()
        path = Path(self._weights.name) / f"{case.model}-{case.dtype}.pt"
        if not path.exists():
            self._ask(self._names[:1], "write", case, path)
        sizes = self._ask(self._names, "prepare", case, path)
        return {name: size for name, size in sizes.items() if size is not None}

    def step(self, order: Sequence[str]) -> dict[str, list[float]]:
        """Have these take a training step at once. Return the seconds of each of their turns."""
        return self._together("step", order)

    def forward(self, order: Sequence[str]) -> dict[str, list[float]]:
        """Have these do a forward of inference at once. Return the seconds of each of their turns."""
        return self._together("forward", order)

    def freeze(self, names: Sequence[str]) -> None:
        """Turn these from training to inference, for good."""
        self._ask(names, "freeze")

    def saved_bytes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the bytes that each of these keeps for backward."""
        return self._ask(names, "saved_bytes")

    def _start(self) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # the processes inherit it; OpenMP reads it when they load it
        spawn = multiprocessing.get_context("spawn")
        self._gates = {name: spawn.Semaphore(0) for name in self._names}
        for name in self._names:
            self._pipes[name], theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(name, theirs, self._gates, self._threads), daemon=True)
            process.start()
            self._processes.append(process)
            theirs.close()  # so that the end of a process ends our waiting for its answer

    def _together(self, method: str, order: Sequence[str]) -> dict[str, list[float]]:
        self._gates[order[0]].release()
        return self._ask(order, method, list(order))

    def _ask(self, names: Sequence[str], method: str, *arguments: Any) -> dict[str, Any]:
        waiting = {self._pipes[name]: name for name in names}
        answers: dict[str, tuple[Any, str | None]] = {}
        try:
            for pipe in waiting:
                name = waiting[pipe]
                pipe.send((method, *arguments))
            while waiting:
                ready: list[Any] = wait(list(waiting), PATIENCE)
                if not ready:
                    raise RuntimeError(f"no answer of {', '.join(waiting.values())} for {PATIENCE} s; is the machine busy?")
                for pipe in ready:
                    name = waiting.pop(pipe)
                    answers[name] = pipe.recv()
        except (EOFError, OSError) as gone:
            raise RuntimeError(f"the process of {name} ended; is there memory enough for all of {', '.join(names)}?") from gone
        for name, (_, error) in answers.items():  # after all have answered, so that no answer is left for the next question
            if error:
                raise RuntimeError(f"{name}: {error}")
        return {name: answers[name][0] for name in names}


# -------------------------------------------------------------------------------------------------------- in a process


def serve(name: str, pipe: Connection, gates: dict[str, Semaphore], threads: int) -> None:
    """Do what the pipe says until it is closed."""
    prepare_process(threads)
    member = Member(name, gates)
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(member, method)(*arguments), None
        except Exception as error:  # told to whoever asked, who raises it
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send(answer)


class Member:
    """One contender, and its part of what is done at once."""

    def __init__(self, name: str, gates: dict[str, Semaphore]):
        self._name = name
        self._turns = Turns(name, gates)
        self._case: Case
        self._made: Contender | None = None
        self._call: dict[str, Tensor]
        self._gradient: Tensor

    @property
    def _contender(self) -> Contender:
        assert self._made is not None  # nobody is asked who could not be prepared
        return self._made

    def write(self, case: Case, weights: Path) -> None:
        """Write the base model's weights for everybody."""
        torch.save(base_model(case.model, getattr(torch, case.dtype), "cpu").state_dict(), weights)
        base_model.cache_clear()

    def prepare(self, case: Case, weights: Path) -> int | None:
        """Make the contender of a case. Return its trained parameters, or None if there is no such contender."""
        self._made = None
        give_memory_back()
        contender = case.contender(self._name, weights)
        if contender is None:
            return None
        self._case, self._made, self._call = case, contender, case.call()
        with torch.no_grad():
            self._gradient = torch.randn_like(contender.forward(self._call))
        if case.device == "cpu":  # an accelerator has a speed of its own; to stop it within a step would measure the stops
            self._turns.pass_after_blocks(contender.model)
        return contender.parameters

    def step(self, order: list[str]) -> list[float]:
        """Take a training step in turns. Return their seconds."""
        contender = self._contender
        contender.clear(self._call)
        return self._turns.take(lambda: contender.step(self._call, self._gradient), order, self._case.device)

    @torch.no_grad()
    def forward(self, order: list[str]) -> list[float]:
        """Do a forward of inference in turns. Return their seconds."""
        contender = self._contender
        return self._turns.take(lambda: contender.forward(self._call), order, self._case.device)

    def freeze(self) -> None:
        """From training to inference."""
        self._contender.freeze()

    def saved_bytes(self) -> int:
        """Return the bytes kept for backward."""
        return self._contender.saved_bytes(self._call)


class Turns:
    """A clock that runs while this process has the turn; all processes take turns around a ring."""

    def __init__(self, name: str, gates: dict[str, Semaphore]):
        self._name, self._gates = name, gates
        self._next: Semaphore | None = None  # nobody's while nobody else takes part
        self._turns: list[float] = []
        self._since = 0.0

    def take(self, work: Callable[[], object], order: list[str], device: str) -> list[float]:
        """Work in turns with the others of `order`, who must pass as often. Return the seconds of each turn."""
        place = order.index(self._name)
        last = place == len(order) - 1
        self._next = self._gates[order[(place + 1) % len(order)]] if len(order) > 1 else None
        self._turns = []
        self._wait()
        try:
            work()
            self._turns.append(now(device) - self._since)
        finally:
            if self._next is not None and not last:  # whoever is after the last one has finished already
                self._next.release()
            self._next = None
        return self._turns

    def pass_after_blocks(self, model: nn.Module) -> None:
        """Have the model pass the turn on after each of its blocks, and before each block's backward pass."""
        for module in model.modules():
            if isinstance(module, BLOCKS):
                module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if self._next is None:
            return
        self._pass()
        tensor = output[-1] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._pass())

    def _pass(self) -> None:
        assert self._next is not None
        self._turns.append(time.perf_counter() - self._since)
        self._next.release()
        self._wait()

    def _wait(self) -> None:
        if not self._gates[self._name].acquire(timeout=PATIENCE):
            raise RuntimeError(f"no turn for {PATIENCE} s; another contender has failed or passes less often")
        self._since = time.perf_counter()
