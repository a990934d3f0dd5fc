"""How well a retriever finds what questions need, when the query is the question itself.

    sd-search data recall --retriever.corpus CORPUS --questions QUESTIONS.jsonl [--split eval]
    sd-search data recall --retriever.endpoints '[http://127.0.0.1:8741]' --questions QUESTIONS.jsonl

Per data set: `sup`, the mean share of hops of which a serving passage is among the top k, and `all`, the
share of questions with every hop found.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sd.config import RetrieverConfig
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import DataError
from megatron_sd.observability.progress import SILENT, Work
from megatron_sd.records import Hit, Question
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.retriever import Retriever
from megatron_sd.search.questions import load_questions

TOGETHER = 64  # questions


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What to measure: a retriever against the questions of one split (None: all) that name their
    passages."""

    retriever: RetrieverConfig
    questions: str  # a questions file
    split: str | None = None  # keep only records whose `split` equals this


@dataclass(frozen=True, kw_only=True)
class RetrievalFigures:
    """Shares in [0, 1] over `num_questions` questions of one data set."""

    source: str
    num_questions: int
    sup: float
    all: float


def hop_recall(hits: Sequence[Hit], supporting: Sequence[Sequence[str]]) -> float:
    """Share of hops of which any serving passage is among the hits. `supporting` must not be empty."""
    found = {hit.passage.id for hit in hits}
    return sum(not found.isdisjoint(hop) for hop in supporting) / len(supporting)


async def measure(
    retriever: Retriever, questions: Sequence[Question], top_k: int, work: Work = SILENT
) -> list[RetrievalFigures]:
    """Figures per `Question.source`, in order of name; questions without known hops are left out. Asks
    TOGETHER questions at a time."""
    asked = [question for question in questions if question.supporting]
    if not asked:
        raise DataError(
            f"none of the {len(questions)} questions names a passage that it needs (supporting), expected some:"
            " import them with --passages, which finds the ids of hops that are given by title"
        )
    found: list[tuple[Hit, ...]] = []
    with work.on("questions", len(asked), "asked") as task:
        for start in range(0, len(asked), TOGETHER):
            texts = [question.text for question in asked[start : start + TOGETHER]]
            found += await retriever.search(texts, top_k)
            task.add(done=len(texts))
    recalls = defaultdict(list)
    for question, hits in zip(asked, found, strict=True):
        recalls[question.source].append(hop_recall(hits, question.supporting))
    return [
        RetrievalFigures(
            source=source,
            num_questions=len(values),
            sup=sum(values) / len(values),
            all=sum(value == 1.0 for value in values) / len(values),
        )
        for source, values in sorted(recalls.items())
    ]


def render(figures: Sequence[RetrievalFigures]) -> str:
    """The figures as a Markdown table."""
    rows = [f"| {f.source} | {f.num_questions} | {f.sup:.3f} | {f.all:.3f} |" for f in figures]
    return "\n".join(["| data set | questions | sup | all |", "|---|---|---|---|", *rows])


def main(config: RetrievalConfig) -> list[RetrievalFigures]:
    """Measure, print the table, return the figures. Raises DataError for missing or broken input."""
    check_ranges(config)
    questions = load_questions(config.questions, config.split, needs_answers=False)
    retriever = open_retriever(config.retriever, alone=True)
    started = time.perf_counter()
    figures = asyncio.run(measure(retriever, questions, config.retriever.top_k, Work(sys.stderr)))
    seconds, asked = time.perf_counter() - started, sum(own.num_questions for own in figures)
    print(
        f"corpus version {retriever.corpus_version}, top {config.retriever.top_k}; {asked} questions in"
        f" {seconds:.1f} s, {asked / seconds:.1f} a second\n\n{render(figures)}"
    )
    return figures
