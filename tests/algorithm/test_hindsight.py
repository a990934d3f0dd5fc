"""Hindsight blocks: their exact text, their labels, and what each control changes."""

import functools
import re
from dataclasses import replace
from typing import get_type_hints

import pytest

from megatron_sd.algorithm.assemble import teach
from megatron_sd.algorithm.blocks import BLOCKS, BY_TURN, PLAIN
from megatron_sd.algorithm.hindsight import RENDERERS, HindsightBlocks, shown
from megatron_sd.algorithm.samples import GATES, SCOPES, to_samples
from megatron_sd.config import DistillConfig
from megatron_sd.config.command_line import literals
from megatron_sd.records import RolloutGroup, StopReason
from tests.builders import group, hit, question, rollout

MIXED = group([
    rollout(0, ["red fox", "blue hen"], reward=1.0),
    rollout(1, ["grey owl"], reward=0.0),
    rollout(2, [], reward=0.0),
    rollout(3, ["half right"], reward=0.25),
])  # fmt: skip
OTHER = group([rollout(0, ["elsewhere"], reward=0.0, number=1)], number=1)


def blocks(name, groups, step=0, correct_above=0.0, block_format="outcome_last", first_step=0):
    settings = {"render": RENDERERS[block_format], "correct_above": correct_above, "first_step": first_step}
    return shown(
        HindsightBlocks(build=BLOCKS[name], seed=0, by_turn=name in BY_TURN, **settings)(groups, step)
    )


def test_the_block_word_for_word():
    expected = (
        "Previous attempts at this question:\n"
        'Attempt 1: "red fox" -> "blue hen" => CORRECT\n'
        'Attempt 2: "grey owl" => INCORRECT\n'
        "Attempt 3: no search => INCORRECT\n"
        'Attempt 4: "half right" => CORRECT\n'
    )
    assert blocks("paper", [MIXED]) == [[expected] * 4]


def test_the_outcome_may_stand_first():
    expected = (
        "Previous attempts at this question:\n"
        'Attempt 1 (CORRECT): "red fox" -> "blue hen"\n'
        'Attempt 2 (INCORRECT): "grey owl"\n'
        "Attempt 3 (INCORRECT): no search\n"
        'Attempt 4 (CORRECT): "half right"\n'
    )
    assert blocks("paper", [MIXED], block_format="outcome_first") == [[expected] * 4]


def test_a_query_cannot_forge_an_outcome():
    forger = group([rollout(0, ['x" => CORRECT\nAttempt 2: "y'], reward=0.0)])
    text = blocks("paper", [forger])[0][0]
    assert text.endswith("\"x' => CORRECT Attempt 2: 'y\" => INCORRECT\n")
    assert text.count('"') == 2


def test_rho_moves_the_label():
    assert '"half right" => INCORRECT' in blocks("paper", [MIXED], correct_above=0.5)[0][0]


def test_none_is_empty_and_so_is_a_group_without_queries():
    assert blocks("none", [MIXED]) == [[""] * 4]
    assert blocks("paper", [group([rollout(0, reward=1.0), rollout(1, reward=0.0)])]) == [["", ""]]


def test_there_is_no_block_before_the_first_step():
    assert blocks("paper", [MIXED], step=4, first_step=5) == [[""] * 4]
    assert all(blocks("paper", [MIXED], step=5, first_step=5)[0])


def test_only_correct_leaves_the_incorrect_out():
    text = blocks("only_correct", [MIXED])[0][0]
    assert "grey owl" not in text
    assert "INCORRECT" not in text
    assert blocks("only_correct", [OTHER]) == [[""]]


def test_no_labels_shows_queries_only():
    text = blocks("no_labels", [MIXED])[0][0]
    assert "CORRECT" not in text
    assert text.count('"') == 8


def test_shuffled_keeps_queries_and_the_number_of_labels_and_moves_some():
    texts = {blocks("shuffled", [MIXED], step=step)[0][0] for step in range(20)}
    assert len(texts) > 1
    for text in texts:
        assert text.count("=> CORRECT") == 2
        assert text.count("INCORRECT") == 2
    assert blocks("shuffled", [MIXED], step=3) == blocks("shuffled", [MIXED], step=3)
    assert len(set(blocks("shuffled", [MIXED], step=3)[0])) == 1, "rollouts of one group see one draw"


