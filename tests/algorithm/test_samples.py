import dataclasses

import pytest

from megatron_sd.algorithm.advantages.from_rewards import grpo
from megatron_sd.algorithm.advantages.table import any_advantage
from megatron_sd.algorithm.packing.outlines import outlines_of
from megatron_sd.algorithm.samples import GATES, SCOPES, GateContext, apply_gate, to_samples
from megatron_sd.config import AdvantageConfig
from megatron_sd.errors import BarrenStepError, RolloutError
from megatron_sd.records import SEARCH, Action, StopReason, Turn
from tests.fakes_groups import make_group, make_rollout


def searched(text, start, stop):
    return Action(tool=SEARCH, text=text, span=(start, stop))


TURNS = (
    Turn(
        completion_ids=(10, 11, 12, 13),
        completion_logprobs=(-1.0, -2.0, -3.0, -4.0),
        observation_ids=(20, 21),
        action=searched("x", 1, 3),
    ),
    Turn(
        completion_ids=(14, 15),
        completion_logprobs=(-5.0, -6.0),
        observation_ids=(22,),
        action=searched("", 1, 1),
    ),
    Turn(completion_ids=(16,), completion_logprobs=(-7.0,)),
)


def group_of(*rollouts):
    return dataclasses.replace(make_group([0.0]), rollouts=rollouts)


def samples_of(group, prompts, scope="query"):
    by_turn = ((0.5, 0.25, -0.125, -0.125), (-0.5,) * 4)
    advantages = [own[: len(rollout.turns)] for own, rollout in zip(by_turn, group.rollouts)]
    samples = to_samples([group], [advantages], [prompts], scope=SCOPES[scope])
    made = list(samples)
    assert samples.outlines == outlines_of(made)  # what packing reckons with is what it gets
    return made


def test_every_array_of_a_rollout():
    group = group_of(make_rollout(1.0, turns=TURNS), make_rollout(0.0, index=1))
    sample, other = samples_of(group, [((7, 8, 9, 9),), ()])
    assert sample.ids.tolist() == [1, 2, 3, 10, 11, 12, 13, 20, 21, 14, 15, 22, 16]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 4 + [False] * 2 + [True] * 2 + [False, True]
    assert sample.rollout_logprobs.tolist() == [0, 0, 0, -1, -2, -3, -4, 0, 0, -5, -6, 0, -7]
    assert sample.query_positions.tolist() == [4, 5]
    assert sample.advantages.tolist() == [0] * 3 + [0.5] * 4 + [0] * 2 + [0.25] * 2 + [0, -0.125]
    assert (sample.group, sample.group_has_spread, sample.prompt_length) == (0, True, 3)
    (view,) = sample.teacher_views
    assert view.prompt_ids == (7, 8, 9, 9)
    assert view.continuation.tolist() == [9, 10, 11]
    assert view.offsets.tolist() == [1, 2]
    assert not other.is_distilled


def test_failures_and_empty_rollouts_are_left_out_and_group_numbers_stay():
    empty = make_rollout(0.0, index=1, turns=())
    nothing = make_rollout(0.0, index=2, turns=(Turn(completion_ids=(), completion_logprobs=()),))
    groups = [group_of(make_rollout(1.0, failed=True), empty, nothing), make_group([0.5, 0.5])]
    samples = to_samples(groups, [[(0.0,)] * 3, [(0.0,)] * 2], [[()] * 3, [()] * 2], scope=SCOPES["query"])
    assert [(s.group, s.group_has_spread) for s in samples] == [(1, False), (1, False)]


def test_a_step_without_a_single_token_is_an_error_unless_all_rollouts_failed():
    """Prompts above rollout.max_rollout_tokens would otherwise train on nothing, step after step."""
    empty = dataclasses.replace(make_rollout(0.0, turns=()), stop_reason=StopReason.TOKEN_LIMIT)
    with pytest.raises(
        BarrenStepError, match=r"none of the step's 1 rollouts has a sampled token .*'token_limit': 1"
    ):
        samples_of(group_of(empty, make_rollout(0.0, index=1, failed=True)), [(), ()])
    assert samples_of(group_of(make_rollout(0.0, failed=True)), [()]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, "empty prompt"),
        (
            {"turns": (Turn(completion_ids=(1, 2), completion_logprobs=(-1.0,)),)},
            "2 sampled ids, 1 log-probabilities",
        ),
        (
            {"turns": (Turn(completion_ids=(1,), completion_logprobs=(-1.0,), action=searched("", 0, 2)),)},
            r"query span \(0, 2\)",
        ),
    ],
)
def test_records_that_do_not_fit(changes, words):
    group = group_of(dataclasses.replace(make_rollout(1.0), **changes))
    with pytest.raises(RolloutError, match=words):
        samples_of(group, [()])


