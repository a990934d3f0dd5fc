"""A tiny encoder and a tiny cross-encoder: real BERTs with random weights and a WordPiece vocabulary of a few
words. No fakes, only small."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.retrieval.fakes import WORDS

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")


def tiny_encoder(directory: Path, dim: int = 32, seed: int = 0) -> Path:
    """Write a BERT of one layer and `dim` dimensions, with its tokenizer."""
    return _write(BertModel, directory, dim, seed)


def tiny_cross_encoder(directory: Path, num_labels: int = 1, seed: int = 0) -> Path:
    """Write a BERT of one layer that scores pairs, with its tokenizer."""
    return _write(BertForSequenceClassification, directory, 32, seed, num_labels=num_labels)


def _write(kind: type[PreTrainedModel], directory: Path, dim: int, seed: int, **options: int) -> Path:
    vocabulary = [*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(
        models.WordPiece({token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    torch.manual_seed(seed)
    shape = {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = kind(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings.word" in name or "pooler" in name or "classifier" in name:
                parameter.mul_(30)  # so that different words are far apart
    model.save_pretrained(directory)
    return directory
