"""What runs inside every vLLM worker: our weight-transfer backend, registered in vLLM's own factory when
vLLM loads WeightTaker.

An update arrives in one of two ways: whole parameters, in buckets fetched over HTTP or as tensors of the
trainer in this process, loaded by vLLM's own model code (any architecture vLLM knows); or this worker's own
shards, by resharding's receiver, straight into its parameters.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers import utils as linear_layers
from vllm.platforms import current_platform

from megatron_sd.errors import RolloutError
from megatron_sd.rollout.vllm.options import BACKEND


@dataclass
class PolicyInfo(WeightTransferInitInfo):
    """policy: what the trainer's model is (options.describe)."""

    policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One of: a bucket (weight_buckets.describe_bucket); tensors, by Hugging Face name; shards (address,
    replica, policy_version, timeout_s); abandon, which ends an update that nobody will finish."""

    bucket: dict[str, Any] | None = None
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None
    shards: dict[str, Any] | None = None
    abandon: bool = False


class WeightTaker:
    """vLLM mixes this class into its worker; loading it registers the backend. It adds no method."""


class PolicyWeights(WeightTransferEngine[PolicyInfo, UpdateInfo]):
    """The worker's side of a publish. A version counts only when every parameter has come:
    finish_weight_update raises else."""

    init_info_cls = PolicyInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config, vllm_config, device, model):
        super().__init__(config, vllm_config, device, model)
        self._taken: set[str] = set()
        self._receiver = None
        self._trainer = ""  # the address of the receiver's trainer

    def init_transfer_engine(self, init_info: PolicyInfo) -> None:
        """Raises RolloutError when trainer and engine are not the same model."""
        found = served_model(self.model_config)
        pairs = [
            (name, found[name], value) for name, value in init_info.policy.items() if found[name] != value
        ]
        wrong = [f"{name} {served!r} (trainer: {trained!r})" for name, served, trained in pairs]
        if wrong:
            raise RolloutError(
                f"engine and trainer differ: the engine serves {', '.join(wrong)}; serve the run's model.path"
            )

    def start_weight_update(self) -> None:
        """Expect every parameter anew."""
        self._taken = set()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take a bucket or the shards. Raises RolloutError or ReshardError; no version is complete then."""
        if update_info.abandon:
            raise RolloutError("the update was abandoned")
        if update_info.bucket is not None:
            self._taken |= self.model.load_weights(fetch_bucket(update_info.bucket)) or set()
        if update_info.tensors is not None:
            self._taken |= self.model.load_weights(update_info.tensors) or set()
        if update_info.shards is not None:
            self._receive_shards(update_info.shards)

    def _receive_shards(self, shards: Mapping[str, Any]) -> None:
        from megatron_sd.resharding.layout import WorkerId
        from megatron_sd.resharding.receiver import ShardReceiver

        parameters = dict(self.model.named_parameters())
        if shards["address"] != self._trainer:  # the first trainer, or one that was started again
            self.shutdown()
            size = self.parallel_config.tensor_parallel_size
            worker = WorkerId(
                replica=shards["replica"], tp_rank=get_tensor_model_parallel_rank(), tp_size=size
            )
            self._receiver = ShardReceiver(
                tensors=parameters, worker=worker, address=shards["address"], timeout_s=shards["timeout_s"]
            )
            self._trainer = shards["address"]
        self._receiver.receive(shards["policy_version"], shards["number"])
        self._taken = set(parameters)

    def finish_weight_update(self) -> None:
        """Raises RolloutError when parameters are missing."""
        missing = sorted(set(dict(self.model.named_parameters())) - self._taken)
        if missing:
            raise RolloutError(
                f"the update lacks {len(missing)} parameters, such as {missing[:3]}; publish every parameter"
            )

    def shutdown(self) -> None:
        """Close the connection to the trainer, if there is one."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver, self._trainer = None, ""


def served_model(model_config: Any) -> dict[str, Any]:
    """options.describe, as vLLM's own configuration has it."""
    text = model_config.hf_text_config
    return {
        "architecture": model_config.architecture,
        "vocabulary_size": text.vocab_size,
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "head_dim": model_config.get_head_size(),
        "tied": bool(text.tie_word_embeddings),
        "dtype": str(model_config.dtype).removeprefix("torch."),
    }


def fetch_bucket(bucket: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters by Hugging Face name, over HTTP from the trainer. Raises OSError when it does not
    answer, RolloutError when the bucket comes short."""
    buffer = bytearray(bucket["num_bytes"])
    filled, view = 0, memoryview(buffer)
    with urllib.request.urlopen(bucket["url"], timeout=bucket["timeout_s"]) as response:
        while filled < len(buffer) and (count := response.readinto(view[filled:])):
            filled += count
    if filled < len(buffer):
        raise RolloutError(f"the trainer sent {filled} bytes of a bucket, expected {len(buffer)}")
    for name, dtype, shape, offset in bucket["parameters"]:
        kind = getattr(torch, dtype)
        count = torch.Size(shape).numel()
        yield name, torch.frombuffer(buffer, dtype=kind, count=count, offset=offset).view(shape)


def keep_plain_weights() -> None:
    """On CPUs vLLM packs the weights of linear layers when it loads them: the packed copy, and with tied
    embeddings the head, would silently keep the old values. Loaded before the model, this makes it compute
    with the plain weights."""

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    linear_layers.dispatch_cpu_unquantized_gemm = plain


WeightTransferEngineFactory.register_engine(BACKEND, PolicyWeights)
if current_platform.is_cpu():
    keep_plain_weights()
