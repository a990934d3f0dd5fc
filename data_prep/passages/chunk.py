"""Long passages to short ones: windows of words, sentences or tokens, each a slice of the original text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.passages.runs import ROWS_PER_RUN, SortedRuns, Taken
from data_prep.passages.sourced import SourcedPassage, from_batch
from data_prep.passages.table import Origin, PassageTable, write_resumable
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.manifest import file_entry

Span = tuple[int, int]
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
# A sentence ends at . ! ? or their full-width forms, with closing quotes or brackets, before white space
# and no small letter.
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s+(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """`sd-search data chunk`: a passages directory to one of shorter passages. DPR's Wikipedia is words,
    size 100."""

    passages: str  # a passages directory
    output: str  # another
    unit: Literal["words", "sentences", "tokens"] = "words"  # what size counts
    size: int = 100  # units of a chunk
    stride: int | None = None  # units from one start to the next; None: size, so that chunks do not overlap
    tokenizer: str | None = None  # for tokens: a local Hugging Face directory with a fast tokenizer
    rows_per_run: int = ROWS_PER_RUN  # chunks that are sorted in memory: what a kill can lose


def chunk_passages(config: ChunkConfig) -> str:
    """Write the chunks and return the version of their directory. Killed and started again it goes on where
    it was.

    A passage that fits one chunk keeps its id; the chunks of a longer one are ID#0000, ID#0001, ... Raises
    ConfigError for sizes that cannot be, DataError for a damaged input.
    """
    stride = config.size if config.stride is None else config.stride
    if not 1 <= stride <= config.size:
        raise ConfigError(
            f"stride: found {stride}, expected 1 to size {config.size}, or text would be lost between chunks"
        )
    spans = token_spans(config.tokenizer) if config.unit == "tokens" else SPANS[config.unit]
    table = PassageTable(Path(config.passages))

    def rest(runs: SortedRuns) -> Iterator[Taken]:
        passages = (passage for batch in table.batches(runs.num_read) for passage in from_batch(batch))
        return (
            Taken(passages=tuple(cut(own, spans(own.text), size=config.size, stride=stride)))
            for own in passages
        )

    settings = {"unit": config.unit, "size": config.size, "stride": stride}
    origin = Origin(settings={"chunks": settings}, made_from={"passages": table.version})
    begun_from = {"passages": table.version, "chunks": settings, "tokenizer": _tokenizer_entries(config)}
    return write_resumable(
        Path(config.output), rest, origin, begun_from=begun_from, rows_per_run=config.rows_per_run
    )


def _tokenizer_entries(config: ChunkConfig) -> dict[str, Any]:
    """Size and checksum of the files that decide where tokens begin and end."""
    if config.unit != "tokens" or config.tokenizer is None:
        return {}
    paths = sorted(path for pattern in _TOKENIZER_FILES for path in Path(config.tokenizer).glob(pattern))
    return {path.name: dataclasses.asdict(file_entry(path)) for path in paths}


def cut(
    passage: SourcedPassage, spans: Sequence[Span], *, size: int, stride: int
) -> Iterator[SourcedPassage]:
    """Windows of `size` spans, every `stride` spans, until the last span is covered."""
    if len(spans) <= size:
        yield passage
        return
    for number, start in enumerate(range(0, len(spans) - size + stride, stride)):
        window = spans[start : start + size]
        text = passage.text[window[0][0] : window[-1][1]]
        yield dataclasses.replace(passage, id=f"{passage.id}#{number:04d}", text=text)


def word_spans(text: str) -> list[Span]:
    """[start, stop) of every run without white space."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def sentence_spans(text: str) -> list[Span]:
    """[start, stop) of every sentence, without the white space around it."""
    spans, start = [], 0
    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:stop]
        if sentence.strip():
            lead = len(sentence) - len(sentence.lstrip())
            spans.append((start + lead, start + len(sentence.rstrip())))
        start = stop
    return spans


SPANS = {"words": word_spans, "sentences": sentence_spans}


def token_spans(directory: str | None) -> Callable[[str], list[Span]]:
    """[start, stop) of the characters of every token. Raises ConfigError without a directory, DataError for
    a slow tokenizer."""
    if directory is None:
        raise ConfigError(
            "tokenizer: found nothing, expected a local Hugging Face directory, since unit is tokens"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} holds no tokenizer that can be loaded ({str(error).splitlines()[0]})"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"{directory} has a tokenizer without offsets; expected a fast one (tokenizer.json)")

    def spans(text: str) -> list[Span]:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return [(start, stop) for start, stop in offsets if stop > start]

    return spans
