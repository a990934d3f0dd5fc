"""The policy's model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sd.machine import preferred_dtype


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: the model's own weights are frozen, W + alpha / rank * B A is trained, sampled
    from and saved."""

    rank: int = 0  # 0: the whole model is trained
    alpha: float = 32.0  # what alpha / rank is made of
    # linear layers that get adapters
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: any local Hugging Face causal language model directory (Qwen2, Qwen3, Llama, ...)."""

    path: str  # directory with config.json, tokenizer and safetensors
    # auto: what this machine computes fast (machine.py)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # varlen: with update.pack_sequences; what sequences have in common is read once (docs/clusters.md)
    attention: Literal["sdpa", "eager", "varlen", "flash_attention_2"] = "sdpa"
    # keep a layer's input only, and compute it once more for the backward
    gradient_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", preferred_dtype())
