"""What a vLLM worker loads from full parameters, written the way its loaders cut: an oracle for the shard
layouts."""

from __future__ import annotations

import numpy as np


def worker_tensors(
    full: dict[str, np.ndarray], config: dict, tp_rank: int, tp_size: int
) -> dict[str, np.ndarray]:
    """By vLLM's names; full: by Hugging Face names. Padding rows of the vocabulary are zero."""
    tensors = {}
    for name, value in full.items():
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            parts = [value, *(full[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))]
            heads = [
                config["num_attention_heads"],
                config["num_key_value_heads"],
                config["num_key_value_heads"],
            ]
            own = [_heads(part, count, tp_rank, tp_size) for part, count in zip(parts, heads)]
            tensors[name.replace("q_proj", "qkv_proj")] = np.concatenate(own)
        elif name.endswith(("gate_proj.weight", "gate_proj.bias")):
            parts = value, full[name.replace("gate_proj", "up_proj")]
            tensors[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(
                [np.split(p, tp_size)[tp_rank] for p in parts]
            )
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.split(value, tp_size, axis=1)[tp_rank]
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padded = np.zeros((-(-len(value) // 64) * 64, value.shape[1]), value.dtype)
            padded[: len(value)] = value
            tensors[name] = np.split(padded, tp_size)[tp_rank]
        elif name.rsplit(".", 2)[-2] not in ("k_proj", "v_proj", "up_proj"):
            tensors[name] = value
    return tensors


def _heads(value: np.ndarray, num_heads: int, tp_rank: int, tp_size: int) -> np.ndarray:
    """Whole heads; with fewer heads than workers, neighbours share one."""
    by_head = np.split(value, num_heads)
    if num_heads >= tp_size:
        return np.concatenate(by_head[tp_rank * num_heads // tp_size : (tp_rank + 1) * num_heads // tp_size])
    return by_head[tp_rank // (tp_size // num_heads)]
