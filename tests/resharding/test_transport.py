"""The meeting point, sessions and hanging up; publishing itself: test_publish.py."""

import threading

import pytest
import torch

from megatron_sd.config import PublishConfig
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.layout import WorkerId
from megatron_sd.resharding.receiver import ShardReceiver
from megatron_sd.resharding.sender import ShardSender
from megatron_sd.resharding.transport import GroupWire, MeetingPoint, Session


def test_who_does_not_answer_is_named():
    session = Session(MeetingPoint.host("127.0.0.1", timeout_s=20), 1, timeout_s=0.1)
    session.post("staged/0")
    with pytest.raises(ReshardError, match="no answer within 0.1 s from worker 1, worker 2: restart it"):
        session.wait_for({"staged/0": "worker 0", "staged/1": "worker 1", "staged/2": "worker 2"})


def test_whoever_waits_learns_why_a_session_ended():
    session = Session(MeetingPoint.host("127.0.0.1", timeout_s=20), 1, timeout_s=60)
    threading.Timer(0.1, session.close, ["worker 3 has died"]).start()
    with pytest.raises(ReshardError, match="worker 3 has died"):
        session.wait_for({"never": "worker 1"})
    session.close("a later reason")
    assert session.closed() == "worker 3 has died"


def test_what_two_transfers_ago_was_said_is_forgotten():
    session = Session(MeetingPoint.host("127.0.0.1", timeout_s=20), 1, timeout_s=1)
    for transfer in range(1, 5):
        session.post_in(transfer, "version", transfer)
    assert [session.has(f"{transfer}/version") for transfer in range(1, 5)] == [False, False, True, True]


def test_whoever_hangs_up_leaves_nobody_waiting():
    """Although its own transfer is still under way: a worker must not sit out the timeout for a rank that
    has given up."""
    session = Session(MeetingPoint.host("127.0.0.1", timeout_s=20), 1, timeout_s=600)
    names, errors, connected = ["trainer rank 0", "worker 0"], [], threading.Event()

    def wait_for_rank_0():
        # a client of the store serves one party at a time
        own = MeetingPoint.join(session.meeting.address, timeout_s=20)
        wire = GroupWire(Session(own, 1, timeout_s=600), "gloo", 1, names)
        connected.set()
        try:
            wire.receive(torch.zeros(4), 0).wait()
        except ReshardError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait_for_rank_0, daemon=True)
    waiting.start()
    wire = GroupWire(session, "gloo", 0, names)
    pending = wire.receive(torch.zeros(4), 1)
    assert connected.wait(timeout=120)
    wire.close()
    waiting.join(timeout=120)
    assert not waiting.is_alive() and pending is not None
    assert "trainer rank 0 has stopped answering" in errors[0]


def test_a_rank_may_leave_after_rank_0_has_gone():
    host = MeetingPoint.host("127.0.0.1", timeout_s=20)
    meeting = MeetingPoint.join(host.address, timeout_s=20)
    sender = ShardSender(meeting, None, PublishConfig(timeout_s=1), rank=1, device=torch.device("cpu"))
    host.post("0/delivery/1", 1)
    sender._agree_on_session()
    del host
    with pytest.raises(ReshardError, match="the meeting point at .* is gone"):
        sender.give_up("anything")
    sender.close()


def test_an_address_without_a_trainer_is_said():
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(ReshardError, match=f"no meeting point at '{address}' within 1 s"):
            ShardReceiver(
                {"w": torch.zeros(1)},
                worker=WorkerId(replica=0, tp_rank=0, tp_size=1),
                address=address,
                timeout_s=1.0,
            )


class FakeWork:
    """A Work of NCCL's that is done after some questions, or never, with an error or without."""

    def __init__(self, questions: float, error: Exception | None = None):
        self.left, self.error = questions, error

    def is_completed(self) -> bool:
        self.left -= 1
        return self.left < 0

    def exception(self) -> Exception | None:
        return self.error

    def wait(self) -> None:
        assert self.is_completed(), "a wait on NCCL never comes back from a dead peer"


class FakeGroup:
    def __init__(self, work: FakeWork):
        self.work, self.aborted = work, False

    def send(self, tensors, peer, tag):
        return self.work

    def abort(self):
        self.aborted = True


def nccl_wire(work: FakeWork, timeout_s: float) -> tuple[GroupWire, FakeGroup, Session]:
    """A GroupWire as NCCL's is, without NCCL."""
    session = Session(MeetingPoint.host("127.0.0.1", timeout_s=20), 1, timeout_s=timeout_s)
    wire = GroupWire(session, "gloo", 0, ["worker 0"])
    group = FakeGroup(work)
    wire._polls, wire._group = True, group
    return wire, group, session


def test_a_transfer_over_nccl_is_asked_until_it_is_done():
    wire, group, _ = nccl_wire(FakeWork(3), timeout_s=60)
    wire.send(torch.zeros(1), 0).wait()
    wire.close()
    assert not group.aborted


@pytest.mark.parametrize(
    ("work", "timeout_s", "message"),
    [
        (FakeWork(float("inf")), 0.05, "worker 0 moved nothing within 0.05 s over NCCL: restart it"),
        (
            FakeWork(1, RuntimeError("remote process exited\nstack")),
            60,
            r"worker 0 has stopped answering \(remote process exited\)",
        ),
    ],
)
def test_a_dead_peer_over_nccl_is_named_and_its_group_aborted(work, timeout_s, message):
    wire, group, _ = nccl_wire(work, timeout_s)
    pending = wire.send(torch.zeros(1), 0)
    with pytest.raises(ReshardError, match=message):
        pending.wait()
    wire.close()
    assert group.aborted == (work.error is None)


def test_a_session_that_ended_ends_a_transfer_over_nccl():
    wire, _, session = nccl_wire(FakeWork(float("inf")), timeout_s=600)
    session.close("worker 3 has died")
    with pytest.raises(ReshardError, match="worker 3 has died"):
        wire.send(torch.zeros(1), 0).wait()
