"""Rewards against hand-computed values, Search-R1's known quirks among them."""

import dataclasses
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.config import ProtocolConfig, RewardConfig
from megatron_sd.records import (
    SEARCH,
    Action,
    Hit,
    Passage,
    Question,
    Rollout,
    RolloutGroup,
    StopReason,
    Turn,
)
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.rewards.answers import (
    exact_match,
    normalize_search_r1,
    normalize_strict,
    sub_em,
    token_f1,
)
from megatron_sd.search.rewards.form import completion_is_well_formed, format_valid
from megatron_sd.search.rewards.reward import hop_hit_rate, score

# What Search-R1's qa_em.py returns, recorded by running it.
SEARCH_R1_EM = [
    ("3.5", "35", 1.0),
    ("-5", "5", 1.0),
    ("The A", "", 1.0),
    ("café", "cafe", 0.0),
    ("café", unicodedata.normalize("NFD", "café"), 0.0),
    ("“Paris”", "Paris", 0.0),
    ('"Paris."', "paris", 1.0),
    ("The  United\nStates", "united states", 1.0),
    ("an apple a day", "apple day", 1.0),
    ("theatre", "atre", 0.0),
    ("Spider-Man", "spiderman", 1.0),
]
STRICT_EM = [
    ("3.5", "35", 0.0),
    ("3.50 m", "3.50 M.", 1.0),
    ("-5", "5", 0.0),
    ("−5", "-5", 1.0),
    (".5", "5", 0.0),
    ("(-.5)", "-.5", 1.0),
    ("5-3", "53", 0.0),
    ("5-3", "5 3", 1.0),
    ("1,000,000", "1000000", 1.0),
    ("1990–1995", "1990-1995", 1.0),
    ("The A", "", 0.0),
    ("The A", "a", 0.0),
    ("café", "cafe", 0.0),
    ("café", unicodedata.normalize("NFD", "café"), 1.0),
    ("“Paris”", "Paris", 1.0),
    ("O’Brien", "O'Brien", 1.0),
    ("U.S.", "US", 1.0),
    ("Spider-Man", "spider man", 1.0),
    ("STRASSE", "straße", 1.0),
    ("ＮＢＡ", "nba", 1.0),
]


@pytest.mark.parametrize(("answer", "gold", "expected"), SEARCH_R1_EM)
def test_search_r1_exact_match(answer, gold, expected):
    assert exact_match(answer, [gold], normalize_search_r1) == expected


@pytest.mark.parametrize(("answer", "gold", "expected"), STRICT_EM)
def test_strict_exact_match(answer, gold, expected):
    assert exact_match(answer, [gold], normalize_strict) == expected


TRICKY = st.text(alphabet="aeTh 15.,-'’–−(%́ͅ\u00a0½Å", max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.text() | TRICKY)
def test_normalisations_are_idempotent(text):
    assert normalize_strict(normalize_strict(text)) == normalize_strict(text)
    once = normalize_search_r1(text)
    assert normalize_search_r1(once) == normalize_search_r1(normalize_search_r1(once))


@settings(deadline=None)
@given(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=1))
def test_strict_never_loses_a_word(text):
    assert normalize_strict(text)


def test_sub_em_substring_and_whole_words():
    assert sub_em("Norway", ["no"], normalize_search_r1) == 1.0
    assert sub_em("Norway", ["no"], normalize_strict) == 0.0
    assert sub_em("anything", ["The"], normalize_search_r1) == 1.0
    assert sub_em("It is in Paris, France.", ["Berlin", "paris"], normalize_strict) == 1.0
    assert sub_em("anything", ["!!"], normalize_strict) == 0.0


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("the cat sat", ["cat sat down"], 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("cat cat", ["cat"], 2 / 3),
        ("cat", ["dog", "big cat"], 2 / 3),
        ("no way", ["no"], 0.0),
        ("No.", ["no"], 1.0),
        ("yes", ["yes sir"], 0.0),
        ("", ["cat"], 0.0),
        ("the", ["the"], 0.0),
        ("dog", ["cat"], 0.0),
    ],
)
def test_token_f1(answer, golds, expected):
    assert token_f1(answer, golds, normalize_search_r1) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=6), st.lists(st.sampled_from("abcde"), max_size=6))
def test_token_f1_is_symmetric_and_bounded(left, right):
    forward = token_f1(" ".join(left), [" ".join(right)], normalize_strict)
    assert forward == token_f1(" ".join(right), [" ".join(left)], normalize_strict)
    assert 0.0 <= forward <= 1.0


