"""Demonstrations: truthful labels, hits that follow the hidden table, a table drawn anew for every
episode."""

import random
from collections import Counter

import numpy as np
import pytest

from data_prep.world.demonstrations import DemonstratorConfig, make_demonstration, read_block
from data_prep.world.world import KEYWORDS, RELATION_OF, Entity, names
from megatron_sd.algorithm.hindsight import AttemptLine, render_outcome_first
from megatron_sd.search.presets import PRESETS
from megatron_sd.search.rewards.form import completion_is_well_formed

PROTOCOL = PRESETS["compact"]
DEMONSTRATOR = DemonstratorConfig()


def demonstrations(kind, count, seed=0):
    rng = random.Random(seed)
    return [make_demonstration(kind, PROTOCOL, DEMONSTRATOR, rng) for _ in range(count)]


def test_the_hidden_table_is_drawn_anew_for_every_episode():
    tables = [tuple(sorted(d.table.items())) for d in demonstrations("natural", 400)]
    assert len(set(tables)) == 400
    for cell, keywords in (
        (("mentor", "scholar"), KEYWORDS["mentor"]),
        (("envoy", "painter"), KEYWORDS["envoy"]),
    ):
        counts = Counter(dict(table)[cell] for table in tables)
        assert set(counts) == set(keywords)
        assert all(60 < count < 140 for count in counts.values()), (
            "uniform: nothing to learn about any one world"
        )


@pytest.mark.parametrize("kind", ["only_correct", "pair", "mixed", "natural", "natural_correct"])
def test_labels_are_truthful(kind):
    for demonstration in demonstrations(kind, 60):
        assert demonstration.block == render_outcome_first([t.attempt for t in demonstration.block_traces])
        traces = [demonstration.trace, *demonstration.block_traces]
        facts = {(e, RELATION_OF[k]): f.value for t in traces for e, k, f in t.searches if f.is_hit}
        subject, relations = asked(demonstration)
        for relation in relations:
            subject = facts.get((subject, relation))
        for trace in traces:
            if subject is None:
                assert not trace.correct, "nobody found the whole chain, so nobody can be right"
            else:
                assert trace.correct == (trace.answer == subject.name)


def asked(demonstration):
    """Subject and relations of the question, read back from the prompt."""
    question = demonstration.segments[0][1].removeprefix(demonstration.block)
    words = question.strip().removeprefix("Question: Who is ").removesuffix("?").split()
    return Entity(" ".join(words[-2:]), words[-3]), [
        word for word in reversed(words[:-3]) if word in KEYWORDS
    ]


def test_a_search_hits_exactly_when_it_uses_the_tables_keyword():
    found = Counter()
    for demonstration in demonstrations("none", 200):
        for entity, keyword, finding in demonstration.trace.searches:
            hit = demonstration.table[RELATION_OF[keyword], entity.type] == keyword
            assert finding.is_hit == hit
            assert (f"The {keyword} of {entity.label} is {finding.value.label}." == finding.text) == hit
            found[hit] += 1
    assert found[True] > 100
    assert found[False] > 100


def test_the_demonstrator_is_mediocre_and_a_block_helps_only_a_block_of_its_own_question():
    def success(kind):
        return np.mean([d.trace.correct for d in demonstrations(kind, 600)])

    assert 0.25 < success("none") < 0.45
    assert success("natural") > 0.8
    assert abs(success("wrong_question") - success("none")) < 0.08


def test_names_are_drawn_from_all_pairs_evenly():
    """A pair that never occurs would be learnt as impossible, and the policy could not copy it from a
    passage."""
    asked_about = [asked(d)[0].name for d in demonstrations("none", 2000)]
    held_out = set(names("eval"))
    assert 0.2 < np.mean([name in held_out for name in asked_about]) < 0.3
    assert len(set(asked_about)) > 1200


def test_pairs_hold_one_correct_and_one_incorrect_attempt_and_blocks_of_only_correct_no_incorrect_one():
    assert all(sorted(t.correct for t in d.block_traces) == [False, True] for d in demonstrations("pair", 50))
    assert all("INCORRECT" not in d.block for d in demonstrations("only_correct", 50))
    assert all("CORRECT" not in d.block for d in demonstrations("no_labels", 20))


def test_reading_a_block():
    entity = Entity("Kalo Baren", "scholar")

    def weights(*attempts, is_last_hop=False):
        return read_block(attempts, entity, "mentor", is_last_hop=is_last_hop, retry=0.75)

    def attempt(correct, *queries):
        return AttemptLine(queries=queries, correct=correct)

    first, second, onward = "scholar Kalo Baren mentor", "scholar Kalo Baren tutor", "sailor Dira Gotam heir"
    assert weights() == {"mentor": 1, "teacher": 1, "tutor": 1, "coach": 1}
    settled = weights(attempt(True, first, second, onward))
    assert settled["tutor"] == 200
    assert settled["mentor"] == 0.01
    assert weights(attempt(False, first, onward))["mentor"] == 4, "it went on: perhaps it had hit"
    assert weights(attempt(False, first), is_last_hop=True)["mentor"] == 0.05, (
        "the last query of a failure had missed"
    )
    assert weights(attempt(None, first), is_last_hop=True)["mentor"] == 1, "without a label nobody knows"
    assert weights(attempt(True, onward))["mentor"] == 1, "another entity's query says nothing"


# -- training


def test_no_two_entities_of_an_episode_share_a_name_by_chance():
    """Else a miss could answer the question, and an episode that needs a wrong attempt could wait for one
    for ever."""
    for demonstration in demonstrations("natural", 300):
        found = {
            f.value for t in (demonstration.trace, *demonstration.block_traces) for _, _, f in t.searches
        }
        assert len({value.name for value in found}) == len(found)


def test_every_turn_is_well_formed_and_thinks_missed_exactly_when_it_asks_again():
    for demonstration in demonstrations("none", 100):
        completions = [text for writer, text in demonstration.segments if writer == "completion"]
        assert all(completion_is_well_formed(text, PROTOCOL) for text in completions)
        entities = [entity for entity, _, _ in demonstration.trace.searches]
        again = [a == b for a, b in zip(entities, entities[1:])]
        assert not completions[0].startswith("<think>")
        assert [text.startswith("<think> missed</think>\n") for text in completions[1:-1]] == again
        assert completions[-1] == f"<think> found</think>\n<answer> {demonstration.trace.answer}</answer>"
