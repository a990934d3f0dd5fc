"""Text to vectors with any local Hugging Face encoder directory (E5, BGE, MiniLM, GTR, DPR, ...).

Weights are read from safetensors (of a Dense layer also from a file of tensors alone) and no code of the
directory runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    DPRContextEncoder,
    DPRQuestionEncoder,
)
from transformers.utils.logging import disable_progress_bar

from megatron_sd.errors import ConfigError, DataError
from megatron_sd.pretrained.loading import HEADS, load_whole
from megatron_sd.retrieval.corpus.encoder_dense import read_dense
from megatron_sd.retrieval.corpus.encoder_files import EncoderCard, positions_of, read_card

disable_progress_bar()  # of weight loading


_POOLER = r"\.pooler\."  # of the BERT within a DPR model, which does not use it
_ENCODER_DECODERS = frozenset({"t5", "mt5", "umt5"})  # whose encoder alone reads (GTR, sentence-T5)


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How a text becomes a vector; stored in the manifest, so a query is encoded as the passages were.

    pooling: mean over the tokens, the first token (cls), or the last. query_prefix, passage_format: what
    the encoder was trained with (E5: "query: " and "passage: {contents}"); fields {title} {text}
    {contents}, the last as Search-R1 writes them. max_tokens: longer texts are cut. normalize: to length 1,
    so that the inner product is the cosine.
    """

    pooling: Literal["mean", "cls", "last"]
    query_prefix: str
    passage_format: str
    normalize: bool
    max_tokens: int
    dtype: Literal["float32", "float16", "bfloat16"]
    batch_size: int


class Encoder:
    """An encoder on one device. `dim` is the length of its vectors."""

    def __init__(self, directory: Path | str, settings: EncoderSettings, device: torch.device) -> None:
        """Load the encoder. Raises DataError when the directory holds none that can be loaded safely."""
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise DataError(
                f"{path} is no encoder directory: found no config.json; expected a local Hugging Face model"
            )
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(path, **options)
            self._tokenizer = AutoTokenizer.from_pretrained(path, **options)
            dtype = getattr(torch, settings.dtype)
            weights = {"use_safetensors": True, "dtype": dtype}
            card = read_card(path)
            kind = _class_of(config.model_type, card)
            self._model = (
                load_whole(kind, path, weights, key="encoder", unused=(*HEADS, _POOLER)).to(device).eval()
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{path} cannot be loaded ({str(error).strip().splitlines()[0]}); expected a tokenizer,"
                " config.json and safetensors of an architecture that transformers has"
            ) from error
        self._positions = positions_of(self._model.config.to_dict())
        self.settings = settings
        self._is_dpr = card.dpr is not None
        if self._is_dpr and settings.pooling != "cls":
            found = f"found {settings.pooling!r} with a DPR encoder at {path}"
            raise ConfigError(f"pooling: {found}, expected 'cls', as it was trained")
        self._dense = nn.Sequential(*(read_dense(path / name) for name in card.dense)).to(device)
        own_dim = (self._is_dpr and self._model.config.projection_dim) or self._model.config.hidden_size
        self.dim = _output_dim(path, card, self._dense, int(own_dim))
        self._device = device
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """[N, dim] float32."""
        return self.encode([self.settings.query_prefix + query for query in queries])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[N, dim] float32 of texts as they are. Texts of like length share a batch; the result has the
        order of the texts."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for places, inputs in self._batches(texts):
            made = self._model(**inputs)
            pooled = (
                made.pooler_output
                if self._is_dpr
                else self._pool(made.last_hidden_state, inputs["attention_mask"])
            )
            pooled = self._dense(pooled.float())
            if self.settings.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            vectors[places] = pooled.cpu().numpy()
        return vectors

    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return POOLINGS[self.settings.pooling](hidden, mask)

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        if not texts:
            return
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.settings.max_tokens)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if self._positions is not None and max(lengths) > self._positions:
            raise DataError(
                f"max_tokens: found {self.settings.max_tokens} and a text of {max(lengths)} tokens, expected"
                f" at most {self._positions}, the encoder's positions"
            )
        order = sorted(range(len(texts)), key=lambda place: (lengths[place], place))
        for start in range(0, len(order), self.settings.batch_size):
            places = order[start : start + self.settings.batch_size]
            rows = {name: [values[place] for place in places] for name, values in encoded.items()}
            yield places, self._tokenizer.pad(rows, return_tensors="pt").to(self._device)


def _class_of(model_type: str, card: EncoderCard) -> Any:
    """The class of transformers that reads texts."""
    if card.dpr is not None:
        return DPRQuestionEncoder if card.dpr == "question" else DPRContextEncoder
    return AutoModelForTextEncoding if model_type in _ENCODER_DECODERS else AutoModel


def _output_dim(path: Path, card: EncoderCard, dense: nn.Sequential, dim: int) -> int:
    """What the layers make of `dim` numbers. Raises DataError when they do not fit each other."""
    for name, (linear, _) in zip(card.dense, dense, strict=True):
        if linear.in_features != dim:
            raise DataError(
                f"{path / name} reads {linear.in_features} numbers, expected {dim}, as come before it: copy"
                " the encoder again"
            )
        dim = linear.out_features
    return dim


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(torch.float32)
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def _cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


POOLINGS = {"mean": _mean, "cls": _cls, "last": _last}


def choose_device(name: Literal["auto", "cpu", "cuda"] | str) -> torch.device:
    """The device of a name, with its number: in a thread of its own "cuda" alone would mean GPU 0. auto:
    the CUDA device that this process uses (a training rank's own), or the CPU."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
