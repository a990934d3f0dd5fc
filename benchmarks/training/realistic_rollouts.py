"""Samples of an update as searching makes them: four searches, observations of 500 tokens, a hindsight
block a group."""

from __future__ import annotations

import numpy as np

from megatron_sd.records import TrainingSample

PROMPT, TURN, QUERY, OBSERVATION, ANSWER, BLOCK, SEARCHES, GROUP = 200, 90, 12, 500, 60, 350, 4, 5


def samples(num_questions: int, vocabulary: int, *, scale: float) -> list:
    """Rollouts of SEARCHES searches, all distilled, a group's with one teacher prompt. scale: of every
    length."""

    def length(tokens: int) -> int:
        return max(int(tokens * scale), 2)

    rng, made = np.random.default_rng(0), []
    prompt, turn, query, observation, answer = map(length, (PROMPT, TURN, QUERY, OBSERVATION, ANSWER))
    mask = np.array([False] * prompt + ([True] * turn + [False] * observation) * SEARCHES + [True] * answer)
    turns = [prompt + number * (turn + observation) for number in range(SEARCHES)]
    positions = np.concatenate([np.arange(start + turn - query - 1, start + turn - 1) for start in turns])
    for group in range(num_questions):
        teacher_prompt = tuple(rng.integers(vocabulary, size=length(BLOCK) + prompt).tolist())
        made += [
            TrainingSample(
                ids=rng.integers(vocabulary, size=len(mask)),
                prompt_length=prompt,
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -10.0, 0.0).astype(np.float32),
                query_positions=positions,
                advantages=np.float32(1.0 - index % 3) * mask,
                turns=np.zeros(len(mask), np.int64),
                group=group,
                group_has_spread=True,
                teacher_prompt_ids=teacher_prompt,
            )
            for index in range(GROUP)
        ]
    return made
