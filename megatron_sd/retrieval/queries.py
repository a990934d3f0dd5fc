"""What a query may be: one rule for the environment that asks, the client that sends and the server that
answers."""

from __future__ import annotations


def fit_query(query: str, max_bytes: int) -> str:
    """`query` as text of at most `max_bytes` UTF-8 bytes: cut between characters, halves of characters
    (lone surrogates) replaced by U+FFFD."""
    encoded = query.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return encoded[:max_bytes].decode(errors="ignore") if len(encoded) > max_bytes else encoded.decode()
