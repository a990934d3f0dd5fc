"""A random Qwen2 model with a byte-level tokenizer of exactly the wanted size, for benchmarks that need no
trained weights."""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

NUM_BYTES = 256
CONTROL_TOKENS = ("<|endoftext|>", "<|pad|>")  # the names that Qwen2 tokenizers expect


def write_model(path: Path, *, vocabulary: int, hidden: int, layers: int, seed: int = 0) -> None:
    """Save a Qwen2 model (heads of 32, tied embeddings, float32) and its tokenizer. Lower-case letters are
    one token each."""
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 1,
    )
    Qwen2ForCausalLM(shape).save_pretrained(path)
    _tokenizer(vocabulary).save_pretrained(path)


def random_prompts(count: int, length: int, seed: int = 0) -> list[str]:
    """Texts of `length` tokens each."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_lowercase, k=length)) for _ in range(count)]


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """All bytes, then as many merges as fill the vocabulary; the merges join characters that prompts do not
    use."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [character for character in alphabet if character not in string.ascii_lowercase]
    merges = list(
        itertools.islice(itertools.product(others, others), vocabulary - NUM_BYTES - len(CONTROL_TOKENS))
    )
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=CONTROL_TOKENS[0], pad_token=CONTROL_TOKENS[1]
    )
