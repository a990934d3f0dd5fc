"""The trained policy: a language model under DeepSpeed, updated by accumulate(...), accumulate(...),
step()."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from megatron_sd.algorithm.distill_loss import EVERY_TERM, POLICY_TERM, TermWeights
from megatron_sd.algorithm.refinements import Reading
from megatron_sd.config import OptimizerConfig
from megatron_sd.distributed.collectives import sum_floats
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.errors import ConfigError, GradientSpikeError, NonFiniteError
from megatron_sd.machine import give_back_memory
from megatron_sd.records import Batch, Microbatch, Totals, UpdateResult
from megatron_sd.training.clipped_adamw import ClippedAdamW
from megatron_sd.training.critic.value_module import ValueModule
from megatron_sd.training.deepspeed_config import deepspeed_config
from megatron_sd.training.lora import is_adapter
from megatron_sd.training.microbatch import on_this_rank
from megatron_sd.training.parallel.tensor import counts_here, mark_cuts
from megatron_sd.training.placement import largest_layer, place, share_masters, zero3_linear
from megatron_sd.training.policy_module import PolicyModule
from megatron_sd.training.safety.norm_limit import GATE
from megatron_sd.training.safety.refusal import forget_gradients
from megatron_sd.training.start_policy import StartPolicy
from megatron_sd.training.state.optimizer_state import TrainedState
from megatron_sd.training.state.tensor_file import TensorFiles
from megatron_sd.training.teacher_side.reference import ReferencePolicy
from megatron_sd.training.teacher_side.teacher import Teacher
from megatron_sd.training.update_metrics import SUM_NAMES, to_metrics

# DeepSpeed 0.19 calls collectives that torch 2.13 renamed, on every microbatch.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
# DeepSpeed would compile a shared-memory collective for CPUs at start-up (minutes, needs a compiler); gloo
# does without.
# `import ... as` would find the torch package instead
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class Companion(Protocol):
    """What is trained beside the policy and kept in its checkpoints. Every rank makes the same calls."""

    def files(self, *, copy: bool = False) -> TensorFiles:
        """This rank's files. copy: nothing of them is a view of what is trained on."""
        ...

    def read_state(self, directory: Path) -> None:
        """Take back what `files` gave on all ranks. Raises CheckpointError."""
        ...

    def go_on(self) -> None:
        """What is collective in that."""
        ...


