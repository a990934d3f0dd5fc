"""The composition root of `sd-search sft`: the trainer of trainer.py with stored episodes in the place of
sampled rollouts."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sd.algorithm.advantages.table import ADVANTAGES
from megatron_sd.algorithm.assemble import own_batches, teach_nothing
from megatron_sd.algorithm.samples import SCOPES, to_samples
from megatron_sd.building.policy import build_policy
from megatron_sd.building.rollout_side import RolloutSide, build_rollout_side
from megatron_sd.building.trainer import (
    check_run_dir,
    choose_publisher,
    greedy_evaluation,
    recorder_of,
    schedule_of,
)
from megatron_sd.config import Config
from megatron_sd.config.checks import engine_reads_policy
from megatron_sd.distributed.collectives import each, share
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.world import World
from megatron_sd.errors import DataError
from megatron_sd.observability.progress import Work
from megatron_sd.observability.timers import Timers
from megatron_sd.records import RolloutGroup
from megatron_sd.rollout.collecting import Collecting
from megatron_sd.rollout.sampling_order import InStep, Sample
from megatron_sd.rollout.stored import EPISODES_NAME, StoredGroups, check_tokenizer, read_record
from megatron_sd.search.questions import QuestionStream
from megatron_sd.search.tokens import TextCodec, load_codec
from megatron_sd.sft_config import SftConfig, evaluation_config
from megatron_sd.trainer import Schedule, Trainer
from megatron_sd.training.critic.critic import policy_alone
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import NoPublisher, Publisher, SparePublisher
from megatron_sd.training.safety.stability import Stability
from megatron_sd.training.safety.starts import ATTEMPTS_NAME, Attempts
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController

logger = logging.getLogger(__name__)

Groups = Sequence[RolloutGroup]
Measure = Callable[[int], dict[str, float]]  # metrics named eval/..., by step; every rank calls it


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured before the first step, every `every` steps (0: none of these) and after the last."""

    every: int
    num_steps: int
    measure: Measure

    def is_due(self, step: int) -> bool:
        """True at such a step."""
        return step in (0, self.num_steps) or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """The parts of a trainer that sample for its evaluation."""

    publisher: Publisher[Any]
    evaluation: Evaluation | None


def build_sft_trainer(config: Config, own: SftConfig, world: World) -> Trainer:
    """The trainer of own.episodes, and the engine of own.eval where it is set; config: of
    sft_config.training_config. Raises ConfigError, and DataError for episodes that are none, or whose ids
    another tokenizer made."""
    parallel = Parallel.of(config.update, world)
    run_dir, directory = check_run_dir(config), Path(own.episodes)
    codec = load_codec(config.model.path)
    record = _checked_record(own, directory, codec, world)
    stored = _stored(config, world)
    side = None if own.eval is None else _rollout_side(evaluation_config(own, config), world)
    policy = build_policy(config, parallel)
    sampling = _sampling(config, own, policy, side)
    possible = (_validation(config, parallel, policy), sampling.evaluation)
    evaluations = [evaluation for evaluation in possible if evaluation is not None]
    return Trainer(
        schedule=_schedule(config, evaluations),
        world=world,
        evaluation=functools.partial(measured, evaluations) if evaluations else None,
        sampling=InStep(stored),
        collect=Collecting(config.rollout),
        score=list,  # what an episode earned was stored with it
        advantages=functools.partial(ADVANTAGES[config.advantage.estimator], config=config.advantage),
        teach=teach_nothing,
        to_samples=functools.partial(to_samples, scope=SCOPES[config.distill.scope]),
        pack=functools.partial(
            own_batches,
            config=config.update,
            aggregation=config.policy_loss.aggregation,
            distill_aggregation=config.distill.aggregation,
            layout=config.layout,
            place=parallel.batch,
        ),
        reread=lambda batches, policy: batches,  # nothing is known of episodes but what was stored
        learn=policy_alone,
        alpha=AlphaController(config.distill, config.policy_loss.weight),
        policy=policy,
        publisher=sampling.publisher,
        engine=None if side is None else side.engine,
        checkpoints=Checkpoints(
            run_dir / "checkpoints", config, world, corpus_version=record["corpus_version"]
        ),
        recorder=recorder_of(config, world, codec),
        timers=Timers(world.pulse.move),
        work=Work(sys.stderr if world.is_first else None) if side is None else side.work,
        rollouter=None if side is None else side.rollouter,
        stability=Stability(config.safety),
        attempts=Attempts(run_dir / ATTEMPTS_NAME, world, limit=config.safety.max_idle_attempts),
        evaluation_is_due=bool(evaluations),  # what the start policy makes of what is held out
    )


