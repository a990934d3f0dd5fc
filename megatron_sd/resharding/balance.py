"""What a plan moves, and how evenly: for people who choose numbers of ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sd.resharding.plan import ReshardPlan


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Bytes of one publish. moved: over all links, the sum of the workers' shards. gathered: what gathering
    on every rank and broadcasting to every worker would move. sent, received, links: the least and the most
    of a rank, a worker, a pair that talks. longest_chain: bytes one after the other until the last worker
    is served, when every party has one link at a time in the plan's order; never less than the most that a
    single party sends or receives."""

    moved: int
    gathered: int
    sent: tuple[int, int]
    received: tuple[int, int]
    links: tuple[int, int]
    longest_chain: int


def balance(plan: ReshardPlan) -> Balance:
    """Counted from the links, not from the layouts."""
    num_ranks, tp_size = plan.source.world_size, len(plan.workers)
    by_tp_rank = [[plan.num_bytes(rank, worker) for worker in range(tp_size)] for rank in range(num_ranks)]
    links = [
        [by_tp_rank[rank][worker % tp_size] for worker in range(plan.num_workers)]
        for rank in range(num_ranks)
    ]
    sent, received = [sum(row) for row in links], [sum(column) for column in zip(*links)]
    used = [size for row in links for size in row if size]
    whole = sum(spec.numel for spec in plan.source.parameters) * plan.item_bytes
    return Balance(
        moved=sum(sent),
        gathered=whole * (num_ranks - 1 + plan.num_workers),
        sent=(min(sent), max(sent)),
        received=(min(received), max(received)),
        links=(min(used), max(used)),
        longest_chain=_longest_chain(plan, links),
    )


def _longest_chain(plan: ReshardPlan, links: list[list[int]]) -> int:
    """A link begins when both its ends are through with their links of earlier rounds."""
    rank_free, worker_free = [0] * plan.source.world_size, [0] * plan.num_workers
    for meetings in plan.rounds():
        for rank, worker in meetings:
            rank_free[rank] = worker_free[worker] = (
                max(rank_free[rank], worker_free[worker]) + links[rank][worker]
            )
    return max(rank_free + worker_free)
