"""The environment of a rollout as pure functions: what it shows, what it appends, and when it ends the
rollout."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron_sd.config import RolloutConfig
from megatron_sd.errors import ConfigError
from megatron_sd.records import Action, Hit, StopReason, TokenIds
from megatron_sd.retrieval.queries import fit_query
from megatron_sd.search.chat_template import ChatTemplate
from megatron_sd.search.parsing import parse_completion
from megatron_sd.search.protocol import Protocol, Tags
from megatron_sd.search.rewards.form import completion_is_well_formed
from megatron_sd.search.sanitize import Sanitizer
from megatron_sd.search.tokens import TextCodec, fill

NO_CALLS: Mapping[str, int] = MappingProxyType({})
MOST_FAULTS_SHOWN = 1  # unreadable native calls of a rollout that are answered; the next one ends it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows a completion: an action to serve, a message and another turn (observation_ids), or the
    end (stop, with the answer if there is one). Exactly one of the three holds: a search that is not served
    is no action. ends_attempt: the message asks for another attempt; `answer` is then the one that ended.
    is_fault: the message says what is wrong with a native call."""

    action: Action | None = None
    answer: str | None = None
    observation_ids: TokenIds = ()
    stop: StopReason | None = None
    ends_attempt: bool = False
    is_fault: bool = False


class Environment:
    """A text protocol bound to a tokenizer and to limits. It holds no state: every method is a function of
    its arguments.

    Raises ConfigError when max_observation_tokens cannot hold the information tags, or when the chat template
    does not have what the protocol needs of it.
    """

    def __init__(self, codec: TextCodec, protocol: Protocol, limits: RolloutConfig):
        self.codec = codec
        self.protocol = protocol = _in_chat(protocol, codec.chat, limits)
        self.limits = limits
        self.sanitizer = Sanitizer((*protocol.control_tags, *codec.control_strings))
        self._most_calls = {
            tool.name: tool.max_calls for tool in protocol.tools if tool.max_calls is not None
        }
        self._retry_ids = codec.encode_own(protocol.invalid_action_message)
        self._reflection_ids = codec.encode_own(protocol.reflection_message)
        self._opened_thought = _opened_thought(codec.decode(self.prompt_ids("")), protocol)
        self._before, after = protocol.information_format.split("{passages}")
        self._closing_ids = codec.encode_own(after)
        frame = len(codec.encode_own(self._before)) + len(self._closing_ids)
        if limits.max_observation_tokens <= frame:
            raise ConfigError(
                f"rollout.max_observation_tokens is {limits.max_observation_tokens}, expected more than the"
                f" {frame} tokens of the information tags"
            )

    def prompt_ids(self, question: str, hindsight: str = "") -> TokenIds:
        """The prompt of a question; `hindsight` is the teacher's block, empty for the student. Both are
        sanitised, the block line by line."""
        clean = self.sanitizer.clean
        block = "\n".join(map(clean, hindsight.split("\n")))
        fields = self.protocol.prompt_fields(clean(question), block)
        return self.codec.in_frame(self.codec.encode_own(self.protocol.prompt, fields))

    def observation_ids(self, hits: Sequence[Hit]) -> TokenIds:
        """The passages, best first, in the protocol's frame; cut so that the closing tag always fits.

        Holds no control id but those of the tags: titles and texts are sanitised, then encoded as plain
        text, in one go with the frame where nothing is cut.
        """
        return self._framed("".join(self._show(rank, hit) for rank, hit in enumerate(hits, start=1)))

    def _framed(self, passages: str) -> TokenIds:
        if self.protocol.strips_passages:
            passages = passages.strip()
        whole = self.codec.encode_own(self.protocol.information_format, {"passages": passages})
        if len(whole) <= self.limits.max_observation_tokens:
            return whole
        shown = self.codec.encode_own(f"{self._before}{{passages}}", {"passages": passages})
        shown = self._whole_characters(shown[: self.limits.max_observation_tokens - len(self._closing_ids)])
        return (*shown, *self._closing_ids)

    def result_ids(self, text: str) -> TokenIds:
        """A tool's result, in the frame and within the limits of passages, and as harmless."""
        return self._framed(f"{self._clean_lines(text)}\n")

    def _show(self, rank: int, hit: Hit) -> str:
        """One passage as text. Lines are cleaned once more, since a tag may be split between title and
        text."""
        clean = self.sanitizer.clean
        text = (
            self._clean_lines(hit.passage.text)
            if self.protocol.keeps_line_breaks
            else clean(hit.passage.text)
        )
        fields = {"rank": str(rank), "title": clean(hit.passage.title), "text": text}
        return "\n".join(map(clean, fill(self.protocol.passage_format, fields).split("\n")))

    def _clean_lines(self, text: str) -> str:
        """The text line by line, or on one line where a tag stands across a break."""
        lines = [self.sanitizer.clean(line) for line in text.split("\n")]
        flat = " ".join(lines)
        return "\n".join(lines) if self.sanitizer.clean(flat) == flat else self.sanitizer.clean(text)

    def _whole_characters(self, ids: TokenIds) -> TokenIds:
        """`ids` without the last tokens when they end in the middle of a character."""
        while ids:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
            decoder.decode(self.codec.bytes_of(ids[-4:]))
            if not decoder.getstate()[0]:
                break
            ids = ids[:-1]
        return ids

    def turn_budget(self, num_tokens: int) -> int:
        """How many tokens the next turn may sample after `num_tokens` of prompt, completions and
        observations; 0: none."""
        return max(0, min(self.limits.max_turn_tokens, self.limits.max_rollout_tokens - num_tokens))

    def judge(
        self,
        completion_ids: TokenIds,
        *,
        turn: int,
        truncated: bool,
        attempt: int = 0,
        called: Mapping[str, int] = NO_CALLS,
        num_faults: int = 0,
    ) -> Verdict:
        """What follows the completion of 0-based `turn` of an attempt. truncated: sampling ended at a token
        limit. called: how often each tool was, in the rollout; num_faults: verdicts with is_fault before. An
        attempt that has answered, or come to its last turn, is followed by the next one, if any.

        Turns 0 .. max_search_turns - 1 may search; turn max_search_turns is the last, in which a search is
        not served.
        """
        found = parse_completion(completion_ids, self.protocol, self.codec)
        more = attempt + 1 < self.limits.attempts
        if found.answer is not None:
            return self._end(completion_ids, StopReason.ANSWERED, found.answer.strip(), more=more)
        is_last = turn >= self.limits.max_search_turns
        action = None if found.action is None else self._servable(found.action)
        if action is not None and not is_last:
            if called.get(action.tool, 0) >= self._most_calls.get(action.tool, math.inf):
                return Verdict(observation_ids=self.result_ids(f"{action.tool} may not be called again."))
            return Verdict(action=action)
        if truncated:
            return Verdict(stop=StopReason.TOKEN_LIMIT)
        if is_last:
            return self._end(completion_ids, StopReason.TURN_LIMIT, more=more)
        if found.fault and num_faults < MOST_FAULTS_SHOWN:
            return Verdict(observation_ids=self.result_ids(found.fault), is_fault=True)
        if found.fault or not self._retry_ids:
            return Verdict(stop=StopReason.NO_ACTION)
        return Verdict(observation_ids=self._message(completion_ids, self._retry_ids))

    def _end(
        self, completion_ids: TokenIds, stop: StopReason, answer: str | None = None, *, more: bool
    ) -> Verdict:
        """Of an attempt; with `more` the next one begins."""
        if more:
            asks = self._message(completion_ids, self._reflection_ids)
            return Verdict(answer=answer, observation_ids=asks, ends_attempt=True)
        return Verdict(answer=answer, stop=stop)

    def _message(self, completion_ids: TokenIds, message: TokenIds) -> TokenIds:
        """The message without the end-of-sequence id before it, where the policy has sampled that itself."""
        is_twice = completion_ids[-1:] == message[:1] and completion_ids[-1] in self.codec.eos_ids
        return message[1:] if is_twice else message

    def _servable(self, action: Action) -> Action | None:
        """The action as the retriever or the tool gets it; None where nothing is left of its text."""
        text = fit_query(self.sanitizer.clean_query(action.text), self.limits.max_query_bytes)
        return replace(action, text=text) if text else None

    def is_well_formed(self, completion_ids: TokenIds, turn: int = 0) -> bool:
        """reward.completion_is_well_formed of the text of 0-based `turn`; an end-of-sequence id is left
        out. The first turn goes on with a thought that the prompt has opened, as chat templates of thinking
        models do."""
        ids = completion_ids[:-1] if completion_ids[-1] in self.codec.eos_ids else completion_ids
        opened = self._opened_thought if turn == 0 else ""
        return completion_is_well_formed(opened + self.codec.decode(ids), self.protocol)

    def note(self, completion_ids: TokenIds) -> str:
        """What the completion notes of earlier results, joined; empty without note tags in the protocol."""
        if self.protocol.note_tags is None:
            return ""
        return " ".join(_between(self.codec.decode(completion_ids), self.protocol.note_tags))


