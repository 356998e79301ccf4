"""The site: Sphinx with MyST pages, the furo theme, a reference made of the docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

import gam_fast

project = "gam_fast"
author = "the gam_fast authors"
version = release = gam_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gam_fast {version}"
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


Optimizer = gam_fast.SharpnessAwareOptimizer


def signature(app: Any, what: str, name: str, entity: Any, *rest: Any) -> Any:
    """Return the signature of the constructor; Sphinx takes that of ``__new__``."""
    if what == "class" and issubclass(entity, Optimizer):
        found = inspect.signature(entity.__init__)
        own = list(found.parameters.values())[1:]
        text = str(found.replace(parameters=own)).removesuffix(" -> 'None'")
        text = text.replace("<class 'torch.optim.sgd.SGD'>", "torch.optim.SGD")
        return re.sub(": '([^']*)'", r": \1", text), ""
    return None


SHARED = "    …: the options of :class:`~gam_fast.SharpnessAwareOptimizer`."


def own_arguments(
    app: Any, what: str, name: str, entity: Any, options: Any, lines: list[str]
) -> None:
    """Leave out what the base class has: the options of all classes."""
    if what != "class" or entity is Optimizer or not issubclass(entity, Optimizer):
        return
    base = {line for line in inspect.getdoc(Optimizer).splitlines() if line[:4] == "    "}
    at = next((i for i, line in enumerate(lines) if line.startswith("    model: ")), None)
    kept = [
        SHARED if i == at else line
        for i, line in enumerate(lines)
        if i == at or line not in base
    ]
    lines[:] = kept


def setup(app: Any) -> None:
    """Connect :func:`signature`."""
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", own_arguments, priority=400)  # before napoleon
