"""Run all checks that need a real GPU, in stages, the most valuable first, without a network.

    python tools/gpu.py                                    all stages, within 9 minutes
    python tools/gpu.py --stages core,smoke,times          some of them
    python tools/gpu.py --budget 300 --out /tmp/gpu --results /tmp/gpu

Each stage has a time limit and prints one line: its name, ``ok``, ``FAILED`` or ``TIMEOUT``, the seconds it took, and
the last line of its output. A failing stage does not stop the others. The lines are also in ``summary.txt`` of
``--out``, and all output is in ``log.txt`` there. Figures are JSON files in ``--results``. The exit status is 1 if a
stage failed.

The Python that runs it needs torch with CUDA, numpy, setuptools, ninja and pytest. A stage reports anything else that
is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable

# No plugins that change the selection of tests. Warnings of another torch release are ignored.
PYTEST = (
    f"{PYTHON} -m pytest -q -ra --tb=short -m gpu -p no:cacheprovider -p no:randomly -o addopts= "
    "-o filterwarnings=default --durations=3"
).split()

SMOKE = "waits_for or twelve or lr_zero or not_finite or nan_comes_back or captured or scaler or streams"


@dataclass(frozen=True)
class Stage:
    """Commands that run concurrently, within a time limit; a benchmark is the only command of its stage.

    Args:
        name: its name for ``--stages``.
        seconds: the time limit.
        commands: by name; ``{results}`` and ``{gpu}`` stand for the results folder and the name of the card.
        environment: environment variables of the commands.
        needs: a required program; without it the stage is left out.
        is_default: whether it runs if no stages are named.
    """

    name: str
    seconds: int
    commands: dict[str, Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    is_default: bool = True


def module(name: str, *arguments: str, file: str = "") -> Sequence[str]:
    """Return the command of a benchmark on the GPU, whose figures go to ``file``."""
    return [PYTHON, "-m", name, "--device", "cuda", *arguments, *(["--json", "{results}/{gpu}" + file] if file else [])]


def sanitizer(tool: str, which: str) -> Sequence[str]:
    """Return the command of some kernel tests under ``compute-sanitizer``."""
    limits = ["--report-api-errors", "no", "--launch-timeout", "60", "--error-exitcode", "9"]
    return ["compute-sanitizer", "--tool", tool, *limits, *PYTEST, "tests/test_backends.py", "-k", which]


CORE = [PYTHON, "setup.py", "build_ext", "--inplace"]
BACKENDS = ("--backends", "native,triton", "--models", "resnet50,vit_small,gpt2,small,single")
BF16 = ("--dtype", "bfloat16", "--models", "resnet50,single")
RIVALS = ("--peers", "plain-gam,foreach-gam,plain-sam,pytorch-optimizer-sam")
MANY = ("--model", "many", "--repeats", "7", *RIVALS)
ADAMW = ("--base", "AdamW")
MIXED = ("--autocast", "bfloat16", "--methods", "SGD,AdamW,SAM,GAM")
IMAGES = ("--model", "mlp,resnet18", "--channels-last", *MIXED)
TEXT = ("--model", "gpt2", "--batch", "8", *ADAMW, "--peers", "none", *MIXED)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
STAGES = (
    Stage("core", 240, {"core": CORE}, {"GAM_FAST_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count())}),
    Stage("report", 60, {"report": [PYTHON, "-m", "gam_fast"]}),
    Stage("smoke", 110, {"smoke": [*PYTEST, "tests/test_gpu.py", "-k", SMOKE]}),
    Stage("times", 90, {"times": module("bench.kernels", *BACKENDS, file="_kernels.json")}),
    Stage("overhead", 60, {"overhead": module("bench.overhead", *RIVALS, file="_overhead.json")}),
    Stage("overhead_adamw", 60, {"overhead": module("bench.overhead", *ADAMW, file="_overhead_adamw.json")}),
    Stage(
        "tests",
        170,
        {
            "kernels": [*PYTEST, "tests/test_backends.py"],
            "native": [*PYTEST, "tests/test_gpu.py", "-k", "native and not trajectories and not compiled"],
            "triton": [*PYTEST, "tests/test_gpu.py", "-k", "triton and not trajectories and not compiled"],
            "native trajectories": [*PYTEST, "tests/test_gpu.py", "-k", "native and trajectories"],
            "triton trajectories": [*PYTEST, "tests/test_gpu.py", "-k", "triton and trajectories"],
            "compiled": [*PYTEST, "tests/test_gpu.py", "-k", "compiled"],
            "others": [*PYTEST, "tests/test_growth.py", "tests/test_rng_batchnorm.py"],
        },
    ),
    Stage("times_bf16", 60, {"times": module("bench.kernels", *BACKENDS, *BF16, file="_kernels_bf16.json")}),
    Stage(
        "overhead_many",
        120,
        {"overhead": module("bench.overhead", *MANY, file="_overhead_many.json")},
    ),
    Stage("throughput", 90, {"throughput": module("bench.throughput", *IMAGES, file=".json")}),
    Stage("throughput_gpt2", 60, {"throughput": module("bench.throughput", *TEXT, file="_gpt2.json")}),
    Stage("graph", 45, {"graph": [PYTHON, "examples/cuda_graph.py"]}),
    Stage(
        "sanitize",
        150,
        {
            "memcheck": sanitizer("memcheck", "native and (is_its_formula or alignment or of_many_groups)"),
            "racecheck": sanitizer("racecheck", "native and (is_its_formula or of_millions)"),
        },
        UNCACHED,
        needs="compute-sanitizer",
    ),
    Stage("memory", 120, {"memory": module("bench.memory", file="_memory.json")}),
    Stage("curvature", 150, {"curvature": module("bench.curvature", file="_curvature.json")}),
    Stage(
        "initcheck",
        150,
        {
            "initcheck": sanitizer("initcheck", "lengths or the_bits_are"),
            "synccheck": sanitizer("synccheck", "native and (is_its_formula or of_millions)"),
        },
        UNCACHED,
        needs="compute-sanitizer",
        is_default=False,
    ),
)


@contextlib.contextmanager
def kernels_in_place() -> Iterator[None]:
    """Map ``gam_fast.kernels`` to the folder ``kernels`` by a link, if no installation does."""
    link = ROOT / "gam_fast" / "kernels"
    found = subprocess.run(
        [PYTHON, "-c", "import gam_fast.kernels"], cwd=ROOT, env=surroundings(), capture_output=True, check=False
    )
    if found.returncode == 0 or link.exists():
        yield
        return
    link.symlink_to(Path("..") / "kernels")
    try:
        yield
    finally:
        link.unlink()


def surroundings(**more: str) -> dict[str, str]:
    """Return the environment of the commands."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4", **more}


