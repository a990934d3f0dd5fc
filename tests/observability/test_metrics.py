"""Metrics of hand-made groups, every figure computed by hand."""

import dataclasses

import pytest

from megatron_sd.observability.metrics import block_figures, block_metrics, rollout_metrics
from megatron_sd.records import RolloutGroup, StopReason
from tests import builders


def _scored(rollout, hop_hit_rate):
    return dataclasses.replace(rollout, scores=dataclasses.replace(rollout.scores, hop_hit_rate=hop_hit_rate))


def _groups():
    failed = builders.rollout(2, ["a"], reward=0.0, stop_reason=StopReason.RETRIEVAL_FAILED)
    mixed = [
        _scored(builders.rollout(0, ["a", "A ", "b"], reward=1.0), 1.0),
        _scored(builders.rollout(1, [], reward=0.5, stop_reason=StopReason.NO_ACTION), 0.5),
        failed,
    ]
    wrong = [builders.rollout(0, ["c"], reward=0.0), builders.rollout(1, ["c"], reward=0.0)]
    return [builders.group(mixed, 0), builders.group(wrong, 1)]


def test_rollout_metrics():
    metrics = rollout_metrics(_groups())
    expected = {
        "reward/mean": 1.5 / 4,
        "reward/em": 1 / 4,
        "reward/f1": 1.5 / 4,
        "reward/format_valid": 1.0,
        "rollout/hop_hit_rate": 0.75,
        "rollout/searches": 5 / 4,
        "rollout/turns": (4 + 1 + 2 + 2) / 4,
        "rollout/completion_tokens": (11 + 2 + 5 + 5) / 4,
        "rollout/observation_tokens": (6 + 0 + 2 + 2) / 4,
        "rollout/total_tokens_max": 3 + 11 + 6,
        "rollout/duplicate_query_share": 1 / 5,
        "rollout/stop_answered": 3 / 5,
        "rollout/stop_no_action": 1 / 5,
        "rollout/stop_turn_limit": 0.0,
        "rollout/stop_token_limit": 0.0,
        "rollout/stop_retrieval_failed": 1 / 5,
        "rollout/stop_engine_failed": 0.0,
        "rollout/stop_tool_failed": 0.0,
        "rollout/stop_judge_failed": 0.0,
        "distill/share_groups_all_wrong": 0.5,
        "distill/share_groups_all_right": 0.0,
        "distill/share_groups_mixed": 0.5,
        "distill/share_groups_no_spread": 0.5,
    }
    assert metrics == pytest.approx(expected)


def test_no_usable_rollout_leaves_the_stop_shares():
    failed = builders.rollout(0, [], stop_reason=StopReason.ENGINE_FAILED)
    metrics = rollout_metrics([builders.group([failed])])
    assert metrics["rollout/stop_engine_failed"] == 1.0
    assert all(name.startswith("rollout/stop_") for name in metrics)
    assert rollout_metrics([]) == {}


def test_block_metrics():
    question = builders.question(0, ["Dava Sul"])  # "Question 0?"
    seen = builders.rollout(0, ["question kalo"], reward=1.0)
    turn = dataclasses.replace(seen.turns[0], hits=(builders.hit("p", text="miren lives", title="Tor"),))
    seen = dataclasses.replace(seen, turns=(turn, *seen.turns[1:]))
    sibling = builders.rollout(1, ["Miren tor", "question  Kalo", "dava sul"], reward=0.0)
    failed = builders.rollout(2, ["x"], stop_reason=StopReason.ENGINE_FAILED)
    group = RolloutGroup(question=question, rollouts=(seen, sibling, failed))
    metrics = block_metrics(
        block_figures([(group, [['"question kalo" -> "dava  SUL"', '"dava sultan"', "Dava Sul"]][0])])
    )
    assert metrics == pytest.approx(
        {
            "distill/share_rollouts_with_block": 1.0,
            "distill/share_blocks_with_gold": 0.5,
            # rollout 0: of {miren, tor, question, kalo, dava, sul} dava and sul are new; rollout 1: nothing
            # is
            "distill/share_block_words_unseen": (2 / 6 + 0 / 2) / 2,
            "distill/copy_rate_correct": 1 / 3,  # rollout 1's three queries against rollout 0
            "distill/copy_rate_incorrect": 1.0,  # rollout 0's only query against rollout 1
        }
    )


def test_rollouts_without_a_block_do_not_count():
    (mixed, wrong) = _groups()
    figures = block_figures([(mixed, ["", "", ""]), (wrong, ["", ""])])
    assert block_metrics(figures) == {"distill/share_rollouts_with_block": 0.0}
    metrics = block_metrics(block_figures([(mixed, ["", "", "x"]), (wrong, ["gold", "gold"])]))
    assert metrics["distill/share_rollouts_with_block"] == 0.5
    assert metrics["distill/share_blocks_with_gold"] == 1.0
    assert metrics["distill/copy_rate_incorrect"] == 1.0
    assert "distill/copy_rate_correct" not in metrics
    assert block_metrics([]) == {}
