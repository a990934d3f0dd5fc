"""Teacher and student on stored rollouts: one forward each, log-probabilities and divergence at the query tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.credit.queries import QueryCredit, query_facts
from eval.lift import group_kind
from megatron_sd.algorithm.hindsight import is_correct
from megatron_sd.algorithm.samples import query_tokens, scoped_positions, to_samples
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.records import RolloutGroup, TrainingSample
from megatron_sd.search.environment import Environment


@torch.no_grad()
def score_group(
    model: PreTrainedModel,
    environment: Environment,
    group: RolloutGroup,
    blocks: Sequence[str],
    *,
    beta: float,
    temperature: float,
    correct_above: float,
) -> list[QueryCredit]:
    """The credit of every query of a scored group. blocks: the hindsight of each rollout, "" where there is none.

    The teacher's view is training's own (records.TrainingSample.teacher_views): its block replaces nothing but the prompt.
    Queries without a token strictly between the tags, and rollouts without a block, are left out.
    """
    prompts = [[(environment.prompt_ids(group.question.text, block),) if block else () for block in blocks]]
    samples = to_samples([group], [[0.0] * len(group.rollouts)], prompts, scope=query_tokens)
    usable = [rollout for rollout in group.usable if any(turn.completion_ids for turn in rollout.turns)]
    credits = []
    for rollout, sample in zip(usable, samples, strict=True):
        if not sample.is_distilled:
            continue
        ratios, divergences = _at_query_tokens(model, sample, beta=beta, temperature=temperature)
        _, turns = scoped_positions(rollout, query_tokens)
        searches = [number for number, turn in enumerate(rollout.turns) if turn.query is not None]
        for number, (turn, facts) in enumerate(zip(searches, query_facts(group, rollout), strict=True)):
            own = np.flatnonzero(turns == turn)
            if len(own) == 0:
                continue
            credits.append(
                QueryCredit(
                    question_id=group.question.id,
                    rollout=rollout.index,
                    number=number,
                    text=rollout.turns[turn].query,
                    group_kind=group_kind(group, correct_above),
                    correct=is_correct(rollout, correct_above),
                    **vars(facts),
                    log_ratios=tuple(ratios[own].tolist()),
                    jsd=divergences[own].mean().item(),
                )
            )
    return credits


def _at_query_tokens(model: PreTrainedModel, sample: TrainingSample, *, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """[Q] teacher minus student log-probability, and [Q] divergence, of the query tokens, in nats."""
    (view,) = sample.teacher_views
    student = _logits(model, sample.ids, sample.query_positions - 1)
    teacher_ids = np.concatenate([np.array(view.prompt_ids[:-1], dtype=np.int64), view.continuation])
    teacher = _logits(model, teacher_ids, len(view.prompt_ids) - 1 + view.offsets)
    targets = torch.from_numpy(sample.ids[sample.query_positions])[:, None]
    ratios = (teacher.log_softmax(-1).gather(1, targets) - student.log_softmax(-1).gather(1, targets))[:, 0]
    rows, weights = torch.arange(len(student)), torch.ones(len(student))
    options = {"divergence": "jsd", "beta": beta, "temperature": temperature}
    return ratios, jsd_rows(student, teacher, rows, rows, weights, **options).values


def _logits(model: PreTrainedModel, ids: np.ndarray, positions: np.ndarray) -> Tensor:
    """[Q, V] float32: of the given positions alone, the vocabulary is not unrolled elsewhere."""
    on_device = torch.from_numpy(ids)[None].to(model.device)
    hidden = model.get_decoder()(input_ids=on_device, use_cache=False).last_hidden_state[0]
    return model.get_output_embeddings()(hidden[torch.from_numpy(positions).to(model.device)]).float().cpu()
