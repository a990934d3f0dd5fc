"""The one module that DeepSpeed wraps: student and teacher through the same backbone, and the head that
sees listed rows only.

Everything of a microbatch happens in one forward, so that ZeRO-3 gathers each parameter in the order it has
seen before, and gathers the head's weight only around the head's own call. The teacher's pass is a separate
call of the backbone without a graph: whether it runs changes no bit of the student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.algorithm.distill_loss import TermWeights, importance_weights, query_row_weights
from megatron_sd.algorithm.policy_loss import POLICY_LOSSES, KnownRows, PolicyRows, sequence_means
from megatron_sd.config import DistillConfig, PolicyLossConfig
from megatron_sd.ops.head.one_pass import linear_jsd
from megatron_sd.ops.head.types import HeadOptions, HeadRows, RowLoss, RowValues
from megatron_sd.ops.head.vocab_parallel import own_rows, replicated
from megatron_sd.records import Totals
from megatron_sd.training.microbatch import DeviceMicrobatch, Runs
from megatron_sd.training.update_metrics import distill_sums, policy_sums


class TeacherRows(NamedTuple):
    """hidden: [Q, H] the teacher's last hidden states at its rows. head: weight and bias of a teacher with
    weights of its own, None where it shares the student's."""

    hidden: Tensor
    head: tuple[Tensor, Tensor | None] | None = None


class RowHead(nn.Module):
    """The model's output embedding, asked for values and losses of listed rows instead of [T, V] logits.

    It shares the parameters (and their names) of the layer it replaces, tied to the input embedding or not.
    """

    def __init__(self, output_embedding: nn.Module, options: HeadOptions):
        super().__init__()
        self.weight = output_embedding.weight
        self.bias = getattr(output_embedding, "bias", None)
        self.options = options

    def forward(
        self, hidden: Tensor, teacher: TeacherRows, rows: HeadRows, row_loss: RowLoss | None
    ) -> RowValues:
        """ops.linear_jsd with this head's weight, or with this rank's rows of it."""
        own, shard = (self.weight, self.bias), self.options.shard
        if shard is not None:
            hidden, own = (
                replicated(hidden, shard),
                tuple(None if part is None else own_rows(part, shard) for part in own),
            )
        options = {"row_loss": row_loss, "options": self.options, "teacher_head": teacher.head}
        return linear_jsd(hidden, teacher.hidden, own, rows, **options)


@dataclass(frozen=True, kw_only=True)
class MicrobatchLoss:
    """The share that any rows of a microbatch have in the step's loss, over global denominators: what the
    head asks for."""

    microbatch: DeviceMicrobatch
    totals: Totals
    weights: TermWeights
    known: KnownRows
    config: PolicyLossConfig
    distill: DistillConfig
    distils: bool

    def __call__(self, values: RowValues, rows: slice, queries: slice) -> Tensor:
        """A scalar, differentiable in values.logprobs, values.divergences and, with an entropy bonus,
        values.entropies."""
        policy = self.policy_rows(values.logprobs, rows)
        loss = (
            self.weights.policy
            * (self.row_weights[rows] * (policy.losses + self.config.kl_weight * policy.kl)).sum()
        )
        if self.config.entropy_weight:
            bonus = self.weights.policy * self.config.entropy_weight
            loss = loss - bonus * (self.row_weights[rows] * values.entropies).sum()
        if self.distils:
            alpha = self.alpha[queries] * self.importance(values.logprobs, rows, queries)
            loss = loss + (alpha * values.divergences).sum() / (self.totals.distilled_rollouts or 1.0)
        return loss

    def policy_rows(self, logprobs: Tensor, rows: slice) -> PolicyRows:
        """The loss of algorithm/policy_loss.py that the configuration names, of rows whose
        log-probabilities are given."""
        return POLICY_LOSSES[self.config.objective](logprobs, self.known.at(rows), config=self.config)

    def importance(self, logprobs: Tensor, rows: slice, queries: slice) -> Tensor | float:
        """[q] weights of these query rows' divergences, of which logprobs [r] of these rows are given; 1
        without a cap."""
        cap, m = self.distill.importance_cap, self.microbatch
        if cap is None:
            return 1.0
        own = m.query_rows[queries]
        return importance_weights(logprobs[own - rows.start], m.old_logprobs[own], cap)

    @property
    def row_weights(self) -> Tensor:
        """[R] over the global total."""
        return self.microbatch.row_weights / (self.totals.policy_weight or 1.0)

    @property
    def alpha(self) -> Tensor:
        """[Q] weights of the query rows in this pass."""
        return query_row_weights(self.microbatch.query_weights, self.microbatch.query_in_spread, self.weights)


