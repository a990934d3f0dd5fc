"""Figures of sets and averages, worked by hand."""

import pytest

from eval.overlap import measure_overlap
from eval.samples import QuestionResult, Sample
from eval.statistics import wilson
from eval.summary import detectable, set_name, summarize, to_markdown
from megatron_sd.records import Question, StopReason


def result(name, source, *values, failed=False):
    stop = StopReason.RETRIEVAL_FAILED if failed else StopReason.ANSWERED
    samples = [
        Sample(
            answer="a",
            stop_reason=stop,
            queries=(),
            retrieved=(),
            figures={} if failed else {"em": v, "f1": v, "turns": 2.0},
        )
        for v in values
    ]
    return QuestionResult(
        question_id=name, source=source, question="?", golden_answers=("a",), samples=tuple(samples)
    )


def summary(*results):
    return summarize(results, num_resamples=200, seed=0)


def test_sets_averages_and_intervals():
    nq = [result(f"n{i}", "NQ", float(i < 1)) for i in range(4)]
    pop = [result(f"p{i}", "PopQA", float(i < 1)) for i in range(2)]
    found = summary(*nq, *pop)
    assert found.num_questions == {"nq": 4, "popqa": 2}
    assert found.sets["nq"]["em"] == wilson(1, 4)
    assert found.sets["nq"]["f1"].value == 0.25
    assert found.averages["sets"]["em"].value == pytest.approx((0.25 + 0.5) / 2)
    assert found.averages["questions"]["em"] == wilson(2, 6)
    assert set(found.averages) == {"questions", "sets"}, "seven and six need their sets"


def test_the_two_averages_of_the_benchmarks():
    names = ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2WikiMultihopQA", "MuSiQue")
    six = [result(name, name, 0.0) for name in names]
    assert set(summary(*six).averages) == {"questions", "sets", "six_without_bamboogle"}
    seven = summary(*six, result("b", "bamboogle", 1.0)).averages
    assert seven["seven"]["em"].value == pytest.approx(1 / 7)
    assert seven["six_without_bamboogle"]["em"].value == 0.0


def test_a_failed_sample_is_counted_and_is_no_data():
    found = summary(result("a", "w", 1.0), result("b", "w", 0.0, failed=True)).sets["w"]
    assert (found["em"].value, found["infrastructure_error"].value) == (1.0, 0.5)


def test_several_samples_are_clustered_by_question():
    found = summary(result("a", "w", 1.0, 1.0, 0.0), result("b", "w", 0.0, 0.0, 0.0)).sets["w"]
    assert found["em"].value == pytest.approx(1 / 3)
    assert (found["em"].low, found["em"].high) == pytest.approx((0.0, 2 / 3)), (
        "two questions: either alone at the extremes"
    )
    assert found["pass@2"].value == pytest.approx((1.0 + 0.0) / 2)
    assert list(found)[-4:] == ["pass@1", "pass@2", "pass@3", "infrastructure_error"]


def test_the_order_of_the_results_does_not_matter():
    results = [result(f"q{i}", "w", float(i % 3 == 0)) for i in range(20)]
    assert summary(*results).to_json() == summary(*reversed(results)).to_json()


def test_a_set_of_failures_has_no_figures_but_a_row():
    report = summary(result("a", "w|x", 0.0, failed=True)).to_json()
    assert report["sets"]["w|x"]["em"] == {"value": None, "low": None, "high": None}
    facts = dict.fromkeys(("strategy", "model", "model_version", "corpus_version", "questions_version"), "-")
    text = to_markdown(report | facts | {"num_questions": 1, "num_samples": 1})
    assert r"| w\|x | 1 |" in text


def test_the_detectable_difference_shrinks_with_the_questions():
    assert detectable(0.4, 500) == pytest.approx(2.8016 * (2 * 0.4008 * 0.5992 / 500) ** 0.5, rel=1e-3)
    assert detectable(0.0, 50) > 0.05


@pytest.mark.parametrize(
    ("source", "name"), [("2wiki", "2wiki"), ("natural-questions", "nq"), ("my set", "my set")]
)
def test_set_names(source, name):
    assert set_name(source) == name


def test_overlap_folds_case_punctuation_and_space():
    def question(name, text):
        return Question(id=name, text=text, golden_answers=("x",), source="NQ")

    found = measure_overlap(
        [question("a", "Who is  the King?"), question("b", "Who?")],
        [question("t", "who is king"), question("u", "x")],
    )
    assert (found.num_shared, found.ids, found.by_set, found.num_training_questions) == (
        1,
        ("a",),
        {"nq": 1},
        2,
    )