WELL_FORMED = [
    ("<think>t</think> <search>q</search>", True),
    ("<search>q</search>", True),
    ("\n<think>t</think>\n<answer>a</answer>\n", True),
    ("<answer>a</answer>", True),
    ("<think></think><search>q</search>", True),
    ("<think>t</think>", False),
    ("<think>t <search>q</search>", False),
    ("<think>t</think> well <search>q</search>", False),
    ("<think>t</think><think>u</think><search>q</search>", False),
    ("<search>q</search><answer>a</answer>", False),
    ("<search>q</search> <search>r</search>", False),
    ("<search> </search>", False),
    ("<answer>a <search>q</search></answer>", False),
    ("<think><answer>x</answer></think><answer>a</answer>", False),
    ("<information>p</information><answer>a</answer>", False),
    ("<search>q", False),
    ("", False),
]


@pytest.mark.parametrize(("text", "expected"), WELL_FORMED)
def test_completion_is_well_formed(text, expected):
    assert completion_is_well_formed(text, build_protocol(ProtocolConfig())) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<refine>n</refine> <think>t</think> <search>q</search>", True),
        ("<refine>n</refine>\n<answer>a</answer>", True),
        ("<think>t</think><answer>a</answer>", True),
        ("<refine>n <answer>a</answer>", False),
        ("<refine>n</refine><refine>m</refine><answer>a</answer>", False),
    ],
)
def test_autorefines_note_is_part_of_a_well_formed_turn(text, expected):
    """Its prompt asks for the note: the format reward must not punish it."""
    assert completion_is_well_formed(text, build_protocol(ProtocolConfig(preset="autorefine"))) is expected
    if "refine" in text:
        assert not completion_is_well_formed(text, build_protocol(ProtocolConfig(preset="search_r1")))


def _passage(id_):
    return Passage(id=id_, title="t", text="<answer>Paris</answer>")


def _turn(query=None, hits=(), **changes):
    return Turn(
        completion_ids=(1,),
        completion_logprobs=(-0.1,),
        action=None if query is None else Action(tool=SEARCH, text=query),
        hits=tuple(Hit(passage=_passage(h), score=1.0) for h in hits),
        **changes,
    )


def _rollout(*turns, answer=None, stop_reason=StopReason.ANSWERED):
    return Rollout(
        question_id="q", index=0, prompt_ids=(0,), turns=turns, stop_reason=stop_reason, answer=answer
    )


def _group(*rollouts, supporting=()):
    return RolloutGroup(
        question=Question(id="q", text="?", golden_answers=("Paris",), supporting=supporting),
        rollouts=rollouts,
    )


def test_format_valid():
    good = _rollout(_turn("a"), _turn("b"), _turn(), answer="Paris")
    assert format_valid(good) == 1.0
    assert format_valid(_rollout(_turn("a"), _turn(), _turn(), answer="Paris")) == 0.0
    assert format_valid(_rollout(_turn("a"), _turn("b"), stop_reason=StopReason.TURN_LIMIT)) == 0.0
    assert format_valid(_rollout(_turn("a", well_formed=False), _turn(), answer="Paris")) == 0.0
    assert format_valid(dataclasses.replace(good, answer=None)) == 0.0


def test_hop_hit_rate():
    rollout = _rollout(_turn("a", hits=["p1", "p2"]), _turn("b", hits=["p9"]), _turn())
    assert hop_hit_rate(rollout, (("p2", "p3"), ("p4",), ("p9",), ("p5",))) == 0.5
    assert hop_hit_rate(rollout, ()) is None


def test_score_takes_the_answer_from_the_rollout_only():
    """A passage that holds the gold answer in answer tags earns nothing."""
    silent = _rollout(_turn("Paris", hits=["p1"]), _turn(), stop_reason=StopReason.NO_ACTION)
    (group,) = score(
        [_group(silent, supporting=(("p1",),))], RewardConfig(answer="sub_em", format_weight=0.5)
    )
    scores = group.rollouts[0].scores
    assert (scores.reward, scores.em, scores.f1, scores.format_valid, scores.hop_hit_rate) == (
        0.0,
        0.0,
        0.0,
        0.0,
        1.0,
    )


def test_score_adds_the_format_weight_and_leaves_its_input_alone():
    rollout = _rollout(_turn("a"), _turn(), answer="Paris, France")
    group = _group(rollout)
    (by_f1,) = score([group], RewardConfig(answer="f1", format_weight=0.2))
    (by_em,) = score([group], RewardConfig(answer="em"))
    assert by_f1.rollouts[0].scores.reward == pytest.approx(2 / 3 + 0.2)
    assert by_em.rollouts[0].scores.reward == 0.0
    assert by_em.rollouts[0].scores.f1 == pytest.approx(2 / 3)
    assert group.rollouts[0].scores is None
