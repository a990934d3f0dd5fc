"""A small Qwen2 model with random weights, and an attention that makes its training quick on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from megatron_sd.errors import ConfigError

ATTENTION = "coldstart_causal"  # its name among transformers' attention implementations


@dataclass(frozen=True, kw_only=True)
class SmallQwenShape:
    """A Qwen2 architecture with tied embeddings."""

    hidden_size: int = 128  # of a layer
    intermediate_size: int = 384  # of its MLP
    num_layers: int = 4  # of the model
    num_heads: int = 4  # of a layer
    rope_theta: float = 10_000.0  # of its positions
    max_positions: int = 2048  # tokens of a sequence


# transformers' interface
def _causal_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Plain causal attention, padding on the right: for short sequences on a CPU 1.5 times faster than
    torch's flash kernel."""
    length = query.shape[2]
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    mask = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
    return torch.matmul(torch.softmax(scores + mask, -1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _causal_attention)


def build_model(shape: SmallQwenShape, *, vocab_size: int, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model; the same seed gives the same weights. Raises ConfigError for a head size
    no engine serves."""
    if shape.hidden_size % shape.num_heads or shape.hidden_size // shape.num_heads not in (32, 64, 128):
        raise ConfigError(
            f"model.hidden_size {shape.hidden_size} / num_heads {shape.num_heads} gives a head size of"
            f" {shape.hidden_size / shape.num_heads:g}, expected 32, 64 or 128: inference engines support no"
            " other"
        )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            max_position_embeddings=shape.max_positions,
            rope_theta=shape.rope_theta,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            attn_implementation=ATTENTION,
        )
    )
