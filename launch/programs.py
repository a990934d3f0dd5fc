"""The command lines of the data programs: parse, run, say what was done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from data_prep.index import IndexConfig, build_index
from data_prep.world import WorldConfig, build_world
from megatron_sd.config import parse
from megatron_sd.errors import DataError

logging.basicConfig(level=logging.INFO, format="%(message)s")


def world(argv: Sequence[str]) -> None:
    """`sd-search world`: passages.jsonl, questions.jsonl and the BM25 corpus over them."""
    config = parse(WorldConfig, argv, "sd-search world")
    print(f"corpus version {make_world(config)}\nquestions {Path(config.output) / 'questions.jsonl'}")


def make_world(config: WorldConfig) -> str:
    """Write a world and index it; returns the corpus version. Words are indexed as they are, so the distractors win ties.

    Raises DataError when `config.output` holds a corpus: the questions would no longer belong to it.
    """
    output = Path(config.output)
    if (output / "corpus").exists():
        raise DataError(f"{output} holds a world already: use it as it is, remove {output}, or choose another --output")
    build_world(config)
    paths = {"passages": str(output / "passages.jsonl"), "output": str(output / "corpus")}
    return build_index(IndexConfig(**paths, stop_words="none", stemmer="none"))


def coldstart(argv: Sequence[str]) -> None:
    """`sd-search coldstart`: train the start policy; `sd-search gate` then says whether it reads hindsight blocks."""
    from data_prep.coldstart import ColdstartConfig, run_coldstart

    print(f"start policy {run_coldstart(parse(ColdstartConfig, argv, 'sd-search coldstart'))}")


def data_import(argv: Sequence[str]) -> None:
    """`sd-search data import`."""
    from data_prep.questions import ImportConfig, import_file

    config = parse(ImportConfig, argv, "sd-search data import")
    report = import_file(config)
    print(f"{report.num_kept} {config.kind} -> {config.output}")
    if report.num_rejected or report.num_notes:
        print(f"{report.num_rejected} rejected, {report.num_notes} lost an empty gold answer: see {report.rejects}")


def data_index(argv: Sequence[str]) -> None:
    """`sd-search data index`."""
    config = parse(IndexConfig, argv, "sd-search data index")
    print(f"corpus version {build_index(config)} -> {config.output}")


def data_info(argv: Sequence[str]) -> None:
    """`sd-search data info`."""
    from data_prep.manifest import InfoConfig, corpus_info

    print(corpus_info(parse(InfoConfig, argv, "sd-search data info")))


def data_recall(argv: Sequence[str]) -> None:
    """`sd-search data recall`."""
    from eval import retrieval

    retrieval.main(parse(retrieval.RetrievalConfig, argv, "sd-search data recall"))
