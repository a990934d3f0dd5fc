"""Two and three real ranks under ZeRO-3 publish to worker processes; one start a world."""

import json
import re

import pytest
import torch

from megatron_sd.resharding.changed_buckets import HEADER_BYTES
from megatron_sd.resharding.exchange import NUM_BUFFERS
from tests.nursery import run_ranks
from tests.training.fakes import write_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
LIMIT_S = 600
BUCKET_MIB = 0.002
SCENES = {
    2: {
        "tied": {"model": "qwen2 tied", "tp_size": 2, "num_replicas": 1},
        "replicas": {"model": "qwen3", "tp_size": 1, "num_replicas": 2, "publish": {"wire": "gloo", "bucket_mib": BUCKET_MIB}},
        "stage 1": {"model": "qwen2", "tp_size": 1, "num_replicas": 1, "zero_stage": 1},
        "lost": {"model": "qwen2", "tp_size": 2, "num_replicas": 1, "fault": "die_when_staged"},
        "cut off": {"model": "qwen3", "tp_size": 2, "num_replicas": 1, "publish": {"wire": "gloo", "bucket_mib": BUCKET_MIB},
                    "fault": "die_while_receiving"},
        "changes": {"model": "qwen2", "tp_size": 2, "num_replicas": 1, "dtype": "bfloat16", "learning_rate": 2e-5,
                    "publish": {"wire": "gloo", "bucket_mib": BUCKET_MIB, "changes_only": True}},
        "changes, cut off": {"model": "qwen3 tied", "tp_size": 2, "num_replicas": 1, "fault": "die_while_receiving",
                             "publish": {"wire": "gloo", "bucket_mib": BUCKET_MIB, "changes_only": True}},
    },
    3: {
        "bfloat16": {"model": "qwen3 tied", "tp_size": 2, "num_replicas": 1, "dtype": "bfloat16"},
        "uneven": {"model": "qwen2", "tp_size": 2, "num_replicas": 1,
                   "publish": {"wire": "gloo", "bucket_mib": BUCKET_MIB, "checksums": True}},
    },
}  # fmt: skip
ALL = [(world_size, name) for world_size, scenes in SCENES.items() for name in scenes]
CHANGES = [key for key in ALL if "changes" in key[1]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(world size, name) -> the outcomes of all ranks."""
    directory = tmp_path_factory.mktemp("reshard")
    for seed, name in enumerate(["qwen2", "qwen2 tied", "qwen3", "qwen3 tied"]):
        write_model(directory / name, family=name.split()[0], tied="tied" in name, seed=seed)
    found = {}
    for world_size, scenes in SCENES.items():
        work = [
            {
                **scene,
                "model": str(directory / scene["model"]),
                "output": str(directory / f"{world_size} {name}"),
            }
            for name, scene in scenes.items()
        ]
        program = "tests.rank_programs.publish_shards:run"
        run_ranks(program, json.dumps(work), ranks=world_size, limit_s=LIMIT_S)
        for name in scenes:
            found[world_size, name] = [
                torch.load(directory / f"{world_size} {name}.{rank}") for rank in range(world_size)
            ]
    return found


@pytest.mark.parametrize(("world_size", "name"), ALL)
def test_workers_hold_what_a_direct_cut_of_the_full_tensors_gives(outcomes, world_size, name):
    for outcome in outcomes[world_size, name]:
        assert outcome["differences"] == []
        assert outcome["log"][-1] == "finish 2"


@pytest.mark.parametrize(("world_size", "name"), [key for key in ALL if key not in CHANGES])
def test_bytes_moved_are_the_sum_of_the_workers_shards(outcomes, world_size, name):
    """And gathering on every rank and broadcasting to every worker would move several times as many."""
    ranks = outcomes[world_size, name]
    item_bytes = 2 if name == "bfloat16" else 4
    shards, numel = ranks[0]["shards"], ranks[0]["numel"]
    for version in range(2):
        assert sum(outcome["sent"][version] for outcome in ranks) == item_bytes * sum(shards)
        assert ranks[0]["received"][version] == [item_bytes * shard for shard in shards]
    gathered = item_bytes * numel * (world_size - 1 + len(shards))
    print(
        f"{world_size} ranks to {name}: {item_bytes * sum(shards)} bytes moved, {gathered} by gather and"
        " broadcast"
    )
    assert item_bytes * sum(shards) < gathered / 1.4


def test_two_ranks_send_what_changed_and_all_of_it_after_a_failure(outcomes):
    """Every worker's shard in bfloat16, 2 bytes an element, or in float32; headers are 8 bytes a bucket."""
    ranks, failed = outcomes[2, "changes"], outcomes[2, "changes, cut off"]
    dense = 2 * sum(ranks[0]["shards"])
    for version in range(2):
        sent = sum(outcome["sent"][version] for outcome in ranks)
        assert sent == sum(ranks[0]["received"][version]) < 0.8 * dense
        assert all(0 < outcome["shares"][version] < 0.5 for outcome in ranks)
    assert all(outcome["shares"][0] is None for outcome in failed)
    assert 4 * sum(failed[0]["shards"]) < sum(outcome["sent"][0] for outcome in failed)
    assert all(outcome["shares"][1] is not None for outcome in failed)


@pytest.mark.parametrize(("world_size", "name"), [key for key in ALL if "publish" in SCENES[key[0]][key[1]]])
def test_no_rank_holds_more_than_its_shard_and_two_buckets(outcomes, world_size, name):
    """As torch's allocator counts, over the whole first publish. A worker's staged shard is the one it then
    takes. With changes_only a rank has a copy of its shard, too."""
    first, *others = outcomes[world_size, name]
    buckets = 2 * int(BUCKET_MIB * 2**20)
    headers = NUM_BUFFERS * HEADER_BYTES if (world_size, name) in CHANGES else 0
    for outcome in (first, *others):
        held = outcome["owned"] if (world_size, name) in CHANGES else 0
        assert held < outcome["peak"] <= buckets + outcome["largest_copy"] + held + headers
    for staged, peak in zip(first["staged"], first["worker_peaks"]):
        assert staged < peak <= staged + buckets + first["largest_copy"] + headers


@pytest.mark.parametrize(
    ("name", "reason"), [("lost", "has died"), ("cut off", "has (died|stopped answering)")]
)
def test_a_lost_worker_is_named_on_every_rank_and_changes_nothing(outcomes, name, reason):
    first, second = outcomes[2, name]
    (error, kept), (other,) = first["errors"], second["errors"]
    assert error == other
    assert re.search(rf"worker 0 \(replica 0, tensor-parallel rank 0 of 2\) {reason}", error), error
    assert kept == "version 0 kept"