class PolicyModule(nn.Module):
    """A Hugging Face causal language model whose forward returns the loss of one microbatch."""

    def __init__(
        self, model: PreTrainedModel, options: HeadOptions, loss: PolicyLossConfig, distill: DistillConfig
    ):
        super().__init__()
        self.model = with_row_head(model, options)
        self.loss = loss
        self.distill = distill

    def forward(
        self,
        microbatch: DeviceMicrobatch,
        totals: Totals,
        weights: TermWeights,
        reference_logprobs: Tensor | None,
        *,
        teacher: TeacherRows | None = None,
        reads_only: bool = False,
    ) -> tuple[Tensor, Tensor] | RowValues:
        """(loss, sums), or with reads_only what the head says of the rows, without a loss.

        loss: this microbatch's share of the step's loss, over global denominators: its sum over microbatches
        and ranks is the step's loss. sums: the detached vector of update_metrics.SUM_NAMES. teacher: what
        another model read; None: these weights are the teacher's too."""
        if microbatch.has_teacher and weights.distils and teacher is None:
            teacher = TeacherRows(teacher_hidden_rows(self.model, microbatch))
        if reads_only:
            return student_values(self.model, microbatch, teacher, None)
        hidden = hidden_rows(self.model, microbatch.input_ids, microbatch.row_index, microbatch.runs)
        sequences = self._sequence_log_ratios(microbatch, hidden) if weights.policy != 0.0 else None
        m = microbatch
        loss = MicrobatchLoss(
            microbatch=m,
            totals=totals,
            weights=weights,
            known=KnownRows(m.rollout_logprobs, m.old_logprobs, m.advantages, reference_logprobs, sequences),
            config=self.loss,
            distill=self.distill,
            distils=teacher is not None,
        )
        values = head_values(self.model, m, hidden, teacher=teacher, row_loss=loss)

        rows = loss.policy_rows(values.logprobs, slice(None))
        sums = policy_sums(rows, values, loss.row_weights, counted=weights.policy != 0.0)
        if loss.distils:
            mean_weights = microbatch.query_weights / (totals.distilled_rollouts or 1.0)
            mean_weights = mean_weights * loss.importance(values.logprobs, slice(0, None), slice(None))
            sums = sums + distill_sums(values, microbatch.query_rows, mean_weights, counted=loss.alpha != 0.0)
        return values.loss, sums

    @torch.no_grad()
    def _sequence_log_ratios(self, microbatch: DeviceMicrobatch, hidden: Tensor) -> Tensor | None:
        """[R] log ratios averaged as the configuration says; None for those of tokens.

        The head takes its gradients a few rows at a time, and a mean needs all rows of its sequence: so the
        head is asked for the log-probabilities alone first."""
        if self.loss.ratio == "token":
            return None
        m = microbatch
        logprobs = head_values(self.model, m, hidden).logprobs
        sequences = m.rollouts if self.loss.ratio == "rollout" else m.turns
        return sequence_means(logprobs - m.old_logprobs, sequences)


def with_row_head(model: PreTrainedModel, options: HeadOptions) -> PreTrainedModel:
    """The model with a RowHead in the place of its output embedding; its parameters stay the same tensors."""
    model.set_output_embeddings(RowHead(model.get_output_embeddings(), options))
    return model


def student_values(
    model: PreTrainedModel,
    microbatch: DeviceMicrobatch,
    teacher: TeacherRows | None,
    row_loss: RowLoss | None,
) -> RowValues:
    """What the head says of the student's rows (and of the teacher's, where there is a teacher)."""
    hidden = hidden_rows(model, microbatch.input_ids, microbatch.row_index, microbatch.runs)
    return head_values(model, microbatch, hidden, teacher=teacher, row_loss=row_loss)


def head_values(
    model: PreTrainedModel,
    microbatch: DeviceMicrobatch,
    hidden: Tensor,
    *,
    teacher: TeacherRows | None = None,
    row_loss: RowLoss | None = None,
) -> RowValues:
    """The same of rows that have been read: hidden [R, H]."""
    head = model.get_output_embeddings()
    if teacher is None:
        return head(
            hidden, TeacherRows(hidden[:0].detach()), microbatch.head_rows.without_teacher(), row_loss
        )
    return head(hidden, teacher, microbatch.head_rows, row_loss)


def hidden_rows(model: PreTrainedModel, ids: Tensor, rows: Tensor, runs: Runs | None = None) -> Tensor:
    """[len(rows), H] last hidden states at flat positions of right-padded ids [B, S], or of one row [1, T]
    of runs.

    No padding mask: under causal attention nothing to the right of a token reaches it, and padding is never
    asked for.
    """
    states = model.base_model(
        input_ids=ids, use_cache=False, **(runs.options() if runs else {})
    ).last_hidden_state
    return states.flatten(0, 1).index_select(0, rows)


@torch.no_grad()
def teacher_hidden_rows(model: PreTrainedModel, microbatch: DeviceMicrobatch) -> Tensor:
    """[Q, H] last hidden states of the teacher at its rows.

    Rollouts of a group share the teacher's prompt, hindsight block and all: it is read once, and every
    rollout continues from its keys and values. In a row of runs every rollout has the prompt before it.
    """
    backbone, m = model.base_model, microbatch
    if m.teacher_runs is not None:
        return hidden_rows(model, m.teacher_ids, m.teacher_rows, m.teacher_runs)
    was_training = backbone.training
    backbone.eval()  # gradient checkpointing would drop the cache
    cache = backbone(input_ids=m.teacher_prompts, use_cache=True).past_key_values
    # [U] prompts become [N] sequences: each rollout goes on from a copy of its prompt's keys and values
    cache.batch_select_indices(m.teacher_prompt_of)
    lengths = m.teacher_prompt_lengths[m.teacher_prompt_of][:, None]
    columns = torch.arange(m.teacher_prompts.shape[1] + m.teacher_ids.shape[1], device=lengths.device)
    # Prompts of unequal length are padded on the right, in the middle of what the continuation attends to:
    # the mask hides that, and positions go on from each prompt's own length.
    is_padding = (columns >= lengths) & (columns < m.teacher_prompts.shape[1])
    states = backbone(
        input_ids=m.teacher_ids,
        attention_mask=(~is_padding).long(),
        position_ids=lengths + columns[: m.teacher_ids.shape[1]],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    backbone.train(was_training)
    return states.flatten(0, 1).index_select(0, m.teacher_rows)
