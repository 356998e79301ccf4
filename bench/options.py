"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from gam_fast import backends

from .spread import LEAST


def repeats(text: str) -> int:
    """Parse the number of measured rounds."""
    if not text.isdigit() or int(text) < LEAST:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST} for a median to mean something, got {text}")
    return int(text)


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def seeds(text: str) -> list[int]:
    """Parse seeds separated by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, got {text}") from None
    if min(found) < 0 or max(found) >= 2**63 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be different, not negative and below 2**63, got {text}")
    return found


def output(text: str) -> Path:
    """Parse a file to write. Check now that its folder exists, and not after minutes."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text} does not exist: create it, or name another")
    return path


def listed(parser: argparse.ArgumentParser, option: str, text: str, known: Collection[str]) -> list[str]:
    """Split a list of names at commas; fail by the parser if a name is unknown or given twice."""
    names = text.split(",")
    if not set(names) <= set(known):
        parser.error(f"{option} must be of {', '.join(known)}, got {text}")
    if len(set(names)) < len(names):
        parser.error(f"{option} must name each once, got {text}")
    return names


def add_common(parser: argparse.ArgumentParser, *, rounds: int | None = 9, files: Iterable[str] = ("json",)) -> None:
    """Add device, threads, repeats (default ``rounds``; ``None`` leaves the option out) and files to write."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of torch (default: 2)")
    if rounds is not None:
        what = "rounds; medians are taken over them (default: %(default)s)"
        parser.add_argument("--repeats", type=repeats, default=rounds, help=what)
    for name in files:
        does = "write the figures to" if name == "json" else "draw the figures to"
        parser.add_argument(f"--{name}", type=output, metavar="PATH", help=f"also {does} PATH")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add the backend of gam_fast."""
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; fail by the parser if the device or the backend is missing."""
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU; install a CUDA build of torch, or use --device cpu")
    if hasattr(given, "backend"):
        try:
            backends.select(given.backend, torch.device(given.device))
        except (RuntimeError, ValueError) as error:
            parser.error(f"--backend {given.backend}: {error}")
    return given
