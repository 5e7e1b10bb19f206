"""Build: the README of the package, whose links lead somewhere outside a checkout, too.

Everything else stands in pyproject.toml. With an address called "Source" under [project.urls], such
as https://example.org/ecqx-onnx/blob/main/, links to files of the repository lead there. Without
one their text stays, with the file's name behind it, which the source distribution holds; pictures
of the repository are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def make_long_description(readme: str, source: str) -> str:
    """Make every link absolute.

    Args:
        readme: the text of README.md.
        source: address that a path in the repository is put behind; "" if there is none.

    Returns:
        The text without relative links.
    """

    def replace(match: re.Match[str]) -> str:
        mark, text, path = match.groups()
        if source:
            return f"{mark}[{text}]({source.rstrip('/')}/{path})"
        if mark:
            return ""
        return text if text == path else f"{text} (`{path}`)"

    return LINK.sub(replace, readme)


def read_source() -> str:
    """Read the repository's address from pyproject.toml.

    Returns:
        The address, or "".
    """
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(document["project"].get("urls", {}).get("Source", ""))


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=make_long_description(readme, read_source()),
        long_description_content_type="text/markdown",
    )
