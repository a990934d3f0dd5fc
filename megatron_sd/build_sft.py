"""The composition root of `sd-search sft`: the trainer of build.py with stored episodes in the place of sampled rollouts."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sd.algorithm.advantage import ADVANTAGES
from megatron_sd.algorithm.blocks import BLOCKS
from megatron_sd.algorithm.hindsight import RENDERERS, Blocks, HindsightBlocks
from megatron_sd.algorithm.samples import SCOPES, TeacherPrompts, to_samples
from megatron_sd.build import check_run_dir, own_batch, recorder_of, schedule_of
from megatron_sd.config import Config
from megatron_sd.distributed.collectives import share
from megatron_sd.distributed.world import World
from megatron_sd.errors import DataError
from megatron_sd.observability.progress import Work
from megatron_sd.observability.timers import Timers
from megatron_sd.records import RolloutGroup
from megatron_sd.rollout.sampling_order import InStep
from megatron_sd.rollout.stored import EPISODES_NAME, StoredGroups, check_tokenizer, read_record
from megatron_sd.search.questions import QuestionStream
from megatron_sd.search.tokens import load_codec
from megatron_sd.trainer import Trainer
from megatron_sd.training.parallel.sequence import sequence_group
from megatron_sd.training.parallel.tensor import tensor_group
from megatron_sd.training.policy import Policy, load_policy
from megatron_sd.training.publisher import NoPublisher
from megatron_sd.training.safety.stability import Stability
from megatron_sd.training.safety.starts import ATTEMPTS_NAME, Attempts
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController

Groups = Sequence[RolloutGroup]


def build_sft_trainer(config: Config, directory: Path, world: World) -> Trainer:
    """The trainer of episodes in `directory`; config: of sft.training_config. Raises ConfigError, and DataError for episodes that
    are none, or whose ids another tokenizer made."""
    for group in (sequence_group, tensor_group):
        group(config.update, world)  # raises at once when the ranks do not divide into groups
    run_dir = check_run_dir(config)
    codec = load_codec(config.model.path, chat_template=False)
    record = read_record(directory / EPISODES_NAME, "sd-search select")
    check_tokenizer(codec.fingerprint, record, directory)
    stored = _stored(config, world)
    policy = load_policy(config, world)
    validation = _validation(config, world, policy)
    return Trainer(
        schedule=dataclasses.replace(schedule_of(config), evaluates_at_end=True),
        world=world,
        evaluation=validation,
        sampling=InStep(stored),
        score=list,  # what an episode earned was stored with it
        advantages=ADVANTAGES[config.policy_loss.advantage],
        hindsight=HindsightBlocks(
            first_step=0,
            build=BLOCKS["none"],
            render=RENDERERS[config.distill.block_format],
            correct_above=config.distill.correct_above,
            seed=config.seed,
        ),
        teacher_prompts=_no_teacher,
        to_samples=functools.partial(to_samples, scope=SCOPES[config.distill.scope]),
        pack=functools.partial(own_batch, config, world),
        alpha=AlphaController(config.distill),
        policy=policy,
        publisher=NoPublisher(),
        engine=None,
        checkpoints=Checkpoints(run_dir / "checkpoints", config, world, corpus_version=record["corpus_version"]),
        recorder=recorder_of(config, world, codec),
        timers=Timers(world.pulse.move),
        work=Work(sys.stderr if world.is_first else None),
        stability=Stability(config.safety),
        attempts=Attempts(run_dir / ATTEMPTS_NAME, world, limit=config.safety.max_idle_attempts),
        evaluation_is_due=validation is not None,  # what the start policy makes of what is held out
    )


def _stored(config: Config, world: World) -> Callable[[int], list[RolloutGroup]]:
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
    return lambda step: list(share(world, stream.batch(step)))


def _no_teacher(groups: Groups, _blocks: Blocks) -> TeacherPrompts:
    return [[()] * len(group.rollouts) for group in groups]


def _validation(config: Config, world: World, policy: Policy) -> Callable[[int], dict[str, float]] | None:
    """Nats a sampled token on the held-out episodes; None without any."""
    episodes = StoredGroups(Path(config.data.eval))
    held_out = [episodes[place] for place in range(min(len(episodes), config.data.max_eval_questions))]
    if not held_out or config.log.eval_every == 0:
        return None
    samples = to_samples(
        held_out,
        [ADVANTAGES[config.policy_loss.advantage](group) for group in held_out],
        _no_teacher(held_out, ()),
        scope=SCOPES[config.distill.scope],
    )
    by_token = dataclasses.replace(config.policy_loss, aggregation="token")
    batch = own_batch(dataclasses.replace(config, policy_loss=by_token), world, samples)
    return lambda step: {"eval/loss_nats": policy.loss_of(batch)}