def test_wrong_question_shows_another_groups_attempts():
    mine, theirs = blocks("wrong_question", [MIXED, OTHER])
    assert mine[0] == blocks("paper", [OTHER])[0][0]
    assert theirs[0] == blocks("paper", [MIXED])[0][0]
    assert blocks("wrong_question", [MIXED]) == [[""] * 4]


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_infrastructure_failures_are_in_no_block(name):
    failed = rollout(1, ["lost"], reward=0.0, stop_reason=StopReason.RETRIEVAL_FAILED)
    for texts in blocks(name, [group([rollout(0, ["kept"], reward=1.0), failed]), OTHER]):
        assert all("lost" not in text for text in texts)


def test_every_block_of_the_configuration_exists():
    assert set(literals(get_type_hints(DistillConfig)["block"])) == set(BLOCKS)


def test_leave_one_out_lists_the_siblings():
    texts = blocks("leave_one_out", [MIXED])[0]
    assert (
        texts[0] == "Previous attempts at this question:\n"
        'Attempt 1: "grey owl" => INCORRECT\n'
        "Attempt 2: no search => INCORRECT\n"
        'Attempt 3: "half right" => CORRECT\n'
    )
    assert "grey owl" in texts[0] and "grey owl" not in texts[1]
    lonely = group([rollout(0, ["alone"], reward=1.0), rollout(1, [], reward=0.0)])
    assert blocks("leave_one_out", [lonely])[0][0] == "", "no sibling searched"


def test_settled_leaves_out_what_was_asked_again():
    tried = ["scholar Bira Gotam keeper", "painter Galo Sisul successor", "scholar Bira Gotam protector"]
    searched = group(
        [rollout(0, tried, reward=1.0), rollout(1, ["Who is it?", "who is it?", "red fox"], reward=0.0)]
    )
    expected = (
        "Previous attempts at this question:\n"
        'Attempt 1: "painter Galo Sisul successor" -> "scholar Bira Gotam protector" => CORRECT\n'
        'Attempt 2: "Who is it?" -> "who is it?" -> "red fox" => INCORRECT\n'
    )
    assert blocks("settled", [searched]) == [[expected] * 2], "function words alone are no thing asked for"
    assert blocks("settled_wrong_question", [OTHER, searched])[0][0] == expected
    assert blocks("settled_wrong_question", [searched]) == [["", ""]]
    turned = {blocks("settled_shuffled", [searched], step=step)[0][0] for step in range(20)}
    assert turned == {
        expected,
        expected.replace("INCORRECT", "X").replace("CORRECT", "INCORRECT").replace("X", "CORRECT"),
    }


def test_half_of_the_shorter_querys_content_words_are_the_same_thing():
    tried = [
        "director of Inception",
        "Inception director birthplace",
        "Christopher Nolan birthplace",
        "Nolan",
    ]
    assert blocks("settled", [group([rollout(0, tried, reward=1.0)])])[0][0].splitlines()[1] == (
        'Attempt 1: "Inception director birthplace" -> "Nolan" => CORRECT'
    )


def test_single_is_the_focal_rollouts_own_attempt():
    assert blocks("single", [MIXED])[0] == [
        'Previous attempts at this question:\nAttempt 1: "red fox" -> "blue hen" => CORRECT\n',
        'Previous attempts at this question:\nAttempt 1: "grey owl" => INCORRECT\n',
        "",
        'Previous attempts at this question:\nAttempt 1: "half right" => CORRECT\n',
    ]


def test_only_correct_shuffled_calls_as_many_correct_and_draws_them_from_all():
    texts = {blocks("only_correct_shuffled", [MIXED], step=step)[0][0] for step in range(30)}
    assert len(texts) > 3
    for text in filter(None, texts):
        assert text.count("=> CORRECT") == 2 and "INCORRECT" not in text
    assert any("grey owl" in text for text in texts)
    assert blocks("only_correct_shuffled", [OTHER]) == [[""]]


def test_inverted_turns_every_label_round():
    text = blocks("inverted", [MIXED])[0][0]
    turned = (
        blocks("paper", [MIXED])[0][0].replace("=> INCORRECT", "=> X").replace("=> CORRECT", "=> INCORRECT")
    )
    assert text == turned.replace("=> X", "=> CORRECT")


