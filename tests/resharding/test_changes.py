"""What changed, as messages: every worker's tensors, bit for bit, for plans of all kinds; and the boxes over
a wire of this process."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_sd.errors import ReshardError
from megatron_sd.resharding.changed_buckets import DENSE, ChangesInbox, ChangesOutbox
from megatron_sd.resharding.changes import FULL, apply, changed_in, decode, encode, message_bytes, take_over
from megatron_sd.resharding.exchange import BucketBuffers
from megatron_sd.resharding.layout import Rectangle as Piece
from megatron_sd.resharding.layout import ShardLayout, TensorSpec, WorkerLayout, WorkerTensor
from megatron_sd.resharding.plan import incoming, make_plan
from tests.resharding.test_plan import divides, model_configs, plan_for, shards_of
from tests.training.tensor_parallel_oracle import worker_tensors

BITS = {"bfloat16": np.int16, "float16": np.int16, "float32": np.int32}
NAN, OTHER_NAN, MINUS_ZERO, ZERO = 0x7FC0, 0x7FC1, -0x8000, 0  # as bfloat16


def tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(getattr(torch, dtype))


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).numpy()


def numbers(generator: np.random.Generator, numel: int, dtype: str) -> np.ndarray:
    """Bit patterns of all kinds, NaN and -0.0 among them."""
    kind = BITS[dtype]
    found = generator.integers(np.iinfo(kind).min, np.iinfo(kind).max, numel, dtype=kind, endpoint=True)
    found[generator.random(numel) < 0.1] = np.iinfo(kind).min  # -0.0
    return found


def other(generator: np.random.Generator, old: np.ndarray, share: float) -> np.ndarray:
    """The same numbers but for a share."""
    new, chosen = old.copy(), generator.random(old.size) < share
    new[chosen] ^= generator.integers(1, 5, chosen.sum(), dtype=old.dtype)
    return new


def moved(plan, world_size: int, worker: int, bucket_numel: int, versions) -> dict[str, torch.Tensor]:
    """The worker's flat tensors after changes alone; versions: by name, bits before and after."""
    old, new = ({name: pair[n] for name, pair in versions.items()} for n in range(2))
    cut = worker_tensors(
        {
            name: values.reshape(spec.shape)
            for (name, values), spec in zip(old.items(), plan.source.parameters)
        },
        versions.config,
        worker % len(plan.workers),
        len(plan.workers),
    )
    staged = {name: tensor(value.reshape(-1), plan.dtype) for name, value in cut.items()}
    held, changes = [], []
    for rank in range(world_size):
        own = {n: tensor(v, plan.dtype) for n, v in shards_of(plan, old, rank).items()}
        now = {n: tensor(v, plan.dtype) for n, v in shards_of(plan, new, rank).items()}
        changes.append({n: take_over(own[n], now[n]) for n in own})
        held.append(own)
    for rank, bucket in incoming(plan, worker, bucket_numel):
        numel = sum(part.numel for part in bucket)
        places, values = changed_in(bucket, held[rank], changes[rank])
        message = torch.zeros(message_bytes(len(places), numel, plan.item_bytes), dtype=torch.uint8)
        encode(places, values, numel, message)
        apply(bucket, *decode(message, len(places), numel, values.dtype), staged)
    return staged


class Versions(dict):
    """By name: bits before and after. config: of the model."""

    def __init__(self, config, pairs):
        super().__init__(pairs)
        self.config = config


