"""The trained policy: a language model under DeepSpeed, updated by accumulate(...), accumulate(...),
step()."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.learning_rate import learning_rate
from megatron_sd.algorithm.packing import distilled_part, row_share
from megatron_sd.config import Config, OptimizerConfig
from megatron_sd.distributed.collectives import sum_floats
from megatron_sd.distributed.world import World
from megatron_sd.durable.directories import Seals
from megatron_sd.errors import ConfigError, GradientSpikeError, NonFiniteError
from megatron_sd.machine import give_back_memory
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.types import HeadOptions
from megatron_sd.records import Batch, Microbatch, Totals, UpdateResult
from megatron_sd.training.clipped_adamw import ClippedAdamW
from megatron_sd.training.deepspeed_config import deepspeed_config
from megatron_sd.training.lora import is_adapter, with_adapters
from megatron_sd.training.parallel.sequence import sequence_group, split_sequences
from megatron_sd.training.parallel.tensor import check_model, counts_here, head_shard, mark_cuts, tensor_group
from megatron_sd.training.placement import (
    check_disk_offload,
    place,
    reads_shards,
    share_masters,
    zero3_linear,
)
from megatron_sd.training.policy_module import DeviceMicrobatch, PolicyModule, load_for_training
from megatron_sd.training.safety.norm_limit import GATE
from megatron_sd.training.state.identity import check_same_model
from megatron_sd.training.state.optimizer_state import TrainedState
from megatron_sd.training.teacher_side.reference import ReferencePolicy
from megatron_sd.training.teacher_side.teacher import TEACHERS, Teacher
from megatron_sd.training.update_metrics import SUM_NAMES, to_metrics

# DeepSpeed 0.19 calls collectives that torch 2.13 renamed, on every microbatch.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
# DeepSpeed would compile a shared-memory collective for CPUs at start-up (minutes, needs a compiler); gloo
# does without.
# `import ... as` would find the torch package instead
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class Policy:
    """One rank's handle on the policy. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: Config,
        world: World,
        *,
        reference: ReferencePolicy | None,
        teacher: Teacher,
    ):
        self.engine = engine
        self.world = world
        self.version = 0  # optimiser steps taken
        self._optimizer_config: OptimizerConfig = config.optimizer
        self._num_steps = config.num_steps
        self._zero_stage = config.update.zero_stage
        self._sharers = sequence_group(config.update, world)
        self._parts = tensor_group(config.update, world)
        # among those that ZeRO shards over
        self._place = world.rank // self._parts.size, world.size // self._parts.size
        self._reference = reference
        self._teacher = teacher
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
        if weights.policy == 0.0:
            microbatch = distilled_part(microbatch, weights)
        microbatch = row_share(microbatch, self._sharers.rank, self._sharers.size)
        on_device = DeviceMicrobatch.of(microbatch, self.world.device)
        reference_logprobs = None
        if self._reference is not None and weights.policy != 0.0:
            reference_logprobs = self._reference.logprobs(on_device)
        reads = on_device.has_teacher and weights.distils
        with (
            self._teacher.rows(on_device) if reads else nullcontext() as teacher,
            self._linear(),
            self.world.pulse.waiting(),
        ):
            loss, sums = self.engine(
                microbatch=on_device,
                totals=totals,
                weights=weights,
                reference_logprobs=reference_logprobs,
                teacher=teacher,
            )
            # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
            self.engine.backward(loss * self._place[1], scale_wrt_gas=False)
        self._loss = self._loss + loss.detach()
        # ranks with parts of the same layers have the same sums
        self._sums = self._sums + sums / self._parts.size

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> float:
        """The policy's loss of a whole batch under these weights, over all ranks; nothing is accumulated."""
        total = torch.zeros((), device=self.world.device)
        weights = TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
        for microbatch in batch:
            own = DeviceMicrobatch.of(
                row_share(microbatch, self._sharers.rank, self._sharers.size), self.world.device
            )
            with self._linear(), self.world.pulse.waiting():
                _, sums = self.engine(
                    microbatch=own, totals=batch.totals, weights=weights, reference_logprobs=None
                )
            total += sums[SUM_NAMES.index("policy_loss")] / self._parts.size
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
        return learning_rate(self.version, self._num_steps, self._optimizer_config)

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
            safe_get_local_grad(parameter) for parameter in trained if counts_here(parameter, self._parts)
        ]

    def trained_state(self) -> TrainedState:
        """What a checkpoint holds of this rank: float32 weights and moments."""
        return TrainedState(self.engine.optimizer, self.model.named_parameters(), *self._place)

    def write_state(self, directory: Path) -> Seals:
        """This rank's files of a checkpoint, by name in the directory. Raises OSError naming one."""
        name = f"rank_{self.world.rank:05d}.safetensors"
        return {
            name: self.trained_state().write(directory / name),
            **self._teacher.save(directory, self.world),
        }

    def read_state(self, directory: Path) -> None:
        """What write_state left on all ranks, of any number of groups of tensor-parallel ranks; then call
        `spread`. Raises CheckpointError."""
        paths = sorted(directory.glob("rank_*.safetensors"))
        self.trained_state().read(paths[self._parts.rank :: self._parts.size])
        self._teacher.load(directory, self.world)

    def forget_accumulated(self) -> None:
        """Drop what was accumulated since the last step."""
        self._forget_sums()
        self._forget_gradients()

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

    def _forget_gradients(self) -> None:
        optimizer = self.engine.optimizer
        (self.engine if self._zero_stage == 0 else optimizer).zero_grad()
        if self._zero_stage in (1, 2):  # their zero_grad leaves what earlier backwards have reduced
            optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))

    def _forget_sums(self) -> None:
        self._loss = torch.zeros((), device=self.world.device)
        self._sums = torch.zeros(len(SUM_NAMES), device=self.world.device)


