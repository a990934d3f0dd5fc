"""Teacher lift: do queries sampled with a hindsight block succeed more often than queries sampled without it?

This is claim A of the method, and the gate before any training of a cold-started model: self-distillation
can only hand on what the block adds. A lift alone proves nothing, because a model may have learnt to do
better whenever it sees the word CORRECT. Hence the controls: the block of a wrong question must not lift,
and on groups with mixed outcomes the true labels must lift more than shuffled ones. Success with the block
is compared with a third sample drawn without it, not with the rollouts the block was made of: those differ
from a new sample by regression to the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_sd.algorithm.blocks import BLOCK_SEAM, BLOCKS
from megatron_sd.algorithm.hindsight import RENDERERS, BlockBuilder, BlockContext, is_correct
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError
from megatron_sd.records import Question, RolloutGroup

MIN_MIXED = 20  # questions with both outcomes below which the bootstrap's interval means nothing

VARIANTS: Mapping[str, BlockBuilder] = {"linked": BLOCKS["paper"], **BLOCKS}
VARIANT_SEAM = dataclasses.replace(BLOCK_SEAM, key="lift.variants", table=VARIANTS)
SOURCE_DRAW = 0  # the sample that blocks are made of
NEEDED_VARIANTS = ("linked", "shuffled", "wrong_question")


class Sampler(Protocol):
    """Samples one group of scored rollouts per question at temperature 1."""

    def __call__(
        self, questions: Sequence[Question], hindsight: Sequence[str] | None, draw: int
    ) -> Sequence[RolloutGroup]:
        """`hindsight`: one block a question for all its rollouts, or None. `draw` names the sample: other
        draw, other noise."""
        ...


@dataclass(frozen=True, kw_only=True)
class LiftConfig:
    """correct_above: rho of the labels. block_format: a key of RENDERERS, the one the model was or will be
    trained with. num_resamples: of the bootstrap over questions. variants: keys of VARIANTS, or blocks of
    your own (module:function or file.py:function). only_mixed: the comparison and the blocks are drawn for
    questions with both outcomes alone, for a model whose rollouts take long.

    Raises ConfigError for a variant that does not exist or is missing.
    """

    correct_above: float = 0.0
    block_format: Literal["outcome_first", "outcome_last"] = "outcome_first"
    num_resamples: int = 2000
    seed: int = 0  # of permuted labels, other questions and the bootstrap
    variants: tuple[OwnFunction | str, ...] = (*NEEDED_VARIANTS, "only_correct", "inverted")
    only_mixed: bool = False

    def __post_init__(self) -> None:
        ours = {name for name in self.variants if not isinstance(name, OwnFunction)}
        unknown, missing = ours - set(VARIANTS), set(NEEDED_VARIANTS) - ours
        if unknown or missing:
            raise ConfigError(
                f"lift.variants is {list(self.variants)}, expected {', '.join(NEEDED_VARIANTS)} and any of "
                f"{', '.join(name for name in VARIANTS if name not in NEEDED_VARIANTS)}"
            )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions with its 95 % bootstrap interval (percentiles); all NaN when there is no
    question."""

    mean: float
    low: float
    high: float
    num_questions: int

    def __str__(self) -> str:
        if self.num_questions == 0:
            return "no question"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] n={self.num_questions}"


@dataclass(frozen=True, kw_only=True)
class LiftReport:
    """Success rates and lifts. form: share of the rollouts without a block that are of the protocol's form.
    `overall` and `mixed` hold one lift for each variant (mixed: groups with both outcomes);
    `linked_minus_shuffled` is paired, on mixed groups."""

    success: float
    form: float
    mixed_share: float
    all_wrong_share: float
    overall: Mapping[str, Estimate]
    mixed: Mapping[str, Estimate]
    all_wrong: Mapping[str, Estimate]
    linked_minus_shuffled: Estimate

    @property
    def failures(self) -> list[str]:
        """Why the gate is closed, in words; empty when training may start."""
        found = []
        wrong = self.overall["wrong_question"]
        if wrong.low > 0:
            found.append(
                f"the block of a wrong question lifts ({wrong}): labels act as a switch, whatever the block"
                " says"
            )
        if (num_mixed := self.linked_minus_shuffled.num_questions) < MIN_MIXED:
            found.append(
                "too few questions have rollouts with both outcomes to tell whether labels are read: found"
                f" {num_mixed}, expected at least {MIN_MIXED}; ask more (limit), or in larger groups"
            )
        if not self.linked_minus_shuffled.low > 0:
            found.append(
                f"linked minus shuffled on mixed groups is {self.linked_minus_shuffled}: labels are not read"
            )
        return found

    def to_json(self) -> dict:
        """Plain numbers, rounded to four places, for coldstart.json."""
        return rounded(dataclasses.asdict(self)) | {"gate": "closed" if self.failures else "passed"}

    def lines(self) -> list[str]:
        """A table for people."""
        shares = f"groups mixed {self.mixed_share:.2f}, all wrong {self.all_wrong_share:.2f}"
        head = f"success without a block {self.success:.3f}; of valid form {self.form:.3f}; {shares}"
        rows = [
            f"{name:>15}: overall {self.overall[name]!s:<32} mixed {self.mixed[name]!s:<32} all wrong"
            f" {self.all_wrong[name]}"
            for name in self.overall
        ]
        verdict = "gate: passed" if not self.failures else "gate: CLOSED: " + "; ".join(self.failures)
        return [head, *rows, f"linked minus shuffled, mixed groups: {self.linked_minus_shuffled}", verdict]


