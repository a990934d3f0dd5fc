"""Of which model families packed rows are padded ones, with tiny random models: those that are taken, and those that
are refused because they are not."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sd.algorithm.packing.microbatches import build_microbatch
from megatron_sd.errors import ConfigError
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.policy_module import hidden_rows
from megatron_sd.training.varlen_attention import PACKED_FAMILIES, check_layout

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "olmo3": {"sliding_window": 8},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}
WINDOWS = ("cohere2", "gemma2", "gemma3_text", "mistral", "olmo3")
REFUSED = {
    "falcon": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}


def config_of(family, own):
    return AutoConfig.for_model(family, **(SIZES | own))


def a_microbatch():
    """Three sequences of one prompt of 20 tokens, longer than the windows, and one of another."""
    rng = np.random.default_rng(0)
    first, other = (rng.integers(3, 60, size=size) for size in (20, 30))
    prompts = [first, first, first, other]
    ends = [rng.integers(3, 60, size=size) for size in (6, 40, 12, 15)]
    lengths = np.array([len(p) + len(e) for p, e in zip(prompts, ends)])
    ids = np.zeros((4, lengths.max()), np.int64)
    for row, prompt, end in zip(ids, prompts, ends):
        row[: len(prompt) + len(end)] = np.concatenate([prompt, end])
    rows = [
        n * ids.shape[1] + np.arange(len(p) - 1, length - 1)
        for n, (p, length) in enumerate(zip(prompts, lengths))
    ]
    return dataclasses.replace(
        build_microbatch([]),
        input_ids=ids,
        lengths=lengths,
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        row_index=np.concatenate(rows),
    )


def read(config, attention, layout):
    """[R, H] hidden states of a model of this family, the same weights each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    m = DeviceMicrobatch.of(dataclasses.replace(a_microbatch(), layout=layout), torch.device("cpu"))
    with torch.no_grad():
        return hidden_rows(model, m.input_ids, m.row_index, m.runs)


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_families_that_are_taken_read_packed_rows_as_padded_ones(family):
    config = config_of(family, OWN.get(family, {}))
    padded = read(config, "sdpa", "padded")
    check_layout(config, "packed")
    torch.testing.assert_close(read(config, "sdpa", "packed"), padded, rtol=0, atol=1e-5)
    if family in WINDOWS:
        with pytest.raises(ConfigError, match="found varlen for a model with sliding_window.*attention sdpa"):
            check_layout(config, "shared")
        return
    check_layout(config, "shared")
    torch.testing.assert_close(read(config, "varlen", "shared"), padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused(family):
    config = config_of(family, REFUSED[family])
    check_layout(config, "padded")
    for layout in ("packed", "shared"):
        with pytest.raises(
            ConfigError, match=f"pack_sequences: found true for a model of the family {family}"
        ):
            check_layout(config, layout)
