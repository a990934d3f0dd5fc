"""From the results of an evaluation to its report: figures of each set with intervals, and averages over
sets."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import ANSWER_FIGURES, PROPORTIONS, pass_figures
from eval.samples import QuestionResult, Sample
from eval.statistics import (
    Interval,
    bootstrap_means,
    percentile_interval,
    smallest_detectable_difference,
    wilson,
)

BENCHMARKS = {  # Search-R1's seven, by every name they go by
    "nq": ("nq", "natural_questions", "naturalquestions"),
    "triviaqa": ("triviaqa", "trivia_qa", "tqa"),
    "popqa": ("popqa",),
    "hotpotqa": ("hotpotqa", "hotpot_qa", "hotpot"),
    "2wiki": ("2wiki", "2wikimultihopqa", "2wikimqa"),
    "musique": ("musique",),
    "bamboogle": ("bamboogle",),
}
AVERAGES = {
    "seven": tuple(BENCHMARKS),
    "six_without_bamboogle": tuple(name for name in BENCHMARKS if name != "bamboogle"),
}
UNNAMED_SET = "unnamed"
INFRASTRUCTURE = "infrastructure_error"

Figures = dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """sets: figures by set; averages: macro averages, by name, of the sets they need. num_questions: by set.

    questions: over all questions alike. sets: the plain mean over whatever sets there are. seven and
    six_without_bamboogle stand only where every set of theirs does.
    """

    num_questions: Mapping[str, int]
    sets: Mapping[str, Figures]
    averages: Mapping[str, Figures]

    def to_json(self) -> dict:
        """Plain numbers; what is not known is null."""
        sets = {
            name: (
                {"num_questions": self.num_questions[name]}
                | {figure: _numbers(interval) for figure, interval in figures.items()}
                | {
                    "smallest_detectable_em_difference": _number(
                        detectable(figures["em"].value, self.num_questions[name])
                    )
                }
            )
            for name, figures in self.sets.items()
        }
        averages = {
            name: {f: _numbers(interval) for f, interval in own.items()}
            for name, own in self.averages.items()
        }
        return {"sets": sets, "averages": averages}


def summarize(results: Sequence[QuestionResult], *, num_resamples: int, seed: int) -> Summary:
    """Figures of every set and of the averages over sets; the same results give the same numbers, whatever
    their order.

    A figure is the mean over all samples that have it; infrastructure failures have none and are counted as
    infrastructure_error. Shares of yes and no with one sample a question get Wilson's interval, all else
    the 95 % percentile interval over resampled questions. Averages weigh sets equally.
    """
    by_set: dict[str, list[QuestionResult]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.question_id):
        by_set[set_name(result.source)].append(result)
    names = _figure_names(results)
    values, resampled = {}, {}
    for own_seed, (name, own) in enumerate(sorted(by_set.items()), start=seed):
        sums, counts = _totals(own, names)
        values[name] = _ratio(sums.sum(axis=0), counts.sum(axis=0))
        resampled[name] = bootstrap_means(sums, counts, num_resamples=num_resamples, seed=own_seed)
    sums, counts = _totals([result for own in by_set.values() for result in own], names)
    pooled = bootstrap_means(sums, counts, num_resamples=num_resamples, seed=seed)
    sets = {name: _intervals(names, values[name], resampled[name]) for name in values}
    for name, own in by_set.items():
        sets[name] |= _proportions(own, names)
    chosen = {
        "sets": tuple(values),
        **{name: needed for name, needed in AVERAGES.items() if set(needed) <= set(values)},
    }
    over_questions = _intervals(names, _ratio(sums.sum(axis=0), counts.sum(axis=0)), pooled) | _proportions(
        results, names
    )
    averages = {"questions": over_questions}
    for name, members in chosen.items():
        value = np.mean([values[member] for member in members], axis=0)
        averages[name] = _intervals(names, value, np.mean([resampled[member] for member in members], axis=0))
    return Summary(num_questions={name: len(by_set[name]) for name in values}, sets=sets, averages=averages)


def set_name(source: str) -> str:
    """The benchmark a source is, by any of its names (`HotpotQA` -> hotpotqa); any other source as it is.

    >>> set_name("2WikiMultihopQA"), set_name("world"), set_name("")
    ('2wiki', 'world', 'unnamed')
    """
    folded = source.casefold().replace("-", "_")
    return next((name for name, names in BENCHMARKS.items() if folded in names), source or UNNAMED_SET)


def detectable(em: float, num_questions: int) -> float:
    """The smallest EM difference that a comparison with another run over these questions finds 4 times in 5
    (level 0.05), were the two runs' answers independent: an upper bound, since runs that agree on questions
    differ less. The share is Agresti and Coull's, so that a set without a right answer does not look like
    one without noise."""
    share = (em * num_questions + 2) / (num_questions + 4)
    return smallest_detectable_difference(math.sqrt(2 * share * (1 - share)), num_questions)


def _figure_names(results: Iterable[QuestionResult]) -> list[str]:
    """All figures in the order they are written in, then pass@k by k, then infrastructure errors."""
    names: dict[str, None] = dict.fromkeys(ANSWER_FIGURES)
    depths: set[str] = set()
    for result in results:
        for sample in result.samples:
            names |= dict.fromkeys(name for name, value in sample.figures.items() if value is not None)
        depths |= _pass_figures(result).keys()
    return [*names, *sorted(depths, key=lambda name: int(name.removeprefix("pass@"))), INFRASTRUCTURE]


def _totals(results: Sequence[QuestionResult], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[N, F] sums and [N, F] counts of the figures of every question."""
    sums, counts = np.zeros((2, len(results), len(names)))
    for row, result in enumerate(results):
        for figures in (*map(_sample_figures, result.samples), _pass_figures(result)):
            for column, name in enumerate(names):
                if figures.get(name) is not None:
                    sums[row, column] += figures[name]
                    counts[row, column] += 1
    return sums, counts


