"""A language model as judge of answers: a further figure of an evaluation, asked of any server that speaks
OpenAI's chat completions (a vLLM server of one's own among them).

What was judged is kept by a hash of all that the judge saw, so nothing is asked twice, and the same command
goes on where it was killed. A judge that cannot be reached, or whose reply is neither yes nor no, gives no
figure: it is counted, and never a 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import xxhash

from eval.samples import QuestionResult, Sample
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.observability.progress import Task

JUDGEMENTS_NAME = "judgements.jsonl"
FIGURE, FAILED = "judge", "judge_failed"
_PROMPT = (
    "Question: {question}\nAccepted answers: {golden_answers}\nGiven answer: {answer}\n\nDoes the given answer mean"
    " the same as an accepted answer? Reply with one word, yes or no."
)
_PLACES = ("{question}", "{golden_answers}", "{answer}")
_RETRIED = frozenset({408, 409, 425, 429})  # beside what the server's side got wrong


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """url: of the server, without /v1/chat/completions. model: its name there. prompt: needs {question},
    {golden_answers} (one a line) and {answer}. key_file: holds the server's API key. deadline_s: of one
    request. tries: of one question. max_concurrent: requests at one time. max_failed_share: of the answers;
    with more the evaluation ends by an error, and goes on with the same command."""

    url: str
    model: str
    prompt: str = _PROMPT
    key_file: str | None = None
    deadline_s: float = 60.0
    tries: int = 3
    max_concurrent: int = 16
    max_tokens: int = 256  # of a reply, thoughts included
    max_failed_share: float = 0.05

    def __post_init__(self) -> None:
        missing = [place for place in _PLACES if place not in self.prompt]
        if missing:
            raise ConfigError(
                f"judge.prompt: found none of {', '.join(missing)}, expected {', '.join(_PLACES)}"
            )


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is asked of the judge: the messages, and the key that they have in the file of judgements."""

    messages: tuple[Mapping[str, str], ...]
    key: str


def judge(
    results: Sequence[QuestionResult], config: JudgeConfig, output: Path, task: Task
) -> list[QuestionResult]:
    """The results with a figure `judge` for every answer: 1.0 when the judge says yes. No answer is 0.0,
    and is not asked; rollouts that are no data have none. Where the judge failed the figure is missing, and
    judge_failed 1.0.

    Raises RetrievalError when it failed for more than max_failed_share of the answers, DataError for
    judgements that cannot be read, ConfigError when the server refuses what it is asked.
    """
    path = output / JUDGEMENTS_NAME
    cut_torn_line(path)
    known = _read(path)
    cases = {(r.question_id, n): case for r in results for n, case in _cases(r, config)}
    missing = {case.key: case for case in cases.values() if case.key not in known}
    failures = asyncio.run(_ask_all(list(missing.values()), config, path, known, task))
    if len(failures) > config.max_failed_share * max(1, len(cases)):
        raise RetrievalError(
            f"judge: {len(failures)} of {len(cases)} answers could not be judged, expected at most"
            f" {config.max_failed_share:.0%} (judge.max_failed_share); the first cause: {failures[0]}; what was judged"
            " is kept: run the same command again"
        )
    return [_with_judgements(result, cases, known) for result in results]


def _cases(result: QuestionResult, config: JudgeConfig) -> Iterator[tuple[int, _Case]]:
    for number, sample in enumerate(result.samples):
        if sample.answer is None or sample.stop_reason.is_infrastructure:
            continue
        fields = {
            "question": result.question,
            "golden_answers": "\n".join(result.golden_answers),
            "answer": sample.answer,
        }
        text = re.sub(r"\{(\w+)\}", lambda found, own=fields: own.get(found[1], found[0]), config.prompt)
        messages = ({"role": "user", "content": text},)
        yield number, _Case(messages=messages, key=_key(messages, config))


def _key(messages: Sequence[Mapping[str, str]], config: JudgeConfig) -> str:
    seen = json.dumps([config.model, messages, config.max_tokens])
    return xxhash.xxh3_128_hexdigest(seen.encode())


def _read(path: Path) -> dict[str, float]:
    known: dict[str, float] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
        try:
            record = json.loads(line)
            known[record["key"]] = float(record["judge"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is no judgement ({type(error).__name__}: {error}): remove the line; its answer is"
                " judged again"
            ) from error
    return known


async def _ask_all(
    cases: Sequence[_Case], config: JudgeConfig, path: Path, known: dict[str, float], task: Task
) -> list[str]:
    """Adds to what is known, in the file first; returns why some could not be judged."""
    failures: list[str] = []
    at_one_time = asyncio.Semaphore(config.max_concurrent)
    headers = {} if config.key_file is None else {"authorization": f"Bearer {_key_of(config.key_file)}"}

    async def ask(http: httpx.AsyncClient, case: _Case) -> None:
        async with at_one_time:
            try:
                reply = await _reply(http, case, config)
                verdict = verdict_of(reply)
            except RetrievalError as error:
                failures.append(str(error))
                return
        append_lines(path, [{"key": case.key, "judge": verdict, "model": config.model, "reply": reply}])
        known[case.key] = verdict
        task.add(done=1)

    async with httpx.AsyncClient(timeout=config.deadline_s, trust_env=False, headers=headers) as http:
        await asyncio.gather(*(ask(http, case) for case in cases))
    return failures


def _key_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"judge.key_file: {error}, expected a file that holds the server's API key"
        ) from error


async def _reply(http: httpx.AsyncClient, case: _Case, config: JudgeConfig) -> str:
    """Raises RetrievalError when no try was answered, ConfigError when the server will never answer this."""
    url = f"{config.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    body = {
        "model": config.model,
        "messages": case.messages,
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
        return str(answer.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RetrievalError(f"judge: found {answer.text[:200]!r}, expected a chat completion") from error


def verdict_of(reply: str) -> float:
    """1.0 for yes, 0.0 for no, thoughts left out. Raises RetrievalError for a reply that says neither, or
    both."""
    words = re.findall(r"\w+", re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).lower())
    said = {word for word in words if word in ("yes", "no")}
    if len(said) != 1:
        raise RetrievalError(f"judge: replied {reply[:200]!r}, expected yes or no")
    return float(said == {"yes"})


def _with_judgements(
    result: QuestionResult, cases: Mapping[tuple[str, int], _Case], known: Mapping[str, float]
) -> QuestionResult:
    samples = tuple(
        dataclasses.replace(sample, figures=_judged(sample, cases.get((result.question_id, number)), known))
        for number, sample in enumerate(result.samples)
    )
    return dataclasses.replace(result, samples=samples)


def _judged(sample: Sample, case: _Case | None, known: Mapping[str, float]) -> Mapping[str, float | None]:
    figures: dict[str, Any] = {n: v for n, v in sample.figures.items() if n not in (FIGURE, FAILED)}
    if sample.stop_reason.is_infrastructure:
        return figures
    if case is None:
        return figures | {FIGURE: 0.0, FAILED: 0.0}
    if case.key not in known:
        return figures | {FAILED: 1.0}
    return figures | {FIGURE: known[case.key], FAILED: 0.0}
