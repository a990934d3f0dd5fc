"""Wrong answers that are right for another question."""

import dataclasses

from data_prep.episodes.relabel import Relabelling, measure
from tests.builders import group, hit, question, rollout

ASKED = dataclasses.replace(question(0, ["1912"]), text="When did the ferry sink?")
OTHER = dataclasses.replace(question(1, ["London"], [["p7"]]), text="Which city is meant?")


def attempt(answer, *ids, queries=("which city",)):
    own = rollout(0, list(queries), answer=answer)
    first = dataclasses.replace(own.turns[0], hits=tuple(hit(id_) for id_ in ids))
    return dataclasses.replace(own, turns=(first, *own.turns[1:]))


def found(*rollouts):
    asked = dataclasses.replace(group(rollouts), question=ASKED)
    own = measure([asked], [ASKED, OTHER])
    return own.num_wrong, own.num_matching, own.num_clean


def test_a_wrong_answer_is_another_questions_if_its_passage_was_found():
    assert found(attempt("london", "p7")) == (1, 1, 1)
    assert found(attempt("London", "p8")) == (1, 0, 0), "without its passage it is a guess"
    assert found(attempt("Rome", "p7"), attempt("1912", "p7"), attempt(None, "p7")) == (1, 0, 0)


def test_queries_about_the_old_question_are_told():
    assert found(attempt("London", "p7", queries=["ferry sink"])) == (1, 1, 0)
    assert "2 wrong answers; 1 (50.00%)" in Relabelling(num_wrong=2, num_matching=1, num_clean=0).line()
