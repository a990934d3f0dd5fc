"""publish.changes_only, from one rank in this process to real worker processes: what the second transfer of a
session carries, and that every failure makes the next one dense; several ranks: test_ranks.py."""

import pytest
import torch

from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.changed_buckets import HEADER_BYTES
from megatron_sd.resharding.connection import bucket_elements
from megatron_sd.resharding.plan import outgoing
from tests.rank_programs.publish_shards import Scene, make_publisher, take_step
from tests.resharding.test_publish import Colocated, assert_published, begin
from tests.training.fakes import write_model

pytestmark = pytest.mark.ranks
BUCKET_MIB = 0.001
CHANGES = {"wire": "gloo", "bucket_mib": BUCKET_MIB, "changes_only": True}


def header_bytes(publisher) -> int:
    """Of one transfer from the only rank."""
    numel = bucket_elements(publisher.plan, publisher._sender._terms)
    return HEADER_BYTES * sum(1 for _ in outgoing(publisher.plan, 0, numel))


def dense_bytes(publisher) -> int:
    return header_bytes(publisher) + sum(
        publisher.plan.num_bytes(0, n) for n in range(publisher.plan.num_workers)
    )


@torch.no_grad()
def nudge(policy, every: int) -> int:
    """Another value for one element in so many of every parameter, the first one included; how many."""
    count = 0
    for _, parameter in policy.named_parameters():
        chosen = parameter.ds_tensor.view(-1)[: parameter.ds_numel][::every]
        chosen.mul_(1.5).add_(1.0)
        count += len(chosen)
    return count


@pytest.mark.parametrize(
    ("family", "tied", "options"),
    [
        ("qwen3", False, {"tp_size": 2, "checksums": True}),
        ("qwen2", True, {"tp_size": 1, "dtype": "bfloat16"}),
        ("llama", False, {"tp_size": 2, "dtype": "bfloat16", "bucket_mib": 1.0}),
    ],
)
def test_workers_hold_their_shards_and_less_travels(tmp_path, group, family, tied, options):
    policy, publisher = begin(
        write_model(tmp_path / "model", family=family, tied=tied), group, **(CHANGES | options)
    )
    publisher.publish(policy, group, 0)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == dense_bytes(publisher) and publisher.changed_share is None
    num_elements = sum(spec.numel for spec in publisher.plan.source.parameters)
    for version in (1, 2):
        share = nudge(policy, every=50) / num_elements
        publisher.publish(policy, group, version)
        assert_published(policy, publisher, group)
        assert publisher.changed_share == share < 0.04
        assert publisher.num_bytes < dense_bytes(publisher) / 4
        assert publisher.metrics() == {
            "publish/sent_mib": publisher.num_bytes / 2**20,
            "publish/changed_share": share,
        }
    publisher.publish(policy, group, 3)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == header_bytes(publisher) and publisher.changed_share == 0
    take_step(policy)  # where most elements move
    publisher.publish(policy, group, 4)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes <= dense_bytes(publisher)
    publisher.close()


def test_over_shared_memory_nothing_changes(tmp_path, group):
    policy, publisher = begin(write_model(tmp_path / "model"), group, wire="shared_memory", changes_only=True)
    for version in range(2):
        publisher.publish(policy, group, version)
        assert_published(policy, publisher, group)
        assert publisher.num_bytes == dense_bytes(publisher) - header_bytes(publisher)
        assert publisher.changed_share is None


@pytest.mark.parametrize("fault", ["die_while_receiving", "die_when_staged"])
def test_after_a_lost_worker_everything_is_sent(tmp_path, group, fault):
    """To the one that is new, and to the one whose staged memory has some of the version that failed."""
    policy, publisher = begin(write_model(tmp_path / "model", tied=False), group, **CHANGES)
    publisher.publish(policy, group, 0)
    before = group.workers[0].tensors()
    nudge(policy, every=20)
    group.workers[1].call(fault)
    with pytest.raises(ReshardError, match=r"worker 1 .* has (died|stopped answering)"):
        publisher.publish(policy, group, 1)
    assert all(torch.equal(value, before[name]) for name, value in group.workers[0].tensors().items())
    nudge(policy, every=20)  # what was sent and what is sent next differ
    group.restart(1, publisher)
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == dense_bytes(publisher)
    publisher.publish(policy, group, 2)
    assert publisher.num_bytes == header_bytes(publisher)


def test_a_worker_that_was_replaced_gets_everything(tmp_path, group):
    policy, publisher = begin(write_model(tmp_path / "model"), group, **CHANGES)
    publisher.publish(policy, group, 0)
    group.restart(0, publisher)
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == dense_bytes(publisher)


def test_a_damaged_element_is_named_and_mended(tmp_path, group):
    """By the checksums of all that is staged, although nothing was sent for that element."""
    policy, publisher = begin(write_model(tmp_path / "model"), group, **CHANGES, checksums=True)
    publisher.publish(policy, group, 0)
    group.workers[1].call("damage", name="model.layers.1.mlp.down_proj.weight", index=7)
    with pytest.raises(
        ReshardError, match="checksums differ in 1 parameters, such as model.layers.1.mlp.down_"
    ):
        publisher.publish(policy, group, 1)
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == dense_bytes(publisher)


def test_after_a_refused_version_everything_is_sent(tmp_path):
    scene = Scene(
        model=str(write_model(tmp_path / "model")), output="", tp_size=2, num_replicas=1, publish=CHANGES
    )
    policy, publisher = make_publisher(scene, join_world())
    group = Colocated(publisher)
    publisher.publish(policy, group, 0)
    before = [{name: value.clone() for name, value in worker.live.items()} for worker in group.workers]
    nudge(policy, every=20)
    group.told = 4
    with pytest.raises(ReshardError, match="was told to take version 4, the trainer sends version 1"):
        publisher.publish(policy, group, 1)
    for worker, tensors in zip(group.workers, before):
        assert all(torch.equal(value, tensors[name]) for name, value in worker.live.items())
    group.told = None
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)
    assert publisher.num_bytes == dense_bytes(publisher)
