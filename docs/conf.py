"""The configuration of the documentation's site: ``make docs`` builds it, without network."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "krea-dagster"
author = "The krea-dagster maintainers"
release = version = version_of("krea-dagster")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "code_tables",
    "llms_txt",
]
exclude_patterns = ["_extensions"]

# Python: signatures show names as users import them, and defaults as they are written.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# A link to a heading, file or page that does not exist fails the build.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
suppress_warnings = ["autodoc.mocked_object"]

html_theme = "furo"
html_title = f"krea-dagster {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
