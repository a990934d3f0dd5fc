"""The composition root: the trainer of a run. Configuration in, objects out; nothing runs here."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.advantages.table import ESTIMATOR_SEAM, gradient_test
from megatron_sd.algorithm.assemble import own_batches, teach
from megatron_sd.algorithm.blocks import BLOCK_SEAM, BY_TURN, PLAIN
from megatron_sd.algorithm.evidence import Teach, teach_by_evidence
from megatron_sd.algorithm.hindsight import RENDERERS, HindsightBlocks
from megatron_sd.algorithm.refinements import refinements
from megatron_sd.algorithm.samples import GATE_SEAM, SCOPES, to_samples
from megatron_sd.building.policy import build_critic, build_policy, check_same_tokens
from megatron_sd.building.rollout_side import Engine, RolloutSide, build_rollout_side
from megatron_sd.config import (
    AdvantageConfig,
    Config,
    DistillConfig,
)
from megatron_sd.config.checks import engine_reads_policy, engine_rests, settings_of_hops
from megatron_sd.config.load import dump
from megatron_sd.distributed.collectives import shared_out
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.watchdog import Watchdog
from megatron_sd.distributed.world import World
from megatron_sd.errors import ConfigError
from megatron_sd.observability.metrics import rollout_metrics
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.sinks.packages import check_packages
from megatron_sd.observability.timers import Timers
from megatron_sd.records import Batch, Question, RolloutGroup, TrainingSample
from megatron_sd.rollout.bank import RolloutBank
from megatron_sd.rollout.carrying import CarriedOver
from megatron_sd.rollout.collecting import Collecting
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.pausable import PausableEngine
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.sampling_order import InStep, OneAhead, OwnShare, SamplingOrder
from megatron_sd.search.questions import (
    MixedStream,
    QuestionStream,
    check_hops,
    load_questions,
    training_stream,
)
from megatron_sd.search.rewards.reward import own_scores, score
from megatron_sd.search.tokens import TextCodec
from megatron_sd.trainer import Schedule, Trainer
from megatron_sd.training.critic.critic import Critic, policy_alone
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import (
    GatherPublisher,
    InPlacePublisher,
    Publisher,
    sharded_or_gathering,
)
from megatron_sd.training.rereading import reread
from megatron_sd.training.safety.stability import Stability
from megatron_sd.training.safety.starts import ATTEMPTS_NAME, Attempts
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.state.identity import contents_of, run_identity
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController


def build_trainer(config: Config, world: World) -> Trainer:
    """The trainer of a run. Raises ConfigError or DataError before anything is trained."""
    parallel = Parallel.of(config.update, world)
    run_dir = check_run_dir(config)
    # functions of the user's own are tried before a model is loaded
    hindsight = hindsight_of(config.distill, config.seed)
    gate, advantages = GATE_SEAM.choose(config.distill.gate), estimator_of(config.advantage)
    own_scores(config.reward)
    parts = config.model, config.protocol, config.rollout, config.retriever
    shares = engine_reads_policy(config, world.size)
    side = build_rollout_side(*parts, seed=config.seed, output=run_dir, world=world, on_demand=shares)
    questions = training_stream(config.data, batch_size=config.rollout.questions_per_step, seed=config.seed)
    check_hops(questions, settings_of_hops(config))
    check_same_tokens(config, side.environment.codec)
    critic, has_gradient = build_critic(config, parallel), gradient_test(config.advantage.estimator)
    policy = build_policy(config, parallel, critic)
    publisher = choose_publisher(policy, config, side.engine)
    return Trainer(
        schedule=schedule_of(config),
        world=world,
        evaluation=_evaluation(config, world, side),
        rollouter=side.rollouter,
        sampling=_sampling_order(config, world, questions, side),
        collect=Collecting(config.rollout),
        score=functools.partial(score, config=config.reward),
        advantages=advantages,
        teach=teaching_of(
            config.distill,
            functools.partial(
                teach,
                hindsight=hindsight,
                prompt_ids=side.environment.prompt_ids,
                gate=gate,
                has_gradient=has_gradient,
            ),
            side.rollouter,
        ),
        to_samples=functools.partial(
            to_samples, scope=SCOPES[config.distill.scope], has_gradient=has_gradient
        ),
        pack=packing_of(config, parallel),
        reread=reading_of(config, critic),
        learn=policy_alone if critic is None else critic.learn,
        alpha=AlphaController(config.distill, config.policy_loss.weight),
        policy=policy,
        publisher=publisher,
        engine=side.engine,
        checkpoints=Checkpoints(
            run_dir / "checkpoints", config, world, corpus_version=side.retriever.corpus_version
        ),
        recorder=recorder_of(config, world, side.environment.codec),
        timers=Timers(world.pulse.move),
        work=side.work,
        stability=Stability(config.safety),
        rest=side.engine.rest if engine_rests(config, world.size) else lambda: None,
        attempts=Attempts(run_dir / ATTEMPTS_NAME, world, limit=config.safety.max_idle_attempts),
    )


def estimator_of(config: AdvantageConfig) -> Callable[[Sequence[RolloutGroup]], list[GroupAdvantages]]:
    """From a step's scored groups to a number for each turn."""
    estimator = ESTIMATOR_SEAM.choose(config.estimator)
    return lambda groups: estimator(groups, config)


def teaching_of(distill: DistillConfig, show: Teach, rollouter: Rollouter) -> Teach:
    """What the teacher is shown of groups; show: of those that distil."""
    if distill.queries == "all":
        return show
    return functools.partial(
        teach_by_evidence, teach=show, scope=SCOPES[distill.scope], ask=rollouter.search_again
    )


