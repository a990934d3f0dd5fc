"""A whole run whose slow searches outlive its steps, killed and gone on with on another number of ranks."""

from __future__ import annotations

import json
import signal
import time

import pytest

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from megatron_sd.observability.metrics_log import read_metrics
from tests.whole_runs.runs import on_the_world, run, start

NUM_STEPS, NUM_QUESTIONS, LAG = 8, 4, 3
SLOW = """
import asyncio
import zlib

from megatron_sd.config.retriever import SearchConfig
from megatron_sd.retrieval.corpus.directory import CorpusRetriever

CORPUS = CorpusRetriever({corpus!r}, SearchConfig(), shares_gpus=False)


async def search(queries, top_k):
    if any(zlib.crc32(query.encode()) % 10 == 0 for query in queries):
        await asyncio.sleep(1.0)
    return await CORPUS.search(queries, top_k)
"""


def questions_of(run_dir, step):
    (path,) = (run_dir / "transcripts").glob(f"*{step:06}.jsonl")
    return [json.loads(line)["question"]["id"] for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.ranks
def test_every_question_makes_one_step_though_slow_ones_are_late(tmp_path):
    world, run_dir = tmp_path / "world", tmp_path / "run"
    make_world(WorldConfig(output=str(world), num_train_questions=60, num_eval_questions=20))
    (tmp_path / "slow.py").write_text(SLOW.format(corpus=str(world / "corpus")))
    argv = on_the_world(
        world,
        run_dir,
        "--retriever.corpus=null",
        f"--retriever.function={tmp_path / 'slow.py'}:search",
        f"--data.eval={world / 'questions.jsonl'}",
        "--log.eval_every=3",
        f"--num_steps={NUM_STEPS}",
        f"--rollout.questions_per_step={NUM_QUESTIONS}",
        f"--rollout.max_lag={LAG}",
        "--checkpoint.every=2",
        "--log.transcripts_every=1",
    )
    ranks = start(2, argv)
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and '"step": 5' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert "resumed from" in run(1, argv)
    steps = read_metrics(log)
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    asked = [questions_of(run_dir, step) for step in steps]
    assert {len(own) for own in asked} == {NUM_QUESTIONS}
    flat = [question for own in asked for question in own]
    assert len(set(flat)) == len(flat) == NUM_STEPS * NUM_QUESTIONS
    lags = [step - 1 - metrics["rollout/policy_version"] for step, metrics in steps.items()]
    assert max(lags) <= LAG and lags[-1] > 0
    assert any(metrics["rollout/mixed_versions_share"] > 0 for metrics in steps.values())
    assert all(metrics["rollout/stop_retrieval_failed"] == 0 for metrics in steps.values())
    assert "eval/reward/em" in steps[3] and "eval/reward/em" in steps[6]
