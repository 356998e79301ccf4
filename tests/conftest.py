"""Every test starts from the same random state and leaves threads and environment as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import emulated
import pytest
import torch
from cases import BACKENDS, EMULATED, INTERPRETED
from ranks import Ranks

if INTERPRETED:
    import interpreted
else:
    collect_ignore = ["test_interpreted.py", "interpreted.py"]


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GAM_FAST_BACKEND", raising=False)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes with a process group."""
    with closing(Ranks(2)) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four processes with a process group."""
    with closing(Ranks(4)) as ranks:
        yield ranks


@pytest.fixture(params=BACKENDS)
def _on_eager_and_native(_same_start: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests of what surrounds a step, to which kernels do not matter, and for threads: the emulator has one."""
    monkeypatch.setenv("GAM_FAST_BACKEND", request.param)


@pytest.fixture(params=[*BACKENDS, *EMULATED])
def _on_each_backend(_same_start: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests of the engine, which do not name a backend: all of them run on each."""
    if request.param == "emulated":
        emulated.use(monkeypatch)
        return
    monkeypatch.setenv("GAM_FAST_BACKEND", request.param)
    if INTERPRETED:
        interpreted.use(monkeypatch)
