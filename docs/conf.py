"""How Sphinx builds the documentation: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pytorch_accelerated import __version__ as release

project = "pytorch-accelerated"
copyright = "the authors of pytorch-accelerated"
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes are listed with the class; properties and fields are members besides.
napoleon_use_ivar = True

# The types below are documented elsewhere, and a build without a network cannot look
# them up: it has no inventory of Python, torch, numpy and the like.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|optim|np|numpy|pd|pandas|accelerate|Accelerator)\b.*"),
    (r"py:.*", r"(matplotlib|Figure)\b.*"),
    (r"py:.*", r".*\.(Result)$"),  # type variables
    (
        r"py:.*",
        r"(collections|contextlib|abc|enum|functools|os|pathlib|types|typing)\b.*",
    ),
]
