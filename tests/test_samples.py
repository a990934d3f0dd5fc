import dataclasses

import pytest

from megatron_sd.algorithm.samples import GATES, apply_gate, to_samples
from megatron_sd.errors import RolloutError
from megatron_sd.records import StopReason, Turn
from tests.fakes_groups import make_group, make_rollout

TURNS = (
    Turn(completion_ids=(10, 11, 12, 13), completion_logprobs=(-1.0, -2.0, -3.0, -4.0), observation_ids=(20, 21), query="x",
         query_span=(1, 3)),
    Turn(completion_ids=(14, 15), completion_logprobs=(-5.0, -6.0), observation_ids=(22,), query="", query_span=(1, 1)),
    Turn(completion_ids=(16,), completion_logprobs=(-7.0,)),
)  # fmt: skip


def group_of(*rollouts):
    return dataclasses.replace(make_group([0.0]), rollouts=rollouts)


def test_every_array_of_a_rollout():
    group = group_of(make_rollout(1.0, turns=TURNS), make_rollout(0.0, index=1))
    sample, other = to_samples([group], [[0.5, -0.5]], [[(7, 8, 9, 9), None]])
    assert sample.ids.tolist() == [1, 2, 3, 10, 11, 12, 13, 20, 21, 14, 15, 22, 16]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 4 + [False] * 2 + [True] * 2 + [False, True]
    assert sample.rollout_logprobs.tolist() == [0, 0, 0, -1, -2, -3, -4, 0, 0, -5, -6, 0, -7]
    assert sample.query_positions.tolist() == [4, 5]
    assert (sample.advantage, sample.group, sample.group_has_spread, sample.prompt_length) == (0.5, 0, True, 3)
    assert sample.is_distilled and sample.teacher_continuation.tolist() == [9, 10, 11]
    assert not other.is_distilled


def test_failures_and_empty_rollouts_are_left_out_and_group_numbers_stay():
    empty = make_rollout(0.0, index=1, turns=())
    nothing = make_rollout(0.0, index=2, turns=(Turn(completion_ids=(), completion_logprobs=()),))
    groups = [group_of(make_rollout(1.0, failed=True), empty, nothing), make_group([0.5, 0.5])]
    samples = to_samples(groups, [[0.0] * 3, [0.0] * 2], [[None] * 3, [None] * 2])
    assert [(s.group, s.group_has_spread) for s in samples] == [(1, False), (1, False)]


def test_a_step_without_a_single_token_is_an_error_unless_all_rollouts_failed():
    """Prompts above rollout.max_rollout_tokens would otherwise train on nothing, step after step."""
    empty = dataclasses.replace(make_rollout(0.0, turns=()), stop_reason=StopReason.TOKEN_LIMIT)
    with pytest.raises(RolloutError, match=r"none of the step's 1 rollouts .*'token_limit': 1.*max_rollout_tokens"):
        to_samples([group_of(empty, make_rollout(0.0, index=1, failed=True))], [[0.0, 0.0]], [[None, None]])
    assert to_samples([group_of(make_rollout(0.0, failed=True))], [[0.0]], [[None]]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, "empty prompt"),
        ({"turns": (Turn(completion_ids=(1, 2), completion_logprobs=(-1.0,)),)}, "2 sampled ids, 1 log-probabilities"),
        ({"turns": (Turn(completion_ids=(1,), completion_logprobs=(-1.0,), query_span=(0, 2)),)}, r"query span \(0, 2\)"),
    ],
)
def test_records_that_do_not_fit(changes, words):
    group = group_of(dataclasses.replace(make_rollout(1.0), **changes))
    with pytest.raises(RolloutError, match=words):
        to_samples([group], [[0.0]], [[None]])


def test_gates():
    """F1 above rho is CORRECT; a failed rollout has no say."""
    groups = [make_group([0.0, 0.0]), make_group([0.6, 0.0]), make_group([0.6, 1.0]), make_group([1.0, 0.0], failed=(0,))]
    prompts = [[(1,), (2,)] for _ in groups]

    def kept(gate, rho):
        return [own != [None, None] for own in apply_gate(groups, prompts, GATES[gate], rho)]

    assert kept("none", 0.0) == [True] * 4
    assert kept("has_correct", 0.0) == [False, True, True, False]
    assert kept("mixed", 0.0) == [False, True, False, False]
    assert kept("mixed", 0.7) == [False, False, True, False]
