"""Toolformer's measure of a search: by hand, and against one plain forward at a time."""

import json
from dataclasses import replace

import pytest
import torch

from eval.credit.auc import credit_table
from eval.credit.main import CreditConfig, credit
from eval.credit.transcripts import read_groups
from eval.credit.usefulness import answer_loss, usefulness, usefulness_of_group
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.search.environment import Environment
from tests.eval.test_credit import COMPACT, EXACT, MODEL, environment, query, transcripts  # noqa: F401


def test_weights_fall_over_five_tokens():
    parts = [answer_loss([-float(n == own) for n in range(9)]) for own in range(7)]
    assert parts == pytest.approx([0.3333, 0.2667, 0.2, 0.1333, 0.0667, 0.0, 0.0], abs=1e-4)
    assert answer_loss([-2.0, -1.0]) == pytest.approx((2.0 + 0.8) / 1.8)


def test_a_call_is_worth_what_it_adds_to_the_better_of_doing_without():
    assert usefulness(2.0, 1.8, 0.6) == pytest.approx(1.2) and usefulness(2.0, 1.8, 0.9) == pytest.approx(0.9)
    assert usefulness(1.0, 3.0, 1.5) == pytest.approx(-0.5)


def loss_of(model, environment: Environment, context):  # noqa: F811
    """Of " Riga" behind the answer's opening tag, by one forward."""
    codec = environment.codec
    start = [*context, *codec.encode_own("<answer>")]
    answer = codec.encode(" Riga")
    with torch.no_grad():
        logits = model(torch.tensor([[*start, *answer]])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return answer_loss([logits[n, token].item() for n, token in enumerate(answer)])


def test_it_is_that_of_plain_forwards(transcripts, environment):  # noqa: F811
    (group,) = read_groups(transcripts, environment)
    model = load_model(MODEL, dtype=torch.float32, device=torch.device("cpu")).eval()
    found = usefulness_of_group(model, environment, group, 4096)
    assert list(found) == [(0, 0), (0, 1), (1, 0)]
    first = group.rollouts[0]
    before = (*first.prompt_ids, *first.turns[0].completion_ids, *first.turns[0].observation_ids)
    called = (*before, *first.turns[1].completion_ids)
    contexts = (
        before,
        (*called, *environment.observation_ids([])),
        (*called, *first.turns[1].observation_ids),
    )
    expected = usefulness(*(loss_of(model, environment, context) for context in contexts))
    assert found[0, 1] == pytest.approx(expected, abs=1e-4)
    nameless = replace(group, question=replace(group.question, golden_answers=()))
    assert usefulness_of_group(model, environment, nameless, 4096) == {}


def test_credit_reports_it_when_asked(transcripts, tmp_path):  # noqa: F811
    paths = {"model": EXACT, "transcripts": str(transcripts), "protocol": COMPACT}
    table = credit(CreditConfig(**paths, output=str(tmp_path / "with"), usefulness=True))
    assert list(table.within["all"]) == [
        "log_ratio",
        "jsd",
        "earlier_is_better",
        "likelier_is_better",
        "usefulness",
    ]
    assert list(table.matched["all"]) == ["log_ratio", "jsd", "likelier_is_better", "usefulness"]
    rows = [json.loads(line) for line in (tmp_path / "with" / "queries.jsonl").read_text().splitlines()]
    assert all(isinstance(row["usefulness"], float) for row in rows)
    assert list(credit_table([query(hit=True)], num_resamples=5, seed=0).matched["all"]) == [
        "log_ratio",
        "jsd",
    ]
