"""``python -m gam_fast.flatness module:factory``: measure a checkpoint, print a table, write JSON and a picture."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from .ascent import Flatness
from .extra import require
from .loss import MODES, Loss
from .measure import Measurement, measure
from .plots import plot_slice, plot_spectrum
from .slices import slice_1d

DESCRIPTION = """Measure how flat a minimum is: zeroth- and first-order flatness (R0, R1), top eigenvalues of the
Hessian, its trace and spectral density."""

EPILOG = """The factory is a function, named as module:function (from this folder or installed) or file.py:function. It
returns (model, loss_fn, data), where loss_fn(model(x), y) is a number and data an iterable of pairs (x, y) that can be
read again and again; or a gam_fast.flatness.Loss. Example:
python -m gam_fast.flatness train.py:build --checkpoint last.pt --key model --rho 0.05,0.1"""


class First:
    """An iterable over the first batches of another."""

    def __init__(self, data: Iterable[Any], count: int) -> None:
        self.data, self.count = data, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.data), self.count)

    def __getattr__(self, name: str) -> Any:  # the generators of a loader, and of its samplers
        return getattr(self.data, name)


def radii(text: str) -> tuple[float, ...]:
    """Parse radii separated by commas."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None
    if not all(0 <= rho < float("inf") for rho in found):
        raise argparse.ArgumentTypeError(f"must not be negative, got {text!r}")
    return found


def positive(text: str) -> float:
    """Parse a positive number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return value


def at_least(least: int) -> Any:
    """Return a parser of integers: at least ``least``, or 0 for none."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least and value != 0:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def whole(text: str) -> int:
    """Parse a positive integer."""
    value: int = at_least(1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def mapping(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"seed\": 1}}', got {text!r}")
    return found


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("python -m gam_fast.flatness", description=DESCRIPTION, epilog=EPILOG)

    def option(name: str, text: str, **settings: Any) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **settings)

    parser.add_argument("factory", help="module:function or file.py:function that makes model, loss and data")
    parser.add_argument(
        "--arguments", type=mapping, metavar="JSON", default={}, help="keyword arguments of the factory"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="state dict to load into the model (weights only)"
    )
    parser.add_argument("--key", help="entry of the checkpoint that is the state dict, unless the whole checkpoint is")
    option("--rho", "radii, with commas between", type=radii, metavar="R[,R…]", default="0.1")
    option("--mode", "mode of the modules; frozen: as the factory leaves them", choices=MODES, default="eval")
    option("--eigenvalues", "number of largest eigenvalues; 0: none", type=at_least(1), metavar="K", default=1)
    option("--trace-samples", "products for the trace; 0: no trace", type=at_least(2), metavar="N", default=30)
    option("--density-steps", "Lanczos steps for the spectrum; 0: none", type=at_least(2), metavar="N", default=0)
    option("--restarts", "number of ascents for R0 and R1", type=whole, metavar="N", default=3)
    option("--max-iterations", "of each ascent", type=whole, metavar="N", default=100)
    option("--tolerance", "residual below which an ascent has converged", type=positive, metavar="T", default=1e-3)
    option("--batches", "use the first N batches only; 0: all", type=at_least(1), metavar="N", default=0)
    option("--seed", "seed of all random numbers", type=int, metavar="N", default=0)
    option("--device", "device for model and data", default="cpu")
    option("--threads", "CPU threads of torch; 0: torch's default", type=at_least(1), metavar="N", default=0)
    parser.add_argument("--per-group", action="store_true", help="also measure each child of the model by itself")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to PATH")
    parser.add_argument("--png", type=Path, metavar="PATH", help="write a picture to PATH")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def load(name: str) -> Any:
    """Return the object that ``module:function`` or ``file.py:function`` names.

    Raises:
        ValueError: it does not exist.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise ValueError(f"the factory must be module:function or file.py:function, got {name!r}")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise ValueError(f"there is no file {place}")
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(Path(place).resolve().parent))
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(f"{place} cannot be imported: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{place} has no function {function}")
    return getattr(module, function)


def build(made: Any, arguments: argparse.Namespace) -> Loss:
    """Return the loss to measure from the factory's result, with the checkpoint loaded.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: the factory, checkpoint or device cannot be used.
    """
    model: nn.Module | None
    if isinstance(made, Loss):
        model = made.model
    elif isinstance(made, tuple | list) and len(made) == 3 and isinstance(made[0], nn.Module):
        try:
            model = made[0].to(arguments.device)
        except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
            raise ValueError(f"--device {arguments.device} cannot be used: {error}") from error
    else:
        raise ValueError(
            f"the factory must return (model, loss_fn, data) or a gam_fast.flatness.Loss, got {type(made).__name__}"
        )
    if arguments.checkpoint is not None:
        if model is None:
            raise ValueError("--checkpoint needs a model: the factory returned a Loss without one")
        load_into(model, state_dict(arguments.checkpoint, arguments.key, arguments.device), arguments.checkpoint)
    if isinstance(made, Loss):
        if arguments.batches or arguments.device != "cpu" or arguments.mode != MODES[0]:
            raise ValueError("--batches, --device and --mode are settled where the factory returns a Loss")
        return made
    _, loss_fn, data = made
    params: Any = None
    if arguments.per_group:
        assert model is not None
        params = children(model)
    data = First(data, arguments.batches) if arguments.batches else data
    return Loss(made[0], loss_fn, data, params=params, mode=arguments.mode, seed=arguments.seed)


def state_dict(path: Path, key: str | None, device: str) -> Any:
    """Return the checkpoint's state dict: the whole checkpoint, or its entry ``key``."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and pickle raise many kinds of errors for other files
        raise ValueError(f"{path} is not a checkpoint that holds weights only: {error!r}") from error
    if key is not None:
        if not isinstance(found, dict) or key not in found:
            names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{path} has no entry {key!r}; it has {names}")
        found = found[key]
    return found


