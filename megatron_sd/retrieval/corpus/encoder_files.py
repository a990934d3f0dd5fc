"""What a sentence-transformers directory says of itself: how its vectors are made of hidden states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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


_FOLDER = re.compile(r"\w[\w.-]*")
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")  # of the modules that are known
_DPR_SIDES: dict[str, Literal["question", "passage"]] = {
    "DPRQuestionEncoder": "question",
    "DPRContextEncoder": "passage",
}
# two of them are no places of text
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """None: the directory does not say. query_prefix: of its prompt for queries. max_tokens: what it was
    trained with. positions: the most tokens it can read. dense: folders of the layers behind the pooling,
    in order. dpr: the side of a DPR model that it is."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    max_tokens: int | None = None
    positions: int | None = None
    dense: tuple[str, ...] = ()
    dpr: Literal["question", "passage"] | None = None


def read_card(directory: Path) -> EncoderCard:
    """modules.json, 1_Pooling/config.json, sentence_bert_config.json and config_sentence_transformers.json,
    where they are.

    Raises DataError for modules that would be left out or in another order, and for a pooling of another
    kind.
    """
    modules = _read(directory / "modules.json") or []
    _check_order(directory, [_kind(module) for module in modules])
    kinds = {_kind(module): module.get("path", "") for module in modules}
    config = _read(directory / "config.json") or {}
    dpr = _dpr_side(directory, config)
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
    if pooling.get("include_prompt") is False and prompts.get("query"):
        raise DataError(
            f"{directory} pools without its prompt (include_prompt is false), expected true: such vectors"
            " cannot be made here"
        )
    return EncoderCard(
        pooling="cls" if dpr else known[0] if known else None,
        normalize=True if "Normalize" in kinds else False if modules or dpr else None,
        query_prefix=prompts.get("query"),
        max_tokens=sentence.get("max_seq_length"),
        positions=positions_of(config),
        dense=tuple(_folder(directory, module) for module in modules if _kind(module) == "Dense"),
        dpr=dpr,
    )


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _folder(directory: Path, module: Mapping[str, Any]) -> str:
    """The name of a layer's folder, which lies in the encoder's own."""
    name = str(module.get("path", ""))
    if not _FOLDER.fullmatch(name):
        raise DataError(
            f"{directory}/modules.json names the folder {name!r}, expected one within it such as '2_Dense'"
        )
    return name


def _check_order(directory: Path, kinds: Sequence[str]) -> None:
    strange = [kind for kind in kinds if kind not in _ORDER]
    if strange:
        raise DataError(
            f"{directory}/modules.json has a module {strange[0]}, expected {', '.join(_ORDER)}: vectors"
            " without it would be others than the encoder's; choose an encoder without it"
        )
    if list(kinds) != sorted(kinds, key=_ORDER.index):
        raise DataError(
            f"{directory}/modules.json has the modules {', '.join(kinds)}, expected them in the order"
            f" {', '.join(_ORDER)}: vectors would be others than the encoder's; choose another encoder"
        )


def _dpr_side(directory: Path, config: Mapping[str, Any]) -> Literal["question", "passage"] | None:
    if config.get("model_type") != "dpr":
        return None
    kind = (config.get("architectures") or ["DPRQuestionEncoder"])[0]
    if kind not in _DPR_SIDES:
        raise DataError(
            f"{directory} holds a {kind}, expected {' or '.join(_DPR_SIDES)}: a reader makes no vectors"
        )
    return _DPR_SIDES[kind]


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
