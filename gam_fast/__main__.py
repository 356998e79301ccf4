"""``python -m gam_fast``: report the installation, the backends that run here, and why the others do not."""

from __future__ import annotations

import sys
import warnings

import torch

from . import __version__
from .backends import ENVIRONMENT_VARIABLE, available, select


def report() -> str:
    """Return the text that ``python -m gam_fast`` prints."""
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [f"gam_fast {__version__}, torch {torch.__version__}, Python {python}", "backends, in order of preference:"]
    for name, status in available().items():
        lines.append(f"  {name:<8}{'available' if status.available else 'not available'}: {status.reason}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in (torch.device("cpu"), *([accelerator] if accelerator else [])):
        lines.append(f"backend='auto' on {device.type}: {_chosen(device)}")
    lines.append(f"override for a process: {ENVIRONMENT_VARIABLE}=<name>")
    return "\n".join(lines)


def _chosen(device: torch.device) -> str:
    """Return the name of the chosen backend and, if it is not the compiled core, the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report itself says that the core does not fit
        chosen = select("auto", device).name
    try:
        select("native", device)
    except RuntimeError as error:
        return chosen if device.type == "cpu" else f"{chosen} ({error})"
    return chosen


if __name__ == "__main__":
    print(report())
