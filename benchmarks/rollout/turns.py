"""Rollouts: concurrent against lock-step turns, and a KV cache kept across turns against prefilling each
conversation again.

    python -m benchmarks.rollout.turns [--json FILE]

40 rollouts (8 questions x 5) of three searches each on a random Qwen2 of 2 layers x 64, float32. Thoughts
of 8 to 40 sampled tokens; a random model would never search, so the action after a thought is written for
it, the same for both sides. Lock-step is Search-R1's loop: all rollouts sample a turn, all queries are
searched in one batch, which takes as long as its slowest query, then all go on. A search takes a log-normal
time (median 0.1 s, sigma 1), a function of its query alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

from benchmarks.baseline import Comparison, report
from benchmarks.tiny_model import random_prompts, write_model
from megatron_sd.config import ProtocolConfig, RolloutConfig
from megatron_sd.records import Hit, Passage, Question
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.rollout.engine import Completion, GenerationRequest, InferenceEngine
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.sampling import rollout_seed
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import load_codec

NUM_QUESTIONS, GROUP_SIZE, NUM_SEARCHES, PROMPT_TOKENS = 8, 5, 3, 96
THOUGHT_TOKENS = (8, 40)
MEDIAN_LATENCY_S, LATENCY_SIGMA = 0.1, 1.0
NUM_ROUNDS = 3
LIMITS = RolloutConfig(
    group_size=GROUP_SIZE, max_search_turns=NUM_SEARCHES, max_turn_tokens=200, max_observation_tokens=400
)


class SteeredEngine:
    """Lets the real engine sample a thought and writes the action after it. Counts all sampled tokens."""

    def __init__(self, engine: InferenceEngine, environment: Environment):
        self.policy_version = 0
        self.num_sampled = 0
        self._engine = engine
        self._environment = environment
        self._num_turns: Counter[str] = Counter()

    async def generate(self, request: GenerationRequest) -> Completion:
        """A thought of drawn length, then a search, or the answer when all searches are done."""
        turn = self._num_turns[request.session]
        self._num_turns[request.session] += 1
        length = random.Random(f"{request.seed}/{turn}").randint(*THOUGHT_TOKENS)
        thought = await self._engine.generate(replace(request, max_new_tokens=length, stop=()))
        self.num_sampled += len(thought.ids)
        protocol = self._environment.protocol
        text = f"{request.seed} {turn}".join(
            protocol.search_tags if turn < NUM_SEARCHES else protocol.answer_tags
        )
        action = self._environment.codec.encode(text)
        return replace(
            thought, ids=thought.ids + action, logprobs=thought.logprobs + (0.0,) * len(action), finish="stop"
        )

    def wake(self) -> None:
        """As the engine's."""
        self._engine.wake()

    def sleep(self) -> None:
        """As the engine's."""
        self._engine.sleep()

    def release(self, session: str) -> None:
        """As the engine's."""
        self._engine.release(session)


class SlowRetriever:
    """Every query finds one passage of `num_letters` tokens, after a time of its own (none with median 0)."""

    corpus_version = "none"

    def __init__(self, *, num_letters: int, median_s: float):
        self._hits = (
            Hit(passage=Passage(id="p", title="", text=random_prompts(1, num_letters)[0]), score=1.0),
        )
        self._median_s = median_s

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """A batch takes as long as its slowest query."""
        if self._median_s > 0:
            await asyncio.sleep(
                max(self._median_s * random.Random(q).lognormvariate(0, LATENCY_SIGMA) for q in queries)
            )
        return [self._hits for _ in queries]