def look_at_gpu() -> tuple[str, str, str]:
    """Return the card's name for file names, its compute capability, and a line that describes the machine.

    Raises:
        SystemExit: torch is missing, or sees no CUDA GPU.
    """
    try:
        import torch
    except ImportError:
        raise SystemExit(f"{PYTHON} has no torch: name an interpreter that has, by make gpu PYTHON=...") from None
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU: install a CUDA build of torch and run on a machine with a GPU")
    card = torch.cuda.get_device_properties(0)
    line = f"{card.name}, {card.total_memory >> 30} GiB, torch {torch.__version__}, Python {sys.version.split()[0]}"
    return card.name.lower().replace(" ", "_"), f"{card.major}.{card.minor}", line


class Run:
    """Runs stages one after the other, within a budget.

    Args:
        out: folder of ``summary.txt`` and ``log.txt``.
        results: folder of the figures.
        budget: seconds for all stages.
        gpu: the name of the card for file names.
    """

    def __init__(self, out: Path, results: Path, budget: float, gpu: str) -> None:
        self._out, self._results, self._gpu = out, results, gpu
        self._begin = time.monotonic()
        self._budget = budget
        self.failed = False
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.txt", "log.txt"):
            (out / name).write_text("")

    def say(self, line: str) -> None:
        """Print a line, and append it to the summary."""
        print(line, flush=True)
        with (self._out / "summary.txt").open("a") as file:
            print(line, file=file)

    def verdict(self, name: str, word: str, seconds: float, what: str) -> None:
        """Print the line of a stage."""
        self.failed = self.failed or word in ("FAILED", "TIMEOUT")
        self.say(f"{name:<20} {word:<8} {seconds:4.0f} s  {what[:200]}")

    def stage(self, stage: Stage, environment: dict[str, str]) -> None:
        """Run the commands of one stage at the same time."""
        left = self._budget - (time.monotonic() - self._begin)
        if left < 15:
            self.verdict(stage.name, "SKIPPED", 0, f"the budget of {self._budget:.0f} s is used up")
            return
        if stage.needs and shutil.which(stage.needs) is None:
            self.verdict(stage.name, "SKIPPED", 0, f"{stage.needs} is not found")
            return
        begin = time.monotonic()
        limit = begin + min(stage.seconds, left - 5)
        started = []
        for name, command in stage.commands.items():
            log = self._out / f".{name}.log"
            filled = [part.replace("{results}", str(self._results)).replace("{gpu}", self._gpu) for part in command]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    filled,
                    cwd=ROOT,
                    env={**environment, **stage.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append((name, process, log))
        for name, process, log in started:
            try:
                status = process.wait(max(0.0, limit - time.monotonic()))
                word = "ok" if status == 0 else "FAILED"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                word = "TIMEOUT"
            self._report(stage, name, word, time.monotonic() - begin, log)

    def _report(self, stage: Stage, name: str, word: str, seconds: float, log: Path) -> None:
        text = log.read_text(errors="replace")
        log.unlink()
        with (self._out / "log.txt").open("a") as file:
            print(f"##### {stage.name}: {name}\n{text}", file=file)
        lines = [line for line in text.splitlines() if line.strip()]
        self.verdict(name if len(stage.commands) == 1 else f"  {name}", word, seconds, lines[-1] if lines else "")
        for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:8]:
            self.say(f"    {line[:200]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages from the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="stages: " + ", ".join(stage.name for stage in STAGES)
    )
    parser.add_argument("--stages", default="", help="names with commas or spaces between (default: all but initcheck)")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages (default: 540)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    arguments = parser.parse_args(argv)
    names = arguments.stages.replace(",", " ").split()
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(
            f"--stages: there is no {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STAGES)}"
        )
    gpu, capability, line = look_at_gpu()
    run = Run(arguments.out.resolve(), arguments.results.resolve(), arguments.budget, gpu)
    arguments.results.mkdir(parents=True, exist_ok=True)
    run.say(line)
    with kernels_in_place():
        for stage in STAGES:
            if stage.name in names or (not names and stage.is_default):
                run.stage(stage, surroundings(TORCH_CUDA_ARCH_LIST=capability))
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
