"""`sd-search select`: sampled rollouts become training episodes, from file to file; the same seed gives the
same bytes.

Below `output`:

    train.jsonl, validation.jsonl    an episode a line (megatron_sd/rollout/stored.py), and under "kind" what its prompt shows:
                                     plain, linked, shuffled or wrong_question
    questions.jsonl                  the questions of wanted difficulty that are not held out, for `sd-search train`
    episodes.json                    model, tokenizer, protocol, corpus and selection they are of; what was kept and dropped
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.episodes.selection import (
    EpisodeMaker,
    Prompt,
    Selection,
    SelectionTally,
    is_held_out,
    is_within,
    without_tokens,
)
from data_prep.sources.jsonl import write_rows
from megatron_sd.config import ProtocolConfig, RolloutConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.durable.files import write_whole
from megatron_sd.durable.run_lock import hold
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.observability.progress import Work
from megatron_sd.records import RolloutGroup
from megatron_sd.rollout.stored import (
    EPISODES_NAME,
    ROLLOUTS_NAME,
    SAMPLE_NAME,
    TRAIN_NAME,
    VALIDATION_NAME,
    StoredGroups,
    check_tokenizer,
    fields_of,
    read_record,
)
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol import Protocol
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import load_codec

QUESTIONS_NAME = "questions.jsonl"
SELECTABLE = ("agent",)  # strategies whose rollouts can become episodes
# What an episode may have otherwise than it was sampled with: the prompt, and what is said to an action
# that is none.
_OF_THE_PROMPT = {"prompt", "chat_template", "template_arguments", "question_end", "invalid_action_message"}
_KEPT = ("model", "model_version", "tokenizer", "corpus_version", "questions_version")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Episodes of what `sd-search sample` left in the directory `rollouts`. tokenizer: a model directory
    that has it; None: the one that sampled. protocol: with another prompt, for a model that shall learn to
    do without examples; None: as sampled."""

    rollouts: str  # a directory of `sd-search sample`
    output: str  # a directory
    tokenizer: str | None = None
    protocol: ProtocolConfig | None = None
    seed: int = 0  # of what is drawn
    selection: Selection = field(default_factory=Selection)


def main(argv: Sequence[str]) -> None:
    """The command line of `select`."""
    config = parse(SelectConfig, argv, "sd-search select")
    tally = select(config)
    print(f"episodes in {config.output}: {TRAIN_NAME}, {VALIDATION_NAME}, {QUESTIONS_NAME}\n{tally.line()}")


def select(config: SelectConfig) -> SelectionTally:
    """Write the episodes; what was kept and dropped. Raises DataError for rollouts that are none of ours,
    or not of this tokenizer, ConfigError for a selection or protocol that cannot be."""
    check_ranges(config)
    if (both := config.selection.shuffled_share + config.selection.wrong_question_share) > 1.0:
        raise ConfigError(
            f"selection.shuffled_share and .wrong_question_share: found {both:g} together, expected at most 1"
        )
    source, output = Path(config.rollouts), Path(config.output)
    groups = StoredGroups(source / ROLLOUTS_NAME)
    sampled = read_record(source / SAMPLE_NAME, "sd-search sample")
    if sampled["strategy"] not in SELECTABLE:
        raise DataError(
            f"{source} holds rollouts of strategy {sampled['strategy']}, expected one that episodes can be "
            f"selected from: {', '.join(SELECTABLE)}; the contexts of a prompted strategy are not one "
            f"sequence, so sample anew by `sd-search sample --strategy {SELECTABLE[0]}`, elsewhere"
        )
    prompt = prompt_of(config, sampled)
    if config.protocol is None:
        _check_prompt(groups, prompt, source)
    with hold(output):
        tally = SelectionTally()
        splits = _split(groups, config)
        (output / EPISODES_NAME).unlink(missing_ok=True)  # until all is written again
        for split, name in (("train", TRAIN_NAME), ("validation", VALIDATION_NAME)):
            bare = splits[split]
            maker = EpisodeMaker(selection=config.selection, prompt=prompt, bare=bare, seed=config.seed)
            write_rows(output / name, _episodes(groups, maker, split, tally))
        wanted = [group.question for group in splits["train"] if is_within(group, config.selection) is None]
        write_rows(output / QUESTIONS_NAME, map(dataclasses.asdict, wanted))
        if not tally.kept["train", "plain"]:
            hint = "sample more, by a prompt that the model follows, or ask for less"
            raise DataError(f"{source} gives no episode to train on: {tally.line()}; {hint}")
        _describe(output, config, sampled, tally)
    return tally


