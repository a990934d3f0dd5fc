"""How search engines of the web are asked, and what they answer: pure, no network here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sd.config import WebSearchConfig
from megatron_sd.records import Passage


@dataclass(frozen=True, kw_only=True)
class WebRequest:
    """What is sent. body: JSON of a POST; None: a GET."""

    url: str
    headers: Mapping[str, str]
    parameters: Mapping[str, str]
    body: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class WebEngine:
    """url: where it is unless the configuration says otherwise; None: nowhere. request: of a query, with the
    key or none. listed: the key of a reply's results; answers: the key that a reply has which found nothing, where
    it then has no list. unasked: the key that names what could not be asked. fields: of a result, address, title
    and text."""

    url: str | None
    needs_key: bool
    request: Callable[[str, str, WebSearchConfig, str], WebRequest]
    listed: str
    fields: tuple[str, str, str]
    answers: str | None = None
    unasked: str | None = None


class EngineBusyError(Exception):
    """The engine answered that it could not search, in the form of an answer that found nothing."""


def _serper(url: str, query: str, config: WebSearchConfig, key: str) -> WebRequest:
    return WebRequest(
        url=url, headers={"X-API-KEY": key}, parameters={}, body={"q": query, "num": config.num_results}
    )


def _searxng(url: str, query: str, config: WebSearchConfig, key: str) -> WebRequest:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return WebRequest(
        url=f"{url.rstrip('/')}/search", headers=headers, parameters={"q": query, "format": "json"}, body=None
    )


WEB_ENGINES: Mapping[str, WebEngine] = {
    "serper": WebEngine(
        url="https://google.serper.dev/search",
        needs_key=True,
        request=_serper,
        listed="organic",
        fields=("link", "title", "snippet"),
        answers="searchParameters",
    ),
    "searxng": WebEngine(
        url=None,
        needs_key=False,
        request=_searxng,
        listed="results",
        fields=("url", "title", "content"),
        unasked="unresponsive_engines",
    ),
}


def read_passages(reply: Any, engine: WebEngine, num_results: int) -> list[Passage]:
    """The first results of a reply, best first, each address once; those without one are left out. Raises
    ValueError for a reply of another form, EngineBusyError for one that found nothing since nobody was asked."""
    found = reply.get(engine.listed) if isinstance(reply, dict) else None
    if found is None and isinstance(reply, dict) and engine.answers in reply:
        found = []
    if found == [] and engine.unasked and reply.get(engine.unasked):
        raise EngineBusyError(f"nothing found, and {engine.unasked} {str(reply[engine.unasked])[:200]}")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"found {str(reply)[:200]!r}, expected JSON with a list {engine.listed!r}")
    url, title, text = engine.fields
    found_at: dict[str, Passage] = {}
    for one in found:
        address = str(one.get(url) or "")
        if address and address not in found_at:
            found_at[address] = Passage(
                id=address, title=str(one.get(title) or ""), text=str(one.get(text) or "")
            )
    return list(found_at.values())[:num_results]
