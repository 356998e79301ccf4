"""``python -m gam_fast``: what is installed, which backends run here, and why the others do not."""

from __future__ import annotations

import sys

import torch

from . import __version__
from .backends import ENVIRONMENT_VARIABLE, available, select


def report() -> str:
    """The text that ``python -m gam_fast`` prints."""
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [f"gam_fast {__version__}, torch {torch.__version__}, Python {python}", "backends, in order of preference:"]
    for name, status in available().items():
        lines.append(f"  {name:<8}{'available' if status.available else 'not available'}: {status.reason}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in (torch.device("cpu"), *([accelerator] if accelerator else [])):
        lines.append(f"backend='auto' on {device.type}: {select('auto', device).name}")
    lines.append(f"override for a process: {ENVIRONMENT_VARIABLE}=<name>")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
