"""The passage store: an Arrow stream file, memory-mapped, with rows in id order.

The file also opens with `datasets.Dataset.from_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from megatron_sd.errors import DataError
from megatron_sd.records import Passage

PASSAGES_NAME = "passages.arrow"
_ROWS_PER_BATCH = 4096
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


def write_passages(path: Path, passages: Iterable[Passage]) -> None:
    """Write passages, which must come in strictly increasing order of id. Raises DataError for a repeated id."""
    previous = None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        remaining = iter(passages)
        while rows := list(islice(remaining, _ROWS_PER_BATCH)):
            for passage in rows:
                if previous is not None and passage.id <= previous:
                    raise DataError(f"passage ids must be unique and in order: found {passage.id!r} after {previous!r}")
                previous = passage.id
            columns = [[getattr(passage, name) for passage in rows] for name in _SCHEMA.names]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


class PassageStore:
    """Read-only passages by row number; row order is id order, so comparing rows compares ids."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises DataError when the file cannot be read."""
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                self._batches = [batch.columns for batch in reader]
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is no readable passage file ({error}): build the corpus again") from error
        self._num_passages = sum(len(columns[0]) for columns in self._batches)

    def __len__(self) -> int:
        return self._num_passages

    def __iter__(self) -> Iterator[Passage]:
        for columns in self._batches:
            for id_, title, text in zip(*(column.to_pylist() for column in columns)):
                yield Passage(id=id_, title=title, text=text)

    def __getitem__(self, row: int) -> Passage:
        """One passage. Raises IndexError outside [0, len)."""
        if not 0 <= row < self._num_passages:
            raise IndexError(f"row {row} of a store of {self._num_passages} passages")
        columns = self._batches[row // _ROWS_PER_BATCH]
        offset = row % _ROWS_PER_BATCH
        id_, title, text = (column[offset].as_py() for column in columns)
        return Passage(id=id_, title=title, text=text)

    def take(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of the rows, in the order asked for."""
        return [self[row] for row in rows]
