"""Toolformer's measure of a call (arXiv 2302.04761): how much likelier the gold answer is behind what a search
found than without the search, and than behind the query alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from eval.credit.scorer import RowsToRead, hidden_rows
from megatron_sd.records import Rollout, RolloutGroup, TokenIds
from megatron_sd.search.environment import Environment

_FALL = 0.2  # of a token's weight to the next one's


def answer_loss(logprobs: Sequence[float]) -> float:
    """Minus the weighted mean of the answer's token log-probabilities, in nats: weights 1, .8, .6, .4, .2, 0,
    ... scaled to the sum 1."""
    weights = np.maximum(0.0, 1.0 - _FALL * np.arange(len(logprobs)))
    return float(-(weights @ np.asarray(logprobs)) / weights.sum())


def usefulness(no_call: float, call_alone: float, with_result: float) -> float:
    """By how many nats the loss falls. Toolformer keeps a call from 1.0 on."""
    return min(no_call, call_alone) - with_result


@torch.no_grad()
def usefulness_of_group(
    model: PreTrainedModel, environment: Environment, group: RolloutGroup, batch_tokens: int
) -> dict[tuple[int, int], float]:
    """Of every search, by (rollout's index, number of the query); nothing for a question without a gold answer.
    The first gold answer is read behind the answer's opening tag, without a thought before it."""
    if not group.question.golden_answers:
        return {}
    codec = environment.codec
    opening = codec.encode_own(environment.protocol.answer_tags[0])
    answer = codec.encode(f" {environment.sanitizer.clean_query(group.question.golden_answers[0])}")
    places, readings = [], []
    for rollout in group.usable:
        for number, contexts in enumerate(_contexts(rollout, environment)):
            places.append((rollout.index, number))
            shared = len(rollout.prompt_ids) - 1
            readings += [_reading((*context, *opening), answer, shared) for context in contexts]
    losses = []
    for hidden in hidden_rows(model, readings, batch_tokens):
        logprobs = model.get_output_embeddings()(hidden).float().log_softmax(-1)
        targets = torch.tensor(answer, device=logprobs.device)[:, None]
        losses.append(answer_loss(logprobs.gather(1, targets)[:, 0].tolist()))
    return {place: usefulness(*losses[3 * n : 3 * n + 3]) for n, place in enumerate(places)}


def _contexts(rollout: Rollout, environment: Environment) -> Iterator[tuple[TokenIds, TokenIds, TokenIds]]:
    """Of every search: what stands before it; the call with an empty result; the call with its own."""
    before: TokenIds = rollout.prompt_ids
    nothing = environment.observation_ids([])
    for turn in rollout.turns:
        called = (*before, *turn.completion_ids)
        after = (*called, *turn.observation_ids)
        if turn.query is not None:
            yield before, (*called, *nothing), after
        before = after


def _reading(context: TokenIds, answer: TokenIds, shared: int) -> RowsToRead:
    """The answer behind the context, whose first `shared` tokens others have, too."""
    ids = np.array((*context, *answer), dtype=np.int64)
    return RowsToRead(ids, np.arange(len(context) - 1, len(ids) - 1), opening=shared)
