"""The command lines of the world and the cold start: parse, run, say what was done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from data_prep.passages.index import IndexConfig, build_index
from data_prep.world.world import WorldConfig, build_world
from megatron_sd.config.command_line import parse
from megatron_sd.errors import DataError

logging.basicConfig(level=logging.INFO, format="%(message)s")


def world(argv: Sequence[str]) -> None:
    """`sd-search world`: passages.jsonl, questions.jsonl and the BM25 corpus over them."""
    config = parse(WorldConfig, argv, "sd-search world")
    print(f"corpus version {make_world(config)}\nquestions {Path(config.output) / 'questions.jsonl'}")


def make_world(config: WorldConfig) -> str:
    """Write a world and index it; returns the corpus version. Words are indexed as they are, so the
    distractors win ties.

    Raises DataError when `config.output` holds a corpus: the questions would no longer belong to it.
    """
    output = Path(config.output)
    if (output / "corpus").exists():
        raise DataError(
            f"{output} holds a world already: use it as it is, remove {output}, or choose another --output"
        )
    build_world(config)
    paths = {"passages": str(output / "passages.jsonl"), "output": str(output / "corpus")}
    return build_index(IndexConfig(**paths, stop_words="none", stemmer="none"))


def coldstart(argv: Sequence[str]) -> None:
    """`sd-search coldstart`: train the start policy; `sd-search gate` then says whether it reads hindsight
    blocks."""
    from data_prep.world.coldstart import ColdstartConfig, run_coldstart

    print(f"start policy {run_coldstart(parse(ColdstartConfig, argv, 'sd-search coldstart'))}")
