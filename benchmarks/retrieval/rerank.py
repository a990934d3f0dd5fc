"""What a reranker adds to BM25, and how many pairs a second it reads.

    python -m benchmarks.retrieval.rerank train --encoder MINILM --corpus CORPUS --questions Q.jsonl --output DIR
    python -m benchmarks.retrieval.rerank compare --model DIR --corpus CORPUS --questions Q.jsonl [--depth 20]

No published cross-encoder could be had where these figures were made, so `train` makes a stand-in: an encoder
(all-MiniLM-L6-v2) with a new score on top, fitted to the supporting passages of the questions' `train` split
against the first passages that BM25 finds for them (a softmax over each choice). `compare` asks the other
questions once without it and once with it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eval.retrieval import TOGETHER, measure
from megatron_sd.config import RerankConfig, SearchConfig
from megatron_sd.observability.progress import Work
from megatron_sd.records import Passage, Question
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.search.questions import load_questions

TOP_K, MAX_TOKENS = 3, 128
MINED, NEGATIVES = 20, 3  # passages that BM25 finds of a question, and those of them that are read with it
BATCH, LEARNING_RATE, WARMUP = 8, 1e-4, 20

Choice = tuple[str, list[Passage]]  # a question, a passage that it needs, and some that it does not


def choices_of(
    questions: Sequence[Question], corpus: CorpusRetriever, rng: random.Random
) -> Iterator[Choice]:
    """One for every supporting passage; the others are among the first that BM25 takes for such."""
    for start in range(0, len(questions), TOGETHER):
        block = questions[start : start + TOGETHER]
        for question, hits in zip(block, corpus.find([own.text for own in block], MINED), strict=True):
            needed = {id for hop in question.supporting for id in hop}
            others = [hit.passage for hit in hits if hit.passage.id not in needed]
            for id in sorted(needed):
                for passage in corpus.passages.between(id, id):
                    yield question.text, [passage, *rng.sample(others, min(NEGATIVES, len(others)))]


def train(arguments: argparse.Namespace) -> None:
    """One pass over the choices in an order by chance; writes the model to --output."""
    rng = random.Random(0)
    torch.manual_seed(0)
    asked = [
        question
        for question in load_questions(arguments.questions, "train")
        if question.source == arguments.source and question.supporting
    ]
    choices = list(choices_of(asked, CorpusRetriever(arguments.corpus, SearchConfig(method="bm25")), rng))
    rng.shuffle(choices)
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.encoder, num_labels=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    num_steps = -(-len(choices) // BATCH)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / num_steps)
    )
    print(f"{len(choices)} choices for {len(asked)} questions", flush=True)
    with Work(sys.stderr).on("training", len(choices), "choices") as task:
        for start in range(0, len(choices), BATCH):
            batch = choices[start : start + BATCH]
            inputs = tokenizer(
                [query for query, passages in batch for _ in passages],
                [f"{passage.title}\n{passage.text}" for _, passages in batch for passage in passages],
                truncation="longest_first",
                max_length=MAX_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            scores = model(**inputs).logits[:, 0].split([len(passages) for _, passages in batch])
            loss = -torch.stack([own.log_softmax(0)[0] for own in scores]).mean()
            loss.backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            task.add(done=len(batch))
            if start // BATCH % 20 == 0:
                right = sum(int(own.argmax()) == 0 for own in scores)
                print(
                    f"{start + len(batch)}: loss {loss.item():.3f}, {right} of {len(batch)} right", flush=True
                )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"stand-in written to {arguments.output}")


def compare(arguments: argparse.Namespace) -> None:
    """Print a table: recall without and with the reranker, questions a second, pairs a second."""
    questions = load_questions(arguments.questions, arguments.split)
    rerank = RerankConfig(model=arguments.model, depth=arguments.depth, max_tokens=MAX_TOKENS)
    print(f"| search | sup@{TOP_K} | all@{TOP_K} | questions/s | pairs/s |\n|---|---|---|---|---|")
    for name, own in (("bm25", None), (f"bm25, {arguments.depth} reranked", rerank)):
        corpus = CorpusRetriever(arguments.corpus, SearchConfig(method="bm25", rerank=own))
        corpus.find(["a first query"], TOP_K)
        started = time.perf_counter()
        (found,) = asyncio.run(measure(corpus, questions, TOP_K, Work(sys.stderr)))
        rate = found.num_questions / (time.perf_counter() - started)
        pairs = f"{rate * arguments.depth:.0f}" if own else ""
        print(f"| {name} | {found.sup:.3f} | {found.all:.3f} | {rate:.1f} | {pairs} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for function in (train, compare):
        part = parts.add_parser(function.__name__, help=function.__doc__)
        part.set_defaults(run=function)
        part.add_argument("--corpus", required=True, help="with a BM25 index")
        part.add_argument("--questions", required=True)
    own = parts.choices
    own["train"].add_argument("--encoder", required=True)
    own["train"].add_argument("--output", required=True, type=Path)
    own["train"].add_argument("--source", default="hotpotqa", help="which set's questions")
    own["compare"].add_argument("--model", required=True)
    own["compare"].add_argument("--depth", type=int, default=20)
    own["compare"].add_argument("--split", default=None)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
