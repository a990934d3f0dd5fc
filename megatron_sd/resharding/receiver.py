"""A worker's part in taking a version over: everything is staged and verified before the first live tensor
changes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_sd.config import PublishConfig
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.connection import Memory, make_inbox, plan_from_plain, ranks, whereabouts
from megatron_sd.resharding.exchange import Inbox, staged_checksums, synchronize
from megatron_sd.resharding.layout import WorkerId
from megatron_sd.resharding.plan import ReshardPlan
from megatron_sd.resharding.staging import padding_views
from megatron_sd.resharding.transport import MeetingPoint, Session, session_of

NO_VERSION = -1


class ShardReceiver:
    """The tensors of one tensor-parallel worker, and how new versions get into them.

    tensors: live and contiguous, by the engine's names; they are written in place, so their addresses stay.
    A tied tensor may be listed under each of its names. address: of the trainer's meeting point. It needs
    the memory of a second copy of the tensors.

    Raises ReshardError when nobody answers at the address within timeout_s.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, worker: WorkerId, address: str, timeout_s: float):
        self.policy_version = NO_VERSION
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._worker = worker
        self._timeout_s = timeout_s
        self._device = next(iter(self._tensors.values())).device
        self._meeting = MeetingPoint.join(address, timeout_s=timeout_s)
        self._connection: _Connection | None = None
        self._retire_predecessor()

    def receive(self, policy_version: int, delivery: int) -> int:
        """Take part in the hand-over of a version; blocks until it is in the live tensors. Returns the
        bytes that came. delivery: the number of this attempt, as the trainer counts them.

        Every worker calls it while every trainer rank sends, with no generation in flight. Raises
        ReshardError, with the live tensors untouched, when trainer, this worker or another one failed, be it
        before this worker came; call it again for the next attempt.
        """
        session = self._session_of(delivery)
        with session.ended_by_errors(self._disconnect):
            if (reason := session.closed()) is not None:
                raise ReshardError(reason)
            connection = self._connection = self._connection or self._connect(session)
            connection.transfer += 1
            t = connection.transfer
            (found,) = session.wait_for({f"{t}/version": "trainer rank 0"})
            if found != policy_version:
                raise ReshardError(
                    f"{self._worker} was told to take version {policy_version}, the trainer sends version"
                    f" {found}"
                )
            # Into staging, not into the live tensors: whatever fails from here on, these are whole.
            num_bytes = connection.inbox.receive()
            sent = session.wait_for(ranks(connection.plan, f"{t}/sent"))
            self._verify(connection, sent)
            for padding in padding_views(connection.staged, connection.plan.layout_of(self._worker.number)):
                padding.zero_()
            # Two phases: all say that they have it, rank 0 decides for all, and only then does anyone
            # commit. A worker that hears no decision waits longer than those who may still be staging.
            session.post_in(t, f"staged/{self._worker.number}")
            session.wait_for({f"{t}/decision": "trainer rank 0"}, patience=3)
            for name, value in connection.staged.items():
                self._tensors[name].view(-1).copy_(value)
            synchronize(self._device)
            self.policy_version = policy_version
            session.post_in(t, f"committed/{self._worker.number}")
        return num_bytes

    def close(self) -> None:
        """Leave; a trainer that publishes after this is told by its timeout."""
        self._disconnect()

    def _retire_predecessor(self) -> None:
        """A worker of this number that died and was replaced may still be expected in an open session: end
        that."""
        number = 1
        while self._meeting.has(f"{number}/open", f"{number}/closed"):
            number += 1
        session = Session(self._meeting, number, self._timeout_s)
        if session.has(f"worker/{self._worker.number}"):
            session.close(f"{self._worker} was restarted: publish again")

    def _session_of(self, delivery: int) -> Session:
        """Where the delivery takes place; a connection of another session ends."""
        number = session_of(delivery, Session.of_everybody(self._meeting, self._timeout_s))
        if self._connection is not None and self._connection.session.number == number:
            return self._connection.session
        self._disconnect()
        return Session(self._meeting, number, self._timeout_s)

    def _connect(self, session: Session) -> _Connection:
        (offer,) = session.wait_for({"open": "trainer rank 0"})
        plan, terms = plan_from_plain(offer["plan"]), PublishConfig(**offer["terms"])
        number = self._worker.number
        if len(plan.workers) != self._worker.tp_size or number >= plan.num_workers:
            raise ReshardError(
                f"the trainer plans for {plan.num_replicas} x {len(plan.workers)} workers and met"
                f" {self._worker}"
            )
        session.post(f"worker/{number}", whereabouts(self._device) | {"tensors": self._description()})
        inbox, memory, staged = make_inbox(session, plan, terms, worker=number, device=self._device)
        return _Connection(session, plan, terms, inbox=inbox, memory=memory, staged=staged)

    def _description(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and type of every tensor; a second name of the same memory is left out. Raises
        ReshardError for a tensor that cannot be written as it lies."""
        seen, found = set(), []
        for name, tensor in self._tensors.items():
            if not tensor.is_contiguous():
                raise ReshardError(
                    f"{self._worker}: {name} is not contiguous, expected a plain row-major tensor"
                )
            place = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() == 0 or place not in seen:
                found.append((name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            seen.add(place)
        return found

    def _verify(self, connection: _Connection, sent: list[dict[str, dict[str, str]]]) -> None:
        if not connection.terms.checksums:
            return
        plan, number = connection.plan, self._worker.number
        for rank, sums in enumerate(sent):
            found = staged_checksums(plan, rank, number, connection.staged)
            wrong = [name for name, checksum in sums[str(number)].items() if found[name] != checksum]
            if wrong:
                raise ReshardError(
                    f"checksums differ in {len(wrong)} parameters, such as {wrong[0]}, between trainer rank"
                    f" {rank} and {self._worker}: expected the bytes that were sent; publish again, and look"
                    " at the link if it repeats"
                )

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.inbox.close()
            self._connection.memory.close()
            self._connection = None


class _Connection:
    """One session as this worker sees it. transfer: hand-overs begun in it."""

    def __init__(
        self,
        session: Session,
        plan: ReshardPlan,
        terms: PublishConfig,
        *,
        inbox: Inbox,
        memory: Memory,
        staged: dict[str, Tensor],
    ):
        self.session = session
        self.plan = plan
        self.terms = terms
        self.inbox = inbox
        self.memory = memory
        self.staged = staged
        self.transfer = 0
