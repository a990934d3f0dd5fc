"""What one training rank holds in memory, component by component: arithmetic on the sizes of model, layout
and configuration.

The activations are counted from what autograd keeps of a decoder layer of the Llama kind; states and
buffers from what DeepSpeed allocates. tests/launch/test_plan.py compares both with what small models really
take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.planner.models import model_config
from megatron_sd.algorithm.advantages.table import FROM_VALUES
from megatron_sd.config import Config
from megatron_sd.config.checks import engine_reads_policy, engine_rests
from megatron_sd.ops.head.one_pass import BLOCK_ELEMENTS
from megatron_sd.resharding.connection import OPEN_MEMORY
from megatron_sd.resharding.names import DecoderSizes, model_shape
from megatron_sd.resharding.plan import ITEM_BYTES
from megatron_sd.training.deepspeed_config import (
    SUB_GROUP_ELEMENTS,
    CommunicationSizes,
)

# the moments of a step that can be the worst
Phase = Literal["rollout", "head", "backward", "reduce", "step"]
Place = Literal["device", "host"]
PHASES: tuple[Phase, ...] = ("rollout", "head", "backward", "reduce", "step")
GIB = 2**30
RESERVED_GIB = 4.0  # CUDA's context, NCCL's buffers, and what the allocator cannot use
STEP_COPIES = 1  # float32, of the elements being stepped over: the gradient, put together; AdamW is fused
# of the embedding: the gradients of head and embedding, their sum, and what the reduction packs and gets
REDUCE_COPIES = 5
BLOCK_COPIES = 4  # float32, of the logits being worked on


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one component of one rank, and when it is there; no phase: always. where: on the device, or
    in host memory."""

    name: str
    num_bytes: float
    phases: tuple[Phase, ...] = ()
    where: Place = "device"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of a model, in elements."""

    layer: int
    num_layers: int
    embedding: int  # of one of the two, tied or not
    total: int

    @classmethod
    def of(cls, shape: DecoderSizes) -> Sizes:
        """Counted from the shape."""
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        biases = shape.qkv_bias * (queries + 2 * keys) + (shape.out_bias + shape.mlp_bias) * shape.hidden
        biases += shape.mlp_bias * 2 * shape.intermediate + shape.qk_norm * 2 * shape.head_dim
        layer = shape.hidden * (2 * queries + 2 * keys + 3 * shape.intermediate + 2) + biases
        embedding = shape.vocabulary * shape.hidden
        total = shape.num_layers * layer + embedding * (1 if shape.tied else 2) + shape.hidden
        return cls(layer=layer, num_layers=shape.num_layers, embedding=embedding, total=total)


def rank_memory(
    shape: DecoderSizes, config: Config, *, world_size: int, on_gpu: bool = True
) -> tuple[Part, ...]:
    """The parts of one rank, with a full microbatch of update.max_microbatch_tokens student positions."""
    update = _update(shape, config, world_size=world_size, on_gpu=on_gpu)
    states = _states(shape, config, world_size, on_gpu=on_gpu)
    held = _held_by_workers(shape, config, world_size, on_gpu=on_gpu)
    return (*states, *update, *_rollout(shape, config, world_size), *held)


def peak(parts: Sequence[Part], where: Place = "device") -> tuple[float, Phase]:
    """Bytes at the worst moment, and which that is."""
    own = [part for part in parts if part.where == where]
    sums = {
        phase: sum(part.num_bytes for part in own if not part.phases or phase in part.phases)
        for phase in PHASES
    }
    worst = max(PHASES, key=lambda phase: sums[phase])
    return sums[worst], worst


def checkpoint_bytes(shape: DecoderSizes, config: Config) -> float:
    """Of one checkpoint on disk: float32 masters and two moments of what is trained, a critic too, and the
    whole model."""
    total = Sizes.of(shape).total
    trained = (adapter_elements(shape, config) or total) + critic_elements(shape, config)
    return 12 * trained + ITEM_BYTES[config.model.dtype] * total


def saved_bytes_per_token(shape: DecoderSizes, item_bytes: int) -> int:
    """What autograd keeps of one decoder layer for each token: two norms (their input in float32, scale,
    and two results), attention (queries, keys, values, result, log-sums), and the MLP's gate, its
    activation, up and their product."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 2 * ((4 + 2 * item_bytes) * shape.hidden + 4)
    attention = item_bytes * 2 * (queries + keys) + 4 * shape.num_heads
    return norms + attention + 4 * item_bytes * shape.intermediate


