"""Which groups make a step."""

import dataclasses

import pytest

from megatron_sd.config import RolloutConfig
from megatron_sd.config.load import load
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import ConfigError, NothingKeptError
from megatron_sd.rollout.collecting import KEEPERS, Collecting
from megatron_sd.rollout.sampling_order import OwnShare
from megatron_sd.search.questions import QuestionStream
from tests.fakes_groups import make_group

RIGHT, MIXED, WRONG = (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)


def group(rewards, name):
    made = make_group(list(rewards))
    return dataclasses.replace(made, question=dataclasses.replace(made.question, id=name))


def test_only_groups_that_are_right_and_wrong_have_spread():
    kept = [KEEPERS["with_spread"](group(rewards, "q"), RolloutConfig()) for rewards in (RIGHT, MIXED, WRONG)]
    assert kept == [False, True, False]


def test_a_shaped_reward_makes_no_spread():
    one = make_group([0.0, 0.0])
    shaped = tuple(
        dataclasses.replace(r, scores=dataclasses.replace(r.scores, reward=0.1 * r.index))
        for r in one.rollouts
    )
    assert not KEEPERS["with_spread"](dataclasses.replace(one, rollouts=shaped), RolloutConfig())


def test_a_range_of_success():
    config = RolloutConfig(keep_range=(0.3, 0.9))
    kept = [KEEPERS["in_range"](group(rewards, "q"), config) for rewards in (RIGHT, MIXED, WRONG)]
    assert kept == [False, True, False]
    assert KEEPERS["in_range"](group(RIGHT, "q"), RolloutConfig())
    assert not KEEPERS["in_range"](make_group([]), RolloutConfig())


def test_further_questions_are_asked_until_there_are_enough():
    batches = [
        [group(MIXED, "a"), group(RIGHT, "b")],
        [group(WRONG, "c"), group(MIXED, "a")],  # asked again: no second group of one question
        [group(MIXED, "d"), group(MIXED, "e")],
        [group(MIXED, "f"), group(MIXED, "g")],
    ]
    collecting = Collecting(RolloutConfig(questions_per_step=2, keep_groups="with_spread"))
    found = collecting(lambda number: batches[number])
    assert [g.question.id for g in found] == ["a", "d"]
    assert collecting.metrics() == {"rollout/sampled_groups": 6.0, "rollout/kept_share": 0.5}


def test_after_the_last_round_a_step_takes_what_there_is():
    few = Collecting(RolloutConfig(questions_per_step=2, keep_groups="with_spread", max_resamples=1))
    assert [g.question.id for g in few(lambda number: [group(MIXED, "a"), group(RIGHT, "b")])] == ["a"]
    with pytest.raises(
        NothingKeptError, match="none of 4 groups is kept by rollout.keep_groups with_spread after 2"
    ):
        few(lambda number: [group(RIGHT, "a"), group(RIGHT, "b")])


def test_without_a_choice_the_first_attempt_is_all():
    groups = [group(RIGHT, "a")]
    collecting = Collecting(RolloutConfig(questions_per_step=9))
    assert collecting(lambda number: groups if number == 0 else []) is groups and collecting.metrics() == {}


def test_a_step_has_questions_of_its_own_whatever_earlier_steps_used():
    asked = []

    class Rollouter:
        def run(self, questions, *, step):
            asked.append((step, questions))
            return []

    stream = QuestionStream(questions=list("abcdefghijkl"), batch_size=2, seed=0, shuffle=False)
    share = OwnShare(
        world=lone_world(), questions=stream, rollouter=Rollouter(), bank=None, question_batches=3
    )
    for step, number in ((0, 0), (0, 1), (1, 0), (1, 2)):
        share(step, number)
    assert [(step, "".join(questions)) for step, questions in asked] == [
        (0, "ab"),
        (0, "cd"),
        (1, "gh"),
        (1, "kl"),
    ]


def test_what_is_sampled_ahead_cannot_be_chosen():
    required = ["--run_dir=r", "--model.path=m", "--data.train=d", "--retriever.corpus=c"]
    with pytest.raises(ConfigError, match="rollout.keep_groups: found with_spread with rollout.max_lag 1"):
        load([*required, "--rollout.keep_groups=with_spread", "--rollout.max_lag=1"])
