"""The passage store: an Arrow stream file, memory-mapped, with rows in id order.

The file also opens with `datasets.Dataset.from_file`. Licence and source of every row lie beside its text.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from megatron_sd.errors import DataError
from megatron_sd.records import Passage

PASSAGES_NAME = "passages.arrow"
ROWS_PER_BATCH = 4096
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text", "source", "license")])
_SHOWN = ("id", "title", "text")


def join_contents(passage: Passage) -> str:
    """Search-R1's `contents`: the title in double quotes, a line break, the text."""
    return f'"{passage.title}"\n{passage.text}'


def split_contents(contents: str) -> tuple[str, str]:
    """(title, text) of Search-R1's `contents`; the text is empty when there is no line break."""
    title, _, text = contents.partition("\n")
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of SCHEMA, each of ROWS_PER_BATCH rows but the last, whose ids must be strictly
    increasing.

    Raises DataError for a repeated id or one out of order.
    """
    previous = None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in batches:
            for id_ in batch.column("id").to_pylist():
                if previous is not None and id_ <= previous:
                    raise DataError(
                        f"passage ids must be unique and in order: found {id_!r} after {previous!r}"
                    )
                previous = id_
            writer.write_batch(batch)


class PassageStore:
    """Read-only passages by row number; row order is id order, so comparing rows compares ids."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises DataError when the file cannot be read."""
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                self._batches = [[batch.column(name) for name in _SHOWN] for batch in reader]
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{path} is no readable passage file ({error}): build the corpus again"
            ) from error
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
        columns = self._batches[row // ROWS_PER_BATCH]
        offset = row % ROWS_PER_BATCH
        id_, title, text = (column[offset].as_py() for column in columns)
        return Passage(id=id_, title=title, text=text)

    def between(self, first: str, last: str) -> Iterator[Passage]:
        """The passages whose ids are within the two, in order."""
        row = bisect.bisect_left(range(len(self)), first, key=lambda row: self[row].id)
        while row < len(self) and (passage := self[row]).id <= last:
            yield passage
            row += 1

    def take(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of the rows, in the order asked for."""
        return [self[row] for row in rows]
