"""Publishing shards from one rank, in this process, to real worker processes; several ranks:
test_ranks.py."""

import logging
import time

import pytest
import torch

from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ReshardError
from megatron_sd.resharding import staging
from megatron_sd.resharding.connection import choose_wire, worker_id
from megatron_sd.resharding.receiver import ShardReceiver
from megatron_sd.resharding.staging import SharedMemory
from megatron_sd.training.publisher import GatherPublisher, sharded_or_gathering
from tests.rank_programs.publish_shards import Scene, expected_tensors, make_publisher, take_step
from tests.resharding.fakes import WorkerGroup
from tests.training.fakes import make_config, make_policy, write_model

pytestmark = pytest.mark.ranks


def begin(path, group, *, tp_size: int = 2, **publish):
    own = {key: publish.pop(key) for key in ("dtype", "zero_stage") if key in publish}
    num_replicas = len(group.workers) // tp_size
    scene = Scene(
        model=str(path), output="", tp_size=tp_size, num_replicas=num_replicas, publish=publish, **own
    )
    policy, publisher = make_publisher(scene, join_world())
    group.join(publisher)
    return policy, publisher


def assert_published(policy, publisher, group):
    for worker in group.workers:
        found, expected = worker.tensors(), expected_tensors(policy, worker.worker)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert publisher.num_bytes == sum(group.received)


@pytest.mark.parametrize(
    ("family", "tied", "options"),
    [
        ("qwen2", True, {"wire": "shared_memory"}),
        ("qwen3", False, {"wire": "gloo", "bucket_mib": 0.001, "checksums": True}),
        ("llama", False, {"wire": "shared_memory", "checksums": True, "tp_size": 1, "zero_stage": 1}),
        ("qwen2", False, {"wire": "gloo", "dtype": "bfloat16", "tp_size": 1}),
    ],
)
def test_workers_hold_their_shards_after_every_step(tmp_path, group, family, tied, options):
    policy, publisher = begin(write_model(tmp_path / "model", family=family, tied=tied), group, **options)
    for version in range(3):
        publisher.publish(policy, group, version)
        assert group.log[-2:] == ["begin", f"finish {version}"]
        assert_published(policy, publisher, group)
        assert [worker.call("version") for worker in group.workers] == [version] * 2
        take_step(policy)
    publisher.close()


def test_the_float32_master_reaches_float32_workers(tmp_path, group):
    """A bfloat16 policy: what arrives rounds to its parameters, and is finer than they are after a step."""
    policy, publisher = begin(write_model(tmp_path / "model"), group, dtype="bfloat16", source="master")
    take_step(policy)
    publisher.publish(policy, group, 1)
    for worker in group.workers:
        for name, rounded in expected_tensors(policy, worker.worker).items():
            found = worker.tensors()[name]
            assert found.dtype == torch.float32 and torch.equal(found.bfloat16(), rounded)
            assert not torch.equal(found, rounded.float())


@pytest.mark.parametrize("wire", ["shared_memory", "gloo"])
def test_a_worker_that_dies_leaves_the_others_as_they_were(tmp_path, group, wire):
    """And the same version can be published once it is back."""
    policy, publisher = begin(write_model(tmp_path / "model", tied=False), group, wire=wire, bucket_mib=0.001)
    publisher.publish(policy, group, 0)
    take_step(policy)
    before = group.workers[0].tensors()
    group.workers[1].call("die_when_staged" if wire == "shared_memory" else "die_while_receiving")
    with pytest.raises(
        ReshardError,
        match=r"worker 1 \(replica 0, tensor-parallel rank 1 of 2\) has (died|stopped answering)",
    ):
        publisher.publish(policy, group, 1)
    assert group.log[-1] == "cancel" and group.workers[0].call("version") == 0
    assert all(torch.equal(value, before[name]) for name, value in group.workers[0].tensors().items())
    group.restart(1, publisher)
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)


