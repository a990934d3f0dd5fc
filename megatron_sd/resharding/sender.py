"""A trainer rank's part in handing a version over: all ranks call `send`, and the workers hold all of it or
what they had."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_sd.config import PublishConfig
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.connection import make_outbox, open_session, ranks, whereabouts, workers
from megatron_sd.resharding.exchange import Outbox, sent_checksums
from megatron_sd.resharding.plan import ReshardPlan
from megatron_sd.resharding.transport import MeetingPoint, Session, delivery_key, session_of


class ShardSender:
    """Trainer rank `rank` of the plan. Rank 0 hosts the meeting point and decides whether a version is taken.

    device: of the shards. num_changed: in the last version, as the outbox says. num_deliveries: calls of
    `send`, equal on all ranks. The first `send`, and the first after a failure, connects to the workers.
    """

    def __init__(
        self,
        meeting: MeetingPoint,
        plan: ReshardPlan,
        terms: PublishConfig,
        *,
        rank: int,
        device: torch.device,
    ):
        self._meeting = meeting
        self._plan = plan
        self._terms = terms
        self._rank = rank
        self._device = device
        self.num_changed: int | None = None
        self.num_deliveries = 0
        self._session: Session | None = None
        self._outbox: Outbox | None = None
        self._transfer = 0  # within the session

    def send(self, shards: Mapping[str, Tensor], policy_version: int) -> int:
        """Hand a version over. shards: flat, valid elements only, by parameter. Returns the bytes that this
        rank sent.

        Raises ReshardError on every rank, naming who failed, when some worker did not get or take all of
        it. Before the decision every worker keeps the version it had; `send` may then be called again.
        """
        session = self._agree_on_session()
        with session.ended_by_errors(self._drop):
            self._outbox = self._outbox or self._connect(session)
            self._transfer += 1
            t = self._transfer
            if self._rank == 0:
                session.post_in(t, "version", policy_version)
            num_bytes = self._outbox.send(shards)
            self.num_changed = self._outbox.num_changed
            session.post_in(t, f"sent/{self._rank}", self._checksums(shards))
            if self._rank == 0:
                session.wait_for(ranks(self._plan, f"{t}/sent"))
                session.wait_for(workers(self._plan, f"{t}/staged"))
                if session.closed() is not None:
                    raise ReshardError(session.closed())
                session.post_in(t, "decision", "commit")
                session.wait_for(workers(self._plan, f"{t}/committed"))
                session.post_in(t, "done")
            session.wait_for({f"{t}/done": "trainer rank 0"}, patience=4)
        return num_bytes

    def give_up(self, reason: str) -> None:
        """End a `send` that is under way, from another thread."""
        if self._session is not None:
            self._session.close(reason)

    def close(self) -> None:
        """Leave; rank 0 ends the session, and workers that still wait are told."""
        if self._session is not None and self._rank == 0:
            self._session.close("the trainer has ended")
        self._drop()

    def _agree_on_session(self) -> Session:
        """The open session, or a new one when it has ended; rank 0 decides which."""
        self.num_deliveries += 1
        everybody = Session.of_everybody(self._meeting, self._terms.timeout_s)
        if self._rank == 0:
            current = self._session
            number = 1 if current is None else current.number + (current.closed() is not None)
            everybody.post(delivery_key(self.num_deliveries), number)
        number = session_of(self.num_deliveries, everybody, patience=4)
        if self._session is None or self._session.number != number:
            self._drop()
            self._session, self._transfer = Session(self._meeting, number, self._terms.timeout_s), 0
        return self._session

    def _connect(self, session: Session) -> Outbox:
        session.post(f"rank/{self._rank}", whereabouts(self._device))
        if self._rank == 0:
            open_session(session, self._plan, self._terms)
        return make_outbox(session, self._plan, self._terms, rank=self._rank, device=self._device)

    def _checksums(self, shards: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
        if not self._terms.checksums:
            return {}
        return sent_checksums(self._plan, self._rank, shards)

    def _drop(self) -> None:
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
