"""One of four gloo ranks: losses over a sharded head, by groups of two, three and four ranks; results go to
files."""

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from megatron_sd.distributed.collectives import gather_tensors
from megatron_sd.distributed.world import join_world, leave_world
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.vocab_parallel import (
    VocabShard,
    replicated,
    vocab_parallel_divergence,
    vocab_parallel_logprobs,
)

NUM_RANKS, NUM_ROWS, WIDTH, VOCABULARY, TEMPERATURE = 4, 9, 12, 53, 1.3
LAYOUTS = {"two": (30, 23), "three": (20, 20, 13), "four": (16, 16, 16, 5), "empty_shards": (28, 0, 25, 0)}
PADDING = 7  # columns after each rank's own
KINDS = ("jsd", "forward_kl", "reverse_kl")
SKEWED = Divergence(kind="jsd", beta=0.3, temperature=TEMPERATURE)


def inputs():
    """hidden, teacher [N, H]; weight [V, H]; targets and slopes of the divergence and of the
    log-probability [N]; entropies have the divergence's. One token is
    impossible for both."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(NUM_ROWS, WIDTH, generator=generator) for _ in range(2))
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (NUM_ROWS,), generator=generator)
    return hidden, teacher, weight, targets, torch.linspace(-1, 2, NUM_ROWS), torch.linspace(0.5, 3, NUM_ROWS)


def one_rank(rank: int, sizes: tuple[int, ...], gather) -> dict[str, list[torch.Tensor]]:
    """kind -> values, log-probabilities, entropies, gradient of hidden and of this rank's weight."""
    hidden, teacher, weight, targets, divergence_slopes, logprob_slopes = inputs()
    start = sum(sizes[:rank])
    padding = torch.full((PADDING, WIDTH), 3.0)
    found = {}
    for kind in KINDS:
        leaf = hidden.clone().requires_grad_()
        own = torch.cat([weight[start : start + sizes[rank]], padding]).requires_grad_()
        shard = VocabShard(start=start, num_real=sizes[rank], gather=gather)
        logits = F.linear(replicated(leaf, shard), own)
        values = vocab_parallel_divergence(logits, F.linear(teacher, own), shard, replace(SKEWED, kind=kind))
        logprobs, entropies = vocab_parallel_logprobs(logits, targets, shard, temperature=TEMPERATURE)
        terms = (values * divergence_slopes, logprobs * logprob_slopes, entropies * divergence_slopes)
        sum(term.sum() for term in terms).backward()
        found[kind] = [values.detach(), logprobs.detach(), entropies.detach(), leaf.grad, own.grad]
    return found


def run(output: str) -> None:
    """Every rank takes part in the groups that have a place for it. output: a directory."""
    rank, directory = join_world().rank, Path(output)
    for name, sizes in LAYOUTS.items():
        group = dist.new_group(list(range(len(sizes))))
        if rank < len(sizes):
            torch.save(
                one_rank(rank, sizes, functools.partial(gather_tensors, group=group)),
                directory / f"{name}_{rank}.pt",
            )
    dist.barrier()
    leave_world()