@settings(max_examples=60, deadline=None)
@given(
    config=model_configs(),
    world_size=st.integers(1, 4),
    tp_size=st.sampled_from([1, 2]),
    bucket_numel=st.integers(1, 300),
    dtype=st.sampled_from(sorted(BITS)),
    share=st.sampled_from([0.0, 0.01, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_changes_alone_make_every_worker_hold_the_new_version(
    config, world_size, tp_size, bucket_numel, dtype, share, seed
):
    assume(divides(config, tp_size))
    plan = plan_for(config, world_size=world_size, tp_size=tp_size, dtype=dtype)
    generator = np.random.default_rng(seed)
    pairs = {}
    for spec in plan.source.parameters:
        old = numbers(generator, spec.numel, dtype)
        pairs[spec.name] = old, other(generator, old, share)
    shapes = {spec.name: spec.shape for spec in plan.source.parameters}
    new = {name: pair[1].reshape(shapes[name]) for name, pair in pairs.items()}
    for worker in range(tp_size):
        found = moved(plan, world_size, worker, bucket_numel, Versions(config, pairs))
        for name, value in worker_tensors(new, config, worker, tp_size).items():
            np.testing.assert_array_equal(bits_of(found[name]), value.reshape(-1), err_msg=name)


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3])
def test_what_is_held_becomes_the_new_version_and_only_what_changed_is_found(dtype, share):
    """Over several chunks and blocks; and it goes into a message and comes out of it."""
    generator = np.random.default_rng(1)
    old = numbers(generator, 2 * (1 << 20) + 3, dtype)
    new = other(generator, old, share)
    held = tensor(old, dtype)
    found = take_over(held, tensor(new, dtype))
    np.testing.assert_array_equal(bits_of(held), new)
    np.testing.assert_array_equal(found.numpy(), np.flatnonzero(old != new))
    assert found.dtype == torch.int32
    size = message_bytes(len(found), len(held), held.element_size())
    in_small, in_large = 8193 * 2 + len(found), 65 * 2 + len(found) * 2
    assert size == len(found) * held.element_size() + min(in_small, in_large)
    message = torch.zeros(size, dtype=torch.uint8)
    encode(found.long(), held[found.long()], len(held), message)
    places, values = decode(message, len(found), len(held), held.dtype)
    np.testing.assert_array_equal(places.numpy(), found.numpy())
    np.testing.assert_array_equal(bits_of(values), new[found.numpy()])


def test_bits_are_compared_not_numbers():
    before = np.array([NAN, NAN, ZERO, MINUS_ZERO, MINUS_ZERO, 1, 1, 1, 1, 1, 1, 1], dtype=np.int16)
    after = np.array([NAN, OTHER_NAN, MINUS_ZERO, MINUS_ZERO, ZERO, 1, 1, 1, 1, 1, 1, 1], dtype=np.int16)
    held = tensor(before, "bfloat16")
    assert take_over(held, tensor(after, "bfloat16")).tolist() == [1, 2, 4]
    np.testing.assert_array_equal(bits_of(held), after)


def test_more_changes_than_a_message_is_worth_count_as_all():
    held = torch.zeros(100, dtype=torch.bfloat16)
    new = torch.zeros(100, dtype=torch.bfloat16)
    new[:66] = 1  # 66 * 3 + 2 bytes are as many as 100 * 2
    assert take_over(held, new) is None and torch.equal(held, new)
    new[:65] = 2
    assert take_over(held, new).tolist() == list(range(65)) and torch.equal(held, new)


def test_a_wider_type_is_converted_before_it_is_compared():
    """A float32 number that moves within what rounds to its bfloat16 is no change."""
    held, new = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    new[3], new[5] = 1.0 + 2**-10, 1.5
    held[3] = 1.0
    assert take_over(held, new).tolist() == [5] and held[5] == 1.5


def test_an_empty_shard_has_no_changes():
    assert take_over(torch.empty(0, dtype=torch.bfloat16), torch.empty(0)).tolist() == []


class LocalWire:
    """A Wire within one process: what was sent is received in order."""

    def __init__(self):
        self.sent: list[torch.Tensor] = []

    def send(self, buffer, peer):
        self.sent.append(buffer.clone())
        return self

    def receive(self, buffer, peer):
        message = self.sent.pop(0)
        assert message.dtype == buffer.dtype == torch.uint8 and len(message) == len(buffer)
        buffer.copy_(message)
        return self

    def wait(self):
        """It is there at once."""

    def close(self):
        self.sent.clear()


def boxes(numel: int, bucket_numel: int):
    """One rank's vector of bfloat16, to one worker."""
    spec = TensorSpec(name="w", shape=(numel,), dtype="bfloat16")
    whole = WorkerTensor(spec=spec, pieces=(Piece(parameter="w", rows=(0, numel), columns=(0, 1)),))
    worker = WorkerLayout(tp_rank=0, tp_size=1, tensors=(whole,))
    plan = make_plan(ShardLayout(parameters=(spec,), world_size=1), [worker], num_replicas=1)
    wire, staged = LocalWire(), {"w": torch.full((numel,), float("nan"), dtype=torch.bfloat16)}

    def buffers():
        return BucketBuffers(bucket_numel, torch.bfloat16, torch.device("cpu"))

    outbox = ChangesOutbox(plan, 0, wire, buffers(), bucket_numel=bucket_numel, device=torch.device("cpu"))
    inbox = ChangesInbox(plan, 0, wire, buffers(), bucket_numel=bucket_numel, staged=staged)
    return outbox, inbox, wire, staged["w"]


def headers(messages: list[torch.Tensor]) -> list[int]:
    return [int(message.view(torch.int64)) for message in messages if len(message) == 8]


def test_each_bucket_goes_as_whichever_is_shorter():
    outbox, inbox, wire, staged = boxes(numel=1000, bucket_numel=300)
    weights = torch.randn(1000).bfloat16()
    assert outbox.send({"w": weights}) == 4 * 8 + 2000 and headers(wire.sent) == [DENSE] * 4
    assert inbox.receive() == 4 * 8 + 2000 and torch.equal(staged, weights)
    assert outbox.num_changed is None
    assert outbox.send({"w": weights}) == 4 * 8 and headers(wire.sent) == [0] * 4
    assert inbox.receive() == 4 * 8 and torch.equal(staged, weights)
    weights[300:600] += 1.0  # a whole bucket
    weights[[0, 299, 997, 998, 999]] += 1.0  # and some of others
    sent = outbox.send({"w": weights})
    assert headers(wire.sent) == [2, DENSE, 0, 3] and outbox.num_changed == 305
    assert sent == 4 * 8 + (2 * 3 + 2 * 2) + 600 + (3 * 3 + 2) == inbox.receive()
    assert torch.equal(staged, weights)


def test_changes_of_what_a_worker_does_not_have_are_refused():
    outbox, inbox, wire, staged = boxes(numel=100, bucket_numel=100)
    outbox.send({"w": torch.zeros(100)})
    wire.sent.clear()  # lost
    outbox.send({"w": torch.ones(100).index_fill_(0, torch.arange(90), 0.0)})
    with pytest.raises(ReshardError, match="rank 0 sent 10 changed elements in the first transfer of a sess"):
        inbox.receive()
    assert staged.isnan().all()


def test_few_changes_lie_in_large_blocks_and_many_in_small_ones():
    """At both ends of a block, and in one that is full."""
    for places, numel, counts in (
        (torch.tensor([0, FULL - 1, FULL, 3 * FULL - 1]), 3 * FULL, [2, 1, 1]),
        (torch.arange(FULL), 2 * FULL, [256] * 128 + [0] * 128),
        (torch.tensor([0, 255, 256, 511]), 512, [2, 2]),
    ):
        message = torch.zeros(message_bytes(len(places), numel, 4), dtype=torch.uint8)
        encode(places, torch.arange(len(places)).float(), numel, message)
        start = 4 * len(places)
        found_counts = message[start : start + 2 * len(counts)].view(torch.int16).int() + FULL
        assert found_counts.tolist() == counts
        found, values = decode(message, len(places), numel, torch.float32)
        assert torch.equal(found, places) and values.tolist() == list(range(len(places)))
