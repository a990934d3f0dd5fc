"""The configuration tree: every default of the project lives here, and nowhere else.

`load(argv)` reads `--config FILE.yaml` and `--section.key value` overrides into a frozen `Config`. A typo, a wrong type, a value
out of range or a missing section is a `ConfigError` that names the key, what was found and what was expected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from megatron_sd.command_line import parse
from megatron_sd.config_checks import check
from megatron_sd.machine import preferred_dtype


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: the model's own weights are frozen, W + alpha / rank * B A is trained, sampled from and saved."""

    rank: int = 0  # 0: the whole model is trained
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: any local Hugging Face causal language model directory (Qwen2, Qwen3, Llama, ...)."""

    path: str  # directory with config.json, tokenizer and safetensors
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what this machine computes fast (machine.py)
    attention: Literal["sdpa", "eager", "varlen", "flash_attention_2"] = "sdpa"  # varlen: for update.pack_sequences on GPUs
    gradient_checkpointing: bool = False  # keep a layer's input only, and compute it once more for the backward
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", preferred_dtype())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions: jsonl, one record a line (`sd-search data import` writes it)."""

    train: str
    eval: str | None = None
    train_split: str | None = None  # keep only records whose `split` equals this
    eval_split: str | None = None
    max_eval_questions: int = 200
    shuffle: bool = True


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a corpus directory is searched, in a run's own process or by `sd-search retriever serve`."""

    method: Literal["auto", "bm25", "dense", "hybrid"] = "auto"  # auto: dense where the corpus has vectors, else bm25
    effort: int | None = None  # HNSW's efSearch, IVF's nprobe; None: as the index was built for
    # Of the query encoder, and of the vectors where FAISS has GPU code. In a training rank: its own GPU; vectors only with cuda.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fusion_depth: int = 100  # hybrid: how many passages of each method are ranked together
    fusion_constant: int = 60  # hybrid: a passage at rank r counts 1 / (constant + r)


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How endpoints are asked. A search that fails for good makes its rollout `retrieval_failed`: no data, and counted."""

    deadline_s: float = 60.0  # of one search, retries included
    try_timeout_s: float = 20.0
    ready_s: float = 600.0  # how long the start of a run waits for a server that is still loading
    first_pause_s: float = 0.2  # pauses between tries are drawn from [0, p), p doubling from here
    max_pause_s: float = 5.0
    gather_s: float = 0.002  # queries asked within this time travel together
    max_request_queries: int = 64
    max_connections: int = 16
    breaker_failures: int = 5  # in a row: the endpoint is left alone
    breaker_open_s: float = 10.0
    cache_size: int = 100_000  # searches whose passages are remembered
    token_file: str | None = None  # a file with the server's secret
    corpus_version: str | None = None  # a name for the corpus of servers that have no /info


@dataclass(frozen=True, kw_only=True)
class QdrantConfig:
    """A Qdrant collection that `sd-search data upload` filled."""

    url: str
    collection: str
    vectors: str  # the vectors directory it was filled from: its encoder reads the queries, its version is the corpus version
    deadline_s: float = 60.0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the query encoder
    token_file: str | None = None  # a file with the server's API key


@dataclass(frozen=True, kw_only=True)
class OpenSearchConfig:
    """An OpenSearch index that `sd-search data upload` filled, searched by BM25 (bm25) or by vectors (knn)."""

    url: str
    index: str
    vectors: str | None = None  # for knn: the vectors directory it was filled from, whose encoder reads the queries
    method: Literal["bm25", "knn"] = "bm25"
    k1: float = 1.5  # of BM25, for upload
    b: float = 0.75
    deadline_s: float = 60.0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the query encoder
    login_file: str | None = None  # a file with USER:PASSWORD
    ca_file: str | None = None  # certificates to believe an https server by; None: the public ones


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """Where passages come from: a corpus directory (`sd-search data index`) in this process, running servers, Qdrant or
    OpenSearch."""

    corpus: str | None = None
    endpoints: tuple[str, ...] = ()  # http://host:port of servers of one corpus, which share the load
    sharded: bool = False  # the endpoints serve different parts of one corpus; each search asks all of them
    qdrant: QdrantConfig | None = None
    opensearch: OpenSearchConfig | None = None
    top_k: int = 3
    search: SearchConfig = field(default_factory=SearchConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The text protocol between policy and environment. `preset` fills every field left at None (search/protocol.py)."""

    preset: Literal["search_r1", "few_shot", "autorefine", "compact"] = "search_r1"
    prompt: str | None = None  # needs {question} and {hindsight}; the student's {hindsight} is empty
    chat_template: bool = False  # wrap the prompt as a user message of the tokenizer's chat template
    template_arguments: dict[str, bool | int | str] = field(default_factory=dict)  # of the template, as {enable_thinking: false}
    search_tags: tuple[str, str] | None = None
    information_tags: tuple[str, str] | None = None
    answer_tags: tuple[str, str] | None = None
    think_tags: tuple[str, str] | None = None
    note_tags: tuple[str, str] | None = None  # a span that may come before the thought, where the preset has one (AutoRefine's)
    passage_format: str | None = None  # fields: {rank} {title} {text}
    invalid_action_message: str | None = None  # appended when a turn neither searches nor answers; empty string: stop instead


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """vLLM as the rollout engine. `placement`: process (servers started and ended by the run, on the ranks' own nodes), server
    (already running, on nodes of their own: `sd-search vllm serve` starts one as a run needs it) or colocated (in the ranks'
    processes and on their GPUs; tensor_parallel_size neighbouring ranks are one engine, which sleeps while they train)."""

    placement: Literal["process", "server", "colocated"] = "process"
    urls: tuple[str, ...] = ()  # of running servers, such as http://node7:8000
    num_replicas: int = 1  # servers that a node of the run starts
    tensor_parallel_size: int = 1
    devices: tuple[int, ...] = ()  # GPUs of the node's servers, tensor_parallel_size for each; empty: those that vLLM sees
    kv_cache_gib: float | None = None  # of each worker; None: what gpu_memory_share leaves beside the weights
    gpu_memory_share: float = 0.85  # of a server's GPU: weights, keys and values, and the copy that a publish of shards stages
    block_tokens: int | None = None  # tokens of a block of the KV cache, the unit of reuse; None: vLLM's choice (16; on CPUs 128)
    threads_per_worker: int = 1  # on CPUs
    # How weights reach the workers. gather: whole tensors through vLLM's loader, as for families without a shard layout; auto:
    # shards for servers, gather for colocated, where a rank and a worker share a GPU.
    publish: Literal["auto", "shards", "gather"] = "auto"
    publish_host: str | None = None  # name under which servers elsewhere reach this node; None: its host name
    start_timeout_s: float = 900.0
    request_timeout_s: float = 600.0  # for one completion, or for one bucket of an update

    @property
    def publishes_shards(self) -> bool:
        """Whether workers get their shards, which they stage, instead of whole tensors."""
        return self.publish == "shards" or (self.publish == "auto" and self.placement != "colocated")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How rollouts are sampled. Token limits count the policy's tokenizer's tokens."""

    questions_per_step: int = 256
    group_size: int = 5
    temperature: float = 1.0
    max_search_turns: int = 4  # one last turn follows, in which a search is not served
    max_turn_tokens: int = 500
    max_observation_tokens: int = 512
    max_query_bytes: int = 4096  # a longer query is cut, with the corpus in process as with servers
    max_rollout_tokens: int = 4096  # prompt, completions and observations
    max_failed_share: float = 0.2  # the run stops when more of a rank's rollouts of a step failed for infrastructure reasons
    # Finished rollouts of an unfinished step wait in run_dir/bank for the run's next start. whole: used only when a rank's part
    # of the step is complete, so that the embedded engine repeats it bit for bit; auto: whole with that engine, else all.
    bank: Literal["auto", "all", "whole", "off"] = "auto"
    max_lag: Literal[0, 1] = 0  # optimiser steps that sampling may be behind: 1 rolls out the next batch during the update
    engine: Literal["torch", "vllm"] = "torch"
    max_concurrent_sequences: int = 256  # in the engine at one time; further rollouts wait
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """reward = answer score (+ format_weight if the rollout's form is valid)."""

    answer: Literal["em", "f1", "sub_em"] = "f1"
    normalization: Literal["search_r1", "strict"] = "search_r1"
    format_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """GRPO. `aggregation`: token (mean over all completion tokens of the step) or rollout (mean of rollout means)."""

    objective: Literal["clipped", "likelihood"] = "clipped"  # algorithm/policy_loss.py; likelihood: of stored rollouts
    advantage: Literal["group", "one"] = "group"  # algorithm/advantage.py
    clip: float = 0.2
    importance_cap: float | None = None  # truncated importance sampling: bound on a token's ratio to the engine; None: off
    kl_weight: float = 1e-3  # k3 KL to the start policy; 0 builds no reference policy
    aggregation: Literal["token", "rollout"] = "token"


@dataclass(frozen=True, kw_only=True)
class AlphaConfig:
    """Weight of L_SD. fixed: `value` (paper: 1e-3); grad_ratio: adapted to |alpha grad L_SD| = target_ratio |grad L_GRPO|."""

    mode: Literal["fixed", "grad_ratio"] = "fixed"
    value: float = 1e-3
    target_ratio: float = 0.2
    warmup_steps: int = 50  # alpha is 0 for the first steps
    max_value: float = 3.0  # of the adapted alpha: beyond it a live teacher feeds back on itself


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Hindsight self-distillation. `block: none` is plain GRPO, bit for bit."""

    block: Literal[
        "paper", "leave_one_out", "single", "only_correct", "only_correct_shuffled", "no_labels", "shuffled", "inverted",
        "flat_pool", "wrong_question", "dummy", "turn_causal", "with_documents", "none",
    ] = "paper"  # algorithm/blocks.py
    block_format: Literal["outcome_last", "outcome_first"] = "outcome_last"
    correct_above: float = 0.0  # rho: a rollout is CORRECT when its answer's token F1 exceeds this
    gate: Literal["none", "has_correct", "mixed", "reward_spread"] = "none"  # which groups distil
    scope: Literal["query", "all", "first_query"] = "query"  # which sampled tokens distil
    target: Literal["teacher", "uniform", "shuffled_vocabulary"] = "teacher"  # what the student is pulled to (ops/targets.py)
    teacher: Literal["live", "ema", "frozen"] = "live"  # whose weights read the block: the student's, their average, the start's
    ema_decay: float = 0.99  # teacher = decay * teacher + (1 - decay) * student after each step
    divergence: Literal["jsd", "forward_kl", "reverse_kl", "mse"] = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None  # None: the full vocabulary; the paper: 50, the teacher's, renormalised
    tail_bucket: bool = False  # with top_k: all other tokens together are one more event, instead of nothing
    teacher_logits: Literal["delta", "float32_delta", "float32", "same_dtype"] = "delta"  # how they keep their digits in bfloat16
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    measure_every: int = 25  # steps between exact gradient-ratio measurements (each costs two more updates); 0: never


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under ZeRO-3."""

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How a batch is cut into microbatches and sharded."""

    max_microbatch_tokens: int = 16384  # student and teacher positions, padding included
    head_chunk_rows: int = 1024  # hidden rows whose vocabulary logits exist at one time
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"  # masters and moments in host memory, stepped there, or on NVMe
    offload_parameters: Literal["none", "cpu"] = "none"  # shards of the weights in host memory between uses; stage 3
    nvme_path: str | None = None  # a directory on a local disk of every node
    pack_sequences: bool = False  # a microbatch is one row without padding: for model.attention varlen
    sequence_parallel_size: int = 1  # neighbouring ranks that share each sequence of a microbatch (training/sequence_parallel.py)
    tensor_parallel_size: int = 1  # neighbouring ranks that hold a part of each layer (training/tensor_parallel.py)

    @property
    def ranks_per_batch(self) -> int:
        """Neighbouring ranks that get the same microbatches."""
        return self.sequence_parallel_size * self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """How new weights reach inference workers in other processes. A rank packs `bucket_mib` at a time and holds two such buckets.

    wire `auto`: shared memory (CUDA IPC between GPUs) when all ranks and workers run on one node, else gloo (NCCL between GPUs).
    """

    source: Literal["parameters", "master"] = "parameters"  # master: the optimiser's float32 weights (ZeRO-3, float32 workers)
    wire: Literal["auto", "shared_memory", "gloo", "cuda_ipc", "nccl"] = "auto"
    bucket_mib: float = 64
    checksums: bool = False  # compare what lies in the workers with what was sent, by parameter; each publish packs twice
    timeout_s: float = 120  # without an answer for so long a worker counts as lost
    attempts: int = 2  # of one hand-over; servers of the run's own that ended are started again before each
    host: str | None = None  # of rank 0's node, as other nodes see it; None: MASTER_ADDR with several nodes, else loopback


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`every` 0 saves only at the end."""

    every: int = 50
    keep: int = 2
    resume: bool = True  # continue from the newest checkpoint of run_dir that verifies
    allow_changes: bool = False  # go on with another plan (learning rate, batch, limits, weights of the loss), and record it


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What keeps a run going, or ends it, when something goes wrong (docs/trust.md)."""

    check_memory: Literal["warn", "refuse", "off"] = "warn"  # before `sd-search train` starts, when the planner sees no fit
    watchdog_s: float = 1800.0  # a rank that does not move for so long ends all ranks, with every rank's stacks; 0: never
    stop_after_s: float | None = None  # of this start: save and end with exit code 85, as run_dir/control/STOP or SIGUSR1 asks
    max_idle_attempts: int = 3  # starts in a row that committed no new checkpoint, before the next one is refused; 0: any number
    roll_back_after_refusals: int = 3  # steps refused (not finite, spike) before the run goes back to its last checkpoint
    stop_after_refusals: int = 5  # of these, and of steps without a sampled token
    spike_sigmas: float = 0.0  # refuse a step whose log gradient norm lies so many robust deviations above the median; 0: none
    spike_window: int = 256  # steps that median and deviation are taken from


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """TensorBoard, metrics.jsonl and transcripts under run_dir."""

    eval_every: int = 0  # 0: only when asked for by `sd-search eval`
    transcripts_every: int = 10
    transcripts_per_step: int = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    run_dir: str
    model: ModelConfig
    data: DataConfig
    retriever: RetrieverConfig
    num_steps: int = 200
    seed: int = 0
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load(argv: Sequence[str]) -> Config:
    """The training configuration from `--config FILE.yaml` and `--section.key value` overrides (later wins).

    Raises ConfigError naming the key at fault, what was found and what was expected.
    """
    config = parse(Config, argv, "sd-search train")
    check(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
