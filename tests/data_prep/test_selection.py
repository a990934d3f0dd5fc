"""Which rollouts become episodes, and what stands in front of them."""

import dataclasses
from collections import Counter

import pytest

from data_prep.episodes.selection import (
    EpisodeMaker,
    Selection,
    SelectionTally,
    is_held_out,
    select_rollouts,
    without_tokens,
)
from megatron_sd.algorithm.blocks import BLOCKS
from megatron_sd.algorithm.hindsight import BlockContext, render_outcome_last
from megatron_sd.records import StopReason
from tests.builders import group, rollout

KEEP = Selection(per_question=9, min_searches=0)


def other_words(own, token):
    """A rollout that wrote something else, though its queries are the same."""
    last = dataclasses.replace(own.turns[-1], completion_ids=(token, 2))
    return dataclasses.replace(own, turns=(*own.turns[:-1], last))


def picked(rollouts, **changes):
    tally = SelectionTally()
    kept = select_rollouts(group(rollouts), dataclasses.replace(KEEP, **changes), tally)
    return [own.index for own in kept], {reason: count for reason, count in tally.dropped.items() if count}


def test_right_well_formed_rollouts_are_kept_fewest_searches_first():
    bad_form = rollout(3, ["a"], reward=1.0)
    bad_form = dataclasses.replace(bad_form, scores=dataclasses.replace(bad_form.scores, format_valid=0.0))
    rollouts = [
        rollout(0, ["a", "b", "c"], reward=1.0),
        rollout(1, ["a"], reward=0.5),
        rollout(2, ["a", "b"], reward=1.0),
        bad_form,
        rollout(4, reward=0.0, stop_reason=StopReason.RETRIEVAL_FAILED),
        rollout(5, reward=1.0),
    ]
    assert picked(rollouts) == ([5, 2, 0], {"wrong": 1, "form": 1, "infrastructure": 1})
    assert picked(rollouts, min_searches=1) == (
        [2, 0],
        {"wrong": 1, "form": 1, "infrastructure": 1, "few_searches": 1},
    )
    assert picked(rollouts, min_searches=1, per_question=1)[1]["surplus"] == 1
    assert picked(rollouts, needs_form=False)[0] == [5, 3, 2, 0]


def test_what_was_written_twice_is_kept_once():
    same = rollout(0, ["a"], reward=1.0)
    rollouts = [same, dataclasses.replace(same, index=1), other_words(dataclasses.replace(same, index=2), 77)]
    assert picked(rollouts) == ([0, 2], {"repeat": 1})


@pytest.mark.parametrize(
    ("num_right", "expected"), [(0, "too_hard"), (1, None), (2, None), (3, "too_easy"), (4, "too_easy")]
)
def test_questions_are_kept_by_their_pass_rate(num_right, expected):
    rollouts = [other_words(rollout(n, ["a"], reward=float(n < num_right)), 50 + n) for n in range(4)]
    kept, dropped = picked(rollouts, min_pass_rate=0.25, max_pass_rate=0.5)
    assert len(kept) == (0 if expected else num_right)
    assert dropped.get(expected, 0) == (4 if expected else 0)


def test_a_pass_rate_leaves_infrastructure_failures_out():
    failed = [rollout(n, stop_reason=StopReason.ENGINE_FAILED, reward=0.0) for n in (1, 2)]
    assert picked([rollout(0, ["a"], reward=1.0), *failed], min_pass_rate=1.0) == ([0], {"infrastructure": 2})


def mixed_groups(count):
    return [
        group(
            [other_words(rollout(n, [f"{g}/{n}"], reward=float(n % 2), number=g), 50 + n) for n in range(4)],
            g,
        )
        for g in range(count)
    ]


def prompt(question, block):
    return tuple(f"{block}{question}".encode())


def made(groups, seed=0, **changes):
    own = dataclasses.replace(KEEP, **({"blocks_per_question": 1} | changes))
    maker = EpisodeMaker(selection=own, prompt=prompt, bare=[without_tokens(g) for g in groups], seed=seed)
    tally = SelectionTally()
    return [episode for place, g in enumerate(groups) for episode in maker(g, place, tally)], tally


