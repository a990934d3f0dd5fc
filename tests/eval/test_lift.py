"""The lift is measured on samplers whose behaviour is known: a reader of labels, a switch that CORRECT
turns on, a blind one."""

import random
from dataclasses import replace

import numpy as np
import pytest

from eval.gate.lift import NEEDED_VARIANTS, LiftConfig, bootstrap_mean, measure_lift
from megatron_sd.algorithm.blocks import inverted_block
from megatron_sd.algorithm.hindsight import BlockContext, render_outcome_first
from megatron_sd.errors import ConfigError
from megatron_sd.records import Question, RolloutGroup
from tests.builders import group, rollout

QUESTIONS = [Question(id=f"q{i}", text=f"Question {i}?", golden_answers=("gold",)) for i in range(300)]
GROUP_SIZE = 5
CONFIG = LiftConfig(num_resamples=500)


class KnownSampler:
    """Tries one of four keywords, of which `right[question]` succeeds; how it takes a block is the
    subclass's."""

    def __init__(self) -> None:
        rng = random.Random(7)
        self.right = {q.id: f"{q.id}-{rng.randrange(4)}" for q in QUESTIONS}

    def choices(self, question: Question, block: str) -> list[str]:
        return [f"{question.id}-{k}" for k in range(4)]

    def __call__(self, questions, hindsight, draw):
        groups = []
        for i, question in enumerate(questions):
            rng = random.Random(f"{draw}/{question.id}")
            choices = self.choices(question, hindsight[i] if hindsight else "")
            queries = [rng.choice(choices) for _ in range(GROUP_SIZE)]
            rollouts = [
                rollout(n, [q], reward=float(q == self.right[question.id])) for n, q in enumerate(queries)
            ]
            groups.append(RolloutGroup(question=question, rollouts=tuple(rollouts)))
        return groups


class Reader(KnownSampler):
    """Repeats what a line labelled CORRECT asked, if it is about this question."""

    def choices(self, question, block):
        told = [line.split('"')[1] for line in block.splitlines() if "(CORRECT)" in line]
        return [q for q in told if q.startswith(f"{question.id}-")] or super().choices(question, block)


class Switch(KnownSampler):
    """Succeeds whenever the word CORRECT stands anywhere in the block: it has memorised the world."""

    def choices(self, question, block):
        return [self.right[question.id]] if "(CORRECT)" in block else super().choices(question, block)


def test_a_reader_passes_the_gate():
    report = measure_lift(Reader(), QUESTIONS, CONFIG)
    assert report.failures == []
    assert report.success == pytest.approx(0.25, abs=0.05)
    assert report.mixed_share == pytest.approx(1 - 0.75**5 - 0.25**5, abs=0.06)
    assert report.mixed["linked"].mean == pytest.approx(0.75, abs=0.05)
    assert report.overall["only_correct"].num_questions == report.overall["linked"].num_questions - round(
        report.all_wrong_share * len(QUESTIONS)
    )
    assert report.overall["wrong_question"].low < 0 < report.overall["wrong_question"].high
    assert report.mixed["inverted"].mean < 0
    assert report.all_wrong["linked"].low <= 0 <= report.all_wrong["linked"].high, (
        "no regression to the mean in the lift"
    )
    assert report.linked_minus_shuffled.low > 0.2
    assert report.to_json()["gate"] == "passed"


def test_a_switch_is_found_out_though_its_block_lifts():
    report = measure_lift(Switch(), QUESTIONS, CONFIG)
    assert report.overall["linked"].low > 0.4
    assert len(report.failures) == 2
    assert "wrong question lifts" in report.failures[0]
    assert "labels are not read" in report.failures[1]
    assert report.lines()[-1].startswith("gate: CLOSED")
    assert report.to_json()["gate"] == "closed"


def test_a_blind_sampler_lifts_nothing_and_does_not_pass():
    report = measure_lift(KnownSampler(), QUESTIONS, CONFIG)
    for name in CONFIG.variants:
        assert abs(report.overall[name].mean) < 0.06
    assert report.failures == [
        f"linked minus shuffled on mixed groups is {report.linked_minus_shuffled}: labels are not read"
    ]