def kv_bytes_per_token(shape: DecoderSizes, item_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item_bytes


def _communication(sizes: Sizes, *, on_gpu: bool) -> CommunicationSizes:
    return CommunicationSizes.of(sizes.layer, "cuda" if on_gpu else "cpu")


def _states(shape: DecoderSizes, config: Config, world_size: int, *, on_gpu: bool) -> list[Part]:
    sizes, item, stage = Sizes.of(shape), ITEM_BYTES[config.model.dtype], config.update.zero_stage
    adapters = adapter_elements(shape, config)
    all_trained = adapters or sizes.total
    bucket = _communication(sizes, on_gpu=on_gpu).reduce_bucket
    trained = math.ceil(all_trained / world_size) if stage else all_trained
    held = math.ceil((sizes.total + adapters) / world_size) if stage == 3 else sizes.total + adapters
    update = config.update
    stepped: Place = "device" if update.offload_optimizer == "none" else "host"
    kept: Place = "device" if update.offload_parameters == "none" else "host"
    largest = (
        trained
        if stage != 3
        else max(SUB_GROUP_ELEMENTS, 0 if adapters else math.ceil(sizes.embedding / world_size))
    )
    at_once = 4 * STEP_COPIES * min(trained, largest)
    has_masters = stage in (1, 2) or (stage == 3 and (item != 4 or stepped != kept))
    parts = [
        Part(name="parameters", num_bytes=item * held, where=kept),
        Part(name="float32 masters", num_bytes=4 * trained if has_masters else 0, where=stepped),
        Part(name="AdamW's moments", num_bytes=8 * trained, where=stepped),
        Part(name="gradients", num_bytes=4 * (trained if stage >= 2 else all_trained)),
        Part(
            name="reduce bucket",
            num_bytes=item * min(bucket, all_trained) if stage else 0,
        ),
        Part(name="optimiser step", num_bytes=at_once, phases=("step",), where=stepped),
    ]
    if config.checkpoint.background:
        copied = math.ceil(checkpoint_bytes(shape, config) / world_size)
        parts.append(Part(name="checkpoint being written", num_bytes=copied, where="host"))
    if config.policy_loss.kl_weight > 0.0:
        own = math.ceil(sizes.total / world_size) if stage == 3 else sizes.total
        parts.append(Part(name="start policy", num_bytes=item * own, where=kept))
    return [*parts, *_teacher(shape, config, world_size), *_critic(shape, config, world_size, on_gpu=on_gpu)]


def _teacher(shape: DecoderSizes, config: Config, world_size: int) -> list[Part]:
    """A teacher with weights of its own, and the float32 average that one of them is."""
    if not has_own_teacher(config):
        return []
    sizes, sharded = teacher_sizes(shape, config), config.update.zero_stage == 3
    own = math.ceil(sizes.total / world_size) if sharded else sizes.total
    average = 4 * own if config.distill.teacher == "ema" else 0
    return [
        Part(name="teacher", num_bytes=ITEM_BYTES[config.model.dtype] * own),
        Part(name="teacher: float32 average", num_bytes=average),
    ]


def _critic(shape: DecoderSizes, config: Config, world_size: int, *, on_gpu: bool) -> list[Part]:
    """PPO's critic: a second whole model with its own gradients and optimiser, sharded as the policy, all of
    it trained. It works while the policy rests, so what is there for a moment is counted once."""
    total, item, update = critic_elements(shape, config), ITEM_BYTES[config.model.dtype], config.update
    if not total:
        return []
    bucket = _communication(Sizes.of(shape), on_gpu=on_gpu).reduce_bucket
    own = math.ceil(total / world_size)
    trained = own if update.zero_stage else total
    stepped: Place = "device" if update.offload_optimizer == "none" else "host"
    kept: Place = "device" if update.offload_parameters == "none" else "host"
    has_masters = update.zero_stage in (1, 2) or (update.zero_stage == 3 and (item != 4 or stepped != kept))
    return [
        Part(name="critic", num_bytes=item * (own if update.zero_stage == 3 else total), where=kept),
        Part(name="critic: float32 masters", num_bytes=4 * trained if has_masters else 0, where=stepped),
        Part(name="critic: AdamW's moments", num_bytes=8 * trained, where=stepped),
        Part(name="critic: gradients", num_bytes=4 * (trained if update.zero_stage >= 2 else total)),
        Part(
            name="critic: reduce bucket",
            num_bytes=item * min(bucket, total) if update.zero_stage else 0,
        ),
    ]


def critic_elements(shape: DecoderSizes, config: Config) -> int:
    """Parameters of the critic; 0 without. shape: the policy's. Raises ConfigError or DataError for a
    critic.path that says nothing of its model."""
    if config.advantage.estimator not in FROM_VALUES:
        return 0
    path = config.critic.path
    own = shape if path is None else model_shape(model_config(path))
    sizes = Sizes.of(own)
    head = own.hidden + 1  # in the place of an output embedding
    return sizes.total + head - (0 if own.tied else sizes.embedding)


def has_own_teacher(config: Config) -> bool:
    """The teacher is a second model beside the policy."""
    return config.distill.block != "none" and config.distill.teacher != "live"


def teacher_sizes(shape: DecoderSizes, config: Config) -> Sizes:
    """Of the model that teaches; shape: the policy's. Raises ConfigError or DataError for a teacher_path that
    says nothing of its model."""
    path = config.distill.teacher_path
    return Sizes.of(shape if path is None else model_shape(model_config(path)))


def adapter_elements(shape: DecoderSizes, config: Config) -> int:
    """Parameters of all adapters; 0 without."""
    return (
        config.model.lora.rank * shape.num_layers * sum(ins + outs for ins, outs in _adapted(shape, config))
    )


def adapted_elements(shape: DecoderSizes, config: Config) -> int:
    """Of the weights that have adapters."""
    return shape.num_layers * sum(ins * outs for ins, outs in _adapted(shape, config))


def _adapted(shape: DecoderSizes, config: Config) -> list[tuple[int, int]]:
    """Inputs and outputs of a decoder layer's linear layers that have an adapter."""
    queries, keys, hidden = (
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
        shape.hidden,
    )
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, shape.intermediate),
        "up_proj": (hidden, shape.intermediate),
        "down_proj": (shape.intermediate, hidden),
    }
    lora = config.model.lora
    return [sizes[target] for target in lora.targets if target in sizes] if lora.rank else []


