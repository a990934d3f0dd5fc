"""Samples of an update as searching makes them: searches, observations, and a hindsight block a group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sd.records import TrainingSample

GROUP = 5


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a rollout's parts: `searches` turns with an observation each, and an answer. query: those of a
    turn's end that are its query. block: a group's hindsight block."""

    prompt: int = 200
    turn: int = 90
    query: int = 12
    observation: int = 500
    answer: int = 60
    block: int = 350
    searches: int = 4

    def scaled(self, scale: float) -> Lengths:
        """Every length times `scale`, at least 2."""
        lengths = ("prompt", "turn", "query", "observation", "answer", "block")
        return Lengths(
            searches=self.searches, **{name: max(int(getattr(self, name) * scale), 2) for name in lengths}
        )


def samples(num_questions: int, vocabulary: int, *, lengths: Lengths) -> list[TrainingSample]:
    """Rollouts of random tokens, GROUP of a question, all distilled. A group's have one prompt, and one prompt
    of the teacher's that ends as theirs."""
    rng, made = np.random.default_rng(0), []
    searches = ([True] * lengths.turn + [False] * lengths.observation) * lengths.searches
    mask = np.array([False] * lengths.prompt + searches + [True] * lengths.answer)
    turns = [
        lengths.prompt + number * (lengths.turn + lengths.observation) for number in range(lengths.searches)
    ]
    ends = [start + lengths.turn - 1 for start in turns]
    positions = np.concatenate([np.arange(end - lengths.query, end) for end in ends])
    for group in range(num_questions):
        prompt = rng.integers(vocabulary, size=lengths.prompt)
        block = rng.integers(vocabulary, size=lengths.block)
        made += [
            TrainingSample(
                ids=np.concatenate([prompt, rng.integers(vocabulary, size=len(mask) - lengths.prompt)]),
                prompt_length=lengths.prompt,
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -10.0, 0.0).astype(np.float32),
                query_positions=positions,
                advantages=np.float32(1.0 - index % 3) * mask,
                turns=np.zeros(len(mask), np.int64),
                group=group,
                group_has_spread=True,
                teacher_prompt_ids=tuple([*block.tolist(), *prompt.tolist()]),
            )
            for index in range(GROUP)
        ]
    return made
