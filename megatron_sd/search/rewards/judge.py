"""A language model as judge of answers: asked of any server that speaks OpenAI's chat completions (a vLLM server
of one's own among them), at temperature 0.

What was judged is kept by a hash of all that the judge saw, so nothing is asked twice, by whatever process. A
judge that cannot be reached, or whose reply is neither yes nor no, gives no verdict: never a 0.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import xxhash

from megatron_sd.config import JudgeConfig
from megatron_sd.durable.shared_lines import SharedLines
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.observability.progress import Task

_AGAIN = "Reply with one word: yes or no."
_RETRIED = frozenset({408, 409, 425, 429})  # beside what the server's side got wrong


@dataclass(frozen=True, kw_only=True)
class GivenAnswer:
    """What is judged."""

    question: str
    golden_answers: tuple[str, ...]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """found: of each answer 1.0 for yes, 0.0 for no, None where the judge failed. failures: why it did."""

    found: tuple[float | None, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is asked of the judge: the messages, and the key that they have in the file of judgements."""

    messages: tuple[Mapping[str, str], ...]
    key: str


class AnswerJudge:
    """A judge and the file of what it said. Processes may share the file: one asks while the others wait."""

    def __init__(self, config: JudgeConfig, store: Path) -> None:
        self._config = config
        self._lines = SharedLines(store)
        self._known: dict[str, float | None] = {}  # None: it was settled that there is no verdict

    def verdicts(self, answers: Sequence[GivenAnswer], task: Task | None = None) -> Verdicts:
        """task: counts the answers that are asked. Raises DataError for judgements that cannot be read,
        ConfigError when the server refuses what it is asked."""
        cases = [_case(answer, self._config) for answer in answers]
        with self._lines.locked():
            self._read()
            missing = {case.key: case for case in cases if case.key not in self._known}
            failures = asyncio.run(self._ask_all(list(missing.values()), task)) if missing else []
            self._read()
        return Verdicts(found=tuple(self._known.get(case.key) for case in cases), failures=tuple(failures))

    def _read(self) -> None:
        for line in self._lines.new():
            try:
                record = json.loads(line)
                said = record["judge"]
                self._known.setdefault(record["key"], None if said is None else float(said))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self._lines.path}: found the line {line[:80]!r}, which is no"
                    f" judgement ({type(error).__name__}: {error}): remove the line; its answer is judged again"
                ) from error

    def settle(self, answers: Sequence[GivenAnswer]) -> tuple[float | None, ...]:
        """Note of those without a verdict that they shall have none, so that whoever asks again, on any rank or
        after a restart, finds the same; what another process heard meanwhile stands."""
        cases = [_case(answer, self._config) for answer in answers]
        with self._lines.locked():
            self._read()
            without = {case.key for case in cases if case.key not in self._known}
            self._lines.add(
                {"key": key, "judge": None, "model": self._config.model} for key in sorted(without)
            )
            self._read()
        return tuple(self._known[case.key] for case in cases)

    async def _ask_all(self, cases: Sequence[_Case], task: Task | None) -> list[str]:
        """Adds to the file what is said; returns why some could not be judged. A judge that has failed for as many
        as may be asked at one time, and answered nobody, is not asked any more."""
        config = self._config
        failures: list[str] = []
        num_judged = 0
        at_one_time = asyncio.Semaphore(config.max_concurrent)
        headers = {} if config.key_file is None else {"authorization": f"Bearer {_key_of(config.key_file)}"}

        async def ask(http: httpx.AsyncClient, case: _Case) -> None:
            nonlocal num_judged
            async with at_one_time:
                if num_judged == 0 and len(failures) >= config.max_concurrent:
                    failures.append("judge: not asked, since it has answered nothing so far")
                    return
                try:
                    reply, verdict = await _judged(http, case, config)
                except RetrievalError as error:
                    failures.append(str(error))
                    return
            num_judged += 1
            self._lines.add([{"key": case.key, "judge": verdict, "model": config.model, "reply": reply}])
            if task is not None:
                task.add(done=1)

        async with httpx.AsyncClient(timeout=config.deadline_s, trust_env=False, headers=headers) as http:
            await asyncio.gather(*(ask(http, case) for case in cases))
        return failures


def _case(answer: GivenAnswer, config: JudgeConfig) -> _Case:
    fields = {
        "question": answer.question,
        "golden_answers": "\n".join(answer.golden_answers),
        "answer": answer.answer,
    }
    # a lone surrogate, which no request can hold, becomes a question mark
    fields = {name: text.encode("utf-8", errors="replace").decode() for name, text in fields.items()}
    text = re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), config.prompt)
    messages = ({"role": "user", "content": text},)
    seen = json.dumps([config.model, messages, config.max_tokens])
    return _Case(messages=messages, key=xxhash.xxh3_128_hexdigest(seen.encode()))


def _key_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"judge.key_file: {error}, expected a file that holds the server's API key"
        ) from error


async def _judged(http: httpx.AsyncClient, case: _Case, config: JudgeConfig) -> tuple[str, float]:
    """(reply, verdict). A reply that is none is asked for once more, with what is wanted said again. Raises
    RetrievalError, ConfigError."""
    reply = await _reply(http, case.messages, config)
    try:
        return reply, verdict_of(reply)
    except RetrievalError:
        again = ({"role": "assistant", "content": reply}, {"role": "user", "content": _AGAIN})
        reply = await _reply(http, (*case.messages, *again), config)
        return reply, verdict_of(reply)


async def _reply(http: httpx.AsyncClient, messages: Sequence[Mapping[str, str]], config: JudgeConfig) -> str:
    """Raises RetrievalError when no try was answered, ConfigError when the server will never answer this."""
    url = f"{config.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    body = {
        "model": config.model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": config.max_tokens,
    }
    cause = ""
    for number in range(config.tries):
        if number:
            await asyncio.sleep(min(2.0 ** (number - 1), 30.0))
        try:
            answer = await http.post(url, json=body)
        except httpx.HTTPError as error:
            cause = f"{type(error).__name__}: {error}"
            continue
        if answer.status_code == 200:
            return _text_of(answer)
        cause = f"{answer.status_code} {answer.text[:200]}"
        if answer.status_code < 500 and answer.status_code not in _RETRIED:
            raise ConfigError(
                f"judge: {url} answered {cause}, expected a chat completion: see judge.url and .model"
            )
    raise RetrievalError(f"judge: {url} gave no answer in {config.tries} tries; the last one: {cause}")


def _text_of(answer: httpx.Response) -> str:
    try:
        choice = answer.json()["choices"][0]
        content, is_cut = str(choice["message"]["content"]), choice.get("finish_reason") == "length"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RetrievalError(f"judge: found {answer.text[:200]!r}, expected a chat completion") from error
    if is_cut:
        raise RetrievalError(f"judge: replied {content[:200]!r} and was cut: raise judge.max_tokens")
    return content


def verdict_of(reply: str) -> float:
    """1.0 for yes, 0.0 for no, as the reply's first or last word, thoughts left out. Raises RetrievalError for a
    reply that begins and ends otherwise, or says both."""
    said_at_last = reply.rpartition("</think>")[2]
    words = re.findall(r"\w+", said_at_last.lower())
    said = {word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")}
    if len(said) != 1 or "<think>" in said_at_last:
        raise RetrievalError(f"judge: replied {reply[:200]!r}, expected yes or no")
    return float(said == {"yes"})