def _split(groups: Iterable[RolloutGroup], config: SelectConfig) -> dict[str, list[RolloutGroup]]:
    """The groups without their tokens, by split."""
    splits: dict[str, list[RolloutGroup]] = {"train": [], "validation": []}
    for group in groups:
        held_out = is_held_out(group.question.id, config.selection.validation_share, config.seed)
        splits["validation" if held_out else "train"].append(without_tokens(group))
    return splits


def _episodes(
    groups: StoredGroups, maker: EpisodeMaker, split: str, tally: SelectionTally
) -> Iterator[dict[str, Any]]:
    """The lines of a split."""
    places = {group.question.id: place for place, group in enumerate(maker.bare)}
    with Work(sys.stderr).on(f"select, {split}", len(groups), "questions") as task:
        for group in groups:
            task.add(done=1)
            if group.question.id not in places:
                continue
            for episode in maker(group, places[group.question.id], tally):
                tally.kept[split, episode.kind] += 1
                yield fields_of(RolloutGroup(question=episode.question, rollouts=(episode.rollout,))) | {
                    "kind": episode.kind
                }


def prompt_of(config: SelectConfig, sampled: Mapping[str, Any]) -> Prompt:
    """How a question and its block become a prompt: the environment's own way. Raises DataError for another
    tokenizer than the sample's, ConfigError for a protocol that would read or show something else than the
    rollouts do."""
    then = _protocol_of(sampled["protocol"])
    own = build_protocol(config.protocol or then)
    codec = load_codec(config.tokenizer or sampled["model"], own.chat)
    check_tokenizer(codec.fingerprint, sampled, Path(config.rollouts))
    check_same_form(own, build_protocol(then))
    environment = Environment(codec, own, RolloutConfig(**sampled["limits"]))
    return environment.prompt_ids


def _check_prompt(groups: StoredGroups, prompt: Prompt, source: Path) -> None:
    """Raise DataError when questions are not asked as they were when they were sampled: the template or a
    preset has changed."""
    for group in itertools.islice(groups, 1):
        if prompt(group.question.text, "") != group.rollouts[0].prompt_ids:
            raise DataError(
                f"{source}: question {group.question.id} was sampled behind another prompt than its protocol"
                " makes now (the chat template, or the preset, has changed); give --protocol to have another"
                " prompt on purpose, or sample anew"
            )


def _protocol_of(fields: Mapping[str, Any]) -> ProtocolConfig:
    return ProtocolConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )


def check_same_form(own: Protocol, then: Protocol) -> None:
    """Raise ConfigError when rollouts of the protocol `then` would be read or shown otherwise by `own`."""
    for name in (f.name for f in dataclasses.fields(Protocol) if f.name not in _OF_THE_PROMPT):
        if getattr(own, name) != getattr(then, name):
            raise ConfigError(
                f"protocol.{name}: found {getattr(own, name)!r}, but the rollouts were sampled with"
                f" {getattr(then, name)!r}; expected the same, only the prompt may be another"
            )


def _describe(output: Path, config: SelectConfig, sampled: Mapping[str, Any], tally: SelectionTally) -> None:
    record = {
        **{name: sampled[name] for name in _KEPT},
        "protocol": sampled["protocol"] if config.protocol is None else dataclasses.asdict(config.protocol),
        "selection": dataclasses.asdict(config.selection),
        "seed": config.seed,
        "kept": {f"{split} {kind}": count for (split, kind), count in sorted(tally.kept.items())},
        "dropped": dict(sorted(tally.dropped.items())),
    }
    write_whole(output / EPISODES_NAME, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