def _update(shape: DecoderSizes, config: Config, *, world_size: int, on_gpu: bool) -> list[Part]:
    sizes, item, sharers = (
        Sizes.of(shape),
        ITEM_BYTES[config.model.dtype],
        config.update.sequence_parallel_size,
    )
    tokens = math.ceil(config.update.microbatch_tokens / sharers)
    # all slices' last hidden states, and a gradient
    joined = 2 * item * tokens * sharers * shape.hidden if sharers > 1 else 0
    layer = saved_bytes_per_token(shape, item)
    trains_head = config.model.lora.rank == 0
    is_kept = not config.model.gradient_checkpointing
    rows = min(config.update.head_chunk_rows, tokens)
    # sums over chunks are float32
    head_gradient = (4 if tokens > config.update.head_chunk_rows else item) * sizes.embedding
    block = min(BLOCK_ELEMENTS["cuda" if on_gpu else "cpu"], rows * shape.vocabulary)
    is_gathered = config.update.zero_stage == 3 and world_size > 1
    ahead = _communication(sizes, on_gpu=on_gpu).prefetch
    gathered = item * min(sizes.total, sizes.embedding + 2 * sizes.layer + ahead) if is_gathered else 0
    busy: tuple[Phase, ...] = ("head", "backward")
    return [
        Part(name="gathered parameters", num_bytes=gathered, phases=(*busy, "reduce")),
        Part(
            name="activations",
            num_bytes=tokens * shape.num_layers * (layer if is_kept else item * shape.hidden),
            phases=busy,
        ),
        Part(name="joined hidden states", num_bytes=joined, phases=busy),
        Part(name="head: gradient", num_bytes=head_gradient if trains_head else 0, phases=busy),
        Part(name="head: logits of a chunk", num_bytes=rows * shape.vocabulary * item, phases=("head",)),
        Part(name="head: float32 blocks", num_bytes=4 * BLOCK_COPIES * block, phases=("head",)),
        Part(
            name="a layer's backward", num_bytes=tokens * layer * (1 if is_kept else 2), phases=("backward",)
        ),
        Part(
            name="embedding's reduction",
            num_bytes=item * REDUCE_COPIES * sizes.embedding if trains_head else 0,
            phases=("reduce",),
        ),
    ]


