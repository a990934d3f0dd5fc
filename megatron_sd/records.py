"""The vocabulary of the project: frozen records that travel between the phases of a training step.

    Question -> Rollout (Turns) -> RolloutGroup -> TrainingSample -> Microbatch -> Batch

Every token of a rollout knows who wrote it: completion ids were sampled by the policy, observation ids were
appended by the environment. Sampled ids are never decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

import numpy as np

from megatron_sd.compact import compact_floats, compact_ids

TokenIds = Sequence[int]  # equal to the tuple of them; records keep them compact
Layout = Literal["padded", "packed", "shared"]  # of sequences: algorithm/packing/rows.py


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWERED = "answered"  # the policy closed an answer tag
    NO_ACTION = "no_action"  # a turn ended with neither a search nor an answer
    TURN_LIMIT = "turn_limit"  # the last turn, in which a search is not served, did not answer
    TOKEN_LIMIT = "token_limit"  # the turn or the rollout ran out of tokens
    RETRIEVAL_FAILED = "retrieval_failed"  # infrastructure: the retriever gave up
    ENGINE_FAILED = "engine_failed"  # infrastructure: the engine returned nothing
    TOOL_FAILED = "tool_failed"  # infrastructure: a tool raised or took too long
    JUDGE_FAILED = "judge_failed"  # infrastructure: the judge whose verdict is the reward said nothing of it

    @property
    def is_infrastructure(self) -> bool:
        """True when the rollout is no data: it leaves the loss and the group baseline, and is counted."""
        return self in (
            StopReason.RETRIEVAL_FAILED,
            StopReason.ENGINE_FAILED,
            StopReason.TOOL_FAILED,
            StopReason.JUDGE_FAILED,
        )


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One retrievable text. `id` is unique within a corpus."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A retrieved passage and the retriever's score (larger is better; scale depends on the retriever)."""

    passage: Passage
    score: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its accepted answers.

    `supporting` holds one tuple per hop: the ids of the passages of which any one serves that hop; empty
    when unknown.

    Example: Question(id="w1", text="Who guides the mentor of Kalo Miren?", golden_answers=("Dava Sul",),
                      supporting=(("p17",), ("p90", "p91")))
    """

    id: str
    text: str
    golden_answers: tuple[str, ...]
    source: str = ""
    split: str = ""
    supporting: tuple[tuple[str, ...], ...] = ()


SEARCH = "search"  # the tool that every protocol has


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a completion asks the environment for, when it does not answer.

    tool: which of the protocol's tools. text: the plain text between the tool's tags (control tags removed).
    span: [start, stop) offsets into completion_ids of the tokens strictly between the tags; a token that
    straddles a tag boundary is outside. Empty (start == stop) when no token lies fully inside; None where
    the text came from elsewhere.
    """

    tool: str
    text: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One completion of the policy and what the environment appended to it.

    completion_ids / completion_logprobs: [C] sampled ids and their log-probabilities under the sampling
    distribution (nats).
    observation_ids: [O] ids the environment appended (empty on the last turn).
    action: what it asked for and was served; None if it answered, or asked for nothing that is served.
    hits: what the retriever returned, best first. policy_version: optimiser step whose weights sampled this
    turn.
    well_formed: the completion is thoughts and then exactly one closed search or answer, nothing else
        (search/rewards/form.py, completion_is_well_formed).
    note: what the policy noted of earlier results, where the protocol has note tags; sampled text alone.
    attempt: which of the rollout's attempts it belongs to, 0-based; answer: what it answered, if it did.
    """

    completion_ids: TokenIds
    completion_logprobs: Sequence[float]
    observation_ids: TokenIds = ()
    action: Action | None = None
    hits: tuple[Hit, ...] = ()
    policy_version: int = 0
    well_formed: bool = True
    note: str = ""
    attempt: int = 0
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "completion_ids", compact_ids(self.completion_ids))
        object.__setattr__(self, "completion_logprobs", compact_floats(self.completion_logprobs))
        object.__setattr__(self, "observation_ids", compact_ids(self.observation_ids))

    @property
    def query(self) -> str | None:
        """What it searched for, None if it did not search."""
        return self.action.text if self.action is not None and self.action.tool == SEARCH else None

    @property
    def query_span(self) -> tuple[int, int] | None:
        """Where the query's tokens are among the completion's (Action.span); None if it did not search."""
        return self.action.span if self.action is not None and self.action.tool == SEARCH else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a rollout earned. `reward` is what GRPO sees; the others are its parts and diagnostics, all but
    `own` in [0, 1]."""

    reward: float
    em: float
    f1: float
    format_valid: float
    hop_hit_rate: float | None = None  # share of hops whose needed passage was retrieved; None: unknown
    em_by_attempt: tuple[float, ...] = ()  # where there are several; `em` and `f1` are the last one's
    own: Mapping[str, float] = field(default_factory=dict)  # by functions of the user's own (reward.own)

    @property
    def figures(self) -> dict[str, float]:
        """All that is known, by name; each attempt's exact match as em_attempt_1, em_attempt_2, ..."""
        names = ("reward", "em", "f1", "format_valid", "hop_hit_rate")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        attempts = {f"em_attempt_{n}": em for n, em in enumerate(self.em_by_attempt, start=1)}
        return known | attempts | dict(self.own)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """prompt | completion | observation | completion | ... for one question. answer: the last attempt's."""

    question_id: str
    index: int  # place in the group, 0-based
    prompt_ids: TokenIds
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: str | None = None
    scores: Scores | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", compact_ids(self.prompt_ids))

    @property
    def queries(self) -> tuple[str, ...]:
        """The search queries in order."""
        return tuple(turn.query for turn in self.turns if turn.query is not None)

    @property
    def attempts(self) -> tuple[tuple[Turn, ...], ...]:
        """The turns, attempt by attempt."""
        numbers = sorted({turn.attempt for turn in self.turns})
        return tuple(tuple(turn for turn in self.turns if turn.attempt == number) for number in numbers)

    @property
    def num_tokens(self) -> int:
        """Prompt, completions and observations together."""
        return len(self.prompt_ids) + sum(len(t.completion_ids) + len(t.observation_ids) for t in self.turns)


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """All rollouts of one question, in index order."""

    question: Question
    rollouts: tuple[Rollout, ...]

    @property
    def usable(self) -> tuple[Rollout, ...]:
        """The rollouts that are data (no infrastructure failure)."""
        return tuple(r for r in self.rollouts if not r.stop_reason.is_infrastructure)


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One rollout as the update sees it. L = len(ids), Q = number of query tokens.

    ids: [L] int64, prompt and everything after it. loss_mask: [L] bool, True where the policy sampled the
    token. rollout_logprobs: [L] float32, the engine's log-probability where loss_mask, else 0.
    advantages: [L] float32, what the turn that a token was sampled in is worth (one number a turn), 0 where
    not sampled. turns: [L] int64, the number of the turn that a token was sampled in, 0 where not sampled.
    query_positions: [Q] int64, increasing positions in `ids` of search-query tokens; the logits at p-1
    predict the token at p. teacher_prompt_ids: the prompt with the hindsight block, or None when this
    sample is not distilled (no block, gated off). later_prompts: where the block differs from turn to turn,
    (n, prompt): this one is read from the n-th query position on. group: index of its question in the step.
    group_has_spread: some advantage of the group is not 0, so that L_GRPO has a gradient there.
    """

    ids: np.ndarray
    prompt_length: int
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    query_positions: np.ndarray
    advantages: np.ndarray
    turns: np.ndarray
    group: int
    group_has_spread: bool
    teacher_prompt_ids: TokenIds | None = None
    later_prompts: tuple[tuple[int, TokenIds], ...] = ()

    @property
    def is_distilled(self) -> bool:
        """True when L_SD has a term for this sample."""
        return self.teacher_prompt_ids is not None and len(self.query_positions) > 0

    @property
    def teacher_views(self) -> tuple[TeacherView, ...]:
        """What the teacher reads of this sample, which must be distilled: one view for each of its
        prompts."""
        starts = [0, *(start for start, _ in self.later_prompts)]
        prompts = [self.teacher_prompt_ids or (), *(prompt for _, prompt in self.later_prompts)]
        parts = [
            self.query_positions[start:stop]
            for start, stop in zip(starts, [*starts[1:], len(self.query_positions)])
        ]
        return tuple(
            TeacherView(
                prompt_ids=prompt,
                continuation=np.concatenate(
                    [np.array(prompt[-1:]), self.ids[self.prompt_length : int(positions[-1])]]
                ),
                offsets=positions - self.prompt_length,
            )
            for prompt, positions in zip(prompts, parts, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """One sequence of the teacher. C = len(continuation), Q = number of query tokens it scores.

    continuation: [C] int64, what the teacher reads after all but the last token of its prompt: that token, then
    the rollout verbatim up to the token before the last query token it scores. Its state at offset i predicts
    the rollout's token i.
    offsets: [Q] int64, increasing: the offsets whose states predict query tokens.
    """

    prompt_ids: TokenIds
    continuation: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Right-padded sequences of several samples and flat row lists into them; int64 / float32 numpy arrays.

    B sequences of padded length S; Bt teacher sequences of padded length St (Bt may be 0).
    input_ids: [B, S]; lengths: [B]; prompt_lengths: [B], the tokens before the first that was sampled.
    row_index: [R] flat positions b * S + (p - 1) whose hidden state predicts a completion token; targets,
        rollout_logprobs, advantages, row_weights: [R] (weights already hold the per-row part of the loss
        aggregation, see algorithm/packing). old_logprobs: [R], the denominators of the policy loss's ratios:
        rollout_logprobs, unless they were read anew before the update. rollouts, turns: [R], numbers of the
        rollout and of the turn that a row belongs to, counted from 0 over the microbatch; groups: [R], of its
        question, in the step. returns, old_values: [R] float32, what a row's critic is fitted to, and what it
        said before the step's first update; zeros without a critic.
    The teacher reads each distinct prompt once: teacher_prompts: [U, Sp], all but the last token of a prompt;
        teacher_prompt_lengths: [U]. Then each rollout as its continuation: teacher_ids: [Bt, St];
        teacher_lengths: [Bt]; teacher_prompt_of: [Bt] which of the U it continues. teacher_rows: [Q] flat
        positions b * St + i in the continuations' hidden states.
    query_rows: [Q] increasing indices into the R rows, of the same tokens; query_weights: [Q] per-row weight
        (1 / tokens of the rollout's queries); query_in_spread: [Q] bool, the row's group_has_spread.
    layout: how all this is read (algorithm/packing/rows.py). An empty microbatch has B = 1, S = 1 and
        R = Q = 0: it still runs, so that collectives stay aligned across ranks. For the same reason a
        microbatch without query rows may carry a dummy teacher of one token (U = Sp = Bt = St = 1, Q = 0).
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    row_index: np.ndarray
    targets: np.ndarray
    rollout_logprobs: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    row_weights: np.ndarray
    rollouts: np.ndarray
    turns: np.ndarray
    groups: np.ndarray
    returns: np.ndarray
    old_values: np.ndarray
    teacher_prompts: np.ndarray
    teacher_prompt_lengths: np.ndarray
    teacher_prompt_of: np.ndarray
    teacher_ids: np.ndarray
    teacher_lengths: np.ndarray
    teacher_rows: np.ndarray
    query_rows: np.ndarray
    query_weights: np.ndarray
    query_in_spread: np.ndarray
    layout: Layout = "padded"

    @property
    def is_packed(self) -> bool:
        """Sequences are read one after the other in one row, without their padding."""
        return self.layout != "padded"

    @property
    def has_teacher(self) -> bool:
        """The teacher's forward runs, possibly on a dummy."""
        return self.teacher_ids.size > 0

    def with_dummy_teacher(self) -> Microbatch:
        """This microbatch, whose teacher part must be empty, with a teacher of one token and no rows."""
        token, one = np.zeros((1, 1), dtype=np.int64), np.ones(1, dtype=np.int64)
        return replace(
            self,
            teacher_prompts=token,
            teacher_prompt_lengths=one,
            teacher_prompt_of=one - 1,
            teacher_ids=token,
            teacher_lengths=one,
        )

    @property
    def num_tokens(self) -> int:
        """Student and teacher tokens that are read, padding left out."""
        return int(self.lengths.sum() + self.teacher_prompt_lengths.sum() + self.teacher_lengths.sum())

    @property
    def num_padding_tokens(self) -> int:
        """Student and teacher positions that hold no token and are read all the same."""
        if self.is_packed:
            return 0
        return self.input_ids.size + self.teacher_prompts.size + self.teacher_ids.size - self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Global denominators of one optimiser step, summed over all ranks before the first backward."""

    policy_weight: float  # of the mean over rows: tokens, or rollouts, by the aggregation
    # rollouts that have at least one query token and a teacher; or all of their query tokens, where L_SD is a
    # mean over these (algorithm/distill_aggregation.py)
    distilled_rollouts: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's microbatches of one optimiser step; every rank has the same number. `totals` are global.
    is_first: of its training step. Within the others a run does not stop: the step has moved the policy, and
    a resumed run would take it once more."""

    microbatches: tuple[Microbatch, ...]
    totals: Totals
    is_first: bool = True

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What one optimiser step did: scalar metrics by TensorBoard name (already reduced over ranks)."""

    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, float]:
        """All of it by TensorBoard name."""
        own = {"optim/grad_norm": self.grad_norm, "optim/learning_rate": self.learning_rate}
        return {**self.metrics, **own}
