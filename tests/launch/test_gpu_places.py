"""Which GPU, node and server a thing belongs to, decided without a GPU: handles, encoders, threads, meeting
points, dealing."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import faiss
import pytest
import torch

from launch.cluster.hostfile import Host
from launch.cluster.layout import LayoutConfig
from launch.cluster.topology import assign
from megatron_sd.config import SearchConfig
from megatron_sd.distributed.world import World
from megatron_sd.errors import ConfigError, ReshardError
from megatron_sd.resharding import staging
from megatron_sd.resharding.connection import choose_wire
from megatron_sd.resharding.staging import handle_parts, open_cuda_memory
from megatron_sd.resharding.transport import publish_host
from megatron_sd.retrieval.corpus import dense
from megatron_sd.retrieval.corpus.encoder import choose_device
from megatron_sd.rollout.engine import Delivery
from megatron_sd.rollout.vllm.colocated_engine import ColocatedEngine
from megatron_sd.rollout.vllm.connect import sharers_of

GPU = torch.device("cuda", 2)


def test_an_ipc_handle_is_opened_on_the_ranks_own_gpu():
    """A worker that sees one GPU exports number 0, whichever GPU of the node that is."""
    token = {"process": 1, "handle": [0, b"abc".hex(), 512, 0, False]}
    assert handle_parts(token, GPU) == [2, b"abc", 512, 0, False]


def test_a_worker_in_the_ranks_process_hands_its_memory_over_as_it_is(monkeypatch):
    """CUDA refuses to open a handle in the process that made it."""
    made = ("class", 1, 1, 0, "storage", "dtype", 0, b"handle", 16)
    monkeypatch.setattr(staging, "reduce_tensor", lambda tensor: (None, made))
    monkeypatch.setattr(staging, "rebuild_cuda_tensor", lambda *_: pytest.fail("opened its own handle"))
    memory = staging.CudaMemory(4, torch.float32, torch.device("cpu"))
    assert open_cuda_memory(memory.token, 4, torch.float32, GPU) is memory.tensor


def party(host: str, gpu: str) -> dict:
    return {"host": host, "device": "cuda", "gpu": gpu}


def test_nccl_is_refused_where_a_rank_and_a_worker_share_a_gpu():
    apart = [party("a", "x"), party("b", "y"), party("a", "z")]
    assert choose_wire("auto", apart) == "nccl"
    with pytest.raises(ReshardError, match="would join 2 parties on GPU x.*set rollout.vllm.publish gather"):
        choose_wire("auto", [*apart, party("a", "x")])
    assert choose_wire("auto", [party("a", "x"), party("a", "x")]) == "cuda_ipc"


def test_the_thread_that_serves_colocated_uses_its_ranks_gpu(monkeypatch):
    used = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((device, threading.current_thread().name))
    )
    world = World(rank=2, size=4, local_rank=2, device=GPU)
    llm = SimpleNamespace(
        collective_rpc=lambda method, args: used.append((method, threading.current_thread().name)),
        has_unfinished_requests=lambda: False,
        sleep=lambda level: None,
        wake_up=lambda tags: None,
    )
    lockstep = SimpleNamespace(num_groups=2, number=1, exchange=lambda news: ([news], True))
    policy = SimpleNamespace(description={}, eos_ids=frozenset({0}), vocabulary_size=4, max_length=8)
    codec = SimpleNamespace(decode=lambda ids: "")
    engine = ColocatedEngine(llm, lockstep, codec, policy, world, timeout_s=4.0)
    engine.wake()
    engine.sleep()
    assert used[1:] == [(GPU, "vllm")]
    engine.start_receiving(Delivery("", number=1, policy_version=1)).result()
    assert used[2:] == [(GPU, "shards_0"), ("update_weights", "shards_0")]


def test_an_encoder_knows_the_number_of_its_gpu(monkeypatch):
    """Else another thread's inputs go to GPU 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == GPU
    assert choose_device("cpu") == torch.device("cpu")


