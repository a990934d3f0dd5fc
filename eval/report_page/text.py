"""Text from anywhere (a model, a passage, a question) as harmless HTML."""

from __future__ import annotations

import html


def plain(text: object) -> str:
    """Escaped for element content and attribute values; control and direction-changing characters become
    U+FFFD."""
    return html.escape(
        "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text)), quote=True
    )


def element(name: str, content: str, kind: str = "") -> str:
    """An element around content that is HTML already; kind: its classes."""
    classes = f' class="{plain(kind)}"' if kind else ""
    return f"<{name}{classes}>{content}</{name}>"


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> [counted(number, "group") for number in (0, 1, 2)]
    ['0 groups', '1 group', '2 groups']
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
