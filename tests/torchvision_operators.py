"""Importing this lets torchvision, which other packages import where it is installed, be imported.

PyPI's torchvision is built for CUDA builds of torch. Beside a CPU build it has no operators, and its import fails.
Declared, they only cannot be called; what is left of it serves Lightning, Transformers and timm.
"""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None and torch.version.cuda is None:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
