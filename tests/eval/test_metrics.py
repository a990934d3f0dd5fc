"""Figures of single rollouts, by hand; Search-R1's quirks as they reach an evaluation; an answer only a
passage gives."""

import dataclasses
import itertools

import pytest

from eval.metrics import answer_in_passages, answered_in_form, pass_at_k, pass_figures, rollout_figures
from eval.retrieval import hop_recall
from megatron_sd.records import Question, StopReason
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.search.rewards.form import format_valid
from tests import builders
from tests.rollout.fakes import InlineRetriever, ScriptedEngine, environment

CAPITAL = Question(id="q", text="Which city?", golden_answers=("Paris",), supporting=(("p1", "p9"), ("p2",)))


def searched(answer, *turn_hits, **changes):
    rollout = builders.rollout(0, [f"query {n}" for n in range(len(turn_hits))], answer=answer)
    turns = [dataclasses.replace(t, hits=tuple(hits)) for t, hits in zip(rollout.turns, turn_hits)] + [
        rollout.turns[-1]
    ]
    return dataclasses.replace(rollout, turns=tuple(turns), **changes)


def test_all_figures_of_a_rollout_by_hand():
    hits = [builders.hit("p1", text="The mayor lives there."), builders.hit("p3", text="In PARIS, of course")]
    figures = rollout_figures(searched("the Paris commune", hits, []), CAPITAL, format_valid)
    assert figures == {
        "em": 0.0,
        "f1": pytest.approx(2 / 3),
        "sub_em": 1.0,
        "em_strict": 0.0,
        "f1_strict": pytest.approx(2 / 3),
        "sub_em_strict": 1.0,
        "answer_in_passages": 1.0,
        "supporting_recall": 0.5,
        "searches": 2.0,
        "turns": 3.0,
        "completion_tokens": 8.0,
        "observation_tokens": 4.0,
        "format_valid": 1.0,
    }
    assert figures["supporting_recall"] == hop_recall(hits, CAPITAL.supporting)


def test_without_a_search_nothing_was_found_and_without_known_passages_nothing_is_said():
    figures = rollout_figures(searched("Paris"), CAPITAL, format_valid)
    assert (figures["em"], figures["answer_in_passages"], figures["supporting_recall"]) == (1.0, 0.0, 0.0)
    unknown = dataclasses.replace(CAPITAL, supporting=())
    assert rollout_figures(searched("Paris"), unknown, format_valid)["supporting_recall"] is None


def test_no_answer_scores_nothing_and_a_failed_rollout_is_no_data():
    assert (
        rollout_figures(searched(None, stop_reason=StopReason.TURN_LIMIT), CAPITAL, answered_in_form)["f1"]
        == 0.0
    )
    assert (
        rollout_figures(searched(None, stop_reason=StopReason.RETRIEVAL_FAILED), CAPITAL, answered_in_form)
        == {}
    )


@pytest.mark.parametrize(
    ("quirk", "answer", "gold", "em", "em_strict"),
    [
        ("the decimal point is punctuation", "3.5", "35", 1.0, 0.0),
        ("so is the minus sign", "-5", "5", 1.0, 0.0),
        ("articles go, wherever they stand", "an apple a day", "apple day", 1.0, 1.0),
        ("a hyphen joins words", "Spider-Man", "Spiderman", 1.0, 0.0),
        ("curly quotes stay", "“Paris”", "Paris", 0.0, 1.0),
        ("composed and decomposed letters differ", "caf\u00e9", "cafe\u0301", 0.0, 1.0),
    ],
)
def test_quirks_of_search_r1_reach_the_report_and_the_strict_figure_mends_them(
    quirk, answer, gold, em, em_strict
):
    figures = rollout_figures(
        searched(answer), dataclasses.replace(CAPITAL, golden_answers=(gold,)), format_valid
    )
    assert (figures["em"], figures["em_strict"]) == (em, em_strict), quirk


def test_quirk_of_search_r1_a_gold_answer_inside_a_longer_word_counts_as_sub_em():
    figures = rollout_figures(
        searched("Norway"), dataclasses.replace(CAPITAL, golden_answers=("no",)), format_valid
    )
    assert (figures["sub_em"], figures["sub_em_strict"]) == (1.0, 0.0)


def test_an_answer_that_stands_only_in_an_observation_scores_0():
    """Search-R1's scorer reads the whole text and gives such a rollout 1.0."""
    engine = ScriptedEngine({"rollout 0": ["<search>who</search>", "I stop here."]})
    retriever = InlineRetriever("<answer>gold</answer> gold")
    rollouter = Rollouter(engine, retriever, environment(max_search_turns=1, group_size=1), top_k=1, seed=0)
    ((rollout,),) = (group.rollouts for group in rollouter.run([builders.question()], step=0, greedy=True))
    figures = rollout_figures(rollout, builders.question(), format_valid)
    assert figures["answer_in_passages"] == 1.0
    assert {figures[name] for name in ("em", "f1", "sub_em", "em_strict", "f1_strict", "sub_em_strict")} == {
        0.0
    }


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("no", "Norway", 0.0),
        ("New York", "new  york!", 1.0),
        ("New York", "New, York", 0.0),
        ("U.S.", "the u.s. army", 1.0),
        ("caf\u00e9", "a cafe\u0301 there", 1.0),
        ("Łódź", "in łódź", 1.0),
        ("---", "no dashes here", 0.0),
    ],
)
def test_an_answer_in_a_passage_is_a_run_of_whole_words(gold, text, expected):
    assert (
        answer_in_passages([builders.hit("p", text="nothing"), builders.hit("p", text=text)], [gold])
        == expected
    )


@pytest.mark.parametrize("num_correct", [0, 1, 2, 5])
def test_pass_at_k_counts_all_draws(num_correct):
    samples = [True] * num_correct + [False] * (5 - num_correct)
    for k in (1, 2, 3, 5):
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert pass_at_k(5, num_correct, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="k from 1 to 5"):
        pass_at_k(5, num_correct, 6)


def test_pass_figures_double_up_to_the_number_of_samples():
    assert pass_figures([1.0]) == {}
    assert pass_figures([1.0, 0.0, 0.0, 0.0, 0.0]) == pytest.approx(
        {"pass@1": 0.2, "pass@2": 0.4, "pass@4": 0.8, "pass@5": 1.0}
    )
    assert list(pass_figures([1.0] * 4)) == ["pass@1", "pass@2", "pass@4"]


def test_a_search_that_finds_nothing_has_figures_of_zero():
    figures = rollout_figures(searched("x", []), CAPITAL, format_valid)
    assert (figures["answer_in_passages"], figures["supporting_recall"]) == (0.0, 0.0)


def test_several_attempts_have_a_figure_each():
    rollout = searched("Paris", [])
    first, last = rollout.turns
    turns = (dataclasses.replace(first, answer="Lyon"), dataclasses.replace(last, attempt=1, answer="Paris"))
    figures = rollout_figures(dataclasses.replace(rollout, turns=turns), CAPITAL, format_valid)
    assert (figures["em@1"], figures["em@2"], figures["em"]) == (0.0, 1.0, 1.0)