def test_a_linked_block_is_the_groups_own_attempts_with_true_labels():
    groups = mixed_groups(3)
    episodes, _ = made(groups, shuffled_share=0.0, wrong_question_share=0.0)
    assert [e.kind for e in episodes] == ["plain", "plain", "linked"] * 3
    plain, _, linked = episodes[3:6]
    assert plain.rollout.prompt_ids == tuple(b"Question 1?")
    text = bytes(linked.rollout.prompt_ids).decode()
    assert text == (
        'Previous attempts at this question:\nAttempt 1: "1/0" => INCORRECT\nAttempt 2: "1/1" => CORRECT\n'
        'Attempt 3: "1/2" => INCORRECT\nAttempt 4: "1/3" => CORRECT\nQuestion 1?'
    )
    assert linked.rollout.turns == groups[1].rollouts[1].turns, "sampled ids stay as they are"
    assert linked.rollout.index == 1


def test_leave_one_out_leaves_the_rollout_itself_out():
    episodes, _ = made(mixed_groups(2), shuffled_share=0.0, wrong_question_share=0.0, block="leave_one_out")
    assert '"0/1"' not in bytes(episodes[2].rollout.prompt_ids).decode()
    assert '"0/3" => CORRECT' in bytes(episodes[2].rollout.prompt_ids).decode()


def test_shuffled_and_wrong_blocks_are_those_of_training_and_come_in_their_shares():
    groups = mixed_groups(400)
    episodes, tally = made(groups, shuffled_share=0.2, wrong_question_share=0.3)
    kinds = Counter(episode.kind for episode in episodes)
    assert kinds["plain"] == 800
    assert kinds["wrong_question"] / 400 == pytest.approx(0.3, abs=0.07)
    assert kinds["shuffled"] / 400 == pytest.approx(0.2, abs=0.06)
    assert kinds["linked"] == 400 - kinds["shuffled"] - kinds["wrong_question"]
    assert tally.dropped.total() == 800, "the wrong ones"
    bare = [without_tokens(g) for g in groups]
    shared = {"groups": bare, "focal": 1, "correct_above": 0.0, "seed": 0, "render": render_outcome_last}
    for episode in episodes:
        if episode.kind in ("shuffled", "wrong_question"):
            place = int(episode.question.id[1:])
            block = BLOCKS[episode.kind](BlockContext(group=place, **shared))
            assert episode.rollout.prompt_ids == prompt(f"Question {place}?", block)
            own = f'"{place}/0"' in block
            assert own == (episode.kind == "shuffled")


def test_labels_that_are_all_alike_cannot_be_shuffled():
    groups = [
        group([other_words(rollout(n, ["q"], reward=1.0), 50 + n) for n in range(3)], g) for g in range(20)
    ]
    episodes, _ = made(groups, shuffled_share=1.0, wrong_question_share=0.0)
    assert Counter(episode.kind for episode in episodes) == {"plain": 60, "linked": 20}


def test_an_empty_block_and_a_long_episode_are_dropped_and_counted():
    silent = group([rollout(0, reward=1.0)])
    episodes, tally = made([silent], shuffled_share=0.0, wrong_question_share=0.0)
    assert [e.kind for e in episodes] == ["plain"] and tally.dropped["empty_block"] == 1
    episodes, tally = made([silent], blocks_per_question=0, max_tokens=12)
    assert episodes == [] and tally.dropped["too_long"] == 1
    assert "dropped 1 (too_long 1)" in tally.line()


def test_the_same_seed_makes_the_same_episodes_and_another_one_others():
    groups = mixed_groups(40)
    assert made(groups, seed=3)[0] == made(groups, seed=3)[0]
    assert made(groups, seed=3)[0] != made(groups, seed=4)[0]


def test_a_question_is_held_out_whatever_the_others_are():
    held = [number for number in range(1000) if is_held_out(f"q{number}", 0.2, 0)]
    assert len(held) / 1000 == pytest.approx(0.2, abs=0.04)
    assert held != [number for number in range(1000) if is_held_out(f"q{number}", 0.2, 1)]
    assert not is_held_out("q", 0.0, 0) and is_held_out("q", 1.0, 0)
