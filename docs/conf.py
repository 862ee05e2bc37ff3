"""How the pages are built: ``sphinx-build -W -q docs docs/_build`` (offline; nothing is fetched)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from stemloop import __version__  # noqa: E402

project = "stemloop"
author = "the stemloop authors"
project_copyright = "the stemloop authors, GPL-3.0-or-later"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": False}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
# torch and what needs it are imported by functions, never by modules: nothing has to be replaced here
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"stemloop {__version__}"
html_theme_options = {
    "navigation_with_keys": False,
    "show_nav_level": 1,
    "secondary_sidebar_items": ["page-toc"],
}
html_show_sourcelink = False


def _as_restructured_text(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose: |e| is a modulus, and a line ``name : text`` begins an entry of a list."""
    out: list[str] = []
    entry = section = False
    for i, raw in enumerate(lines):
        section = section or lines[i + 1 : i + 2] in (["----------"], ["-------"], ["------"], ["-----"])
        parts = re.split(r"(``.*?``)", raw)
        line = "".join(p if p.startswith("``") else re.sub(r"(?<!\\)\|", r"\\|", p) for p in parts)
        begins = None if section else re.match(r"([A-Za-z_][\w, ]*) : (.*)", line)
        if begins:
            out += ["", f"- **{begins[1]}** : {begins[2]}"]
            entry = True
        elif entry and line.startswith(" "):
            out.append("  " + line.strip())
        else:
            if entry and line.strip():
                out.append("")
            entry = False
            out.append(line)
    lines[:] = out


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)


#: Shapes such as (n, 2) in docstrings are no names of attributes called n.
suppress_warnings = ["ref.python"]
