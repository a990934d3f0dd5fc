"""Which of several servers a rollout is sampled on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sd.records import TokenIds


def dealt_to(num_dealt: int, *, sharer: int, num_sharers: int, num_servers: int) -> int:
    """The server of a rank's next prompt. Together the ranks count 0, 1, 2, ...: the first prompt of each,
    then the second, so that no server has two prompts more than another while the ranks have equally many."""
    return (num_dealt * num_sharers + sharer) % num_servers


@dataclass(kw_only=True)
class Homes:
    """The places of the servers that this rank's rollouts go to: a rollout stays where it began, and a group
    where its prompt was first read, since their keys and values lie there. sharer: this rank's number among
    the num_sharers ranks that have the same servers."""

    num_servers: int
    sharer: int = 0
    num_sharers: int = 1
    _of_prompt: dict[TokenIds, int] = field(default_factory=dict)
    _of_session: dict[str, int] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)  # of each session that is under way

    def place(self, session: str, prompt_ids: TokenIds, living: Sequence[bool]) -> int:
        """The server of this session's next turn, which begins with these ids. living: which servers still
        serve.

        A new prompt goes to the server whose turn it is; to the one with the fewest tokens under way where
        the former has more than these by more than the prompt, or serves no longer. So does a rollout or a
        group whose server is lost."""
        home = self._of_session.get(session)
        if home is None or not living[home]:
            home = self._of_prompt.get(prompt_ids)
            if home is None or not living[home]:
                home = self._new_home(len(prompt_ids), living)
            self._of_prompt[prompt_ids] = self._of_session[session] = home
        self._tokens[session] = len(prompt_ids)
        return home

    def _new_home(self, num_tokens: int, living: Sequence[bool]) -> int:
        dealt = dealt_to(
            len(self._of_prompt),
            sharer=self.sharer,
            num_sharers=self.num_sharers,
            num_servers=self.num_servers,
        )
        loads = self.loads()
        choice = [place for place in range(self.num_servers) if living[place]] or range(self.num_servers)
        # of equal ones the next in turn, which differs from rank to rank
        fewest = min(choice, key=lambda place: (loads[place], (place - dealt) % self.num_servers))
        return dealt if dealt in choice and loads[dealt] - loads[fewest] <= num_tokens else fewest

    def loads(self) -> list[int]:
        """Tokens of the rollouts under way, by server; those that wait for a search are under way, too."""
        loads = [0] * self.num_servers
        for session, home in list(self._of_session.items()):  # another thread ends sessions meanwhile
            loads[home] += self._tokens.get(session, 0)
        return loads

    def end(self, session: str) -> None:
        """The rollout is over."""
        self._of_session.pop(session, None)
        self._tokens.pop(session, None)

    def forget(self) -> None:
        """What the servers held is gone: they have new weights."""
        for known in (self._of_prompt, self._of_session, self._tokens):
            known.clear()
