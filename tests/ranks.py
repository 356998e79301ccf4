"""Several processes with one process group, for the tests of distributed training on a CPU.

Processes are started once and used by many tests, each of which gets a process group of its own. One that does not
answer in time is killed, with a message that says what each process was doing.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision_operators  # noqa: F401  # a rank imports this module first
from cases import ALL, BASES
from torch import Tensor, distributed, nn

SECONDS = 120
"""In which a function has to be done on all ranks."""

# Processes are forks of one that has imported torch, and what takes long besides.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint"])


class RankError(Exception):
    """A function raised on a rank, or did not end."""


def _free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _serve(rank: int, world: int, pipe: Connection, stacks: Path) -> None:
    torch.set_num_threads(1)
    log = stacks.open("w")  # faulthandler writes to it as long as the process lives
    while True:
        try:
            function, arguments, port, seconds = pipe.recv()
        except EOFError:
            return
        faulthandler.unregister(signal.SIGUSR1)  # a framework may have taken the signal
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
        if distributed.is_initialized():  # not sooner: a group that one rank leaves ends what another still connects
            distributed.destroy_process_group()
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
        )
        try:
            distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
            torch.manual_seed(0)
            answer = (True, function(rank, world, *arguments))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            os._exit(1)  # what others wait for will never come, and the group could not be left in order
        pipe.send(answer)


class Ranks:
    """A pool of ``world`` processes."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, self.world, theirs, self._stacks(rank)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _stacks(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, f"{rank}.txt")

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """What ``function(rank, world, *arguments)`` returns, by rank.

        Raises:
            RankError: it raised somewhere, or is not done in time.
        """
        answers = self.answers(function, *arguments, seconds=seconds)
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def answers(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS
    ) -> list[tuple[bool, Any]]:
        """As :meth:`run`; for each rank, whether it went well, and the result or the traceback."""
        answers: list[tuple[bool, Any]] = []
        try:
            answers = self._answers(function, arguments, seconds)
        finally:
            if not answers or not all(fine for fine, _ in answers):
                self.close()  # an answer that comes later would be taken for that of the next function
        return answers

    def _answers(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
    ) -> list[tuple[bool, Any]]:
        if not self._processes:
            self._start()
        port = _free_port()
        for pipe in self._pipes:
            pipe.send((function, arguments, port, seconds))
        deadline = time.monotonic() + seconds
        answers: list[tuple[bool, Any]] = []
        late = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    answers.append(pipe.recv())
                else:
                    late.append(rank)
            except (EOFError, ConnectionError):
                self._processes[rank].join()
                answers.append((False, f"the process ended with code {self._processes[rank].exitcode}"))
        if late:
            where = self._where(late)
            raise RankError(f"{function.__name__}: ranks {late} of {self.world} not done in {seconds} s\n{where}")
        return answers

    def _where(self, late: list[int]) -> str:
        """Return the stacks of the late ranks, which a busy machine takes a while to write."""
        for rank in late:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(self._stacks(rank).read_text() for rank in late):
            time.sleep(0.1)
        time.sleep(0.5)  # the first lines are there, the others follow
        return "\n".join(f"rank {rank}:\n{self._stacks(rank).read_text()}" for rank in late)

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts others."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def on_two(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a test that each of two processes runs. It gets its rank and their number first."""
    two = inspect.Parameter("two", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def test(two: Ranks, **arguments: Any) -> None:
        two.run(_body, function.__module__, function.__name__, arguments)

    test.__name__, test.__module__, test.__doc__ = function.__name__, function.__module__, function.__doc__
    given = list(inspect.signature(function).parameters.values())[2:]
    test.__dict__.update(body=function, __signature__=inspect.Signature([two, *given]))
    return test


def _body(rank: int, world: int, module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).body(rank, world, **arguments)


def in_a_process(program: str, *, warnings: str = "error", timeout: float = 300, **environment: str) -> str:
    """Run a program in a process of its own, and return its output."""
    command = [sys.executable, "-W", warnings, "-c", textwrap.dedent(program)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


# What the functions that run on the ranks have in common


def optimizer_of(model: nn.Module, method_name: str, base_name: str = "sgd_nesterov", **options: Any) -> Any:
    method = ALL[method_name]
    return method.optimizer(model.parameters(), BASES[base_name], model=model, **{**method.hyper, **options})


def share(tensor: Tensor, rank: int, world: int) -> Tensor:
    """The rows of a batch that are this rank's."""
    return tensor.chunk(world)[rank]


def shares(batches: Iterable[tuple[Tensor, Tensor]], rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    return [(share(x, rank, world), share(y, rank, world)) for x, y in batches]


def values(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters, whole where they are sharded."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float = 1e-10) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def same_on_all_ranks(tensors: Iterable[Tensor]) -> bool:
    """Whether rank 0 has the same bits."""
    for tensor in tensors:
        theirs = tensor.detach().clone()
        distributed.broadcast(theirs, 0)
        if not torch.equal(theirs, tensor):
            return False
    return True
