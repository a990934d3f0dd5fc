"""A checkpoint on its way to the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_sd.durable import directories
from megatron_sd.training.state.tensor_file import TensorFiles, write_tensors


class Writing:
    """This rank's files of a checkpoint on their way to the disk, one after the other in a thread. record: the
    first rank's state.json."""

    def __init__(self, directory: Path, record: str):
        self.directory = directory
        self.record = record
        self.staging = directories.staging_of(directory)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._files: dict[str, Future[directories.Seal]] = {}

    def add(self, folder: str, files: TensorFiles) -> None:
        """Begin to write them; what they hold must stay as it is until `wait`."""
        for name, file in files.items():
            path = self.staging / folder / name
            self._files[f"{folder}/{name}"] = self._thread.submit(write_tensors, path, *file)

    def is_done(self) -> bool:
        """Written, or failed."""
        return all(file.done() for file in self._files.values())

    def wait(self) -> None:
        """Until it is."""
        wait(self._files.values())

    def seals(self) -> directories.Seals:
        """Waits. Raises OSError naming a file that could not be written."""
        self.wait()
        return {name: file.result() for name, file in self._files.items()}

    def commit(self, seals: directories.Seals) -> None:
        """All ranks' files are there, under `seals`."""
        directories.commit(self.staging, self.directory, seals | directories.seal(self.staging, seals))
