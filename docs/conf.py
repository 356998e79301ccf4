"""The site: Sphinx with MyST pages, the furo theme, a reference made of the docstrings."""

from __future__ import annotations

import inspect
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


def signature(app: Any, what: str, name: str, entity: Any, *rest: Any) -> Any:
    """Return the signature of the constructor; Sphinx takes that of ``__new__``."""
    if what == "class" and issubclass(entity, gam_fast.SharpnessAwareOptimizer):
        text = str(inspect.signature(entity)).removesuffix(" -> 'None'")
        return text.replace("'", ""), ""
    return None


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", signature)
