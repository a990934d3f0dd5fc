"""A small byte-level BPE tokenizer for the synthetic world, of Qwen2's kind.

It is Qwen2's tokenizer (its rules for cutting text into words) with a vocabulary of the world's own,
because transformers applies those rules to any model of the Qwen2 architecture, whatever its tokenizer
files say. Tags such as `<search>` are ordinary text, not special tokens: `<search` and `>` are two tokens,
and in `<search>scholar` the token `>scholar` straddles the tag's boundary. Words carry the space before
them, so a name behind a space has the same tokens everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

END_OF_SEQUENCE = "<|endoftext|>"
PADDING = "<|pad|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Qwen2Tokenizer:
    """Learn merges from `texts` and return a Hugging Face tokenizer; the same texts give the same tokenizer.

    The vocabulary holds all 256 bytes and the two special tokens, so any text can be encoded; it may stay
    below `vocab_size`.
    """
    rules = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_SEQUENCE, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges, eos_token=END_OF_SEQUENCE, pad_token=PADDING)


def save_tokenizer(tokenizer: Qwen2Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and its configuration where transformers.AutoTokenizer finds them."""
    tokenizer.save_pretrained(directory)
