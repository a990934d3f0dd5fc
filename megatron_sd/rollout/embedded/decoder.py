"""The synchronous heart of the embedded engine: prefill and decode steps of a causal language model over
rows of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from megatron_sd.errors import ConfigError
from megatron_sd.ops import few_rows
from megatron_sd.records import TokenIds
from megatron_sd.rollout.embedded.attention import ATTENTION
from megatron_sd.rollout.embedded.kv_cache import Pass, RowCache, RowStore, state_shape
from megatron_sd.rollout.embedded.lanes import Lanes
from megatron_sd.rollout.embedded.opening import Opening
from megatron_sd.rollout.sampling import sample, uniform_noise

_PREFILL_TOKENS = 8192  # padded tokens of one prefill pass, which bounds its activations
_MAX_HOLES = 0.25  # share of idle rows among the decoded ones that is tolerated before rows are compacted


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Prompt tokens to prefill. All `rows` get the same prompt, which is computed once; the first `start`
    tokens are cached, in the rows or, where `in_opening`, in the opening."""

    rows: tuple[int, ...]
    prompt_ids: TokenIds
    start: int
    in_opening: bool = False

    @property
    def num_new(self) -> int:
        """Tokens to compute."""
        return len(self.prompt_ids) - self.start


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One new token for each of `rows`; all arrays [n]. A log-probability that is not finite means that the
    logits were not."""

    rows: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


class RowDecoder:
    """A model, a KV cache of at most `max_rows` rows, and the sampling state of each row (`lanes`).

    max_length: positions a row may hold. Raises ConfigError for models with layers other than full or
    sliding attention.
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int):
        self.max_length = _max_length(model.config)
        self.max_rows = max_rows
        self._model = model.eval().requires_grad_(False)
        few_rows.speed_up(model)
        is_ours = model._supports_attention_backend and model.config._attn_implementation in (
            "sdpa",
            ATTENTION,
        )
        if is_ours:
            model.set_attn_implementation(ATTENTION)
        shape = state_shape(model, through="row_cache" if is_ours else None)
        self._can_share = shape.is_attended
        stores = [
            RowStore(shape, max_rows=most, max_length=self.max_length, dtype=model.dtype, device=model.device)
            for most in (max_rows, max_rows, 1)
        ]
        self._cache = RowCache(*stores[:2], device=model.device)
        self._opening = Opening(stores[2])
        self.reset()

    def reset(self) -> None:
        """No row holds anything; the cache's memory stays."""
        self.lanes = Lanes(self.max_rows)
        self._opening.forget()

    def give_back(self) -> None:
        """No row holds anything, nor does the cache hold memory."""
        self.reset()
        for store in (self._cache.rows, self._cache.prompts, self._opening.store):
            store.give_back()

    @torch.inference_mode()
    def prefill(self, feeds: Sequence[Feed]) -> list[Sampled]:
        """Compute the missing prompt tokens of rows and sample the first new token of each; rows must be
        started in `lanes`."""
        together, apart = [], []
        for feed in self._from_opening(feeds):
            if len(feed.rows) > 1 and self._can_share:
                together.append(feed)
            else:
                apart += [replace(feed, rows=(row,)) for row in feed.rows]
        return [self._prefill_prompts(c) for c in _chunks(together)] + [
            self._prefill_rows(c) for c in _chunks(apart)
        ]

    def _from_opening(self, feeds: Sequence[Feed]) -> list[Feed]:
        """The feeds, new prompts from where the opening ends; a better opening is computed first."""
        opening = self._opening
        if ids := opening.better([feed.prompt_ids for feed in feeds if feed.start == 0]):
            row = np.zeros(1, dtype=np.int64)
            whole = Feed(rows=(0,), prompt_ids=ids, start=0)
            self._forward(opening.store, *_new_tokens(row, [whole], shared=row, prompt_rows=row))
            opening.ids = ids
        lengths = [0 if feed.start else opening.length_in(feed.prompt_ids) for feed in feeds]
        return [
            replace(f, start=length, in_opening=True) if length else f for f, length in zip(feeds, lengths)
        ]

    def _copy_opening(self, store: RowStore, rows: np.ndarray, feeds: Sequence[Feed]) -> None:
        """Into the rows of those feeds that begin with it."""
        for length in {feed.start for feed in feeds if feed.in_opening}:
            taking = np.array([feed.in_opening and feed.start == length for feed in feeds])
            self._opening.copy_to(store, rows[taking], length)

    def _prefill_prompts(self, feeds: Sequence[Feed]) -> Sampled:
        """Prompts that several rows share, each into a free row of the shared prompts."""
        lanes = self.lanes
        taken = set(lanes.prompt_row[lanes.shared > 0].tolist())
        prompt_rows = np.array(sorted(set(range(len(taken) + len(feeds))) - taken)[: len(feeds)])
        self._copy_opening(self._cache.prompts, prompt_rows, feeds)
        step, ids = _new_tokens(
            prompt_rows, feeds, shared=np.zeros_like(prompt_rows), prompt_rows=prompt_rows
        )
        logits = self._forward(self._cache.prompts, step, ids)
        rows = np.array([row for feed in feeds for row in feed.rows])
        entry = np.repeat(np.arange(len(feeds)), [len(feed.rows) for feed in feeds])
        lengths = np.array([len(feed.prompt_ids) for feed in feeds])[entry]
        lanes.prompt_row[rows], lanes.shared[rows], lanes.length[rows] = prompt_rows[entry], lengths, lengths
        return self._sample(rows, logits[torch.from_numpy(entry).to(logits.device)])

    def _prefill_rows(self, feeds: Sequence[Feed]) -> Sampled:
        """Prompts, or what was appended to them, each into the conversation's own row."""
        lanes = self.lanes
        rows = np.array([feed.rows[0] for feed in feeds])
        self._copy_opening(self._cache.rows, rows, feeds)
        step, ids = _new_tokens(rows, feeds, shared=lanes.shared[rows], prompt_rows=lanes.prompt_row[rows])
        logits = self._forward(self._cache.rows, step, ids)
        lanes.length[rows] = [len(feed.prompt_ids) for feed in feeds]
        return self._sample(rows, logits)

    @torch.inference_mode()
    def decode(self) -> Sampled:
        """One more token for every active row (there must be one). Rows [0, last active] are computed, idle
        ones in vain."""
        lanes = self.lanes
        active = np.flatnonzero(lanes.active)
        num_rows = int(active[-1]) + 1
        step = Pass(
            rows=np.arange(num_rows),
            positions=lanes.length[:num_rows, None],
            valid=np.ones((num_rows, 1), dtype=bool),
            shared=lanes.shared[:num_rows],
            prompt_rows=lanes.prompt_row[:num_rows],
        )
        logits = self._forward(self._cache.rows, step, lanes.next_id[:num_rows, None])
        if len(active) < num_rows:
            logits = logits[torch.from_numpy(active).to(logits.device)]
        lanes.length[active] += 1
        return self._sample(active, logits)

    @torch.inference_mode()
    def compact(self) -> list[tuple[int, int]]:
        """Exchange high active rows with low idle ones when too many idle rows lie in between; the pairs of
        rows exchanged."""
        active = np.flatnonzero(self.lanes.active)
        if not len(active) or active[-1] + 1 - len(active) <= _MAX_HOLES * (active[-1] + 1):
            return []
        low = np.flatnonzero(~self.lanes.active[: len(active)])
        high = active[-len(low) :]
        sources, targets = np.concatenate([low, high]), np.concatenate([high, low])
        self._cache.rows.copy_rows(
            sources, targets, int((self.lanes.length - self.lanes.shared)[sources].max())
        )
        self.lanes.move(sources, targets)
        return list(zip(low.tolist(), high.tolist()))

    def free(self, row: int) -> None:
        """The row holds nothing any more."""
        self.lanes.active[row] = False
        self.lanes.length[row] = self.lanes.shared[row] = 0

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Free a row whose numbers, or whose shared prompt's, may not be finite."""
        self.free(row)
        self._opening.forget()
        self._opening.store.clear_row_if_broken(0)
        self._cache.rows.clear_row_if_broken(row)
        self._cache.prompts.clear_row_if_broken(int(self.lanes.prompt_row[row]))

    def _forward(self, store: RowStore, step: Pass, ids: np.ndarray) -> torch.Tensor:
        """Logits [m, V] after the last token of each entry. ids: [m, T], padding on the left."""
        cache, device = self._cache, self._model.device
        cache.bind(store, step)
        hidden = torch.from_numpy(step.hidden()[:, None]).to(device)
        return self._model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.zeros(hidden.shape, dtype=self._model.dtype, device=device).masked_fill_(
                hidden, float("-inf")
            ),
            position_ids=torch.from_numpy(step.positions).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **({"row_cache": cache} if self._can_share else {}),
        ).logits[:, -1]

    def _sample(self, rows: np.ndarray, logits: torch.Tensor) -> Sampled:
        """Draw the next token of rows whose cache holds everything before it."""
        lanes = self.lanes
        noise = uniform_noise(lanes.seed[rows], lanes.length[rows])
        ids, logprobs = sample(logits, lanes.temperature[rows], noise)
        lanes.append(rows, ids, logprobs)
        return Sampled(rows=rows, ids=ids, logprobs=logprobs)


