"""The story: one loop, four phases. Rollout, assemble, update, publish; every part is handed in by
building/trainer.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.assemble import Teaching
from megatron_sd.algorithm.packing.batches import packing_metrics
from megatron_sd.algorithm.packing.outlines import Samples
from megatron_sd.algorithm.samples import TeacherPrompts
from megatron_sd.distributed.collectives import agree_to_stop, each, shared_out, together
from megatron_sd.distributed.world import World
from megatron_sd.errors import OwnCodeError, RefusedStepError, ReshardError, RolloutError, StopRequested
from megatron_sd.observability.metrics import block_figures, block_metrics, lag_metrics, rollout_metrics
from megatron_sd.observability.progress import Work
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.timers import Timers, memory_metrics
from megatron_sd.records import Batch, RolloutGroup, UpdateResult
from megatron_sd.rollout.collecting import Collecting
from megatron_sd.rollout.engine import WeightReceiver
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.sampling_order import SamplingOrder
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import Publisher
from megatron_sd.training.safety.stability import Stability
from megatron_sd.training.safety.starts import Attempts
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController
from megatron_sd.training.update_metrics import mean_of

logger = logging.getLogger(__name__)

Groups = Sequence[RolloutGroup]
Texts = Sequence[Sequence[str]]  # the blocks as metrics and people see them, by group and rollout


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop ends and when side work is due, in optimiser steps; 0 means never."""

    num_steps: int
    eval_every: tuple[int, ...]  # of each evaluation that there is
    transcripts_every: int
    checkpoint_every: int
    evaluates_at_end: bool = False  # beside the steps of eval_every

    def due(self, every: int, step: int) -> bool:
        """True on every `every`-th step."""
        return every > 0 and step % every == 0

    def evaluation_is_due(self, step: int) -> bool:
        """True when what is held out is looked at after this step."""
        is_last = self.evaluates_at_end and step == self.num_steps
        return is_last or any(self.due(every, step) for every in self.eval_every)


