"""PPO's critic: a second whole model under a DeepSpeed engine of its own, with an optimiser of its own, that
learns what each sampled token may still expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import deepspeed
import numpy as np
import torch
from torch import nn

from megatron_sd.algorithm.distill_loss import POLICY_TERM
from megatron_sd.algorithm.learning_rate import learning_rate
from megatron_sd.algorithm.value_loss import explained_variance, value_moments, value_rows
from megatron_sd.config import CriticConfig
from megatron_sd.distributed.collectives import sum_floats
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.errors import CheckpointError, NonFiniteError
from megatron_sd.machine import give_back_memory
from megatron_sd.records import Batch, Microbatch, Totals, UpdateResult
from megatron_sd.training.microbatch import on_this_rank
from megatron_sd.training.placement import zero3_linear
from megatron_sd.training.safety.norm_limit import GATE
from megatron_sd.training.safety.refusal import forget_gradients
from megatron_sd.training.state.optimizer_state import TrainedState
from megatron_sd.training.state.tensor_file import TensorFiles
from megatron_sd.training.teacher_side.reference import ReferencePolicy


def policy_alone(batch: Batch, update: Callable[[Batch], UpdateResult], step: int) -> UpdateResult:
    """What a run without a critic learns from a batch."""
    return update(batch)


class Critic:
    """One rank's handle on it. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        parallel: Parallel,
        *,
        zero_stage: int,
        config: CriticConfig,
        reference: ReferencePolicy | None,
    ):
        """engine: of a ValueModule. reference: the start policy, where a KL to it is part of the reward."""
        self.engine = engine
        self.version = 0  # optimiser steps taken
        self._parallel = parallel
        self._zero_stage = zero_stage
        self._config = config
        self._reference = reference
        self._explained: float | None = None  # of the step being learnt from
        self._forget_sums()

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model with its value head; under ZeRO-3 its parameters are empty outside gathered
        regions."""
        return self.engine.module.model

    @torch.no_grad()
    def read(self, microbatch: Microbatch) -> dict[str, np.ndarray]:
        """What refinements.Reading has of it: values [R] float32, and reference_logprobs [R] float32 where a
        KL is part of the reward. Every rank reads as many microbatches."""
        own = on_this_rank(microbatch, POLICY_TERM, self._parallel)
        with self._linear(), self._parallel.world.pulse.waiting():
            columns = {"values": self.engine(microbatch=own)}
            if self._reference is not None:
                columns["reference_logprobs"] = self._reference.logprobs(own)
        self.engine.empty_partition_cache()  # ZeRO-3 gathers ahead for a backward that does not come
        return {name: column.float().cpu().numpy() for name, column in columns.items()}

    def compare(self, microbatches: Sequence[Microbatch]) -> None:
        """How well its values foretold the returns of all this rank's microbatches of a step, which `step`
        then reports. Collective."""
        moments = sum((value_moments(m.returns, m.old_values) for m in microbatches), np.zeros(5))
        self._explained = explained_variance(sum_floats(self._parallel.world, moments.tolist()))

    def learn(self, batch: Batch, update: Callable[[Batch], UpdateResult], step: int) -> UpdateResult:
        """One optimiser step of the policy, by `update`, and then one of the critic, on the same rows; in the
        first config.warmup_only_steps steps of the run one of the critic alone.

        Raises NonFiniteError, on every rank, when the critic's gradient is not finite: it stays what it was,
        and the policy's step stands. What `update` raises leaves the critic what it was."""
        stays = step < self._config.warmup_only_steps
        result = UpdateResult(grad_norm=0.0, learning_rate=0.0) if stays else update(batch)
        for microbatch in batch:
            self.accumulate(microbatch, batch.totals)
        return UpdateResult(
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            metrics={**result.metrics, **self.step()},
        )

    def accumulate(self, microbatch: Microbatch, totals: Totals) -> None:
        """Add the gradient of this microbatch's share of the value loss: a mean over the step's rows, weighed
        as in the policy loss. An empty microbatch must be accumulated too."""
        own = on_this_rank(microbatch, POLICY_TERM, self._parallel)
        with self._linear(), self._parallel.world.pulse.waiting():
            values = self.engine(microbatch=own)
            rows = value_rows(values, own.old_values, own.returns, clip=self._config.value_clip)
            loss = (own.row_weights * rows.losses).sum() / (totals.policy_weight or 1.0)
            # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
            self.engine.backward(loss * self._parallel.zero.size, scale_wrt_gas=False)
        self._sums += np.array([loss.item(), rows.clipped.sum().item(), len(microbatch.returns)])

    def step(self) -> dict[str, float]:
        """Take the optimiser step with what was accumulated; metrics by TensorBoard name. explained_variance
        is that of `compare`, and missing where all returns are equal.

        Raises NonFiniteError when the gradient is not finite, on every rank, with parameters, optimiser and
        version untouched and the accumulated gradient dropped."""
        # constant after its warm-up: the number of steps to come decides nothing
        rate = learning_rate(self.version, 0, self._config.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        world = self._parallel.world
        GATE.open(float("inf"))
        with world.pulse.waiting():
            self.engine.step()
        if not self.engine.was_step_applied():
            self.forget_accumulated()
            raise NonFiniteError(
                f"the critic's gradient is not finite at its step {self.version}: no rank took its optimiser step"
            )
        give_back_memory()
        self.version += 1
        loss, clipped, num_rows = sum_floats(world, self._sums.tolist())
        self._forget_sums()
        explained = self._explained
        return {
            "critic/loss": loss,
            "critic/clipped": clipped / max(num_rows, 1.0),
            "critic/grad_norm": float(self.engine.get_global_grad_norm()),
            "critic/learning_rate": rate,
            **({} if explained is None else {"critic/explained_variance": explained}),
        }

    def files(self, *, copy: bool = False) -> TensorFiles:
        """This rank's file of a checkpoint: float32 weights and moments. copy: as TrainedState.file has it."""
        return {f"critic_{self._parallel.world.rank:05d}.safetensors": self._trained_state().file(copy=copy)}

    def read_state(self, directory: Path) -> None:
        """What `files` gave on all ranks, of any number; then call `go_on`. Raises CheckpointError."""
        paths = sorted(directory.glob("critic_*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{directory} holds no critic, expected the one that advantage.estimator gae goes on with: resume"
                " with the estimator that the run had, or begin a new run from its model/ directory"
            )
        self.version = self._trained_state().read(paths)

    def go_on(self) -> None:
        """Bring the parameters to what read_state read, and drop what was accumulated. Collective."""
        self._trained_state().spread()
        self.forget_accumulated()

    def forget_accumulated(self) -> None:
        """Drop what was accumulated since the last step."""
        self._forget_sums()
        forget_gradients(self.engine, self._zero_stage)

    def _trained_state(self) -> TrainedState:
        return TrainedState(self.engine.optimizer, self.model.named_parameters(), *self._parallel.zero)

    def _linear(self) -> AbstractContextManager[None]:
        return zero3_linear() if self._zero_stage == 3 else nullcontext()

    def _forget_sums(self) -> None:
        self._sums = np.zeros(3)  # loss, clipped rows, rows