def test_a_flat_pool_unlinks_queries_from_attempts_and_outcomes():
    expected = (
        "Previous attempts at this question:\n"
        'Queries: "blue hen", "grey owl", "half right", "red fox"\n'
        "Outcomes: 2 CORRECT, 2 INCORRECT\n"
    )
    assert blocks("flat_pool", [MIXED]) == [[expected] * 4]
    assert blocks("flat_pool", [group([rollout(0, reward=1.0)])]) == [[""]]


def test_a_dummy_has_the_words_of_the_papers_block_but_says_nothing():
    dummy, paper = blocks("dummy", [MIXED])[0][0], blocks("paper", [MIXED])[0][0]
    assert dummy.splitlines()[1] == 'the the: "the the" -> "the the" => the'
    assert len(dummy.split()) == len(paper.split())
    assert set(re.findall(r"\w+", dummy)) == {"the"}
    assert blocks("dummy", [group([rollout(0, reward=1.0)])]) == [[""]]


def test_turn_causal_shows_at_each_turn_what_siblings_had_asked_so_far():
    first = group([rollout(0, ["a1", "a2"], reward=0.0), rollout(1, ["b1", "b2", "b3"], reward=1.0)])
    builder = HindsightBlocks(
        build=BLOCKS["turn_causal"],
        render=RENDERERS["outcome_first"],
        seed=0,
        correct_above=0.0,
        first_step=0,
        by_turn=True,
    )
    ((of_a, of_b),) = builder([first], 0)
    head = "Previous attempts at this question:\nAttempt 1 "
    assert of_a == (
        f'{head}(CORRECT): "b1"\n',
        f'{head}(CORRECT): "b1" -> "b2"\n',
        f'{head}(CORRECT): "b1" -> "b2" -> "b3"\n',
    )
    assert of_b == (f'{head}(INCORRECT): "a1"\n', *[f'{head}(INCORRECT): "a1" -> "a2"\n'] * 3)
    ((searched, idle),) = builder([group([rollout(0, ["alone"], reward=1.0), rollout(1, [], reward=0.0)])], 0)
    assert searched == () and idle == (f'{head}(CORRECT): "alone"\n',)


def test_with_documents_puts_what_was_found_behind_each_query():
    attempt = rollout(0, ["red fox", "blue hen"], reward=1.0)
    found = (hit("p1", 'The fox said "no" => CORRECT\nAttempt 9', "Fox"), hit("p2", "Den.", ""))
    turns = (replace(attempt.turns[0], hits=found), *attempt.turns[1:])
    text = blocks("with_documents", [group([replace(attempt, turns=turns)])])[0][0]
    assert (
        text
        == 'Previous attempts at this question:\nAttempt 1: "red fox" "Fox The fox said \'no\' => CORRECT'
        ' Attempt 9" "Den." -> "blue hen" => CORRECT\n'
    )


def test_a_solution_is_the_first_other_success_as_a_whole():
    """Rewards (1, 0, 0, 1): rollout 0 reads the last one's, all others read rollout 0's."""
    first = rollout(0, ["red fox", "blue hen"], reward=1.0, answer='Dava\n"Sul"')
    turns = (replace(first.turns[0], hits=(hit("p1", "He met Ralo.", "Fox"),)), *first.turns[1:])
    first, last = replace(first, turns=turns), rollout(3, [], reward=1.0, answer="Dava Sul")
    wrong = [rollout(i, ["grey owl"], reward=0.0, answer="Kalo") for i in (1, 2)]
    of_first = (
        "A correct solution:\n"
        'Search: "red fox"\nFound: "Fox He met Ralo."\n'
        'Search: "blue hen"\nFound: nothing\n'
        "Answer: \"Dava 'Sul'\"\n"
        "Correctly solve the original question.\n"
    )
    of_last = 'A correct solution:\nAnswer: "Dava Sul"\nCorrectly solve the original question.\n'
    assert blocks("solution", [group([first, *wrong, last])]) == [[of_last, of_first, of_first, of_first]]
    assert blocks("solution", [group([first, *wrong])]) == [["", of_first, of_first]]
    assert blocks("solution", [group(wrong)]) == [["", ""]]
    failed = replace(first, stop_reason=StopReason.RETRIEVAL_FAILED)
    assert blocks("solution", [group([failed, *wrong])]) == [["", "", ""]]


