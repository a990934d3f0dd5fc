"""What a sentence-transformers directory says of itself: how its vectors are made of hidden states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sd.errors import DataError

Pooling = Literal["mean", "cls", "last"]
_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})  # two of them are no places of text


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """None: the directory does not say. query_prefix: of its prompt for queries. max_tokens: what it was trained with.
    positions: the most tokens it can read."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    max_tokens: int | None = None
    positions: int | None = None


def read_card(directory: Path) -> EncoderCard:
    """modules.json, 1_Pooling/config.json, sentence_bert_config.json and config_sentence_transformers.json, where they are.

    Raises DataError for a module that would be left out (a Dense layer), and for a pooling of another kind.
    """
    modules = _read(directory / "modules.json") or []
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module.get("path", "") for module in modules}
    strange = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if strange:
        raise DataError(
            f"{directory}/modules.json has a module {strange[0]} after the encoder, expected Transformer, Pooling and Normalize: "
            "vectors without it would be others than the encoder's; choose an encoder without it"
        )
    pooling = _read(directory / (kinds.get("Pooling") or "1_Pooling") / "config.json") or {}
    chosen = [name for name, wanted in pooling.items() if name.startswith("pooling_mode_") and wanted is True]
    if isinstance(pooling.get("pooling_mode"), str):  # newer files name it
        chosen = [f"pooling_mode_{pooling['pooling_mode']}", f"pooling_mode_{pooling['pooling_mode']}_tokens"]
    known = [_MODES[name] for name in chosen if name in _MODES]
    known += ["cls"] if "pooling_mode_cls" in chosen else []
    if chosen and len(known) != 1:
        raise DataError(f"{directory} pools by {', '.join(chosen)}, expected one of {', '.join(_MODES)}")
    sentence = _read(directory / "sentence_bert_config.json") or {}
    prompts = (_read(directory / "config_sentence_transformers.json") or {}).get("prompts") or {}
    return EncoderCard(
        pooling=known[0] if known else None,
        normalize=True if "Normalize" in kinds else False if modules else None,
        query_prefix=prompts.get("query"),
        max_tokens=sentence.get("max_seq_length"),
        positions=positions_of(_read(directory / "config.json") or {}),
    )


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that an encoder of this config.json can read at most; None: any number."""
    positions = config.get("max_position_embeddings")
    return positions - 2 if positions and config.get("model_type") in _OFFSET_POSITIONS else positions


def _read(path: Path) -> Any:
    """A JSON file's value; None without the file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected JSON: copy the encoder again") from error
