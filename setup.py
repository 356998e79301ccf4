"""Build script; everything static is in pyproject.toml. The compiled core, when there is one, is declared here."""

import os

from setuptools import setup

BUILD_MODES = ("auto", "cpu", "cuda", "none")


def build_mode() -> str:
    """``GAM_FAST_BUILD``: what to compile. This version has no compiled core, so ``cpu`` and ``cuda`` cannot be met."""
    mode = os.environ.get("GAM_FAST_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise SystemExit(f"GAM_FAST_BUILD must be one of {', '.join(BUILD_MODES)}, got {mode!r}")
    if mode in ("cpu", "cuda"):
        raise SystemExit(f"GAM_FAST_BUILD={mode}: this version has no compiled core yet; use auto or none")
    return mode


build_mode()
setup()
