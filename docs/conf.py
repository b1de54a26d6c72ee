"""Sphinx: pages in Markdown beside this file, the API reference from docstrings."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

project = "resu"
author = "The resu developers"
copyright = "The resu developers"
version = release = installed_version("resu-torch")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "api_pages",
]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are described once
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

# One name may stand in several modules (`RESU` the algorithm, `RESUMode.RESU`); the text means the near one.
suppress_warnings = ["ref.python"]
# Docstrings inherited from torch follow torch's own conventions.
autodoc_inherit_docstrings = False

html_theme = "furo"
html_title = f"resu {release}"