def _max_length(config: PreTrainedConfig) -> int:
    """Positions one conversation may hold. Within a sliding window, sliding attention is full attention; a
    longrope model (Phi-3, Phi-4-mini) turns all its keys otherwise once one lies beyond the original
    length, so cached ones would be wrong."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"the model's layers are {sorted(kinds)}, expected full or sliding attention: the embedded engine"
            " cannot serve it"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    limits = (text.max_position_embeddings, getattr(text, "sliding_window", None), original)
    return min(limit for limit in limits if limit)


def _new_tokens(
    rows: np.ndarray, feeds: Sequence[Feed], *, shared: np.ndarray, prompt_rows: np.ndarray
) -> tuple[Pass, np.ndarray]:
    """The pass that feeds the new tokens of `feeds` into `rows`, and its ids [m, T], padded on the left."""
    starts, stops = (np.array(n) for n in zip(*((feed.start, len(feed.prompt_ids)) for feed in feeds)))
    padded = max(feed.num_new for feed in feeds)
    positions = np.arange(padded)[None, :] + (stops - padded)[:, None]
    valid = positions >= starts[:, None]
    ids = np.zeros(positions.shape, dtype=np.int64)
    ids[valid] = np.concatenate([feed.prompt_ids[feed.start :] for feed in feeds])
    step = Pass(
        rows=rows,
        positions=np.where(valid, positions, 0),
        valid=valid,
        shared=shared,
        prompt_rows=prompt_rows,
    )
    return step, ids


def _chunks(feeds: Sequence[Feed]) -> list[list[Feed]]:
    """Feeds with similar numbers of new tokens together, each chunk within the bound of one prefill pass."""
    chunks: list[list[Feed]] = []
    for feed in sorted(feeds, key=lambda feed: feed.num_new, reverse=True):
        padded = chunks[-1][0].num_new if chunks else 0
        if chunks and padded * (len(chunks[-1]) + 1) <= _PREFILL_TOKENS and padded <= 2 * feed.num_new + 32:
            chunks[-1].append(feed)
        else:
            chunks.append([feed])
    return chunks
