"""The documentation site: `make docs` builds it into outputs/docs, without a network, and takes warnings for errors."""

import logging
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import slsam_ds  # noqa: E402  # the package of this repository, wherever it is built from

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "slsam_ds"
author = "The developers of slsam_ds"
project_copyright = author
release = version = slsam_ds.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    # ours, in _ext
    "outside_links",
    "docstrings",
    "command_help",
]
exclude_patterns = ["_ext"]
smartquotes_action = "D"  # dashes alone: quotation marks in docstrings and pages belong to values
nitpicky = True
# A glob of a table of contents need not find anything. This warning has no type, so `suppress_warnings` cannot name it.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: getattr(record, "subtype", None) != "empty_glob"
)

# Links that lead out of docs. The files that a page includes are pages of the site; all others are in the repository.
repository_url = _PROJECT.get("urls", {}).get("Repository")
included_files = {"README.md": "readme", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}

myst_heading_anchors = 4

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
autodoc_mock_imports = ["axolotl"]

# Types of other packages: there is no network to look for their pages.
_OTHERS = "torch|transformers|accelerate|axolotl|pydantic|collections|contextlib|os|pathlib|random|typing"
nitpick_ignore_regex = [(r"py:.*", rf"({_OTHERS})\..*")]