async def lock_step(
    engine: SteeredEngine, retriever: SlowRetriever, environment: Environment, questions: list[Question]
) -> None:
    """Search-R1's loop over the same engine: nobody goes on before everybody has searched."""
    live = {(q.id, n): environment.prompt_ids(q.text) for q in questions for n in range(GROUP_SIZE)}
    for turn in range(NUM_SEARCHES + 1):
        requests = [
            GenerationRequest(
                session=f"{name}",
                prompt_ids=ids,
                max_new_tokens=environment.turn_budget(len(ids)),
                temperature=1.0,
                seed=rollout_seed(0, step=0, question_id=name[0], index=name[1]),
                stop=environment.protocol.stop_strings,
            )
            for name, ids in live.items()
        ]
        completions = await asyncio.gather(*(engine.generate(request) for request in requests))
        verdicts = [environment.judge(c.ids, turn=turn, truncated=False) for c in completions]
        searching = {
            name: (ids + c.ids, v)
            for (name, ids), c, v in zip(live.items(), completions, verdicts)
            if v.action
        }
        if not searching:
            return
        found = await retriever.search([v.action.text for _, v in searching.values()], 1)
        live = {
            name: ids + environment.observation_ids(h)
            for (name, (ids, _)), h in zip(searching.items(), found)
        }


class Bench:
    """The model directory, and ways to run the same rollouts over it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._codec = load_codec(str(directory))
        self._environment = Environment(self._codec, build_protocol(ProtocolConfig(preset="compact")), LIMITS)
        texts = random_prompts(NUM_QUESTIONS, PROMPT_TOKENS - 12)
        self._questions = [
            Question(id=str(n), text=text, golden_answers=("",)) for n, text in enumerate(texts)
        ]

    def engine(self, *, reuse_cache: bool) -> TorchEngine:
        """A fresh engine."""
        model = load_model(str(self._directory), dtype=torch.float32, device=torch.device("cpu"))
        return TorchEngine(model, self._codec, max_rows=NUM_QUESTIONS * GROUP_SIZE, reuse_cache=reuse_cache)

    def concurrent(self, engine: InferenceEngine, retriever: SlowRetriever) -> int:
        """Our rollouter; the number of sampled tokens."""
        steered = SteeredEngine(engine, self._environment)
        Rollouter(steered, retriever, self._environment, top_k=1, seed=0).run(self._questions, step=0)
        return steered.num_sampled

    def lock_step(self, engine: InferenceEngine, retriever: SlowRetriever) -> int:
        """The lock-step loop; the number of sampled tokens."""
        steered = SteeredEngine(engine, self._environment)
        asyncio.run(lock_step(steered, retriever, self._environment, self._questions))
        return steered.num_sampled


def in_turn(ours: Callable[[], int], theirs: Callable[[], int]) -> tuple[float, float]:
    """Median milliseconds per sampled token of both, run alternately after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + NUM_ROUNDS):
        for side, run in zip(times, (ours, theirs)):
            start = time.perf_counter()
            num_sampled = run()
            side.append(1000 * (time.perf_counter() - start) / num_sampled)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main() -> None:
    """Run both comparisons and report them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), vocabulary=1024, hidden=64, layers=2)
        bench = Bench(Path(directory))
        engine, without_reuse = bench.engine(reuse_cache=True), bench.engine(reuse_cache=False)
        slow = SlowRetriever(num_letters=60, median_s=MEDIAN_LATENCY_S)
        long = SlowRetriever(num_letters=250, median_s=0)
        rollouts = in_turn(lambda: bench.concurrent(engine, slow), lambda: bench.lock_step(engine, slow))
        cache = in_turn(lambda: bench.concurrent(engine, long), lambda: bench.concurrent(without_reuse, long))
    unit = "ms/token"
    report(
        "rollout",
        [
            Comparison(
                name="searches of varying latency",
                ours=rollouts[0],
                theirs=rollouts[1],
                unit=unit,
                against="lock-step",
            ),
            Comparison(
                name="KV cache kept across turns",
                ours=cache[0],
                theirs=cache[1],
                unit=unit,
                against="re-prefill",
            ),
        ],
        arguments.json,
    )


if __name__ == "__main__":
    main()
