"""Teacher and student on stored rollouts: log-probabilities and divergence at the query tokens, a group's
forwards batched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eval.credit.queries import QueryCredit, query_facts
from eval.gate.lift import group_kind
from megatron_sd.algorithm.hindsight import is_correct
from megatron_sd.algorithm.samples import query_tokens, scoped_positions, to_samples
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.records import Rollout, RolloutGroup, TrainingSample
from megatron_sd.search.environment import Environment


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """beta, temperature: of the divergence. correct_above: rho of the labels. batch_tokens: padded tokens
    of one forward."""

    beta: float = 0.5
    temperature: float = 1.0
    correct_above: float = 0.0
    batch_tokens: int = 8192


class RowsToRead(NamedTuple):
    """A sequence and the positions whose next token is asked for: ids [L], positions [Q], int64. opening: how
    many of its first tokens other sequences may begin with, too; none of them is asked for."""

    ids: np.ndarray
    positions: np.ndarray
    opening: int = 0


class QueryFigures(NamedTuple):
    """Of query tokens, each [Q], in nats: the student's log-probability, the teacher's less that, and their
    divergence."""

    logprobs: Tensor
    ratios: Tensor
    divergences: Tensor


@torch.no_grad()
def score_group(
    model: PreTrainedModel,
    environment: Environment,
    group: RolloutGroup,
    blocks: Sequence[str],
    *,
    options: ScoreOptions,
) -> list[QueryCredit]:
    """The credit of every query of a scored group. blocks: the hindsight of each rollout, "" where there is
    none.

    The teacher's view is training's own (records.TrainingSample.teacher_views): its block replaces nothing
    but the prompt. Queries without a token strictly between the tags, and rollouts without a block, are
    left out.
    """
    prompts = [[(environment.prompt_ids(group.question.text, block),) if block else () for block in blocks]]
    nothing = [(0.0,) * len(rollout.turns) for rollout in group.rollouts]  # no policy loss is taken
    samples = to_samples([group], [nothing], prompts, scope=query_tokens)
    usable = [rollout for rollout in group.usable if any(turn.completion_ids for turn in rollout.turns)]
    distilled = [
        (rollout, sample) for rollout, sample in zip(usable, samples, strict=True) if sample.is_distilled
    ]
    readings = [reading for _, sample in distilled for reading in (_student(sample), _teacher(sample))]
    hidden = hidden_rows(model, readings, options.batch_tokens)
    credits = []
    for place, (rollout, sample) in enumerate(distilled):
        figures = _at_query_tokens(model, sample, hidden[2 * place], hidden[2 * place + 1], options)
        credits += _of_rollout(group, rollout, figures, options.correct_above)
    return credits


def _student(sample: TrainingSample) -> RowsToRead:
    return RowsToRead(sample.ids, sample.query_positions - 1, opening=sample.prompt_length - 1)


def _teacher(sample: TrainingSample) -> RowsToRead:
    (view,) = sample.teacher_views
    ids = np.concatenate([np.array(view.prompt_ids[:-1], dtype=np.int64), view.continuation])
    opening = len(view.prompt_ids) - 1
    return RowsToRead(ids, opening + view.offsets, opening=opening)


@torch.no_grad()
def hidden_rows(model: PreTrainedModel, readings: Sequence[RowsToRead], batch_tokens: int) -> list[Tensor]:
    """[Q, H] of each reading, before the head.

    An opening that several readings share is read once. The rest, of like lengths, shares a forward of at most
    `batch_tokens` padded tokens (one that is longer has its own); what pads a sequence stands behind it,
    where causal attention does not look."""
    rows: list[Tensor] = [torch.empty(0)] * len(readings)
    by_opening: dict[bytes, list[int]] = {}
    for number, reading in enumerate(readings):
        by_opening.setdefault(reading.ids[: reading.opening].tobytes(), []).append(number)
    for numbers in by_opening.values():
        own = [readings[number] for number in numbers]
        opening = _opening(model, own[0]) if len(own) > 1 and own[0].opening else None
        for number, found in zip(numbers, _after(model, own, opening, batch_tokens), strict=True):
            rows[number] = found
    return rows


def _opening(model: PreTrainedModel, reading: RowsToRead) -> DynamicCache | None:
    """Keys and values of a reading's opening; None for a model that keeps something else."""
    ids = torch.from_numpy(reading.ids[None, : reading.opening]).to(model.device)
    cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    return cache if type(cache) is DynamicCache and not any((*cache.is_linear, *cache.is_sliding)) else None


def _after(
    model: PreTrainedModel, readings: Sequence[RowsToRead], opening: DynamicCache | None, batch_tokens: int
) -> list[Tensor]:
    """`hidden_rows` of readings that begin alike; opening: what was read of that, if anything."""
    rows: list[Tensor] = [torch.empty(0)] * len(readings)
    begin = 0 if opening is None else readings[0].opening
    order = sorted(range(len(readings)), key=lambda n: len(readings[n].ids), reverse=True)
    while order:
        longest = len(readings[order[0]].ids) - begin
        size = max(1, batch_tokens // longest)
        batch, order = order[:size], order[size:]
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        for row, n in enumerate(batch):
            ids[row, : len(readings[n].ids) - begin] = readings[n].ids[begin:]
        cache = None
        if opening is not None:
            cache = copy.deepcopy(opening)  # which the forward goes on with
            cache.batch_repeat_interleave(len(batch))
        hidden = model.get_decoder()(
            input_ids=torch.from_numpy(ids).to(model.device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        for row, n in enumerate(batch):
            rows[n] = hidden[row, torch.from_numpy(readings[n].positions - begin).to(model.device)]
    return rows


def _at_query_tokens(
    model: PreTrainedModel, sample: TrainingSample, student: Tensor, teacher: Tensor, options: ScoreOptions
) -> QueryFigures:
    """student, teacher: [Q, H]."""
    head = model.get_output_embeddings()
    logits, teacher_logits = head(student).float(), head(teacher).float()
    targets = torch.from_numpy(sample.ids[sample.query_positions])[:, None].to(logits.device)
    own, other = (of.log_softmax(-1).gather(1, targets)[:, 0] for of in (logits, teacher_logits))
    rows, weights = (
        torch.arange(len(logits), device=logits.device),
        torch.ones(len(logits), device=logits.device),
    )
    divergence = Divergence(kind="jsd", beta=options.beta, temperature=options.temperature)
    divergences = jsd_rows(logits, teacher_logits, rows, rows, weights, divergence=divergence).values
    return QueryFigures(own.cpu(), (other - own).cpu(), divergences.cpu())


def _of_rollout(
    group: RolloutGroup, rollout: Rollout, figures: QueryFigures, correct_above: float
) -> Iterator[QueryCredit]:
    """figures: of the rollout's query tokens."""
    _, turns = scoped_positions(rollout, query_tokens)
    searches = [number for number, turn in enumerate(rollout.turns) if turn.query is not None]
    for number, (turn, facts) in enumerate(zip(searches, query_facts(group, rollout), strict=True)):
        own = np.flatnonzero(turns == turn)
        if len(own):
            yield QueryCredit(
                question_id=group.question.id,
                rollout=rollout.index,
                number=number,
                text=rollout.turns[turn].query,
                group_kind=group_kind(group, correct_above),
                correct=is_correct(rollout, correct_above),
                **vars(facts),
                student_logprob=figures.logprobs[own].mean().item(),
                log_ratios=tuple(figures.ratios[own].tolist()),
                jsd=figures.divergences[own].mean().item(),
            )
