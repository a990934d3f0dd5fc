"""Links between Markdown files, as they stand in the repository and as the site has them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository outside docs/ that are pages of the site, or pictures of pages.
OUTSIDE = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/README.md": "kernels/kernels.md",
    "kernels/linear_jsd.md": "kernels/linear_jsd.md",
    "results/claim_c/results.md": "results/claim_c.md",
    "results/claim_c/results.svg": "results/results.svg",
    "results/claim_c_strength/results.md": "results/claim_c_strength.md",
}
# code, or a link, whichever begins first
_MARKED = re.compile(
    r"^```.*?^```[ ]*$|``.+?``|`(?:[^`\n]|\n(?!\n))+`"
    r"|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def site_place(path: str) -> str | None:
    """Where a file of the repository lies in the site; None where it is no part of it."""
    return OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def repository_path(place: str) -> str:
    """The file of the repository that lies at a place of the site."""
    return next((path for path, own in OUTSIDE.items() if own == place), f"docs/{place}")


def for_the_site(markdown: str, place: str) -> str:
    """A page's text with links between places of the site. A link to a file that is no part of it, such as
    code, becomes its own text."""
    source = repository_path(place)

    def moved(match: re.Match[str]) -> str:
        bang, text, target = match.group("bang", "text", "target")
        if target is None or is_elsewhere(target) or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        found = site_place(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if found is None:
            return text
        relative = posixpath.relpath(found, posixpath.dirname(place) or ".")
        return f"{bang}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    return _MARKED.sub(moved, markdown)


def links(markdown: str) -> list[str]:
    """The targets of a page's links and pictures, those in code left out."""
    return [match["target"] for match in _MARKED.finditer(markdown) if match["target"] is not None]


def anchors(markdown: str) -> set[str]:
    """What a link may name behind `#`: the headings, as GitHub and the site spell them."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#{1,6} +(.+?) *#*$", re.sub(r"(?ms)^```.*?^```", "", markdown), re.MULTILINE
    ):
        plain = re.sub(
            r"[^\w\- ]", "", _MARKED.sub(lambda match: match["text"] or match[0], heading).lower()
        ).replace(" ", "-")
        number = next(count for count in range(100) if (f"{plain}-{count}" if count else plain) not in found)
        found.add(f"{plain}-{number}" if number else plain)
    return found


def is_elsewhere(target: str) -> bool:
    """On another host."""
    return re.match(r"[a-z]+:", target) is not None
