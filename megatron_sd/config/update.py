"""The optimiser, how a batch is cut and sharded, and how new weights reach inference workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from megatron_sd.errors import ConfigError

AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under ZeRO-3."""

    learning_rate: float = 1e-6  # after the warm-up
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # algorithm/learning_rate.py
    final_ratio: float | None = None  # of one that decays: the last step's share of learning_rate; None: 0
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW's moments
    weight_decay: float = 0.0  # of AdamW
    warmup_steps: int = 0  # over which the rate rises from 0
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it

    @property
    def decays(self) -> bool:
        """Whether rates depend on the number of steps."""
        return self.schedule != "constant"


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How a batch is cut into microbatches and sharded."""

    # student and teacher positions, padding included; auto: the most that the planner says fits
    max_microbatch_tokens: int | Literal["auto"] = 16384
    # optimiser steps that a batch is cut into, by question, and how often it is gone through
    minibatches: int = 1
    epochs: int = 1  # how often a batch is gone through
    head_chunk_rows: int = 1024  # hidden rows whose vocabulary logits exist at one time
    zero_stage: Literal[0, 1, 2, 3] = 3  # of DeepSpeed
    # masters and moments in host memory, stepped there, or on NVMe
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    # shards of the weights in host memory between uses; stage 3
    offload_parameters: Literal["none", "cpu"] = "none"
    nvme_path: str | None = None  # a directory on a local disk of every node
    pack_sequences: bool = False  # a microbatch is one row without padding
    # neighbouring ranks that share each sequence of a microbatch (training/parallel/sequence.py)
    sequence_parallel_size: int = 1
    # neighbouring ranks that hold a part of each layer (training/parallel/tensor.py)
    tensor_parallel_size: int = 1

    def check_settled(self) -> None:
        """Raise ConfigError while max_microbatch_tokens is auto, which those who start ranks settle."""
        if isinstance(self.max_microbatch_tokens, str):
            raise ConfigError(
                "update.max_microbatch_tokens: found auto, expected a number in a rank: `sd-search train`, `sft`"
                " and `launch`, which know the machine, settle it"
            )

    @property
    def microbatch_tokens(self) -> int:
        """max_microbatch_tokens, settled. Raises what check_settled does."""
        self.check_settled()
        return int(self.max_microbatch_tokens)

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps that a step's rollouts are used for."""
        return self.minibatches * self.epochs

    @property
    def ranks_per_batch(self) -> int:
        """Neighbouring ranks that get the same microbatches."""
        return self.sequence_parallel_size * self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """How new weights reach inference workers in other processes. A rank packs `bucket_mib` at a time and
    holds two such buckets.

    wire `auto`: shared memory (CUDA IPC between GPUs) when all ranks and workers run on one node, else gloo
    (NCCL between GPUs).
    """

    # master: the optimiser's float32 weights (ZeRO-3, float32 workers)
    source: Literal["parameters", "master"] = "parameters"
    # how bytes travel between processes
    wire: Literal["auto", "shared_memory", "gloo", "cuda_ipc", "nccl"] = "auto"
    bucket_mib: float = 64  # that a rank packs at a time
    # buckets carry what changed since the last version, bit for bit; a rank keeps a copy of its shard for it.
    # No effect over shared_memory and cuda_ipc, which need no buckets
    changes_only: bool = False
    # compare what lies in the workers with what was sent, by parameter; each publish packs twice
    checksums: bool = False
    timeout_s: float = 120  # without an answer for so long a worker counts as lost
    attempts: int = 2  # of one hand-over; servers of the run's own that ended are started again before each
    # of rank 0's node, as other nodes see it; None: MASTER_ADDR with several nodes, else loopback
    host: str | None = None
