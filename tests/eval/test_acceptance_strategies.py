"""All strategies on real questions, where their files are at hand (SD_SEARCH_DATA, as in
test_acceptance_retrieval.py).

The committed start policy knows nothing of the world, so its answers are worth nothing; what is shown is
that every strategy gets through real questions and passages, and that what RAG's report says of passages is
what the retriever finds.
"""

import asyncio
import json
from importlib.resources import files

import pytest

from data_prep.passages.index import IndexConfig, build_index
from eval.metrics import answer_in_passages
from eval.retrieval import hop_recall
from eval.run import EvalConfig, evaluate
from eval.strategies.table import PROMPTED
from megatron_sd.config import ModelConfig, RetrieverConfig, RolloutConfig
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.search.questions import load_questions
from tests.eval.test_acceptance_retrieval import _folder, _import

pytestmark = pytest.mark.slow

SETS = {name: name for name in ("hotpotqa", "musique", "nq", "popqa", "triviaqa")} | {
    "2wikimultihopqa": "2wiki"
}
EACH = 12  # 50 were asked once: docs/evaluation.md
TOP_K = 3
LIMITS = RolloutConfig(
    questions_per_step=100,
    max_search_turns=3,
    max_turn_tokens=48,
    max_observation_tokens=1000,
    max_rollout_tokens=2048,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A directory with the corpus and the first held-out questions of each set."""
    data, own = _folder("SD_SEARCH_DATA"), tmp_path_factory.mktemp("real")
    passages = _import("passages", data / "corpus.jsonl.zst", own / "passages")
    _import("questions", data / "questions.jsonl.zst", own / "all.jsonl")
    build_index(IndexConfig(passages=passages, output=str(own / "corpus")))
    rows = [json.loads(line) for line in (own / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "eval"]
    chosen = [row for name in SETS for row in [row for row in held_out if row["source"] == name][:EACH]]
    (own / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return own


@pytest.mark.parametrize("strategy", ["agent", *PROMPTED])
def test_every_strategy_gets_through_real_questions(real, strategy, tmp_path):
    report = evaluate(
        EvalConfig(
            model=ModelConfig(path=str(files("data_prep") / "coldstart_model"), dtype="float32"),
            retriever=RetrieverConfig(corpus=str(real / "corpus"), top_k=TOP_K),
            questions=str(real / "questions.jsonl"),
            output=str(tmp_path),
            strategy=strategy,
            num_resamples=100,
            rollout=LIMITS,
        )
    )
    assert report["num_failed"] == 0
    assert {name: figures["num_questions"] for name, figures in report["sets"].items()} == dict.fromkeys(
        SETS.values(), EACH
    )
    if strategy == "rag":
        found = {
            name: (f["supporting_recall"]["value"], f["answer_in_passages"]["value"])
            for name, f in report["sets"].items()
        }
        assert found == {name: pytest.approx(values, abs=1e-6) for name, values in retrieved(real).items()}


def retrieved(real) -> dict[str, tuple[float, float]]:
    """Of each set: the mean share of hops found, and the share of questions with an answer in a passage."""
    questions = load_questions(str(real / "questions.jsonl"))
    retriever = open_retriever(RetrieverConfig(corpus=str(real / "corpus"), top_k=TOP_K))
    hits = asyncio.run(retriever.search([question.text for question in questions], TOP_K))
    own = {
        name: [(q, h) for q, h in zip(questions, hits) if q.source == source] for source, name in SETS.items()
    }
    return {
        name: (
            sum(hop_recall(h, q.supporting) for q, h in pairs) / EACH,
            sum(answer_in_passages(h, q.golden_answers) for q, h in pairs) / EACH,
        )
        for name, pairs in own.items()
    }