def test_a_training_rank_never_spreads_vectors_over_all_gpus(monkeypatch):
    monkeypatch.setattr(dense, "on_gpus", lambda index: "all")
    monkeypatch.setattr(dense, "on_one_gpu", lambda index, number: number)
    index, device = faiss.IndexFlatIP(4), GPU
    assert dense.place(index, device, SearchConfig(), shares_gpus=False) == "all"
    assert dense.place(index, device, SearchConfig(device="cuda"), shares_gpus=True) == 2
    assert dense.place(index, device, SearchConfig(), shares_gpus=True) is index
    assert dense.place(index, torch.device("cpu"), SearchConfig(), shares_gpus=False) is index


def test_ranks_know_with_whom_they_share_servers():
    started = [["a", "b"], [], [], ["c"], []]
    assert [sharers_of(started, rank) for rank in range(5)] == [[0, 1, 2]] * 3 + [[3, 4]] * 2


def test_ranks_of_several_nodes_never_meet_on_loopback():
    assert publish_host(None, ["a", "a"], launcher_address="10.0.0.1") == "127.0.0.1"
    assert publish_host("n1", ["a", "a"], launcher_address=None) == "n1"
    assert publish_host(None, ["a", "b"], launcher_address="10.0.0.1") == "10.0.0.1"
    for wanted, launcher in (
        ("127.0.0.1", "10.0.0.1"),
        (None, "localhost"),
        (None, "127.0.0.1"),
        (None, None),
        ("::1", None),
    ):
        with pytest.raises(
            ConfigError,
            match="publish.host: found .* for ranks on 2 nodes, expected the address of rank 0's node",
        ):
            publish_host(wanted, ["a", "b"], launcher_address=launcher)


def test_the_launcher_names_the_meeting_point_of_several_training_nodes():
    config = {"rollout": {"vllm": {"tensor_parallel_size": 1}}}
    hosts, addresses = [Host(name=name, num_slots=4) for name in "ab"], {"a": "10.0.0.1", "b": "10.0.0.2"}
    both = assign(hosts, addresses, LayoutConfig(cluster="slurm", nodes=2), config, attempt=1)
    assert both.arguments == ("--publish.host=10.0.0.1",) and both.master[0] == "10.0.0.1"
    assert assign(hosts[:1], addresses, LayoutConfig(cluster="slurm"), config, attempt=1).arguments == ()


HOST = """
import sys
from megatron_sd.resharding.transport import MeetingPoint, publish_host
host = publish_host(None, ["node a", "node b"], launcher_address="10.231.7.1") if sys.argv[1] == "found" else "127.0.0.1"
meeting = MeetingPoint.host(host, timeout_s=60)
meeting.post("word", "from node a")
print(meeting.address, flush=True)
sys.stdin.read()
"""
JOIN = """
import sys
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.transport import MeetingPoint
try:
    print(MeetingPoint.join(sys.argv[1], timeout_s=5).read("word"))
except ReshardError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces, each with a loopback and an address of its own."""
    names = ["sd-node-a", "sd-node-b"]
    lines = [
        *(f"ip netns add {name}" for name in names),
        "ip link add sd-a netns sd-node-a type veth peer name sd-b netns sd-node-b",
    ]
    for letter, number in (("a", 1), ("b", 2)):
        inside = f"ip -n sd-node-{letter}"
        lines += [
            f"{inside} link set lo up",
            f"{inside} addr add 10.231.7.{number}/24 dev sd-{letter}",
            f"{inside} link set sd-{letter} up",
        ]
    try:
        for line in lines:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("way", "found"), [("found", "from node a"), ("loopback", "no meeting point at '127.0.0.1:")]
)
def test_a_rank_of_another_node_reaches_the_meeting_point(nodes, way, found):
    """On loopback it would look on its own node."""
    root = Path(__file__).resolve().parents[2]
    one, other = (["ip", "netns", "exec", node, sys.executable, "-c"] for node in nodes)
    host = subprocess.Popen(
        [*one, HOST, way], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = host.stdout.readline().strip()
        done = subprocess.run(
            [*other, JOIN, address], cwd=root, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.stdout.startswith(found), done.stdout + done.stderr
    finally:
        host.communicate("", timeout=60)
