"""Rewards made of a rollout's parts: cases by hand."""

import dataclasses

import pytest

from megatron_sd.config import RewardConfig
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.search.rewards.reward import score_rollout
from megatron_sd.search.rewards.shapes import REWARD_SHAPES, RewardParts, overlong_penalty, plain, structured
from tests.builders import group, hit, rollout

STRUCTURED = RewardConfig(answer="em", shape="structured", structure=0.2, final=0.1, retrieval=0.1)
PARTS = RewardParts(
    answer=0.0, em=0.0, f1=0.0, sub_em=0.0, answer_words=1, has_answer=True, format_valid=1.0, num_searches=0,
    found_gold=lambda: False, noted_gold=lambda: False, num_sampled=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "changes", "reward"),
    [
        ("r1_searcher", {"f1": 0.5}, 0.5),
        ("r1_searcher", {"f1": 0.5, "answer_words": 12}, -1.5),
        ("r1_searcher", {"has_answer": False, "format_valid": 0.0}, -2.0),
        ("r1_searcher_first", {"sub_em": 1.0, "num_searches": 1}, 2.0),
        ("r1_searcher_first", {}, -0.5),
        ("r1_searcher_first", {"format_valid": 0.0, "has_answer": False}, -1.0),
        ("research", {"format_valid": 0.0, "f1": 0.4}, 0.0),
        ("research", {}, 0.1),
        ("research", {"f1": 0.4}, 0.4),
        ("autorefine", {"noted_gold": lambda: True}, 0.1),
        ("autorefine", {"f1": 0.6667, "noted_gold": lambda: True}, 0.6667),
        ("autorefine", {"has_answer": False, "noted_gold": lambda: True}, 0.0),
        ("autorefine", {}, 0.0),
    ],
)
def test_the_rewards_of_relatives(shape, changes, reward):
    found = REWARD_SHAPES[shape](dataclasses.replace(PARTS, **changes), RewardConfig(shape=shape))
    assert found == pytest.approx(reward)


def test_autorefine_reads_the_policys_own_notes():
    """Gold "Paris": a note that holds it earns .1 beside a wrong answer; a passage that holds it nothing. As a
    substring it counts inside a word, under `strict` as a word alone."""

    def reward(answer: str | None, note: str, text: str = "", **settings) -> float:
        asked = group([rollout(0, ["q"], answer=answer)])
        asked = dataclasses.replace(
            asked, question=dataclasses.replace(asked.question, golden_answers=("Paris",))
        )
        (own,) = asked.rollouts
        first = dataclasses.replace(own.turns[0], note=note, hits=(hit("p", text=text),))
        own = dataclasses.replace(own, turns=(first, *own.turns[1:]))
        return score_rollout(own, asked, RewardConfig(shape="autorefine", **settings)).reward

    assert reward("London", "it is in paris, they say") == pytest.approx(0.1)
    assert reward("Paris France", "nothing") == pytest.approx(0.6667, abs=1e-4)
    assert reward(None, "it is in paris") == 0.0
    assert reward("London", "nothing", text="Paris") == 0.0
    assert reward("London", "parisian") == pytest.approx(0.1)
    assert reward("London", "parisian", normalization="strict") == 0.0


@pytest.mark.parametrize(
    ("changes", "reward"),
    [
        ({"em": 1.0}, 1.0),
        ({"em": 1.0, "format_valid": 0.0}, 0.8),
        ({"found_gold": lambda: True}, 0.3),
        ({}, 0.2),
        ({"format_valid": 0.0}, 0.1),
        ({"format_valid": 0.0, "found_gold": lambda: True}, 0.1),
        ({"format_valid": 0.0, "has_answer": False}, 0.0),
    ],
)
def test_the_structured_reward_is_a_substitution(changes, reward):
    assert structured(dataclasses.replace(PARTS, **changes), STRUCTURED) == pytest.approx(reward)


def test_passages_are_not_read_for_a_reward_that_does_not_ask():
    def looked() -> bool:
        raise AssertionError("the passages were read")

    parts = dataclasses.replace(PARTS, found_gold=looked)
    assert plain(parts, RewardConfig()) == 0.0
    assert structured(parts, dataclasses.replace(STRUCTURED, retrieval=0.0)) == pytest.approx(0.2)


def test_the_plain_reward_is_a_sum():
    parts = dataclasses.replace(PARTS, answer=0.5)
    assert plain(parts, RewardConfig(format_weight=0.25)) == 0.75
    assert plain(dataclasses.replace(parts, format_valid=0.0), RewardConfig(format_weight=0.25)) == 0.5


@pytest.mark.parametrize(("sampled", "penalty"), [(80, 0.0), (90, -0.5), (100, -1.0), (0, 0.0)])
def test_rollouts_near_the_limit_lose_up_to_one(sampled, penalty):
    config = RewardConfig(overlong_limit=100, overlong_buffer=20)
    assert overlong_penalty(sampled, config) == pytest.approx(penalty)
    assert overlong_penalty(sampled, RewardConfig()) == 0.0


def test_a_gold_answer_counts_as_found_where_a_passage_holds_it():
    """By the shape of a whole rollout: one search, a wrong answer, a valid form."""
    asked = group([rollout(0, ["q"], answer="wrong")])
    (gold,) = asked.question.golden_answers

    def reward(text: str) -> float:
        (own,) = asked.rollouts
        first = dataclasses.replace(own.turns[0], hits=(hit("p", text=text),))
        found = dataclasses.replace(own, turns=(first, *own.turns[1:]))
        return score_rollout(found, asked, STRUCTURED).reward

    assert reward(f"Somebody says {gold} here.") == pytest.approx(0.3)
    assert reward("Nothing of it.") == pytest.approx(0.2)


def test_only_sampled_tokens_are_counted():
    """Three a search and two for the answer; five observed tokens do not count."""
    asked = group([rollout(0, ["q", "r"], answer="wrong")])
    config = RewardConfig(overlong_limit=10, overlong_buffer=4)
    base = score_rollout(asked.rollouts[0], asked, RewardConfig()).reward
    assert score_rollout(asked.rollouts[0], asked, config).reward == pytest.approx(base - 0.5)


def test_a_buffer_without_a_limit_is_refused():
    required = ["--run_dir=r", "--model.path=m", "--data.train=d", "--retriever.corpus=c"]
    with pytest.raises(ConfigError, match="reward.overlong_limit: found 0 with reward.overlong_buffer 8"):
        load([*required, "--reward.overlong_buffer=8"])
