"""`sd-search compare RUN_A RUN_B`: do two evaluations of the same questions differ, and by how much?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.identity import read_identity
from eval.samples import SAMPLES_NAME, QuestionResult, read_results
from eval.statistics import Difference, holm, mcnemar, paired_bootstrap, smallest_detectable_difference
from eval.summary import set_name
from megatron_sd.config.command_line import name_positionals, parse
from megatron_sd.errors import DataError

ALL = "all questions"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two directories that `sd-search eval` wrote; the difference is second minus first."""

    first: str  # an evaluation's directory
    second: str  # another's, of the same questions
    metric: Literal["em", "f1", "sub_em", "em_strict", "f1_strict", "sub_em_strict"] = "em"  # of an answer
    num_resamples: int = 10000  # of the bootstrap over questions
    seed: int = 0  # of the bootstrap
    output: str | None = None  # a JSON file that takes the figures


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One set. first, second: means. p_value: McNemar's where every question was answered once and the
    metric is yes or no, else the paired bootstrap's. p_holm: adjusted over the sets; NaN for all questions
    together, which are no further test. smallest: the difference that these questions, with the spread they
    showed, find with probability 0.8 at level 0.05."""

    num_questions: int
    first: float
    second: float
    difference: Difference
    p_value: float
    p_holm: float
    smallest: float


def main(argv: Sequence[str]) -> None:
    """The command line of `compare`."""
    config = parse(CompareConfig, name_positionals(argv, ("first", "second")), "sd-search compare")
    comparisons = compare(config)
    print(render(comparisons, config))
    if config.output is not None:
        figures = {name: dataclasses.asdict(own) for name, own in comparisons.items()}
        Path(config.output).write_text(json.dumps(_without_nan(figures), indent=1) + "\n", encoding="utf-8")


def compare(config: CompareConfig) -> dict[str, Comparison]:
    """A comparison for each set, and for all questions together. Raises DataError for runs that do not go
    together: other questions, another corpus, a run that is not finished or that failed on some question."""
    first, second = (_finished(Path(path)) for path in (config.first, config.second))
    for key, meaning in (("questions_version", "questions"), ("corpus_version", "corpus")):
        found = [identity.get(key) for identity, _ in (first, second)]
        if found[0] != found[1]:
            raise DataError(
                f"{config.first} and {config.second} are evaluations over different {meaning} ({key}"
                f" {found[0]} and {found[1]}); expected the same {meaning}: evaluate both again"
            )
    if first[1].keys() != second[1].keys():
        names = sorted(first[1].keys() ^ second[1].keys())
        raise DataError(
            f"only one of {config.first} and {config.second} answered {names[:3]}; finish both by their own"
            " commands"
        )
    by_set: dict[str, list[str]] = defaultdict(list)
    for name, result in sorted(first[1].items()):
        by_set[set_name(result.source)].append(name)
    sets = {name: _compare(config, first[1], second[1], ids) for name, ids in sorted(by_set.items())}
    adjusted = holm([own.p_value for own in sets.values()])
    sets = {name: dataclasses.replace(own, p_holm=p) for (name, own), p in zip(sets.items(), adjusted)}
    return sets | {ALL: _compare(config, first[1], second[1], sorted(first[1]))}


def _finished(path: Path) -> tuple[dict[str, Any], dict[str, QuestionResult]]:
    identity, results = read_identity(path), read_results(path / SAMPLES_NAME)
    failed = [result.question_id for result in results.values() if result.failed]
    if failed or len(results) != identity["num_questions"]:
        missing = identity["num_questions"] - len(results)
        raise DataError(
            f"{path} is not finished: {missing} questions unanswered, {len(failed)} failed; run its command"
            " again"
        )
    return identity, results


def _compare(
    config: CompareConfig,
    first: Mapping[str, QuestionResult],
    second: Mapping[str, QuestionResult],
    ids: Sequence[str],
) -> Comparison:
    before, after = (
        np.array([_mean(results[name], config.metric) for name in ids]) for results in (first, second)
    )
    difference = paired_bootstrap(before, after, num_resamples=config.num_resamples, seed=config.seed)
    is_binary = set(before) | set(after) <= {0.0, 1.0}
    p_value = (
        mcnemar(int((before > after).sum()), int((after > before).sum())) if is_binary else difference.p_value
    )
    spread = float(np.std(after - before, ddof=1)) if len(ids) > 1 else math.nan
    return Comparison(
        num_questions=len(ids),
        first=float(before.mean()),
        second=float(after.mean()),
        difference=difference,
        p_value=p_value,
        p_holm=math.nan,
        smallest=smallest_detectable_difference(spread, len(ids)),
    )


def _mean(result: QuestionResult, metric: str) -> float:
    return float(np.mean([sample.figures[metric] for sample in result.samples]))


def render(comparisons: Mapping[str, Comparison], config: CompareConfig) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"{config.metric}: second minus first, over the same questions",
        f"first  {config.first}",
        f"second {config.second}",
        "",
        "| set | questions | first | second | difference [95 %] | p | p (Holm) | could show |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in comparisons.items():
        change = f"{own.difference.value:+.3f} [{own.difference.low:+.3f}, {own.difference.high:+.3f}]"
        p_holm = "" if math.isnan(own.p_holm) else f"{own.p_holm:.4f}"
        means = f"{own.first:.3f} | {own.second:.3f}"
        smallest = "" if math.isnan(own.smallest) else f"{own.smallest:.3f}"
        lines.append(
            f"| {name} | {own.num_questions} | {means} | {change} | {own.p_value:.4f} | {p_holm} |"
            f" {smallest} |"
        )
    return "\n".join(lines)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