@pytest.mark.parametrize(
    ("scope", "ids"),
    [
        ("query", [11, 12, 17]),
        ("first_query", [11, 12]),
        ("last_query", [17]),
        ("all", [10, 11, 12, 13, 14, 15, 16, 17, 18]),
    ],
)
def test_scopes_name_the_tokens_that_distil(scope, ids):
    turns = (
        *TURNS[:2],
        Turn(completion_ids=(16, 17, 18), completion_logprobs=(-7.0,) * 3, action=searched("y", 1, 2)),
    )
    (sample,) = samples_of(group_of(make_rollout(1.0, turns=turns)), [((7, 8, 9),)], scope)
    assert sample.ids[sample.query_positions].tolist() == ids
    (view,) = sample.teacher_views
    predicted = [sample.ids[sample.prompt_length + offset] for offset in view.offsets]
    assert predicted == ids
    assert len(view.continuation) == view.offsets[-1] + 1


def test_a_first_query_without_a_whole_token_leaves_nothing_to_distil():
    turns = (TURNS[1], dataclasses.replace(TURNS[0], action=searched("x", 1, 3)))
    (sample,) = samples_of(group_of(make_rollout(1.0, turns=turns)), [((7, 8, 9),)], "first_query")
    assert not sample.is_distilled


def test_prompts_by_turn_give_one_view_for_each_and_equal_ones_share():
    turns = (TURNS[0], TURNS[0], TURNS[0], TURNS[2])
    prompts = ((7, 7), (7, 7), (8, 8), (9, 9))
    (sample,) = samples_of(group_of(make_rollout(1.0, turns=turns)), [prompts])
    assert sample.query_positions.tolist() == [4, 5, 10, 11, 16, 17]
    first, second = sample.teacher_views
    assert (first.prompt_ids, first.offsets.tolist()) == ((7, 7), [1, 2, 7, 8])
    assert (second.prompt_ids, second.offsets.tolist()) == ((8, 8), [13, 14])
    assert first.continuation.tolist() == [7, 10, 11, 12, 13, 20, 21, 10, 11]
    assert second.continuation.tolist() == [8, 10, 11, 12, 13, 20, 21, 10, 11, 12, 13, 20, 21, 10, 11]


def test_turns_without_a_prompt_are_not_distilled():
    turns = (TURNS[0], TURNS[0], TURNS[2])
    (sample,) = samples_of(group_of(make_rollout(1.0, turns=turns)), [(None, (8, 8), None)])
    assert sample.query_positions.tolist() == [10, 11]
    assert [view.prompt_ids for view in sample.teacher_views] == [(8, 8)]
    (other,) = samples_of(group_of(make_rollout(1.0, turns=turns)), [(None, None, (9, 9))])
    assert not other.is_distilled


def test_gates():
    """F1 above rho is CORRECT; a failed rollout has no say."""
    groups = [
        make_group([0.0, 0.0]),
        make_group([0.6, 0.0]),
        make_group([0.6, 1.0]),
        make_group([1.0, 0.0], failed=(0,)),
    ]
    prompts = [[((1,),), ((2,),)] for _ in groups]

    def kept(gate, rho):
        contexts = [
            GateContext(group=group, has_gradient=any_advantage(own), correct_above=rho)
            for group, own in zip(groups, grpo(groups, AdvantageConfig()), strict=True)
        ]
        return [own != [(), ()] for own in apply_gate(contexts, prompts, GATES[gate])]

    assert kept("none", 0.0) == [True] * 4
    assert kept("has_correct", 0.0) == [False, True, True, False]
    assert kept("mixed", 0.0) == [False, True, False, False]
    assert kept("mixed", 0.7) == [False, False, True, False]
    assert kept("reward_spread", 0.0) == [False, True, True, False]
