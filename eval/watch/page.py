"""The live page: one HTML document with its style and its script within, which may ask for its own sections
and for nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from eval.report_page.groups import OUTCOMES
from eval.report_page.text import counted, element, plain
from eval.watch.filters import FILTERS, Matches
from eval.watch.view import Section

STYLE = (files("eval.report_page") / "style.css").read_text(encoding="utf-8") + (
    files("eval.watch") / "watch.css"
).read_text(encoding="utf-8")
SCRIPT = (files("eval.watch") / "watch.js").read_text(encoding="utf-8")
# The name of each section that the page shows at once, and its heading.
HEADINGS = {
    "standing": "",
    "phases": "Where the seconds of the newest steps went",
    "pulses": "Ranks",
    "curves": "Learning curves",
    "groups": "Newest groups",
}
FOLDED = "more"  # all other curves: asked for while it is open
_BAND = "A point of a long run is the mean of 2, 4, 8, ... steps; the band goes from their lowest to their highest."


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"


# Sent as a header. The style and the script are known by their digests, so that nothing else acts.
POLICY = "; ".join(
    [
        "default-src 'none'",
        f"style-src {_digest(STYLE)}",
        f"script-src {_digest(SCRIPT)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


def render_page(title: str, sections: Mapping[str, Section]) -> str:
    """The whole document, with all sections of HEADINGS as they are now."""
    parts = []
    for name, heading in HEADINGS.items():
        own = sections[name]
        body = f'<div id="{name}" data-version="{own.version}">{own.html}</div>'
        if name == "curves":
            body += _more()
        if name == "groups":
            body = _bar(own.counts) + body
        parts.append((element("h2", heading) if heading else "") + body)
    head = f'<meta charset="utf-8"><title>{plain(title)}</title><style>{STYLE}</style>'
    lost = '<p id="lost" class="notice" hidden></p>'
    body = f"<h1>{plain(title)}</h1>{lost}{''.join(parts)}<script>{SCRIPT}</script>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body class="live">{body}</body></html>\n'


def as_json(sections: Mapping[str, Section]) -> dict[str, Any]:
    """Sections as the page's script reads them."""
    return {
        name: {
            "version": own.version,
            "html": own.html,
            "counts": {key: count_words(found) for key, found in own.counts.items()},
        }
        for name, own in sections.items()
    }


def count_words(found: Matches) -> str:
    """How much a filter finds.

    >>> count_words(Matches(groups=1, rollouts=3))
    '1 group, 3 rollouts'
    """
    return f"{counted(found.groups, 'group')}, {counted(found.rollouts, 'rollout')}"


def _more() -> str:
    inside = f'<div id="{FOLDED}" data-version=""></div>'
    return (
        element("p", _BAND, "facts")
        + f'<details id="fold"><summary>all other metrics</summary>{inside}</details>'
    )


def _bar(counts: Mapping[str, Matches]) -> str:
    """What to show of the groups: choices that stay while groups are exchanged."""
    boxes = "".join(
        f'<label class="choice"><input type="checkbox" data-filter="{name}">{plain(own.title)}'
        f' <small data-count="{name}">{count_words(counts[name])}</small></label>'
        for name, own in FILTERS.items()
    )
    outcomes = {"": "every outcome"} | OUTCOMES
    options = "".join(f'<option value="{key}">{plain(title)}</option>' for key, title in outcomes.items())
    joins = '<option value="any">any of the ticked</option><option value="all">all of the ticked</option>'
    return (
        f'<div class="bar">{boxes}<select id="join" aria-label="several filters">{joins}</select>'
        f'<select id="outcome" aria-label="outcome of a group">{options}</select>'
        '<label class="choice"><input type="checkbox" id="only">hide other rollouts</label>'
        '<span id="shown" class="facts"></span>'
        '<button id="newer" type="button" hidden></button></div>'
    )
