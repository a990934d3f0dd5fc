"""What a rank does between rollouts and update: work on the step's groups shared out among ranks, against
every rank doing all of it.

    python -m benchmarks.algorithm.assemble [--questions 1024] [--ranks 8] [--json FILE]

Synthetic rollouts, eight of a question, 3,700 tokens each: a prompt of 300, three searches with 1,000 tokens
observed, an answer. Ranks are processes of this machine, joined by gloo; since they share its cores, seconds
are a rank's own processor time, of the slowest rank. Memory: what a rank holds more at its peak, pages of
files left out.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing as mp

from benchmarks.baseline import Comparison, report
from benchmarks.resident import anonymous_bytes, extra_mib
from megatron_sd import records

GROUP, SEARCHES, VOCABULARY = 8, 3, 150_000
MODEL = Path("data_prep/coldstart_model")  # its tokenizer reads the blocks


def made_group(number: int) -> records.RolloutGroup:
    """A question's rollouts; half of them end right."""
    rng = random.Random(number)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def text(num_words: int) -> str:
        return " ".join(f"w{rng.randrange(5000)}" for _ in range(num_words))

    passages = [records.Passage(id=f"{number}/{n}", title=text(3), text=text(100)) for n in range(12)]

    def turn(place: int) -> records.Turn:
        searches = place < SEARCHES
        return records.Turn(
            completion_ids=ids(100),
            completion_logprobs=[-rng.random() for _ in range(100)],
            observation_ids=ids(1000) if searches else (),
            action=records.Action(tool=records.SEARCH, text=text(5), span=(80, 92)) if searches else None,
            hits=tuple(records.Hit(passage=one, score=1.0) for one in rng.sample(passages, 3))
            if searches
            else (),
        )

    prompt = ids(300)
    rollouts = [
        records.Rollout(
            question_id=str(number),
            index=index,
            prompt_ids=prompt,
            turns=tuple(turn(place) for place in range(SEARCHES + 1)),
            stop_reason=records.StopReason.ANSWERED,
            answer=f"gold {number}" if index % 2 else text(2),
        )
        for index in range(GROUP)
    ]
    question = records.Question(id=str(number), text=text(12), golden_answers=(f"gold {number}",))
    return records.RolloutGroup(question=question, rollouts=tuple(rollouts))


def assembled(world: Any, own: list, *, shared: bool) -> Callable[[], Any]:
    """The phase as the trainer takes it from this rank's rollouts on. shared False: each rank by itself, all
    ranks' batches included, as before the work was shared out."""
    from megatron_sd.algorithm.assemble import own_batches, teach
    from megatron_sd.algorithm.samples import GATES, SCOPES, to_samples
    from megatron_sd.building.trainer import estimator_of, hindsight_of
    from megatron_sd.config.load import load
    from megatron_sd.distributed.collectives import shared_out, together
    from megatron_sd.distributed.world import lone_world
    from megatron_sd.observability.metrics import block_figures, block_metrics, rollout_metrics
    from megatron_sd.search.rewards.reward import score
    from megatron_sd.search.tokens import load_codec

    settings = {
        "model.path": MODEL,
        "run_dir": "none",
        "data.train": "none",
        "retriever.corpus": "none",
        "distill.alpha.warmup_steps": 0,
    }
    config = load([f"--{key}={value}" for key, value in settings.items()])
    codec, hindsight = load_codec(config.model.path), hindsight_of(config.distill, 0)

    def prompt_ids(question: str, block: str) -> tuple[int, ...]:
        return codec.encode(f"{block}\n{question}")

    def action() -> Any:
        workers = world if shared else lone_world(world.device)
        if shared:
            parts = together(world, lambda: score(own, config.reward))
            groups = [group for part in parts for group in part]
        else:
            groups = score([group for part in together(world, lambda: own) for group in part], config.reward)
        advantages = estimator_of(config.advantage)(groups)

        def taught(numbers: Any) -> list:
            parts = {"hindsight": hindsight, "prompt_ids": prompt_ids, "gate": GATES["none"]}
            return teach(groups, advantages, 1, numbers, **parts)

        teaching = shared_out(workers, range(len(groups)), taught)
        samples = to_samples(groups, advantages, [one.prompts for one in teaching], scope=SCOPES["query"])
        if not shared:
            samples = list(samples)
        ranks = [world.rank] if shared else range(world.size)
        batches = [
            own_batches(samples, config=config.update, aggregation="token", place=(rank, world.size))
            for rank in ranks
        ]
        pairs = [(group, one.texts) for group, one in zip(groups, teaching, strict=True)]
        figures = shared_out(workers, pairs, block_figures)
        return batches, rollout_metrics(groups) | block_metrics(figures)

    return action


def rank_of(rank: int, num_ranks: int, num_questions: int, results: Path) -> None:
    """One rank: both ways in turn."""
    import torch.distributed as dist

    from megatron_sd.distributed.collectives import share
    from megatron_sd.distributed.world import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=num_ranks)
    world = World(rank=rank, size=num_ranks, local_rank=rank, device=torch.device("cpu"))
    own = [made_group(number) for number in share(world, range(num_questions))]
    figures = []
    for shared in (True, False):
        action = assembled(world, own, shared=shared)
        assembled(world, own[:1], shared=shared)()  # a warm-up
        dist.barrier()
        began = time.process_time()
        memory = extra_mib(action, anonymous_bytes, every_s=0.05)
        figures.append((time.process_time() - began, memory))
        dist.barrier()
    torch.save(figures, results / f"{rank}.pt")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(rank_of, (arguments.ranks, arguments.questions, Path(directory)), nprocs=arguments.ranks)
        found = [torch.load(Path(directory) / f"{rank}.pt") for rank in range(arguments.ranks)]
    size = f"{arguments.questions} x {GROUP} rollouts, {arguments.ranks} ranks"
    comparisons = []
    for place, (name, unit) in enumerate((("assemble", "s"), ("memory of assemble", "MiB"))):
        ours, theirs = (max(rank[way][place] for rank in found) for way in (0, 1))
        comparisons.append(
            Comparison(name=f"{name}, {size}", ours=ours, theirs=theirs, unit=unit, against="every rank all")
        )
    report("assemble", comparisons, arguments.json)


if __name__ == "__main__":
    main()
