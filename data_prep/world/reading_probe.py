"""A cheap look, during the cold start, at whether the model reads hindsight blocks: no sampling, one
forward pass for each block.

On fixed demonstrations with mixed blocks it takes the first query for each entity on the way to the answer
and reports the probability of the keyword that hits, given the block, the block with its labels shuffled,
another question's block, and none. Reading labels shows as linked above shuffled; a wrong question's block
must come out at the level of none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from data_prep.world.demonstrations import Demonstration, DemonstratorConfig, Trace, make_demonstration
from data_prep.world.world import RELATION_OF
from megatron_sd.algorithm.hindsight import AttemptLine, render_outcome_first
from megatron_sd.search.protocol import Protocol

_BATCH = 64
_SEGMENTS_PER_SEARCH = 4  # the query; opening tag, passage and closing tag of its observation


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A tokenised demonstration and where to look: `positions` of keyword tokens, `targets` the ids of the
    keywords that hit."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


class ReadingProbe:
    """Fixed demonstrations under four blocks; `measure(model)` gives one probability each."""

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        protocol: Protocol,
        demonstrator: DemonstratorConfig,
        *,
        num_episodes: int,
        seed: int,
    ) -> None:
        self._tokenizer, self._protocol = tokenizer, protocol
        rng = random.Random(f"probe/{seed}")
        episodes: list[Demonstration] = []
        while len(episodes) < num_episodes:
            episode = make_demonstration("mixed", protocol, demonstrator, rng)
            if len({trace.correct for trace in episode.block_traces}) == 2:
                episodes.append(episode)
        others = episodes[1:] + episodes[:1]
        self._sets = {
            "linked": [self._probed(e, e.block) for e in episodes],
            "shuffled": [self._probed(e, _shuffled(e.block_traces, rng)) for e in episodes],
            "wrong_question": [self._probed(e, other.block) for e, other in zip(episodes, others)],
            "none": [self._probed(e, "") for e in episodes],
        }

    @torch.no_grad()
    def measure(self, model: Qwen2ForCausalLM) -> dict[str, float]:
        """Mean probability of the keyword that hits, by block."""
        return {
            name: float(np.mean(self._probabilities(model, probed))) for name, probed in self._sets.items()
        }

    def _probabilities(self, model: Qwen2ForCausalLM, probed: Sequence[Probed]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(probed), _BATCH):
            part = probed[start : start + _BATCH]
            ids = torch.full((len(part), max(len(p.ids) for p in part)), self._tokenizer.pad_token_id)
            for row, item in enumerate(part):
                ids[row, : len(item.ids)] = torch.tensor(item.ids)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            for row, item in enumerate(part):
                logits = model.lm_head(hidden[row, [p - 1 for p in item.positions]].float())
                found += torch.softmax(logits, -1)[range(len(item.targets)), item.targets].tolist()
        return found

    def _probed(self, episode: Demonstration, block: str) -> Probed:
        prompt = block + episode.segments[0][1].removeprefix(episode.block)
        texts = [prompt, *(text for _, text in episode.segments[1:])]
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        offsets = np.cumsum([0, *(len(ids) for ids in encoded)])
        num_closing_tokens = len(
            self._tokenizer(self._protocol.search_tags[1], add_special_tokens=False)["input_ids"]
        )
        positions, targets, asked = [], [], set()
        for i, (entity, keyword, _) in enumerate(episode.trace.searches):  # segment 0 is the prompt
            if entity not in asked:
                asked.add(entity)
                right = episode.table[RELATION_OF[keyword], entity.type]
                positions.append(int(offsets[_SEGMENTS_PER_SEARCH * i + 2]) - num_closing_tokens - 1)
                targets.append(self._tokenizer(f" {right}", add_special_tokens=False)["input_ids"][0])
        return Probed(
            ids=tuple(token for ids in encoded for token in ids),
            positions=tuple(positions),
            targets=tuple(targets),
        )


def _shuffled(traces: Sequence[Trace], rng: random.Random) -> str:
    """The block of `traces` with its labels in another order; the labels must differ among themselves."""
    labels = [trace.correct for trace in traces]
    permuted = list(labels)
    while permuted == labels:
        rng.shuffle(permuted)
    return render_outcome_first(
        [AttemptLine(queries=t.attempt.queries, correct=label) for t, label in zip(traces, permuted)]
    )