def _sample_figures(sample: Sample) -> dict[str, float | None]:
    return {**sample.figures, INFRASTRUCTURE: float(sample.stop_reason.is_infrastructure)}


def _pass_figures(result: QuestionResult) -> Mapping[str, float]:
    return pass_figures(
        [sample.figures["em"] for sample in result.samples if not sample.stop_reason.is_infrastructure]
    )


def _proportions(results: Sequence[QuestionResult], names: Sequence[str]) -> Figures:
    """Wilson's intervals where every question has one sample, so that samples are independent."""
    if any(len(result.samples) > 1 for result in results):
        return {}
    figures: Figures = {}
    for name in (*PROPORTIONS, INFRASTRUCTURE):
        rows = (_sample_figures(sample).get(name) for result in results for sample in result.samples)
        values = [value for value in rows if value is not None]
        if name in names:
            figures[name] = wilson(round(sum(values)), len(values))
    return figures


def _intervals(names: Sequence[str], values: np.ndarray, resampled: np.ndarray) -> Figures:
    return {name: percentile_interval(float(values[i]), resampled[:, i]) for i, name in enumerate(names)}


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {"value": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


COLUMNS = {
    "em": "EM",
    "f1": "F1",
    "sub_em": "sub-EM",
    "em_strict": "EM strict",
    "answer_in_passages": "answer in passages",
    "supporting_recall": "supporting recall",
    "searches": "searches",
    "turns": "turns",
    "completion_tokens": "tokens",
    "format_valid": "form valid",
    INFRASTRUCTURE: "infra. errors",
}


NOTES = (
    "EM stands with its 95 % interval. The last column: level 0.05, power 0.8, the answers of two runs",
    "independent of each other; what two given runs can show is said by `sd-search compare`.",
)


def to_markdown(report: Mapping) -> str:
    """report.json for people: what was evaluated, a row a set and average, EM with its interval."""
    facts = (
        "strategy",
        "model",
        "model_version",
        "corpus_version",
        "questions_version",
        "num_questions",
        "num_samples",
    )
    lines = ["# Evaluation", "", *(f"- {name.replace('_', ' ')}: {report[name]}" for name in facts)]
    if report.get("overlap"):
        lines.append(
            f"- {report['overlap']['num_shared']} of these questions are training questions too, by"
            " normalised text"
        )
    columns = {
        name: title for name, title in COLUMNS.items() if any(name in own for own in report["sets"].values())
    }
    depths = [name for name in report["averages"]["sets"] if name.startswith("pass@")]
    columns |= {name: name for name in depths}
    head = ["set", "questions", *columns.values(), "EM difference it could show"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, own in report["sets"].items():
        smallest = own["smallest_detectable_em_difference"]
        lines.append(_row([name, str(own["num_questions"]), *_cells(own, columns), _plain(smallest)]))
    for name, own in report["averages"].items():
        lines.append(_row([f"average: {name.replace('_', ' ')}", "", *_cells(own, columns), ""]))
    return "\n".join([*lines, "", *NOTES, ""])


def _cells(own: Mapping, columns: Mapping[str, str]) -> list[str]:
    cells = []
    for name in columns:
        figure = own.get(name) or {"value": None}
        text = _plain(figure["value"])
        cells.append(f"{text} [{_plain(figure['low'])}, {_plain(figure['high'])}]" if name == "em" else text)
    return cells


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def dumps(report: Mapping) -> str:
    """report.json's text."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