def load_policy(config: Config, world: World) -> Policy:
    """The policy of config.model.path under DeepSpeed, and beside it the frozen start policy when
    policy_loss.kl_weight asks for one. Collective. Raises ConfigError or DataError."""
    options = head_options(config)
    if config.update.zero_stage == 0 and config.model.dtype != "float32":
        raise ConfigError(
            "update.zero_stage 0 keeps no float32 master weights: expected model.dtype float32, or a stage 1"
            " to 3"
        )
    check_disk_offload(config.update)
    check_same_model(config.model.path, world)
    reference = ReferencePolicy.load(config, world, options) if config.policy_loss.kl_weight > 0.0 else None
    teacher = TEACHERS[config.distill.teacher if config.distill.block != "none" else "live"](config, world)
    settings = deepspeed_config(config, world.size)
    model = split_sequences(
        load_for_training(config.model, on_demand=reads_shards(settings)), config.update, world
    )
    model = with_adapters(model, config.model.lora, seed=config.seed)
    parts = tensor_group(config.update, world)
    check_model(model, config.update)
    options = dataclasses.replace(
        options, shard=head_shard(parts, model.get_output_embeddings().weight.shape[0])
    )
    module = PolicyModule(model, options, config.policy_loss)
    module = place(module, module.model, settings, world.device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module, config), config=settings)
    share_masters(engine.optimizer)
    mark_cuts(engine, module.model, parts)
    give_back_memory()  # the weights were in host memory whole
    return Policy(engine, config, world, reference=reference, teacher=teacher)


def _optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    settings = config.optimizer
    parameters = [p for p in module.parameters() if p.requires_grad]
    options = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if config.update.zero_stage == 0:
        return ClippedAdamW(parameters, max_grad_norm=settings.max_grad_norm, **options)
    # without temporaries as large as what it steps over
    return torch.optim.AdamW(parameters, fused=True, **options)


def head_options(config: Config) -> HeadOptions:
    """The head's part of the configuration. Rollouts sampled greedily (temperature 0) are scored at
    temperature 1. Raises ConfigError where the divergence's values are out of range."""
    distill = config.distill
    return HeadOptions(
        sampling_temperature=config.rollout.temperature or 1.0,
        divergence=Divergence(
            kind=distill.divergence,
            beta=distill.beta,
            temperature=distill.temperature,
            top_k=distill.top_k,
            tail_bucket=distill.tail_bucket,
        ),
        teacher_logits=distill.teacher_logits,
        chunk_rows=config.update.head_chunk_rows,
        target=distill.target,
    )