class Policy:
    """One rank's handle on the policy. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        parallel: Parallel,
        *,
        zero_stage: int,
        learning_rate_of: Callable[[int], float],
        reference: ReferencePolicy | None,
        teacher: Teacher,
        companion: Companion | None = None,
    ):
        """learning_rate_of: the optimiser steps taken so far -> the learning rate of the next one."""
        self.engine = engine
        self.world = parallel.world
        self.version = 0  # optimiser steps taken
        self._parallel = parallel
        self._zero_stage = zero_stage
        self._learning_rate_of = learning_rate_of
        self._reference = reference
        self._teacher = teacher
        self._companion = companion
        self._forget_sums()

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model; under ZeRO-3 its parameters are empty outside gathered regions."""
        return self.engine.module.model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Hugging Face names; a tied parameter comes once. Adapters are no parameters of their own: a
        weight knows its own."""
        return (
            (name, parameter) for name, parameter in self.model.named_parameters() if not is_adapter(name)
        )

    def accumulate(self, microbatch: Microbatch, totals: Totals, weights: TermWeights) -> None:
        """Add the gradient of this microbatch's share of `weights.policy * L_GRPO + weights.distill * L_SD`.

        An empty microbatch must be accumulated too: the forward and backward of all ranks run in step.
        """
        own = on_this_rank(microbatch, weights, self._parallel)
        reference_logprobs = None
        if self._reference is not None and weights.policy != 0.0:
            reference_logprobs = self._reference.logprobs(own)
        reads = own.has_teacher and weights.distils
        with (
            self._teacher.rows(own) if reads else nullcontext() as teacher,
            self._linear(),
            self.world.pulse.waiting(),
        ):
            loss, sums = self.engine(
                microbatch=own,
                totals=totals,
                weights=weights,
                reference_logprobs=reference_logprobs,
                teacher=teacher,
            )
            # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
            self.engine.backward(loss * self._parallel.zero.size, scale_wrt_gas=False)
        self._loss = self._loss + loss.detach()
        # ranks with parts of the same layers have the same sums
        self._sums = self._sums + sums / self._parallel.tensor.size

    @torch.no_grad()
    def read(self, microbatch: Microbatch, totals: Totals, *, with_teacher: bool) -> Reading:
        """What these weights, and with_teacher the teacher's, say of the microbatch's rows; nothing is
        accumulated. Every rank reads as many microbatches."""
        own = on_this_rank(microbatch, EVERY_TERM, self._parallel)
        reads = own.has_teacher and with_teacher
        with (
            self._teacher.rows(own) if reads else nullcontext() as teacher,
            self._linear(),
            self.world.pulse.waiting(),
        ):
            values = self.engine(
                microbatch=own,
                totals=totals,
                weights=EVERY_TERM if reads else POLICY_TERM,
                reference_logprobs=None,
                teacher=teacher,
                reads_only=True,
            )
        self.engine.empty_partition_cache()  # ZeRO-3 gathers ahead for a backward that does not come
        columns = (values.logprobs, values.entropies, values.teacher_logprobs)
        return Reading(*(column.float().cpu().numpy() for column in columns))

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> float:
        """The policy's loss of a whole batch under these weights, over all ranks; nothing is accumulated."""
        total = torch.zeros((), device=self.world.device)
        for microbatch in batch:
            own = on_this_rank(microbatch, POLICY_TERM, self._parallel)
            with self._linear(), self.world.pulse.waiting():
                _, sums = self.engine(
                    microbatch=own, totals=batch.totals, weights=POLICY_TERM, reference_logprobs=None
                )
            total += sums[SUM_NAMES.index("policy_loss")] / self._parallel.tensor.size
        self.engine.empty_partition_cache()  # ZeRO-3 gathers ahead for a backward that does not come
        return sum_floats(self.world, [total.item()])[0]

    def step(self, max_norm: float = math.inf) -> UpdateResult:
        """Take the optimiser step with what was accumulated.

        Raises NonFiniteError when any rank's loss or gradient is not finite, and GradientSpikeError when
        the gradient's norm exceeds max_norm: on every rank, with the optimiser, the parameters and the
        version untouched and the accumulated gradient dropped.
        """
        sums, learning_rate = self._sum_over_ranks(), self.learning_rate()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        GATE.open(max_norm)
        with self.world.pulse.waiting():
            self.engine.step()
        if not self.engine.was_step_applied():
            self._refuse_spike(GATE.spike, max_norm)
            self._refuse("gradient", self._ranks_with_non_finite_gradient())
        self._teacher.follow(self.named_parameters())
        give_back_memory()
        self.version += 1
        self._forget_sums()
        return UpdateResult(
            grad_norm=float(self.engine.get_global_grad_norm()),
            learning_rate=learning_rate,
            metrics=to_metrics(sums),
        )

    def learning_rate(self) -> float:
        """Of the next step: a function of the steps taken, so that a resumed run goes on with it."""
        return self._learning_rate_of(self.version)

    def local_gradients(self) -> list[Tensor]:
        """What has been accumulated since the last step: this rank's partition of every parameter's
        gradient, float32, summed over ranks. Views: clone what must outlive the next accumulate. Raises
        ConfigError below ZeRO stage 3, which has no complete partition before the step."""
        if self._zero_stage != 3:
            raise ConfigError(
                f"update.zero_stage is {self._zero_stage}, and the gradient ratio can be measured at stage 3"
                " only: set update.zero_stage to 3, or distill.measure_every to 0 with distill.alpha.mode"
                " fixed"
            )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            safe_get_local_grad(parameter)
            for parameter in trained
            if counts_here(parameter, self._parallel.tensor)
        ]

    def trained_state(self) -> TrainedState:
        """What a checkpoint holds of this rank: float32 weights and moments."""
        return TrainedState(self.engine.optimizer, self.model.named_parameters(), *self._parallel.zero)

    def files(self, *, copy: bool = False) -> TensorFiles:
        """This rank's files of a checkpoint. copy: nothing of them is a view of what is trained on."""
        return {
            f"rank_{self.world.rank:05d}.safetensors": self.trained_state().file(copy=copy),
            **self._teacher.files(self.world, copy=copy),
            **(self._companion.files(copy=copy) if self._companion else {}),
        }

    def read_state(self, directory: Path) -> None:
        """What `files` gave on all ranks, of any number of groups of tensor-parallel ranks; then call
        `go_on`. Raises CheckpointError."""
        parts, paths = self._parallel.tensor, sorted(directory.glob("rank_*.safetensors"))
        self.trained_state().read(paths[parts.rank :: parts.size])
        self._teacher.load(directory, self.world)
        if self._companion is not None:
            self._companion.read_state(directory)

    def go_on(self, version: int) -> None:
        """From what read_state read: the parameters of that version, nothing accumulated. Collective."""
        self.trained_state().spread()
        self.version = version
        self.forget_accumulated()
        if self._companion is not None:
            self._companion.go_on()

    def forget_accumulated(self) -> None:
        """Drop what was accumulated since the last step."""
        self._forget_sums()
        forget_gradients(self.engine, self._zero_stage)

    def _linear(self) -> AbstractContextManager[None]:
        """torch's linear layer, as ZeRO-3 needs it where that shards the parameters."""
        return zero3_linear() if self._zero_stage == 3 else nullcontext()

    def _sum_over_ranks(self) -> list[float]:
        """The step's sums over all ranks. Raises NonFiniteError when a rank's loss is not finite."""
        loss, *own = torch.cat([self._loss[None], self._sums]).tolist()
        flags = [0.0] * self.world.size
        flags[self.world.rank] = 0.0 if math.isfinite(loss) else 1.0
        total = sum_floats(self.world, flags + own)
        bad_ranks = [rank for rank in range(self.world.size) if total[rank]]
        if bad_ranks:
            self._refuse("loss", bad_ranks)
        return total[self.world.size :]

    def _ranks_with_non_finite_gradient(self) -> list[int]:
        if self._zero_stage != 3:
            return []
        flags = [0.0] * self.world.size
        flags[self.world.rank] = float(not all(bool(torch.isfinite(g).all()) for g in self.local_gradients()))
        return [rank for rank, flag in enumerate(sum_floats(self.world, flags)) if flag]

    def _refuse(self, quantity: str, ranks: list[int]) -> None:
        self.forget_accumulated()
        where = f"rank {', '.join(map(str, ranks))}" if ranks else "the average over ranks"
        raise NonFiniteError(
            f"the {quantity} of {where} is not finite at step {self.version}: no rank took the optimiser step"
        )

    def _refuse_spike(self, norm: float | None, limit: float) -> None:
        if norm is not None:
            self.forget_accumulated()
            raise GradientSpikeError(
                f"the gradient's norm is {norm:.3g} at step {self.version}, expected at most {limit:.3g} by"
                " the steps before it (safety.spike_sigmas): no rank took the optimiser step"
            )

    def _forget_sums(self) -> None:
        self._loss = torch.zeros((), device=self.world.device)
        self._sums = torch.zeros(len(SUM_NAMES), device=self.world.device)


def under_deepspeed(
    module: PolicyModule | ValueModule, start: StartPolicy, optimizer: OptimizerConfig
) -> deepspeed.DeepSpeedEngine:
    """The module's DeepSpeed engine: its parameters and their optimiser on the devices, sharded as
    start.update asks. Collective."""
    parallel = start.parallel
    settings = deepspeed_config(
        start.update,
        optimizer,
        dtype=start.model.dtype,
        world_size=parallel.world.size,
        device_type=parallel.world.device.type,
        layer=largest_layer(module.model),
    )
    module = place(module, module.model, settings, parallel.world.device)
    steps = _optimizer(module, optimizer, start.update.zero_stage)
    engine, *_ = deepspeed.initialize(model=module, optimizer=steps, config=settings)
    share_masters(engine.optimizer)
    mark_cuts(engine, module.model, parallel.tensor)
    give_back_memory()  # the weights were in host memory whole
    return engine


def _optimizer(module: nn.Module, config: OptimizerConfig, zero_stage: int) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    options = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if zero_stage == 0:
        return ClippedAdamW(parameters, max_grad_norm=config.max_grad_norm, **options)
    # without temporaries as large as what it steps over
    return torch.optim.AdamW(parameters, fused=True, **options)