@dataclass(kw_only=True)
class Trainer:
    """Trains a policy by GRPO with hindsight self-distillation; all ranks run the same loop."""

    schedule: Schedule
    world: World
    evaluation: Callable[[int], Mapping[str, float]] | None  # by step, of what is held out; None: nothing is
    sampling: SamplingOrder
    collect: Collecting
    score: Callable[[Groups], list[RolloutGroup]]
    advantages: Callable[[Groups], list[GroupAdvantages]]
    # (groups, advantages, step, numbers of some groups) -> what the teacher is shown of these
    teach: Callable[[Groups, list[GroupAdvantages], int, Sequence[int]], list[Teaching]]
    to_samples: Callable[[Groups, list[GroupAdvantages], TeacherPrompts], Samples]
    pack: Callable[[Samples], Sequence[Batch]]
    reread: Callable[[Sequence[Batch], Policy], Sequence[Batch]]  # one batch an optimiser step, in order
    # (batch, an update of the policy by it, step) -> what came of it: a critic learns beside the policy
    learn: Callable[[Batch, Callable[[Batch], UpdateResult], int], UpdateResult]
    alpha: AlphaController
    policy: Policy
    publisher: Publisher[Any]
    engine: WeightReceiver | None  # None where nobody samples
    checkpoints: Checkpoints
    recorder: Recorder
    timers: Timers
    work: Work
    stability: Stability
    attempts: Attempts
    rest: Callable[[], None] = lambda: None  # of what samples, until the next publish
    step: int = 0
    evaluation_is_due: bool = False
    rollouter: Rollouter | None = None  # for who asks more of the trained policy; None where nobody samples

    def train(self) -> None:
        """Run to `num_steps` from the newest checkpoint, or from the start policy when there is none.

        Raises StopRequested, having saved, when the run was asked to stop."""
        self.checkpoints.refuse_when_resume_is_off()
        self.resume()
        self.attempts.begin(self.step)
        if self.step >= self.schedule.num_steps and self.world.is_first:
            told = "step %d of %d is reached: nothing is left to do; more by num_steps"
            logger.info(told, self.step, self.schedule.num_steps)
        while self.step < self.schedule.num_steps or self.evaluation_is_due:
            try:
                agree_to_stop(self.world)
                self.evaluate() if self.evaluation_is_due else self.take_step()
            except RefusedStepError as error:  # this and the next are raised on every rank
                self.recover(error)
            # the engine may be lost, or a function of the user's own fail, what was trained is not
            except (StopRequested, RolloutError, ReshardError, OwnCodeError):
                self.save()
                raise
        self.stability.refuse_to_end()
        self.save()
        self.recorder.close()

    def take_step(self) -> None:
        """One step: roll out, assemble, update, publish."""
        with self.timers.phase("rollout"):
            groups = self.collect(self.sample)
        with self.timers.phase("assemble"):
            blocks, batches = self.assemble(groups)
        with self.timers.phase("update"):
            self.rest()
            updates = [self.learn(b, self.update, self.step) for b in self.reread(batches, self.policy)]
        self.step += 1
        with self.timers.phase("publish"):
            together(self.world, self.sampling.settle)  # a server may be another rank's, too
            self.publisher.publish(self.policy, self.engine, self.step)
        self.record(groups, blocks, batches, mean_of(updates))
        self.side_work(groups, blocks)

    def assemble(self, groups: Groups) -> tuple[Texts, Sequence[Batch]]:
        """What the teacher is shown of all groups, each rank seeing to some, and what this rank reads of them."""
        earned = each(self.world, lambda: self.advantages(groups))
        numbers = range(len(groups))
        taught = shared_out(self.world, numbers, lambda own: self.teach(groups, earned, self.step, own))
        texts, prompts = ([one.texts for one in taught], [one.prompts for one in taught])
        return texts, each(self.world, lambda: self.pack(self.to_samples(groups, earned, prompts)))

    def update(self, batch: Batch) -> UpdateResult:
        """One optimiser step."""
        # one pass; three on a step that measures the gradient ratio
        for weights in self.alpha.passes(self.step):
            with self.work.on("update", len(batch.microbatches), "microbatches") as task:
                for microbatch in batch:
                    agree_to_stop(self.world, now=batch.is_first)
                    self.policy.accumulate(microbatch, batch.totals, weights)
                    task.add(done=1, tokens=microbatch.num_tokens)
            self.alpha.observe(self.policy)
        update = self.policy.step(self.stability.norm_limit())
        self.stability.taken(self.step, update.grad_norm)
        return update

    def sample(self, round_number: int) -> list[RolloutGroup]:
        """Every rank samples and scores its share; all get all groups, in question order, or one's error."""
        parts = together(self.world, lambda: self.score(self.sampling.take(self.step, round_number)))
        return [group for part in parts for group in part]

    def record(self, groups: Groups, blocks: Texts, batches: Sequence[Batch], update: UpdateResult) -> None:
        """One line of metrics for the step that just ended."""
        metrics = rollout_metrics(groups) | lag_metrics(groups, self.step - 1)
        figures = shared_out(self.world, list(zip(groups, blocks, strict=True)), block_figures)
        metrics |= block_metrics(figures)
        metrics |= self.collect.metrics() | update.scalars | packing_metrics(batches) | self.alpha.metrics()
        metrics |= self.publisher.metrics() | self.timers.metrics() | memory_metrics()
        self.recorder.record(self.step, metrics)

    def side_work(self, groups: Groups, blocks: Texts) -> None:
        """What is due after this step: transcripts, a checkpoint, and, next in the loop, an evaluation."""
        self.checkpoints.settle(wait=False)
        if self.schedule.due(self.schedule.transcripts_every, self.step):
            self.recorder.transcripts(self.step, groups, blocks)
        self.evaluation_is_due = self.evaluation is not None and self.schedule.evaluation_is_due(self.step)
        is_last = self.step >= self.schedule.num_steps
        if self.schedule.due(self.schedule.checkpoint_every, self.step) and not is_last:
            self.save(wait=False)

    def evaluate(self) -> None:
        """What the policy does on what is held out: metrics named eval/..."""
        self.world.pulse.move("evaluate")
        self.recorder.record(self.step, self.evaluation(self.step))
        self.evaluation_is_due = False

    def recover(self, error: RefusedStepError) -> None:
        """The step was refused: go back to the last checkpoint, or pass its questions over, or give up and
        raise."""
        goes_back = self.stability.refused(self.step, error) and self.checkpoints.newest_step() is not None
        together(self.world, self.sampling.settle)
        if goes_back:
            self.recorder.close()
            self.resume()
        else:
            self.step += 1
            self.publisher.publish(self.policy, self.engine, self.step)
            self.recorder.record(self.step, {"optim/refused_steps": 1.0})
        outcome = f"back to step {self.step}" if goes_back else "its questions are passed over"
        if self.world.is_first:
            logger.warning("%s; %s", error, outcome)

    def save(self, *, wait: bool = True) -> None:
        """Commit a checkpoint of this step; without `wait`, perhaps later (checkpoint.background)."""
        self.world.pulse.move("save")
        state = {"alpha": self.alpha.state(), "stability": self.stability.state()}
        state |= {"evaluation_is_due": self.evaluation_is_due, "sampling": self.sampling.state(self.step)}
        self.checkpoints.save(self.policy, step=self.step, state=state, wait=wait)

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if any, and give the engine its weights."""
        self.world.pulse.move("resume")
        state = self.checkpoints.load(self.policy)
        if state is not None:
            self.step, self.evaluation_is_due = state["step"], state["evaluation_is_due"]
            self.alpha.load_state(state["alpha"])
            self.stability.load_state(state["stability"])
            together(self.world, lambda: self.sampling.load_state(state.get("sampling", {}), self.step))
        self.recorder.begin(self.step, self.checkpoints.plan_changes)
        self.publisher.publish(self.policy, self.engine, self.step)
