"""`sd-search eval`: greedy rollouts of a model directory on a questions file; metrics, and one JSON line a question."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_sd.build import build_rollout_side
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig, parse
from megatron_sd.config_checks import check_ranges
from megatron_sd.observability.metrics import rollout_metrics
from megatron_sd.records import RolloutGroup
from megatron_sd.search.questions import load_questions
from megatron_sd.search.reward import score


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model directory. `protocol` and the limits in `rollout` should be those it was trained with."""

    model: ModelConfig
    retriever: RetrieverConfig
    questions: str
    output: str  # directory for report.json and samples.jsonl
    split: str | None = None
    limit: int | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def main(argv: Sequence[str]) -> None:
    """The command line of `evaluate`."""
    config = parse(EvalConfig, argv, "sd-search eval")
    check_ranges(config)
    report = evaluate(config)
    for name, value in report.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    print(f"one line a question: {Path(config.output) / 'samples.jsonl'}")


def evaluate(config: EvalConfig) -> dict[str, float | int | str]:
    """Roll out every question once, greedily; write and return the report.

    Raises DataError for a missing model, corpus or questions file, RolloutError when too many rollouts fail.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before the rollouts
    questions = load_questions(config.questions, config.split, config.limit)
    rollout = dataclasses.replace(config.rollout, group_size=1)
    size = config.rollout.questions_per_step
    groups: list[RolloutGroup] = []
    side = build_rollout_side(config.model, config.protocol, rollout, config.retriever, seed=0, output=output)
    with contextlib.closing(side):
        for start in tqdm(range(0, len(questions), size), desc="evaluate", unit="batch", disable=None):
            groups += score(side.rollouter.run(questions[start : start + size], step=0, greedy=True), config.reward)
    report = {"num_questions": len(questions), "model": config.model.path, "corpus_version": side.retriever.corpus_version}
    report |= rollout_metrics(groups)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _write_samples(output / "samples.jsonl", groups)
    return report


def _write_samples(path: Path, groups: Iterable[RolloutGroup]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for group in groups:
            for rollout in group.rollouts:
                record = {
                    "question_id": group.question.id,
                    "question": group.question.text,
                    "golden_answers": group.question.golden_answers,
                    "answer": rollout.answer,
                    "queries": rollout.queries,
                    "retrieved": [[hit.passage.id for hit in turn.hits] for turn in rollout.turns if turn.query is not None],
                    "stop_reason": rollout.stop_reason,
                    "scores": dataclasses.asdict(rollout.scores),
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