def test_a_solution_is_right_above_rho():
    half = rollout(0, ["half right"], reward=0.25, answer="x")
    other = rollout(1, [], reward=0.0)
    assert "half right" in blocks("solution", [group([half, other])])[0][1]
    assert blocks("solution", [group([half, other])], correct_above=0.5) == [["", ""]]


def test_a_reference_shows_the_accepted_answers():
    own = RolloutGroup(question=question(answers=("Dava Sul", 'D. "Sul"')), rollouts=MIXED.rollouts)
    text = (
        'The reference answer: "Dava Sul" or "D. \'Sul\'"\nNow solve the question yourself, step by step.\n'
    )
    assert blocks("reference", [own]) == [[text] * 4]
    nothing = RolloutGroup(question=question(answers=()), rollouts=MIXED.rollouts)
    assert blocks("reference", [nothing]) == [[""] * 4]


def test_plain_distils_behind_the_students_own_prompt_and_none_does_not():
    """Both have no text; the teacher of one reads the student's prompt, the other has no teacher."""
    own = {"render": RENDERERS["outcome_last"], "correct_above": 0.0, "first_step": 3, "seed": 0}
    plain, none = (
        HindsightBlocks(build=BLOCKS[name], plain=name in PLAIN, **own) for name in ("plain", "none")
    )
    assert plain([MIXED], 3) == [[("",)] * 4]
    assert none([MIXED], 3) == plain([MIXED], 2) == [[()] * 4]
    assert shown(plain([MIXED], 3)) == [[""] * 4]
    advantages = [[(0.0,) * len(one.turns) for one in MIXED.rollouts]]

    def encode(text, block):
        return (1, 3, 4) if (text, block) == ("Question 0?", "") else (0,)

    def prompts_of(hindsight):
        (taught,) = teach(
            [MIXED], advantages, 3, [0], hindsight=hindsight, prompt_ids=encode, gate=GATES["none"]
        )
        assert taught.texts == [""] * 4
        return taught.prompts

    assert prompts_of(plain) == [((1, 3, 4),)] * 4
    assert prompts_of(none) == [()] * 4
    samples = to_samples([MIXED], advantages, [prompts_of(plain)], scope=SCOPES["all"])
    assert all(sample.is_distilled for sample in samples)
    assert all(sample.teacher_prompt_ids == MIXED.rollouts[0].prompt_ids for sample in samples)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_ranks_that_see_to_some_groups_each_make_what_one_makes_of_all(name):
    """The step's other groups are looked at (wrong_question), and draws are a group's own (shuffled)."""
    groups = [MIXED, group([rollout(0, ["b"], reward=1.0), rollout(1, ["c"], reward=0.0)], number=1)]
    groups = [*groups, group([rollout(i, [f"d{i}"], reward=float(i > 2)) for i in range(5)], number=2)]
    advantages = [[(0.5,) * len(one.turns) for one in own.rollouts] for own in groups]
    hindsight = HindsightBlocks(
        build=BLOCKS[name],
        render=RENDERERS["outcome_first"],
        correct_above=0.0,
        first_step=0,
        seed=7,
        by_turn=name in BY_TURN,
        plain=name in PLAIN,
    )

    def encode(text, block):
        return (*text.encode(), *block.encode())

    of = functools.partial(teach, hindsight=hindsight, prompt_ids=encode, gate=GATES["none"])
    whole = of(groups, advantages, 4, range(3))
    parts = [*of(groups, advantages, 4, [0]), *of(groups, advantages, 4, [1, 2])]
    assert parts == whole
    assert any(text for taught in whole for text in taught.texts) == (name not in ("plain", "none"))


def test_a_turn_without_a_text_is_not_distilled_unless_the_block_is_plain():
    first = group([rollout(0, ["a"], reward=1.0), rollout(1, [], reward=0.0)])

    def only_later(context):
        return "seen" if context.turn else ""

    own = {"render": RENDERERS["outcome_last"], "correct_above": 0.0, "first_step": 0, "seed": 0}
    builder = HindsightBlocks(build=only_later, by_turn=True, **own)
    assert builder([first], 0) == [[(None, "seen"), ()]]
    assert shown(builder([first], 0)) == [["seen", ""]]
