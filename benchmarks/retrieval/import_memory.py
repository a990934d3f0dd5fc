"""Memory of an import of passages: the peak of reading the rows alone and of the whole import, by size of
the file.

    python -m benchmarks.retrieval.import_memory [--gib 0.25 1] [--folder DIR]

TSV files of passages of about 600 bytes, generated; each figure is the peak resident memory of a process of
its own. What must hold: the peak does not grow with the file. Not a comparison: it prints what
docs/compatibility.md says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.sources.questions import ImportConfig, import_file
from data_prep.sources.rows import read_rows

PHRASES, PHRASE_WORDS, TEXT_PHRASES = 20_000, 10, 9


def write_tsv(path: Path, num_bytes: int) -> int:
    """A file of at least so many bytes; its rows."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    phrases = [" ".join(rng.choices(words, k=PHRASE_WORDS)) for _ in range(PHRASES)]
    num_rows = 0
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("id\ttext\ttitle\n")
        while handle.tell() < num_bytes:
            for _ in range(1_000):
                num_rows += 1
                handle.write(
                    f"{num_rows}\t{' '.join(rng.choices(phrases, k=TEXT_PHRASES))}\t{rng.choice(words)}\n"
                )
    return num_rows


def read_only(path: Path) -> None:
    """Pass over the rows."""
    for _ in read_rows(path):
        pass


def import_whole(path: Path) -> None:
    """The import beside the file."""
    import_file(
        ImportConfig(
            kind="passages", input=str(path), output=str(path.with_suffix(".passages")), source="bench"
        )
    )


def peak_mb(action: Callable[[Path], None], path: Path) -> float:
    """Peak resident memory in MB of a fresh process that does it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mb, (action, path))


def _peak_mb(action: Callable[[Path], None], path: Path) -> float:
    action(path)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[0.25, 1.0], help="sizes of the files")
    parser.add_argument("--folder", help="where to write them; default: a temporary folder")
    options, _ = parser.parse_known_args()
    for gib in options.gib:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "passages.tsv"
            num_rows = write_tsv(path, int(gib * 2**30))
            reading = peak_mb(read_only, path)
            started = time.perf_counter()
            importing = peak_mb(import_whole, path)
            elapsed_s = time.perf_counter() - started
        print(
            f"{gib:g} GiB, {num_rows:,} rows: peak {reading:,.0f} MB to read, {importing:,.0f} MB to import "
            f"({num_rows / elapsed_s:,.0f} rows a second)",
            flush=True,
        )


if __name__ == "__main__":
    main()