def test_a_few_questions_pass_no_gate():
    """One mixed question has an interval of no width, far from 0."""
    report = measure_lift(Reader(), QUESTIONS[:8], CONFIG)
    assert report.linked_minus_shuffled.num_questions < 20
    assert "questions have rollouts with both outcomes" in report.failures[0]
    assert f"found {report.linked_minus_shuffled.num_questions}, expected at least 20" in report.failures[0]


def test_the_estimates_are_means_with_percentile_intervals():
    values = np.array([0.0, 1.0, np.nan, 1.0, 0.0] * 20)
    estimate = bootstrap_mean(values, 2000, seed=0)
    assert estimate.num_questions == 80
    assert estimate.mean == 0.5
    half_width = 1.96 * 0.5 / np.sqrt(80)
    assert estimate.high - estimate.mean == pytest.approx(half_width, rel=0.15)
    assert estimate.mean - estimate.low == pytest.approx(half_width, rel=0.15)
    empty = bootstrap_mean(np.array([np.nan]), 10, seed=0)
    assert empty.num_questions == 0
    assert np.isnan(empty.mean)


def test_inverted_labels_turn_every_label_round():
    mixed = group([rollout(0, ["a"], reward=1.0), rollout(1, ["b"], reward=0.0)])
    shared = {"correct_above": 0.0, "seed": 0, "render": render_outcome_first}
    text = inverted_block(BlockContext(groups=[mixed], group=0, focal=0, **shared))
    assert 'Attempt 1 (INCORRECT): "a"' in text
    assert 'Attempt 2 (CORRECT): "b"' in text


def test_the_report_says_which_share_was_of_valid_form():
    class Sloppy(Reader):
        def __call__(self, questions, hindsight, draw):
            groups = super().__call__(questions, hindsight, draw)
            if draw != 1:
                return groups
            worse = [
                [replace(r, scores=replace(r.scores, format_valid=0.0)) for r in g.rollouts[:2]]
                for g in groups
            ]
            return [replace(g, rollouts=(*own, *g.rollouts[2:])) for g, own in zip(groups, worse)]

    report = measure_lift(Sloppy(), QUESTIONS, CONFIG)
    assert report.form == pytest.approx(1 - 0.5 * 2 / GROUP_SIZE)
    assert report.to_json()["form"] == 0.8
    assert "of valid form 0.800" in report.lines()[0]


def test_blocks_for_mixed_groups_alone_give_the_same_lifts_there():
    asked = []

    class Counting(Reader):
        def __call__(self, questions, hindsight, draw):
            asked.append(len(questions))
            return super().__call__(questions, hindsight, draw)

    everything, alone = (
        measure_lift(Counting(), QUESTIONS, replace(CONFIG, only_mixed=only)) for only in (False, True)
    )
    assert alone.mixed == everything.mixed == alone.overall
    num_mixed = alone.linked_minus_shuffled.num_questions
    assert asked[7:9] == [300, num_mixed] and max(asked[9:]) == num_mixed < 300
    assert alone.failures == []
    assert alone.success == pytest.approx(everything.success, abs=0.03), (
        "of all questions, not of the mixed ones"
    )
    assert alone.form == everything.form == 1


def test_any_block_can_be_a_variant_and_what_is_none_is_refused():
    report = measure_lift(Reader(), QUESTIONS[:40], replace(CONFIG, variants=(*NEEDED_VARIANTS, "no_labels")))
    assert report.overall["no_labels"].mean == pytest.approx(0, abs=0.15) and "inverted" not in report.overall
    for variants in ((*NEEDED_VARIANTS, "no_label"), ("linked", "shuffled")):
        with pytest.raises(
            ConfigError, match="expected linked, shuffled, wrong_question and any of .*no_labels"
        ):
            LiftConfig(variants=variants)
