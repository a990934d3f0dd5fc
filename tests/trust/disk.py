"""R2 and R4: a disk that fails, or changes what was written."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

from megatron_sd.config import SearchConfig
from megatron_sd.durable import directories
from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from tests.training.fakes import write_model
from tests.trust.rows import Bench, Row, row

FAULTS = ("ENOSPC", "EACCES", "EIO")


def tiny_model(bench: Bench) -> Path:
    """Made once."""
    path = bench.directory / "tiny"
    if not path.exists():
        write_model(path)
        (path / "tokenizer.json").write_text("{}")
    return path


def faults(bench: Bench, *, stride: int) -> Row:
    """R2: every `stride`-th operation on the disk of a save fails on one of two ranks, with every errno."""
    failures, saves, refused, places = [], 0, 0, []
    for rank in range(2):
        root, output = bench.directory / f"faults{rank}", bench.directory / f"faults{rank}.json"
        order = {"root": f"{root}", "model": f"{tiny_model(bench)}", "output": f"{output}", "rank": rank}
        order |= {"faults": FAULTS, "stride": stride}
        ranks = bench.nursery.start(
            "tests.rank_programs.trust:commits", order, ranks=2, log=bench.directory / "faults.log"
        )
        if ranks.wait(900) != [0, 0]:
            return row("R2", "faults", [ranks.output()[-2000:]], count=1)
        outcome = json.loads(Path(f"{output}.{rank}").read_text())
        failures += [f"rank {rank}: {wrong}" for wrong in outcome["wrong"]]
        saves, refused = saves + outcome["saves"], refused + outcome["refused"]
        places.append(len(outcome["operations"]))
    figures = (
        f"{places[0]} and {places[1]} operations a save; {refused} saves refused on both ranks, the others"
        " committed"
    )
    what = (
        f"{', '.join(FAULTS)} at the operations of a save, on each of 2 ranks: all ranks learn, the last"
        " commit stands"
    )
    return row("R2", what, failures, count=saves, figures=figures)


def killed_commits(bench: Bench, *, stride: int) -> Row:
    """R2: a rank is killed at every `stride`-th operation of a save."""
    failures, count = [], 0
    for rank in range(2):
        root, place, ended = bench.directory / f"killed_commit{rank}", 1, False
        while not ended:
            order = {"root": f"{root}", "model": f"{tiny_model(bench)}", "rank": rank, "place": place}
            log = bench.directory / "killed_commit.log"
            before = _newest(root)
            ranks = bench.nursery.start("tests.rank_programs.trust:killed_commit", order, ranks=2, log=log)
            codes = _end(ranks, rank)
            ended = codes == [0, 0]  # there is no such operation any more
            if not ended:
                count += 1
                found = directories.committed(root)
                damage = directories.find_damage(found[0])
                if damage or _newest(root) < before + 1 or codes[rank] != -signal.SIGKILL:
                    failures.append(
                        f"rank {rank} at {place}: exit codes {codes}, newest {found[0].name}: {damage}"
                    )
            place += stride
    return row(
        "R2",
        "kill -9 at the operations of a save, on each of 2 ranks: the last commit stands",
        failures,
        count=count,
    )


def _end(ranks, rank: int) -> list[int]:
    """The rank that is not killed notices, or is killed as a launcher would."""
    if ranks.code(rank, 120) not in (0, None):
        ranks.code(1 - rank, 20)
        ranks.signal(signal.SIGKILL)
    return ranks.wait()


def _newest(root: Path) -> int:
    found = directories.committed(root)
    return int(found[0].name.removeprefix("step_")) if found else -1


def damages(bench: Bench, checkpoint: Path, *, offsets: int) -> Row:
    """R4: a bit flipped at random offsets, and cuts, in every file of a checkpoint and of a corpus; all
    bits of the manifest."""
    failures, count = [], 0
    for name, damaged in _damaged_files(checkpoint, bench.random, offsets):
        count += 1
        found = directories.find_damage(checkpoint)
        if found is None or not found.startswith(name):
            failures.append(f"{name}, {damaged}: {found}")
    manifest = checkpoint / directories.MANIFEST
    content = manifest.read_bytes()
    for bit in range(0, len(content) * 8, 1 if offsets > 5 else 97):
        count += 1
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(changed)
        if directories.find_damage(checkpoint) is None:
            failures.append(f"{directories.MANIFEST}, bit {bit}")
    manifest.write_bytes(content)
    in_checkpoint = count
    corpus = bench.world / "corpus"
    for name, damaged in _damaged_files(corpus, bench.random, offsets):
        count += 1
        try:
            CorpusRetriever(corpus, SearchConfig(method="bm25"))
            failures.append(f"{name}, {damaged}: opened")
        except DataError as error:
            if name not in str(error):
                failures.append(f"{name}, {damaged}: {error}")
    figures = (
        f"{in_checkpoint} in a checkpoint, every bit of its manifest among them; {count - in_checkpoint} in a"
        " BM25 corpus"
    )
    what = "a flipped bit or a cut in every kind of file: found before use, the file named"
    return row("R4", what, failures, count=count, figures=figures)


def _damaged_files(directory: Path, chance: random.Random, offsets: int) -> Iterator[tuple[str, str]]:
    """Damage one file after the other, and put it right again; the file's name and what was done to it."""
    names = [str(path.relative_to(directory)) for path in directories.files_under(directory)]
    for name in names:
        path = directory / name
        content = path.read_bytes()
        for _ in range(offsets):
            bit = chance.randrange(len(content) * 8)
            with path.open("r+b") as file:
                file.seek(bit // 8)
                file.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
            yield name, f"bit {bit}"
            path.write_bytes(content)
        for length in {0, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            yield name, f"cut to {length} bytes"
        path.write_bytes(content)