def packing_of(config: Config, parallel: Parallel) -> Callable[[Sequence[TrainingSample]], list[Batch]]:
    """From a step's samples to this rank's part of each optimiser step."""
    return functools.partial(
        own_batches,
        config=config.update,
        aggregation=config.policy_loss.aggregation,
        most_tokens=config.rollout.most_sampled_tokens,
        distill_aggregation=config.distill.aggregation,
        layout=config.layout,
        place=parallel.batch,
    )


def reading_of(config: Config, critic: Critic | None) -> Callable[[Sequence[Batch], Policy], Sequence[Batch]]:
    """What is read before a step's first update."""
    return functools.partial(
        reread,
        refinements=refinements(config.policy_loss, config.advantage, config.update, config.critic),
        with_teacher=config.advantage.modulation != "none",
        critic=critic,
        epochs=config.update.epochs,
    )


def hindsight_of(distill: DistillConfig, seed: int) -> HindsightBlocks:
    """What the teacher is shown of a group."""
    return HindsightBlocks(
        first_step=distill.alpha.warmup_steps,
        build=BLOCK_SEAM.choose(distill.block),
        render=RENDERERS[distill.block_format],
        correct_above=distill.correct_above,
        seed=seed,
        by_turn=distill.block in BY_TURN,
        plain=distill.block in PLAIN,
    )


def check_run_dir(config: Config) -> Path:
    """Where the run writes. Raises ConfigError for a file, and for a sink whose package is not installed."""
    check_packages(config.log.sinks)
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(
            f"run_dir: found a file at {run_dir}, expected a directory of this run, or a new one"
        )
    return run_dir


def schedule_of(config: Config) -> Schedule:
    """When the loop ends and when side work is due."""
    return Schedule(
        num_steps=config.num_steps,
        eval_every=(config.log.eval_every,),
        transcripts_every=config.log.transcripts_every,
        checkpoint_every=config.checkpoint.every,
    )


def recorder_of(config: Config, world: World, codec: TextCodec) -> Recorder:
    """What the run writes about itself, on the first rank."""
    return Recorder(
        config.run_dir,
        enabled=world.is_first,
        num_steps=config.num_steps,
        config_text=dump(config),
        decode=codec.decode,
        log=config.log,
    )


def build_watchdog(config: Config, world: World) -> Watchdog:
    """What ends a stuck run."""
    return Watchdog(world, timeout_s=config.safety.watchdog_s, directory=Path(config.run_dir) / "watchdog")


def _sampling_order(
    config: Config, world: World, questions: QuestionStream | MixedStream, side: RolloutSide
) -> SamplingOrder:
    identity = json.dumps(
        run_identity(config, side.retriever.corpus_version) | contents_of(config), sort_keys=True
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()
    mode = config.rollout.bank
    only_whole = mode == "whole" or (mode == "auto" and isinstance(side.engine, TorchEngine))
    bank = RolloutBank(
        Path(config.run_dir) / "bank",
        rank=world.rank,
        identity=digest,
        only_whole=only_whole,
        keep_steps=config.checkpoint.keep,
    )
    kept_in = None if mode == "off" else bank
    if config.rollout.max_lag > 1:
        engine = PausableEngine(side.engine, width=config.rollout.max_concurrent_sequences)
        return CarriedOver(
            world=world,
            questions=questions,
            rollouter=side.rollouter.on(engine),
            engine=engine,
            bank=kept_in,
            num_steps=config.num_steps,
            config=config.rollout,
            work=side.work,
        )
    sample = OwnShare(
        world=world,
        questions=questions,
        rollouter=side.rollouter,
        bank=kept_in,
        question_batches=config.rollout.question_batches,
    )
    if config.rollout.max_lag == 0:
        return InStep(sample)
    return OneAhead(sample, num_steps=config.num_steps, device=world.device)


def choose_publisher(policy: Policy, config: Config, engine: Engine) -> Publisher[Any]:
    """Shards straight into vLLM's workers; whole parameters into the embedded engine, below ZeRO stage 3,
    or when asked for; none where the embedded engine reads the policy's own."""
    if engine_reads_policy(config, policy.world.size):
        return InPlacePublisher()
    own, stage = config.rollout.vllm, config.update.zero_stage
    if isinstance(engine, TorchEngine) or not own.publishes_shards or stage != 3:
        return GatherPublisher()
    return sharded_or_gathering(
        policy,
        config.publish,
        dtype=config.model.dtype,
        tp_size=own.tensor_parallel_size,
        num_replicas=engine.num_replicas,
    )


def _evaluation(config: Config, world: World, side: RolloutSide) -> Callable[[int], dict[str, float]] | None:
    is_off = config.data.eval is None or config.log.eval_every == 0
    return None if is_off else greedy_evaluation(config, world, side)


def greedy_evaluation(config: Config, world: World, side: RolloutSide) -> Callable[[int], dict[str, float]]:
    """Metrics, named eval/..., of greedy rollouts on the questions of data.eval, which all ranks share.
    Raises DataError for questions that are none."""
    questions = load_questions(config.data.eval, config.data.eval_split, config.data.max_eval_questions)

    def answer(mine: Sequence[Question], step: int) -> list[RolloutGroup]:
        return score(side.rollouter.run(mine, step=step, greedy=True), config.reward)

    def evaluate(step: int) -> dict[str, float]:
        groups = shared_out(world, questions, lambda mine: answer(mine, step))
        return {f"eval/{name}": value for name, value in rollout_metrics(groups).items()}

    return evaluate
