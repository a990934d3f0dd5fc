"""The vectors of a passages directory, as `sd-search data encode` wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.manifest import open_manifest


class VectorShards:
    """A verified vectors directory; rows are read through memory maps."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError that names a missing, damaged or foreign file."""
        self.directory = directory
        self.manifest, self.version = open_manifest(directory, "vectors")
        names = sorted(name for name in self.manifest.files if name.endswith(".npy"))
        try:
            self._shards = [np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in names]
        except ValueError as error:
            raise DataError(
                f"{directory} holds a shard that is no array of numbers ({error}): encode again"
            ) from error
        self._rows_per_shard = self.manifest.settings["vectors"]["rows_per_shard"]
        self.dim = self.manifest.settings["vectors"]["dim"]
        if sum(map(len, self._shards)) != len(self) or any(
            shard.shape[1:] != (self.dim,) for shard in self._shards
        ):
            raise DataError(
                f"{directory}: its shards do not hold {len(self)} vectors of {self.dim} numbers: encode again"
            )

    def __len__(self) -> int:
        return self.manifest.num_passages

    def blocks(self, num_rows: int) -> Iterator[np.ndarray]:
        """Float32 [<= num_rows, dim] blocks, in row order."""
        for shard in self._shards:
            for start in range(0, len(shard), num_rows):
                yield shard[start : start + num_rows].astype(np.float32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Float32 [len(rows), dim]."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        for place, row in enumerate(rows.tolist()):
            shard, offset = divmod(row, self._rows_per_shard)
            vectors[place] = self._shards[shard][offset]
        return vectors