def _rollout(shape: DecoderSizes, config: Config, world_size: int) -> list[Part]:
    """Of the embedded engine, whose own copy of the weights goes while the rank trains, or of vLLM in the rank,
    which sleeps then; the memory of vLLM's servers is their own (megatron_sd/rollout/vllm/memory.py). Both give
    their keys and values back while the rank trains."""
    item, rollout, total = ITEM_BYTES[config.model.dtype], config.rollout, Sizes.of(shape).total
    own = rollout.vllm
    if rollout.engine == "vllm" and own.placement != "colocated":
        return []
    if rollout.engine == "vllm":
        weights = item * total / own.tensor_parallel_size
        staged = [Part(name="vLLM: staged shard", num_bytes=weights)] if own.publishes_shards else []
        return [
            *staged,
            Part(name="vLLM", num_bytes=weights, phases=("rollout",)),
            Part(
                name="vLLM: keys and values", num_bytes=(own.kv_cache_gib or 0.0) * GIB, phases=("rollout",)
            ),
            Part(name="vLLM, asleep", num_bytes=weights, where="host"),
        ]
    num_rollouts = math.ceil(rollout.questions_per_step * rollout.group_size / world_size)
    rows = min(rollout.max_concurrent_sequences, num_rollouts)
    cache = rows * rollout.max_rollout_tokens * kv_bytes_per_token(shape, item)
    if engine_reads_policy(config, world_size):  # but of weights with adapters, it has merged copies
        total = adapted_elements(shape, config)
    return [
        Part(
            name="embedded engine",
            num_bytes=item * total,
            phases=("rollout",) if engine_rests(config, world_size) else (),
        ),
        Part(name="embedded engine: keys and values", num_bytes=cache, phases=("rollout",)),
    ]


def _held_by_workers(shape: DecoderSizes, config: Config, world_size: int, *, on_gpu: bool) -> list[Part]:
    """The copy of the rank's shard that publish.changes_only compares with, where the buckets are; `auto` is
    taken for the wire between nodes."""
    publish, served = config.publish, config.rollout.engine == "vllm" and config.rollout.vllm.publishes_shards
    by_shards = served and config.update.zero_stage == 3
    if not publish.changes_only or not by_shards or publish.wire in OPEN_MEMORY:
        return []
    item = ITEM_BYTES["float32" if publish.source == "master" else config.model.dtype]
    between_gpus = publish.wire == "nccl" or (publish.wire == "auto" and on_gpu)
    part = Part(
        name="publish: what the workers hold",
        num_bytes=item * math.ceil(Sizes.of(shape).total / world_size),
        where="device" if between_gpus else "host",
    )
    return [part]
