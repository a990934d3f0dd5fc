"""A cross-encoder: reads a query and a passage together, and says how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from megatron_sd.config import RerankConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.pretrained.loading import load_whole
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.corpus.encoder_files import positions_of
from megatron_sd.retrieval.corpus.manifest import files_version

KEY = "search.rerank.model"


class Reranker:
    """Any local sequence classifier of query and passage with one score, or with the classes "does not fit"
    and "fits". Nothing of the directory's code runs. One object serves
    one thread. `depth`: hits of a query that it should be given;
    `digest`: of all that its order depends on.

    Raises DataError for a directory that holds none that can be loaded safely, ConfigError for a format of
    passages with other fields.
    """

    def __init__(self, config: RerankConfig, device: torch.device) -> None:
        path, options = Path(config.model), {"local_files_only": True, "trust_remote_code": False}
        if not (path / "config.json").is_file():
            raise DataError(
                f"{KEY}: found no config.json in {path}, expected a local directory of a cross-encoder"
            )
        try:
            own = AutoConfig.from_pretrained(path, **options)
            self._tokenizer = AutoTokenizer.from_pretrained(path, **options)
            weights = {"use_safetensors": True, "dtype": getattr(torch, config.dtype)}
            model = load_whole(AutoModelForSequenceClassification, path, weights, key=KEY)
        except DataError as error:
            raise DataError(
                f"{error}; expected a cross-encoder: a classifier of query and passage"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{KEY}: {path} cannot be loaded ({str(error).strip().splitlines()[0]}); expected a tokenizer,"
                " config.json and safetensors of a sequence classifier that transformers has"
            ) from error
        if own.num_labels not in (1, 2):
            raise DataError(
                f"{KEY}: found {own.num_labels} classes in {path}, expected a score, or the classes of pairs that do"
                " not fit and that do"
            )
        _refuse(config, positions_of(own.to_dict()), path)
        self._model = model.to(device).eval()
        self._config = config
        self.depth = config.depth
        self.digest = _digest(config, path)
        self._device = device
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def rerank(
        self, queries: Sequence[str], found: Sequence[Sequence[Hit]], top_k: int
    ) -> list[tuple[Hit, ...]]:
        """The best `top_k` of each query's hits by the scores of this model, which they get; ties stay in
        their order."""
        pairs = [(query, hit.passage) for query, hits in zip(queries, found, strict=True) for hit in hits]
        scores = iter(self.scores(pairs).tolist())
        again = [[Hit(passage=hit.passage, score=next(scores)) for hit in hits] for hits in found]
        return [tuple(sorted(hits, key=lambda hit: -hit.score)[:top_k]) for hits in again]

    @torch.inference_mode()
    def scores(self, pairs: Sequence[tuple[str, Passage]]) -> np.ndarray:
        """[N] float32, larger is better. What reads the same is read once, so that it ties whatever shares its
        batch; pairs of like length share one."""
        texts = [(query, self._text(passage)) for query, passage in pairs]
        different = list(dict.fromkeys(texts))
        scores = dict(zip(different, self._read(different), strict=True))
        return np.array([scores[pair] for pair in texts], np.float32)

    def _read(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        scores = np.zeros(len(pairs), np.float32)
        if not pairs:
            return scores
        encoded = self._tokenizer(
            [query for query, _ in pairs],
            [text for _, text in pairs],
            truncation="longest_first",
            max_length=self._config.max_tokens,
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(pairs)), key=lambda place: (lengths[place], place))
        for start in range(0, len(order), self._config.batch_size):
            places = order[start : start + self._config.batch_size]
            rows = {name: [values[place] for place in places] for name, values in encoded.items()}
            inputs = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
            logits = self._model(**inputs).logits.float()
            # of two classes the log-odds, so that every model gives one number
            fits = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            scores[places] = fits.cpu().numpy()
        return scores

    def _text(self, passage: Passage) -> str:
        return self._config.passage_format.format(title=passage.title, text=passage.text)


def _digest(config: RerankConfig, path: Path) -> str:
    """Of the model's files and of how they are used."""
    files = files_version(path, (".json", ".safetensors", ".txt", ".model"))
    told = f"{config.depth} {config.passage_format!r} {config.max_tokens} {config.dtype} {files}"
    return xxhash.xxh3_128_hexdigest(told.encode())


def _refuse(config: RerankConfig, positions: int | None, path: Path) -> None:
    """Raise ConfigError for a format with other fields, DataError for more tokens than the model can read."""
    try:
        config.passage_format.format(title="", text="")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"search.rerank.passage_format: found {config.passage_format!r} ({error}), expected {{title}} and {{text}}"
            " as its only fields"
        ) from error
    if positions is not None and config.max_tokens > positions:
        raise DataError(
            f"search.rerank.max_tokens: found {config.max_tokens}, expected at most {positions}, the positions of"
            f" {path}"
        )