def _in_chat(protocol: Protocol, chat: ChatTemplate | None, limits: RolloutConfig) -> Protocol:
    """The protocol with what is shown and said later in the frames of the chat template: of native calls, and
    of another attempt."""
    if chat is None:
        if protocol.native_calls:
            raise ValueError("native calls need a codec with the protocol's chat template")
        return protocol
    if protocol.native_calls:
        result = "{passages}".join(chat.result_frame())
        message = protocol.invalid_action_message and protocol.invalid_action_message.join(
            chat.message_frame()
        )
        protocol = replace(protocol, information_format=result, invalid_action_message=message)
    if limits.attempts > 1 and protocol.reflection_message:
        protocol = replace(
            protocol, reflection_message=protocol.reflection_message.strip().join(chat.message_frame())
        )
    return protocol


def _between(text: str, tags: Tags) -> Iterator[str]:
    """What stands between each pair of the tags."""
    opening, closing = map(re.escape, tags)
    return (found.group(1).strip() for found in re.finditer(f"{opening}(.*?){closing}", text, re.DOTALL))


def _opened_thought(prompt: str, protocol: Protocol) -> str:
    """The thought's opening tag when the prompt ends with it, else nothing."""
    opening = protocol.think_tags[0]
    return opening if prompt.rstrip().endswith(opening) else ""
