"""Several processes with one process group, for the tests of distributed training on a CPU.

Processes are started once and used by many tests, each of which gets a process group of its own. One that does not
answer in time is killed, with a message that says what each process was doing.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision_operators  # noqa: F401  # a rank imports this module first
from torch import Tensor, distributed

SECONDS = 120
"""In which a function has to be done on all ranks."""

READY = "ready"
"""What a process says first, when it has imported all it needs and can be asked what it does."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class RankError(Exception):
    """A function raised on a rank, or did not end."""


def _serve(rank: int, world: int, pipe: Connection, stacks: str) -> None:
    torch.set_num_threads(1)
    log = Path(stacks).open("w")  # noqa: SIM115  # faulthandler writes to it as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    pipe.send(READY)
    while True:
        try:
            function, arguments, port, seconds = pipe.recv()
        except EOFError:
            return
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
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp()
        for rank in range(self.world):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, self.world, theirs, self._stacks(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        """So that imports, which take long on a busy machine, are not within the time of a function."""
        deadline = time.monotonic() + SECONDS
        for rank, pipe in enumerate(self._pipes):
            try:
                there = pipe.poll(max(0.0, deadline - time.monotonic())) and pipe.recv() == READY
            except (EOFError, ConnectionError):
                self._processes[rank].join()
                raise RankError(f"rank {rank} ended with code {self._processes[rank].exitcode} at its start") from None
            if not there:
                raise RankError(f"rank {rank} of {self.world} has not started in {SECONDS} s")

    def _stacks(self, rank: int) -> str:
        return str(Path(self._folder, f"{rank}.txt"))

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
        try:
            answers = self._answers(function, arguments, seconds)
        except BaseException:
            self.close()  # an answer that comes later would be taken for that of the next function
            raise
        if not all(fine for fine, _ in answers):
            self.close()
        return answers

    def _answers(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
    ) -> list[tuple[bool, Any]]:
        if not self._processes:
            self._start()
        port = free_port()
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
        for rank in late:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n".join(f"rank {rank}:\n{Path(self._stacks(rank)).read_text()}" for rank in late)

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts others."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            shutil.rmtree(self._folder)
        self._processes, self._pipes = [], []


def same_on_all_ranks(tensors: Iterable[Tensor]) -> bool:
    """Whether rank 0 has the same bits."""
    for tensor in tensors:
        theirs = tensor.detach().clone()
        distributed.broadcast(theirs, 0)
        if not torch.equal(theirs, tensor):
            return False
    return True
