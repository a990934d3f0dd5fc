"""The story: one loop, four phases. Rollout, assemble, update, publish; every part is handed in by build.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sd.algorithm.advantage import group_advantages
from megatron_sd.algorithm.hindsight import Blocks, HindsightBlocks, shown
from megatron_sd.algorithm.packing import padding_share
from megatron_sd.algorithm.samples import TeacherPrompts
from megatron_sd.distributed.collectives import share, together
from megatron_sd.distributed.world import World
from megatron_sd.errors import ReshardError, RolloutError
from megatron_sd.observability.metrics import block_metrics, lag_metrics, rollout_metrics
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.timers import Timers, memory_metrics
from megatron_sd.records import Batch, Question, RolloutGroup, TrainingSample, UpdateResult
from megatron_sd.rollout.engine import WeightReceiver
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.sampling_order import SamplingOrder
from megatron_sd.training.checkpoint import Checkpoints
from megatron_sd.training.gradient_ratio import AlphaController
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import Publisher

Groups = Sequence[RolloutGroup]
Texts = Sequence[Sequence[str]]  # the blocks as metrics and people see them, by group and rollout


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop ends and when side work is due, in optimiser steps; 0 means never."""

    num_steps: int
    eval_every: int
    transcripts_every: int
    checkpoint_every: int

    def due(self, every: int, step: int) -> bool:
        """True on every `every`-th step."""
        return every > 0 and step % every == 0


@dataclass(kw_only=True)
class Trainer:
    """Trains a policy by GRPO with hindsight self-distillation. All ranks run the same loop on the same groups."""

    schedule: Schedule
    world: World
    eval_questions: Sequence[Question]
    rollouter: Rollouter
    sampling: SamplingOrder
    score: Callable[[Groups], list[RolloutGroup]]
    hindsight: HindsightBlocks
    teacher_prompts: Callable[[Groups, Blocks], TeacherPrompts]
    to_samples: Callable[[Groups, Sequence[Sequence[float]], TeacherPrompts], list[TrainingSample]]
    pack: Callable[[Sequence[TrainingSample]], Batch]
    alpha: AlphaController
    policy: Policy
    publisher: Publisher
    engine: WeightReceiver
    checkpoints: Checkpoints
    recorder: Recorder
    timers: Timers
    step: int = 0

    def train(self) -> None:
        """Run to `num_steps` from the newest checkpoint, or from the start policy when there is none."""
        self.resume()
        while self.step < self.schedule.num_steps:
            try:
                self.take_step()
            except (RolloutError, ReshardError):  # raised on every rank: the engine is lost, what was trained is not
                self.save()
                raise
        self.save()
        self.recorder.close()

    def take_step(self) -> None:
        """One optimiser step: roll out, assemble, update, publish."""
        with self.timers.phase("rollout"):
            groups = self.gather(lambda: self.sampling.take(self.step))
        with self.timers.phase("assemble"):
            groups = self.score(groups)
            blocks = self.hindsight(groups, self.step)
            advantages = [group_advantages(group) for group in groups]
            batch = self.pack(self.to_samples(groups, advantages, self.teacher_prompts(groups, blocks)))
        with self.timers.phase("update"):
            for weights in self.alpha.passes(self.step):  # one pass; three on a step that measures the gradient ratio
                for microbatch in batch:
                    self.policy.accumulate(microbatch, batch.totals, weights)
                self.alpha.observe(self.policy)
            update = self.policy.step()
        self.step += 1
        with self.timers.phase("publish"):
            self.sampling.settle()
            self.publisher.publish(self.policy, self.engine, self.step)
        self.record(groups, shown(blocks), batch, update)
        self.side_work(groups, shown(blocks))

    def gather(self, sample: Callable[[], list[RolloutGroup]]) -> list[RolloutGroup]:
        """Every rank samples its share; every rank gets all groups, in question order, or the error of one."""
        return [group for part in together(self.world, sample) for group in part]

    def record(self, groups: Groups, blocks: Texts, batch: Batch, update: UpdateResult) -> None:
        """One line of metrics for the step that just ended."""
        metrics: dict[str, float] = {}
        metrics |= rollout_metrics(groups) | lag_metrics(groups, self.step - 1) | block_metrics(groups, blocks) | update.metrics
        metrics |= {"optim/grad_norm": update.grad_norm, "optim/learning_rate": update.learning_rate}
        metrics |= {"update/microbatches": len(batch.microbatches), "update/padding_share": padding_share(batch)}
        metrics |= self.alpha.metrics() | self.timers.metrics() | memory_metrics()
        self.recorder.record(self.step, metrics)

    def side_work(self, groups: Groups, blocks: Texts) -> None:
        """What is due after this step: transcripts, evaluation, a checkpoint."""
        if self.schedule.due(self.schedule.transcripts_every, self.step):
            self.recorder.transcripts(self.step, groups, blocks)
        if self.eval_questions and self.schedule.due(self.schedule.eval_every, self.step):
            self.recorder.record(self.step, self.evaluate())
        if self.schedule.due(self.schedule.checkpoint_every, self.step) and self.step < self.schedule.num_steps:
            self.save()

    def evaluate(self) -> Mapping[str, float]:
        """Greedy rollouts on the held-out questions: metrics named eval/..."""
        mine = share(self.world, self.eval_questions)
        groups = self.score(self.gather(lambda: self.rollouter.run(mine, step=self.step, greedy=True)))
        return {f"eval/{name}": value for name, value in rollout_metrics(groups).items()}

    def save(self) -> None:
        """Commit a checkpoint of this step."""
        self.checkpoints.save(self.policy, step=self.step, state={"alpha": self.alpha.state()})

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if any, and give the engine its weights."""
        state = self.checkpoints.load(self.policy)
        if state is not None:
            self.step = state["step"]
            self.alpha.load_state(state["alpha"])
        self.recorder.begin(self.step)
        self.publisher.publish(self.policy, self.engine, self.step)