def test_a_version_that_a_dying_worker_failed_is_handed_over_once_it_is_back(
    tmp_path, group, monkeypatch, caplog
):
    """As an engine does that starts its servers again when an update begins."""
    policy, publisher = begin(
        write_model(tmp_path / "model", tied=False), group, wire="shared_memory", attempts=2
    )
    publisher.publish(policy, group, 0)
    take_step(policy)
    begin_update, was_killed = group.begin_update, []

    def revive() -> None:
        if was_killed:
            group.restart(1, publisher)
        was_killed.append(True)
        begin_update()

    monkeypatch.setattr(group, "begin_update", revive)
    group.workers[1].call("die_when_staged")
    publisher.publish(policy, group, 1)
    assert group.log[-4:] == ["begin", "cancel", "begin", "finish 1"]
    assert "version 1 was not handed over, trying again: worker 1 (replica 0" in caplog.text
    assert_published(policy, publisher, group)


def test_a_worker_that_was_replaced_between_two_publishes_is_met_again(tmp_path, group):
    policy, publisher = begin(write_model(tmp_path / "model"), group)
    publisher.publish(policy, group, 0)
    group.restart(0, publisher)
    take_step(policy)
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)


def test_an_element_that_changed_on_the_way_is_named(tmp_path, group):
    """Nobody takes the version; without damage it is taken."""
    policy, publisher = begin(write_model(tmp_path / "model"), group, checksums=True)
    publisher.publish(policy, group, 0)
    before = [worker.tensors() for worker in group.workers]
    take_step(policy)
    group.workers[1].call("damage", name="model.layers.1.mlp.down_proj.weight", index=7)
    with pytest.raises(
        ReshardError,
        match=r"layers.1.mlp.down_proj.weight, between trainer rank 0 and worker 1 \(replica 0, tens",
    ):
        publisher.publish(policy, group, 1)
    for worker, tensors in zip(group.workers, before):
        assert all(torch.equal(value, tensors[name]) for name, value in worker.tensors().items())
    assert len(group.errors) == 2 and group.errors[0] == group.errors[1]
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)


def test_a_worker_that_comes_when_a_version_has_failed_is_told_so_at_once(tmp_path, group, monkeypatch):
    """It would wait for a delivery that comes only after it has answered."""
    policy, publisher = begin(write_model(tmp_path / "model"), group, checksums=True)
    publisher.publish(policy, group, 0)
    take_step(policy)
    group.workers[1].call("damage", name="model.layers.1.mlp.down_proj.weight", index=7)
    late = group.workers[0]
    call = late.call

    def call_late(action: str, **arguments):
        while not group.errors:
            time.sleep(0.01)
        return call(action, **arguments)

    with monkeypatch.context() as patched, pytest.raises(ReshardError, match="checksums differ in 1 param"):
        patched.setattr(late, "call", call_late)
        publisher.publish(policy, group, 1)
    assert len(group.errors) == 2 and group.errors[0] == group.errors[1]
    publisher.publish(policy, group, 1)
    assert_published(policy, publisher, group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": torch.zeros(64, 32)}, "lm_head.weight: found, expected no such tensor"),
        ({"model.norm.weight": None}, "model.norm.weight: missing, expected float32[32]"),
        (
            {"model.norm.weight": torch.zeros(33)},
            "model.norm.weight: found float32[33], expected float32[32]",
        ),
        (
            {"model.norm.weight": torch.zeros(32).half()},
            "model.norm.weight: found float16[32], expected float32[32]",
        ),
    ],
)
def test_a_worker_of_another_form_is_named_before_anything_is_sent(tmp_path, group, changes, message):
    policy, publisher = begin(write_model(tmp_path / "model"), group)
    group.workers[1].open(publisher.plan.layout_of(1), publisher.address, **changes)
    with pytest.raises(ReshardError) as caught:
        publisher.publish(policy, group, 0)
    assert "worker 1 (replica 0" in str(caught.value) and message in str(caught.value)
    assert publisher.num_bytes == 0 and all(worker.call("version") == -1 for worker in group.workers)
    assert all(torch.isnan(tensor).all() for tensor in group.workers[0].tensors().values())


class Colocated(WorkerGroup):
    """Workers that live in the trainer's own process, each receiving in a thread. told: the version they
    are told to take."""

    def __init__(self, publisher, told: int | None = None):
        self.told, self.received = told, []
        self.live = []
        super().__init__(2, [self.Worker(self, publisher, number) for number in range(2)])

    class Worker:
        def __init__(self, group, publisher, number):
            self.group, self.worker = group, worker_id(publisher.plan, number)
            layout = publisher.plan.layout_of(number)
            self.live = {
                tensor.spec.name: torch.full(tensor.spec.shape, float("nan")) for tensor in layout.tensors
            }
            self.receiver = ShardReceiver(
                self.live, worker=self.worker, address=publisher.address, timeout_s=60.0
            )

        def call(self, action: str, policy_version: int, delivery: int) -> int:
            told = policy_version if self.group.told is None else self.group.told
            return self.receiver.receive(told, delivery)

        def tensors(self):
            return self.live


