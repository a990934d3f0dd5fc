"""Stored rollouts: our own transcripts, what `sd-search sample` left, and the text transcripts of Search-R1 and
its relatives.

Ours hold token ids, and are scored as they were sampled. Foreign rows hold text alone and are encoded anew:

    question          the question; or `prompt` (a text or a chat's messages) or verl's `input`, with "Question: ..." in it
    response          everything after the prompt, tags included; also named output, completion, sequence or text (a sequence that
                      begins with its prompt is cut there)
    golden_answers    a string or list; also named answers, answer, target, ground_truth or gts (verl's rollout_data_dir)
    id                of the question; rows of one data_source (or source), id and question text are one group

What the environment wrote is not the policy's: passages between the information tags, and the messages
after an invalid action.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.identity import IDENTITY_NAME
from eval.samples import read_lines
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Hit, Passage, Question, Rollout, RolloutGroup, StopReason, Turn
from megatron_sd.rollout.stored import (
    ROLLOUTS_NAME,
    SAMPLE_NAME,
    StoredGroups,
    check_tokenizer,
    read_record,
    rollout_of,
)
from megatron_sd.search.environment import Environment
from megatron_sd.search.parsing import parse_completion

_RESPONSE_NAMES = ("response", "output", "completion", "sequence", "text")
_GOLD_NAMES = ("golden_answers", "answers", "answer", "target", "ground_truth", "gts")
# What Search-R1's environment, and those made of it, say after an action that is none.
_RETRY_MESSAGE = r"\s*My previous action is invalid\..*?Let me try again\.\s*"
_ASSISTANT = "<|im_start|>assistant\n"
_PASSAGE = re.compile(
    r"Doc\s*(\d+)\s*\(Title:\s*((?:[^()\n]|\([^()\n]*\))*)\)\s*(.*?)(?=\n?Doc\s*\d+\s*\(Title:|\Z)", re.DOTALL
)


def read_groups(path: Path, environment: Environment) -> list[RolloutGroup]:
    """The groups of a file of any kind; rollouts of foreign ones have no scores yet.

    Raises DataError that names file and line, for a row of no kind, and for ids of another tokenizer.
    """
    if path.name == ROLLOUTS_NAME and (path.parent / IDENTITY_NAME).is_file():
        return _sampled(path, read_record(path.parent / SAMPLE_NAME, "sd-search sample"), environment)
    try:
        records = read_lines(path, is_ours=False)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; expected a transcript in JSON lines") from error
    if not records:
        raise DataError(f"{path} holds no line, expected rollouts")
    if "rollouts" in records[0]:
        return [
            _own(record, f"{path}:{number}", environment) for number, record in enumerate(records, start=1)
        ]
    return list(_foreign(records, path, environment))


def _sampled(path: Path, record: Mapping[str, Any], environment: Environment) -> list[RolloutGroup]:
    """Of `sd-search sample`. record: what the directory says of itself."""
    check_tokenizer(environment.codec.fingerprint, record, path.parent)
    if record["strategy"] not in (None, "agent"):
        raise DataError(
            f"{path.parent} holds rollouts of the strategy {record['strategy']}, expected those of agent: the"
            " contexts of a prompted strategy are not one sequence"
        )
    return list(StoredGroups(path))


def _own(record: Mapping[str, Any], place: str, environment: Environment) -> RolloutGroup:
    try:
        rollouts = tuple(_scored(fields, place, environment) for fields in record["rollouts"])
        fields = record["question"]
        tuples = {
            "golden_answers": tuple(fields["golden_answers"]),
            "supporting": tuple(map(tuple, fields["supporting"])),
        }
        return RolloutGroup(question=Question(**{**fields, **tuples}), rollouts=rollouts)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place} is no transcript of ours ({type(error).__name__}: {error})") from error


def _scored(fields: Mapping[str, Any], place: str, environment: Environment) -> Rollout:
    """Raises DataError when the ids do not read as the text beside them."""
    for turn in fields["turns"]:
        _check_tokenizer(turn["completion_ids"], turn["completion_text"], place, environment)
    turns = [
        {name: value for name, value in turn.items() if name in Turn.__dataclass_fields__}
        for turn in fields["turns"]
    ]
    return rollout_of({**fields, "turns": turns})


def _check_tokenizer(ids: Sequence[int], text: str, place: str, environment: Environment) -> None:
    try:
        found = environment.codec.decode(ids)
    except (IndexError, KeyError) as error:
        expected = "expected the model that sampled it"
        raise DataError(
            f"{place}: token id {max(ids)} is none of this model's tokenizer; {expected}"
        ) from error
    if found != text:
        raise DataError(
            f"{place}: by this model's tokenizer the ids read {found[:60]!r}, in the transcript"
            f" {text[:60]!r}; expected the model, or at least the tokenizer, that sampled it"
        )


def _foreign(
    records: Sequence[Mapping[str, Any]], path: Path, environment: Environment
) -> Iterator[RolloutGroup]:
    questions: dict[tuple[str, ...], Question] = {}
    rollouts = defaultdict(list)
    for number, record in enumerate(records, start=1):
        place = f"{path}:{number}"
        question = _question(record, place)
        key = question.source, question.id, question.text
        if key not in questions:
            taken = sum(other.id.partition("~")[0] == question.id for other in questions.values())
            questions[key] = replace(question, id=f"{question.id}~{taken + 1}") if taken else question
        rollouts[key].append(
            _rollout(questions[key], _response(record, place), len(rollouts[key]), environment)
        )
    for key, question in questions.items():
        yield RolloutGroup(question=question, rollouts=tuple(rollouts[key]))


def _response(record: Mapping[str, Any], place: str) -> str:
    """The rollout's text after its prompt."""
    response, prompt = _first(record, _RESPONSE_NAMES), _prompt(record)
    if not isinstance(response, str):
        names = ", ".join(_RESPONSE_NAMES)
        raise DataError(f"{place} has fields {sorted(record)}, expected the rollout's text in one of {names}")
    if prompt and response.startswith(prompt):
        return response.removeprefix(prompt)
    return response.rpartition(_ASSISTANT)[2] if response.count(_ASSISTANT) == 1 else response


