"""Builds the documentation: `make docs`, strict; a warning fails.

The pages of commands and of Python names are generated from the program before they are read.
Links to files of the repository outside docs/ are kept as text, once the file is there.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(DOCS)]

import generate  # noqa: E402

import ecqx_onnx  # noqa: E402

project = "ecqx-onnx"
author = "the ecqx-onnx maintainers"
release = version = ecqx_onnx.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"ecqx-onnx {release}"
html_static_path: list[str] = []
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_execution_show_tb = True

nitpicky = True
# Names of other projects have no inventory here; our own must lead somewhere.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!ecqx_onnx).*"),
    # Rooms behind the public names, which signatures mention.
    (r"py:.*", r"ecqx_onnx(_converters)?\.\w+\..*"),
]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s#]*)(?:#[^)\s]*)?\)")
logger = logging.getLogger(__name__)


def name_files_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links that lead out of docs/ into text, and warn of files that are missing.

    Args:
        app: that builds.
        page: name of the page.
        source: its text, the only entry; replaced.
    """
    folder = (DOCS / page).parent

    def replace(match: re.Match[str]) -> str:
        _, text, target = match.groups()
        path = (folder / target).resolve()
        if not path.exists():
            logger.warning("dead link to %s", target, location=page)
        if DOCS in path.parents:
            return match[0]
        name = path.relative_to(ROOT).as_posix() if ROOT in path.parents else target
        return text if text == name else f"{text} (`{name}`)"

    if not page.startswith("notebooks/"):
        source[0] = LINK.sub(replace, source[0])


def refuse_undocumented(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Warn of a public name without a docstring.

    Args:
        app: that builds.
        what: "class", "function", "method" and the like.
        name: its full name.
        value: what it stands for.
        options: of the directive.
        lines: its docstring.
    """
    is_described = what in ("class", "function", "method", "exception", "property")
    if is_described and not any(line.strip() for line in lines):
        logger.warning("the public name %s has no docstring", name)


def show_examples_as_code(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Keep an example from being read as prose: it is code, as it stands.

    Args:
        app: that builds.
        what: kind of the name.
        name: its full name.
        value: what it stands for.
        options: of the directive.
        lines: its docstring; changed in place.
    """
    for number, line in enumerate(lines):
        if line.strip() in ("Example:", "Examples:"):
            lines[number] = f"{line.rstrip()}:"
            lines.insert(number + 1, "")


def make_accessible(app: Sphinx, error: Exception | None) -> None:
    """Mend in the pages what axe finds: headings without a level, boxes that no key scrolls.

    Args:
        app: that has built.
        error: why it failed; None where it did not.
    """
    if error is not None or app.builder.name != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        path.write_text(mend_page(path.read_text(encoding="utf-8")), encoding="utf-8")


def mend_page(page: str) -> str:
    """Give captions a heading's level, and code and tables a place in the order of Tab.

    Args:
        page: as Sphinx and the theme write it, or as this has mended it before.

    Returns:
        The page.
    """
    page = page.replace('role="heading">', 'role="heading" aria-level="2">')
    page = page.replace("<pre>", '<pre tabindex="0">')
    return re.sub(r'(<div class="table-wrapper[^"]*")>', r'\1 tabindex="0">', page)


def setup(app: Sphinx) -> None:
    """Generate pages and connect the checks.

    Args:
        app: that builds.
    """
    generate.write_pages(DOCS / "reference")
    app.connect("source-read", name_files_outside)
    app.connect("build-finished", make_accessible)
    app.connect("autodoc-process-docstring", refuse_undocumented)
    app.connect(
        "autodoc-process-docstring", show_examples_as_code, priority=400
    )  # as napoleon: 500
    for name in ecqx_onnx.__all__:
        value = getattr(ecqx_onnx, name)
        if not isinstance(value, str) and not inspect.getdoc(value):
            logger.warning("the public name ecqx_onnx.%s has no docstring", name)
