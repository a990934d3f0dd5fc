"""Text <-> token ids, byte-exact in one direction and safe in the other.

Sampled ids are read as raw bytes (a tag, or a single character, may straddle tokens). Text from outside
(questions, passages, messages) is encoded by a copy of the tokenizer that knows no added token at all, so
plain text can never become a control id. Text of our own (the prompt's template, tags) is cut at added
tokens first: where a model has a token for <think>, it is used.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_sd.errors import DataError
from megatron_sd.records import TokenIds
from megatron_sd.search.chat_template import ChatArguments, ChatTemplate

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _decoder_types(decoder: dict | None) -> set[str]:
    """Names of all decoders in a (possibly nested) `tokenizer.json` decoder."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(d) for d in decoder.get("decoders", ())))


def _piece_bytes(piece: str, alphabet: dict[str, int] | None) -> bytes:
    """Raw bytes of a vocabulary entry; `alphabet` is None for SentencePiece-style vocabularies."""
    if alphabet is not None and all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8")


class TextCodec:
    """A Hugging Face tokenizer as rollouts need it.

    token_bytes: raw bytes of every id (added tokens: their text; ids without an entry: nothing).
    control_ids: ids that plain text never encodes to. control_strings: their texts. eos_ids: ids that end a
    completion. chat: the chat template that prompts are wrapped in, None without one. Raises DataError for
    a tokenizer whose ids cannot be read as bytes, or which turns plain text into control ids; ConfigError
    for a chat template that cannot be had.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatArguments | None = None):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {entry["id"]: entry["content"] for entry in spec["added_tokens"]}
        self._plain = Tokenizer.from_str(json.dumps(spec | {"added_tokens": [], "post_processor": None}))
        self._plain.no_padding()
        self._plain.no_truncation()
        self.token_bytes = self._read_vocabulary(tokenizer, spec, added)
        self.control_ids = frozenset(added)
        self.control_strings = tuple(sorted(set(added.values())))
        self.eos_ids = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
        self._refuse_leaks()
        self._own_tokens = _AddedTokens(spec["added_tokens"])
        self.chat = None if chat is None else ChatTemplate(tokenizer, chat)
        if self.chat is None:
            self._prefix_ids, self._suffix_ids = _plain_frame(tokenizer)
        else:
            before, after = self.chat.prompt_frame()
            self._prefix_ids, self._suffix_ids = _ids(tokenizer, before), _ids(tokenizer, after)

    @staticmethod
    def _read_vocabulary(
        tokenizer: PreTrainedTokenizerBase, spec: dict, added: dict[int, str]
    ) -> tuple[bytes, ...]:
        kinds = _decoder_types(spec["decoder"])
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise DataError(
                f"the tokenizer's decoder is {sorted(kinds) or 'absent'}, expected byte-level BPE (Qwen,"
                " Llama 3, GPT-2) or SentencePiece with byte fallback: sampled ids must be readable as raw"
                " bytes"
            )
        alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        pieces = {index: _piece_bytes(piece, alphabet) for piece, index in tokenizer.get_vocab().items()}
        pieces |= {index: content.encode("utf-8") for index, content in added.items()}
        return tuple(pieces.get(index, b"") for index in range(max(pieces) + 1))

    def _refuse_leaks(self) -> None:
        leaking = [
            text for text in self.control_strings if not self.control_ids.isdisjoint(self.encode(text))
        ]
        if leaking:
            raise DataError(
                f"the tokenizer encodes the plain texts {leaking[:5]} to control ids, expected ordinary ids:"
                " a passage could forge control tokens; use a tokenizer that keeps its added tokens out of"
                " its model's vocabulary"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """What every id stands for, and which ids are control ids, as a hash: stored ids are worth nothing
        under another one."""
        digest = xxhash.xxh3_128(json.dumps(sorted(self.control_ids)).encode())
        for piece in self.token_bytes:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def encode(self, text: str) -> TokenIds:
        """Ids of untrusted plain text; never a control id, whatever the text says."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_own(self, template: str, fields: Mapping[str, str] | None = None) -> TokenIds:
        """Ids of text that we wrote: added tokens in it are what they are for the model. `{name}` of
        `fields` become untrusted text, as encode reads it."""
        ids: list[int] = []
        for part in self._own_tokens.split(template):
            ids += (part,) if isinstance(part, int) else self.encode(fill(part, fields or {}))
        return tuple(ids)

    def prompt_ids(self, text: str) -> TokenIds:
        """Ids of a prompt of untrusted text; see in_frame."""
        return self.in_frame(self.encode(text))

    def in_frame(self, ids: TokenIds) -> TokenIds:
        """A prompt's ids after what the tokenizer puts before every text (if anything), or in its chat
        frame."""
        return (*self._prefix_ids, *ids, *self._suffix_ids)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Raw bytes of sampled ids. Ids beyond the tokenizer (padding rows of the embedding) have none."""
        return b"".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Raw bytes of each id."""
        table = self.token_bytes
        return [table[index] if index < len(table) else b"" for index in ids]

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """[len(ids) + 1] byte offsets: token i covers bytes [offsets[i], offsets[i + 1])."""
        return list(accumulate(map(len, self.pieces(ids)), initial=0))

    def decode(self, ids: Iterable[int]) -> str:
        """Text for reading (transcripts, answers); bytes that are no UTF-8 become U+FFFD. Never encoded
        again."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")


class _AddedTokens:
    """Cuts a text at the tokenizer's added tokens, the longest first."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]):
        self._ids = {entry["content"]: entry["id"] for entry in entries if entry["content"]}
        contents = sorted(self._ids, key=len, reverse=True)
        flags = {entry["content"]: (entry.get("lstrip"), entry.get("rstrip")) for entry in entries}
        patterns = []
        for content in contents:  # a token may take the white space beside it along
            before, after = (r"\s*" if flag else "" for flag in flags[content])
            patterns.append(f"{before}({re.escape(content)}){after}")
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def split(self, text: str) -> list[str | int]:
        """Texts, and ids where an added token stands; empty texts are left out."""
        parts: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            parts += [text[end : match.start()], self._ids[match[match.lastindex or 0]]]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with each `{name}` of `fields` replaced, in one pass: what a value says is never filled
    in again."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def _plain_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[TokenIds, TokenIds]:
    """What the tokenizer puts before every text (Llama's begin-of-text); what it puts after would be an
    ending: left out."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a", add_special_tokens=True).input_ids
    starts = [n for n in range(len(full)) if full[n : n + len(bare)] == bare]
    return (tuple(full[: starts[0]]) if starts else ()), ()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """Of the template's own text."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def load_codec(path: str, chat: ChatArguments | None = None) -> TextCodec:
    """The codec of a local model directory. Raises DataError when there is no tokenizer."""
    if not Path(path).is_dir():
        raise DataError(
            f"model.path: found no directory at {path}, expected a local Hugging Face model directory"
        )
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(
            f"no tokenizer in {path}, expected {' or '.join(_TOKENIZER_FILES)}: copy the files of the"
            " model's own"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer in {path} ({_first_line(error)}); expected a directory with tokenizer.json"
        ) from error
    return TextCodec(tokenizer, chat)
