"""A passage that knows where it comes from, and many of them as Arrow batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.passages import ROWS_PER_BATCH, SCHEMA


@dataclass(frozen=True, kw_only=True)
class SourcedPassage(Passage):
    """A passage and where it comes from."""

    source: str = ""
    license: str = ""


def to_batches(passages: Iterable[Passage], size: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """Batches of `size` rows, the last one shorter; passages without source or licence get empty ones."""
    remaining = iter(passages)
    while rows := list(islice(remaining, size)):
        columns = [[getattr(passage, name, "") for passage in rows] for name in SCHEMA.names]
        yield pa.record_batch(columns, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterator[SourcedPassage]:
    """The rows of a batch."""
    for values in zip(*(batch.column(name).to_pylist() for name in SCHEMA.names)):
        yield SourcedPassage(**dict(zip(SCHEMA.names, values)))