def other_keys(own: SftConfig, record: Mapping[str, Any]) -> list[str]:
    """Keys of the evaluation's protocol that have another value in the episodes' (record: episodes.json)."""
    if own.eval is None:
        return []
    now = json.loads(json.dumps(dataclasses.asdict(own.protocol)))
    return [name for name, value in now.items() if record["protocol"].get(name) != value]


def measured(evaluations: Sequence[Evaluation], step: int) -> dict[str, float]:
    """The metrics of the evaluations that are due at this step. Collective."""
    due = [evaluation.measure(step) for evaluation in evaluations if evaluation.is_due(step)]
    return {name: value for metrics in due for name, value in metrics.items()}


def _schedule(config: Config, evaluations: Sequence[Evaluation]) -> Schedule:
    every = tuple(own.every for own in evaluations)
    return dataclasses.replace(schedule_of(config), eval_every=every, evaluates_at_end=bool(evaluations))


def _rollout_side(evaluating: Config, world: World) -> RolloutSide:
    return build_rollout_side(
        evaluating.model,
        evaluating.protocol,
        evaluating.rollout,
        evaluating.retriever,
        seed=evaluating.seed,
        output=Path(evaluating.run_dir),
        world=world,
        on_demand=engine_reads_policy(evaluating, world.size),
    )


def _sampling(config: Config, own: SftConfig, policy: Policy, side: RolloutSide | None) -> _Sampling:
    """The trainer's own evaluation, and a publisher that gives the engine weights before it alone."""
    if own.eval is None or side is None:
        return _Sampling(publisher=NoPublisher(), evaluation=None)
    evaluating = evaluation_config(own, config)
    evaluation = Evaluation(
        every=own.eval.every,
        num_steps=config.num_steps,
        measure=greedy_evaluation(evaluating, policy.world, side),
    )
    publisher = choose_publisher(policy, evaluating, side.engine)
    return _Sampling(publisher=SparePublisher(publisher, evaluation.is_due), evaluation=evaluation)


def _checked_record(own: SftConfig, directory: Path, codec: TextCodec, world: World) -> Mapping[str, Any]:
    """What the episodes say of themselves. Raises DataError for those of another tokenizer."""
    record = read_record(directory / EPISODES_NAME, "sd-search select")
    check_tokenizer(codec.fingerprint, record, directory)
    if world.is_first and (keys := other_keys(own, record)):
        logger.warning(
            "eval: protocol.%s differs from that of the episodes, so its figures are of a form that is not "
            "trained; give the episodes' protocol (%s) unless this is on purpose",
            ", .".join(keys),
            directory / EPISODES_NAME,
        )
    return record


def _stored(config: Config, world: World) -> Sample:
    """This rank's episodes of a step."""
    path = Path(config.data.train)
    episodes = StoredGroups(path)
    if not len(episodes):
        raise DataError(f"{path} holds no episode, expected some that `sd-search select` wrote")
    stream = QuestionStream(
        questions=episodes,
        batch_size=config.rollout.questions_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    return lambda step, _round: list(share(world, stream.batch(step)))


def _validation(config: Config, parallel: Parallel, policy: Policy) -> Evaluation | None:
    """Nats a sampled token on the held-out episodes; None without any."""
    episodes = StoredGroups(Path(config.data.eval))
    held_out = [episodes[place] for place in range(min(len(episodes), config.data.max_eval_questions))]
    if not held_out or config.log.eval_every == 0:
        return None
    samples = to_samples(
        held_out,
        ADVANTAGES[config.advantage.estimator](held_out, config.advantage),
        [[()] * len(group.rollouts) for group in held_out],
        scope=SCOPES[config.distill.scope],
    )
    pack = functools.partial(
        own_batches, config=config.update, aggregation="token", layout=config.layout, place=parallel.batch
    )
    (batch,) = each(policy.world, lambda: pack(samples))  # a rank looks at its own episodes alone
    return Evaluation(
        every=config.log.eval_every,
        num_steps=config.num_steps,
        measure=lambda step: {"eval/loss_nats": policy.loss_of(batch)},
    )