@pytest.mark.parametrize("wire", ["shared_memory", "gloo"])
def test_workers_may_live_in_the_trainers_process(tmp_path, wire):
    scene = Scene(
        model=str(write_model(tmp_path / "model")),
        output="",
        tp_size=2,
        num_replicas=1,
        publish={"wire": wire},
    )
    policy, publisher = make_publisher(scene, join_world())
    group = Colocated(publisher)
    for version in range(2):
        publisher.publish(policy, group, version)
        assert_published(policy, publisher, group)
        take_step(policy)


def test_a_worker_that_expects_another_version_takes_none(tmp_path):
    scene = Scene(model=str(write_model(tmp_path / "model")), output="", tp_size=2, num_replicas=1)
    policy, publisher = make_publisher(scene, join_world())
    group = Colocated(publisher, told=4)
    with pytest.raises(
        ReshardError, match=r"worker \d .* was told to take version 4, the trainer sends version 5"
    ):
        publisher.publish(policy, group, 5)
    assert all(torch.isnan(tensor).all() for worker in group.workers for tensor in worker.live.values())


def test_a_tied_name_is_the_same_tensor_and_a_transposed_one_is_refused(tmp_path):
    scene = Scene(model=str(write_model(tmp_path / "model")), output="", tp_size=2, num_replicas=1)
    policy, publisher = make_publisher(scene, join_world())
    group = Colocated(publisher)
    for worker in group.workers:
        tied = {**worker.live, "lm_head.weight": worker.live["model.embed_tokens.weight"]}
        worker.receiver = ShardReceiver(tied, worker=worker.worker, address=publisher.address, timeout_s=60.0)
    publisher.publish(policy, group, 0)
    assert_published(policy, publisher, group)
    worker = group.workers[0]
    turned = {**worker.live, "model.layers.0.mlp.down_proj.weight": torch.zeros(24, 32).t()}
    worker.receiver = ShardReceiver(turned, worker=worker.worker, address=publisher.address, timeout_s=60.0)
    with pytest.raises(ReshardError, match="down_proj.weight is not contiguous"):
        publisher.publish(policy, group, 1)


def test_the_wire_fits_everybody():
    here, there = {"host": "a", "device": "cpu"}, {"host": "b", "device": "cpu"}
    gpu, far_gpu = {"host": "a", "device": "cuda"}, {"host": "b", "device": "cuda"}
    cases = {
        "shared_memory": [here, here],
        "gloo": [here, there],
        "cuda_ipc": [gpu, gpu],
        "nccl": [gpu, far_gpu],
    }
    for wire, parties in cases.items():
        assert choose_wire("auto", parties) == wire == choose_wire(wire, parties)
    assert choose_wire("auto", [here, gpu]) == "shared_memory" and choose_wire("gloo", [gpu, gpu]) == "gloo"
    with pytest.raises(
        ReshardError, match="publish.wire is shared_memory, but ranks and workers run on several nodes"
    ):
        choose_wire("shared_memory", [here, there])
    with pytest.raises(ReshardError, match="publish.wire is nccl, but not every rank and worker has CUDA"):
        choose_wire("nccl", [gpu, there])


def test_too_little_memory_is_said_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(staging, "available_bytes", lambda: 1 << 30)
    with pytest.raises(
        ReshardError, match="needs 2.00 GiB beside the current one, found 1.00 GiB of free memory"
    ):
        SharedMemory(1 << 29, torch.float32)


def test_an_unknown_family_is_gathered_and_that_is_said(tmp_path, monkeypatch, caplog):
    path = write_model(tmp_path / "model")
    policy = make_policy(config := make_config(path), join_world())
    monkeypatch.setattr(policy.model.config, "architectures", ["NewForCausalLM"])
    with caplog.at_level(logging.WARNING):
        publisher = sharded_or_gathering(
            policy, config.publish, dtype=config.model.dtype, tp_size=1, num_replicas=1
        )
    assert isinstance(publisher, GatherPublisher) and "NewForCausalLM has no shard layout" in caplog.text