def _prompt(record: Mapping[str, Any]) -> str:
    """The prompt as text: `prompt`, the last user's message of a chat, or verl's `input`."""
    prompt = _first(record, ("prompt", "input"))
    if isinstance(prompt, list):
        said = [str(message.get("content", "")) for message in prompt if isinstance(message, Mapping)]
        return said[-1] if said else ""
    return prompt if isinstance(prompt, str) else ""


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _question(record: Mapping[str, Any], place: str) -> Question:
    text = record.get("question")
    if text is None and "Question:" in _prompt(record):
        text = _prompt(record).rpartition("Question:")[2].split("\n")[0].split("<|im_end|>")[0]
    golds = _first(record, _GOLD_NAMES)
    golds = golds.get("target", golds) if isinstance(golds, Mapping) else golds
    if not isinstance(text, str) or golds is None:
        raise DataError(
            f"{place} has fields {sorted(record)}, expected question (or prompt) and one of"
            f" {', '.join(_GOLD_NAMES)}"
        )
    golds = (golds,) if isinstance(golds, str) else tuple(map(str, golds))
    source = str(_first(record, ("data_source", "source")) or "")
    return Question(
        id=str(record.get("id", text.strip())), text=text.strip(), golden_answers=golds, source=source
    )


def _rollout(question: Question, response: str, index: int, environment: Environment) -> Rollout:
    """Completions and observations of a text: what the information tags enclose was not written by the
    policy. Raises ConfigError beside native calls, whose chat is more than tags."""
    if environment.protocol.native_calls:
        raise ConfigError(
            "protocol.preset: found one of native calls with transcripts that are text, expected those of training or of"
            " `sd-search eval`, whose token ids say what the policy wrote"
        )
    opening, closing = map(re.escape, environment.protocol.information_tags)
    messages = [_RETRY_MESSAGE, *filter(None, [re.escape(environment.protocol.invalid_action_message)])]
    written = "|".join([rf"\s*{opening}.*?(?:{closing}\s*|\Z)", *messages])
    parts = re.split(f"({written})", response, flags=re.DOTALL)
    turns = []
    for completion, observation in zip(parts[::2], [*parts[1::2], ""], strict=True):
        ids = environment.codec.encode(completion)
        found = parse_completion(ids, environment.protocol, environment.codec)
        action = found.action
        if action is not None:
            action = replace(action, text=environment.sanitizer.clean(action.text).strip())
        turns.append(
            Turn(
                completion_ids=ids,
                completion_logprobs=(0.0,) * len(ids),
                observation_ids=environment.codec.encode(observation),
                action=action,
                hits=_hits(observation),
                well_formed=bool(ids) and environment.is_well_formed(ids, turn=len(turns)),
                note=environment.note(ids),
            )
        )
    answer = found.answer
    return Rollout(
        question_id=question.id,
        index=index,
        prompt_ids=environment.prompt_ids(question.text),
        turns=tuple(turns),
        stop_reason=StopReason.NO_ACTION if answer is None else StopReason.ANSWERED,
        answer=None if answer is None else answer.strip(),
    )


def _hits(observation: str) -> tuple[Hit, ...]:
    """The passages that Search-R1's format shows, by title; scores are not in the text."""
    body = re.sub(r"</?\w+>\s*\Z", "", observation.strip())
    found = _PASSAGE.findall(body)
    titled = [(title.strip().removeprefix('"').removesuffix('"'), text.strip()) for _, title, text in found]
    return tuple(Hit(passage=Passage(id=title, title=title, text=text), score=0.0) for title, text in titled)