def load_into(model: nn.Module, state: Any, path: Path) -> None:
    """Load ``state`` into ``model``; where an entry of ``state`` would fit instead, the error names it."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        for name, entry in state.items():
            if isinstance(entry, dict) and entry.keys() & model.state_dict().keys():
                raise ValueError(f"{path} has the state dict in its entry {name!r}: add --key {name}") from error
        raise


def children(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the parameters that require a gradient, by child module; the model's own ones as ``(own)``."""
    groups: dict[str, list[torch.Tensor]] = {}
    seen: set[torch.Tensor] = set()
    own = ("(own)", model.parameters(recurse=False))
    for name, params in (own, *((name, child.parameters()) for name, child in model.named_children())):
        found = [p for p in params if p.requires_grad and p not in seen]
        seen.update(found)
        if found:
            groups[name] = list(found)
    return groups


def picture(loss: Loss, found: Measurement, path: Path) -> None:
    """Plot the spectrum, if measured, and slices of loss and gradient norm along the sharpest known direction."""
    pyplot = require("matplotlib.pyplot", "a picture")
    if found.eigenvalues is not None:
        direction, about = found.eigenvalues.vectors[0], "along the first eigenvector"
    else:
        best: Flatness = found.first_order[-1]
        size = best.rho or 1.0
        direction, about = tuple(x / size for x in best.point), "towards the maximum of the gradient norm"
    reach = 2 * max(one.rho for one in found.first_order) or 1.0
    line = slice_1d(loss, direction, torch.linspace(-reach, reach, 41).tolist())
    panels = 2 if found.density is None else 3
    figure, axes = pyplot.subplots(1, panels, figsize=(5.0 * panels, 3.8), layout="constrained")
    plot_slice(line, "loss", axes=axes[0]).set_xlabel(about)
    plot_slice(line, "gradient_norm", axes=axes[1]).set_xlabel(about)
    if found.density is not None:
        plot_spectrum(found.density, eigenvalues=found.eigenvalues, axes=axes[2])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def require_all(arguments: argparse.Namespace) -> None:
    """Import all packages that will be needed, so that a missing one is found before measuring."""
    require("rich.table", "the table")
    if not arguments.quiet:
        require("tqdm", "a progress bar (left out by --quiet)")
    if arguments.eigenvalues or arguments.trace_samples or arguments.density_steps:
        require("curvlinops", "curvature (left out by --eigenvalues 0 --trace-samples 0)")
    if arguments.eigenvalues:
        require("scipy.sparse.linalg", "eigenvalues (left out by --eigenvalues 0)")
    if arguments.png is not None:
        require("matplotlib", "a picture").use("Agg")


def show(title: str, found: Measurement) -> None:
    """Print a table in the terminal."""
    table = require("rich.table", "the table").Table(title=title)
    for heading, justify in (("quantity", "left"), ("value", "right"), ("", "left")):
        table.add_column(heading, justify=justify)
    for row in found.rows():
        table.add_row(*row)
    require("rich.console", "the table").Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for path in (arguments.json, arguments.png):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        require_all(arguments)
    except ImportError as error:
        parser.error(str(error))
    try:
        factory = load(arguments.factory)
        inspect.signature(factory).bind(**arguments.arguments)
    except (ValueError, TypeError) as error:
        parser.error(f"{arguments.factory}: {error}")
    made = factory(**arguments.arguments)  # an error in it is shown with its traceback
    try:
        loss = build(made, arguments)
        loss.check()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(str(error))
    parts = {"all": loss} | (loss.by_group() if arguments.per_group else {})
    options = {name: getattr(arguments, name) for name in ("eigenvalues", "trace_samples", "density_steps", "restarts")}
    options |= {name: getattr(arguments, name) for name in ("max_iterations", "tolerance", "seed")}
    found = {}
    for name, part in parts.items():
        found[name] = measure(part, arguments.rho, progress=not arguments.quiet, **options)
        show(arguments.factory if name == "all" else name, found[name])
        if arguments.json is None:
            continue
        figures = {
            "factory": arguments.factory,
            "arguments": arguments.arguments,
            "checkpoint": None if arguments.checkpoint is None else str(arguments.checkpoint),
            "mode": loss.mode,
            "versions": {"gam_fast": __version__, "torch": str(torch.__version__)},
            "measures": {name: one.as_dict() for name, one in found.items()},
        }
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.json is not None:
        print(f"figures: {arguments.json}")
    if arguments.png is not None:
        picture(loss, found["all"], arguments.png)
        print(f"picture: {arguments.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