def measure_lift(sample: Sampler, questions: Sequence[Question], config: LiftConfig) -> LiftReport:
    """Draw a sample to build blocks of, an independent one to compare with, and one for each variant.

    A question with an empty block takes no part in a variant.
    """
    builders = [VARIANT_SEAM.choose(name) for name in config.variants]
    source = list(sample(questions, None, SOURCE_DRAW))
    kinds = [group_kind(group, config.correct_above) for group in source]
    compared = [i for i, kind in enumerate(kinds) if kind == "mixed" or not config.only_mixed]
    second = list(sample([questions[i] for i in compared], None, 1))
    without = np.full(len(questions), np.nan)
    without[compared] = _success_by_question(second)
    of_all = source if config.only_mixed else second  # the draw that has every question
    lifts: dict[str, np.ndarray] = {}
    for draw, (name, build) in enumerate(zip(config.variants, builders, strict=True), start=2):
        blocks = [_block(build, source, i, config) for i in range(len(source))]
        shown = [i for i in compared if blocks[i]]
        groups = sample([questions[i] for i in shown], [blocks[i] for i in shown], draw)
        lifts[name] = np.full(len(questions), np.nan)
        lifts[name][shown] = _success_by_question(groups) - without[shown]

    def estimates(chosen: Callable[[str], bool]) -> dict[str, Estimate]:
        rows = np.array([chosen(kind) for kind in kinds], dtype=bool)
        return {
            name: bootstrap_mean(lift[rows], config.num_resamples, config.seed)
            for name, lift in lifts.items()
        }

    is_mixed = np.array([kind == "mixed" for kind in kinds], dtype=bool)
    difference = (lifts["linked"] - lifts["shuffled"])[is_mixed]
    return LiftReport(
        success=float(np.nanmean(_success_by_question(of_all))),
        form=_form_share(source if config.only_mixed else [*source, *second]),
        mixed_share=kinds.count("mixed") / len(kinds),
        all_wrong_share=kinds.count("all_wrong") / len(kinds),
        overall=estimates(lambda kind: True),
        mixed=estimates(lambda kind: kind == "mixed"),
        all_wrong=estimates(lambda kind: kind == "all_wrong"),
        linked_minus_shuffled=bootstrap_mean(difference, config.num_resamples, config.seed),
    )


def bootstrap_mean(values: np.ndarray, num_resamples: int, seed: int) -> Estimate:
    """Mean of `values` [N] float (NaN: no such question) and its 95 % percentile interval over resampled
    questions."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Estimate(mean=float("nan"), low=float("nan"), high=float("nan"), num_questions=0)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(num_resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high), num_questions=len(values))


def _block(build: BlockBuilder, source: Sequence[RolloutGroup], group: int, config: LiftConfig) -> str:
    shared = {
        "correct_above": config.correct_above,
        "seed": config.seed,
        "render": RENDERERS[config.block_format],
    }
    return build(BlockContext(groups=source, group=group, focal=0, **shared))


def group_kind(group: RolloutGroup, correct_above: float) -> str:
    """mixed, all_right or all_wrong."""
    labels = {is_correct(rollout, correct_above) for rollout in group.usable}
    return "mixed" if len(labels) == 2 else "all_right" if True in labels else "all_wrong"


def _success_by_question(groups: Sequence[RolloutGroup]) -> np.ndarray:
    """[N] share of right answers (exact match) of each group; NaN for a group without usable rollouts."""
    return np.array(
        [np.mean([r.scores.em for r in group.usable]) if group.usable else np.nan for group in groups]
    )


def _form_share(groups: Sequence[RolloutGroup]) -> float:
    """Share of usable rollouts of valid form; NaN without any. A model that does not follow its prompt
    shows here first."""
    valid = [rollout.scores.format_valid for group in groups for rollout in group.usable]
    return float(np.mean(valid)) if valid else float("nan")


def rounded(value: object) -> object:
    """Nested figures to four places, NaN as None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value
