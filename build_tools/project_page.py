"""The page of da_ops on a package index: addresses, and README with links that work there.

Where the repository lies is known to whoever publishes it: DA_OPS_REPOSITORY=https://HOST/OWNER/NAME.
Without it README goes in as it is, with links that are good in the source tree, and no addresses.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
# Code, in which nothing is a link; or what stands before a target, and the target.
LINK = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)|`[^`\n]+`"
    r"|(?P<before>\]\(<?|^\[[^\]\n]+\]:[ ]+<?|\b(?:src|srcset|href)=\")(?P<target>[^\s)>\"]+)",
    re.MULTILINE | re.DOTALL,
)
ABSOLUTE = re.compile(r"#|//|[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def version() -> str:
    return (ROOT / "da_ops" / "_version.py").read_text().split('"')[1]


def fields(environ: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of setup()."""
    readme = (ROOT / "README.md").read_text()
    shown: dict[str, Any] = {"long_description_content_type": "text/markdown"}
    repository = environ.get("DA_OPS_REPOSITORY", "").rstrip("/").removesuffix(".git")
    if not repository:
        return {**shown, "long_description": readme, "project_urls": {}}
    if not re.fullmatch(r"https?://[^/\s]+/\S+", repository):
        raise SetupError(
            "DA_OPS_REPOSITORY: expected the address of the repository, such as "
            f"https://HOST/OWNER/NAME, or nothing, got {repository!r}"
        )
    tag = f"v{version()}"
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
    }
    return {**shown, "long_description": absolute(readme, repository, tag), "project_urls": urls}


def absolute(markdown: str, repository: str, tag: str) -> str:
    """The text with its relative links, of Markdown and HTML, into the repository at a tag."""

    def replace(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or ABSOLUTE.match(target):
            return found[0]
        path, rest = re.fullmatch(r"([^?#]*)(.*)", target).groups()
        kind = "raw" if path.lower().endswith(PICTURES) else "blob"
        path = posixpath.normpath(path.lstrip("/"))
        return f"{found['before']}{repository}/{kind}/{tag}/{path}{rest}"

    return LINK.sub(replace, markdown)
