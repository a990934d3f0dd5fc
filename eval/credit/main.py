"""`sd-search credit`: what hindsight says of the queries of stored rollouts, and whether it is right (the
method's claim B).

For every query: teacher minus student log-probability, divergence, leak and copy flags; then how well they
tell queries that hit from those that did not. Writes credit.json, queries.jsonl and, for `sd-search
report`, transcripts with each token's log-ratio.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.credit.auc import CreditTable, credit_table
from eval.credit.queries import QueryCredit
from eval.credit.scorer import ScoreOptions, score_group
from eval.credit.store import Scored
from eval.credit.transcripts import read_groups
from eval.credit.usefulness import usefulness_of_group
from eval.gate.lift import group_kind, rounded
from eval.identity import claim, model_version, own_code
from megatron_sd.algorithm.blocks import BLOCK_SEAM, BLOCKS, BY_TURN
from megatron_sd.algorithm.hindsight import RENDERERS, BlockBuilder, BlockContext
from megatron_sd.config import ModelConfig, ProtocolConfig, RewardConfig, RolloutConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.config.ranges import check_ranges
from megatron_sd.distributed.collectives import hold_together, share, together
from megatron_sd.distributed.world import World, end_process, lone_world, world_of_program
from megatron_sd.door import exit_code_of
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.observability.names import TRANSCRIPTS_NAME
from megatron_sd.observability.progress import Work
from megatron_sd.observability.transcripts import group_record
from megatron_sd.pretrained.loading import check_head, load_config
from megatron_sd.records import RolloutGroup
from megatron_sd.retrieval.corpus.manifest import file_entry
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.rewards.reward import score
from megatron_sd.search.tokens import load_codec


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Score `transcripts` (jsonl of training, of `sd-search eval`, `gate` or `sample`, or of Search-R1's kind) with `model` as
    teacher and student.

    block: a key of BLOCKS that is the same for every turn, or a block of your own. beta, temperature: of the
    divergence. num_resamples: of the bootstrap over questions. batch_tokens: padded tokens of one forward,
    which bounds its memory. only_mixed: groups that ended alike are not scored; other groups' blocks may
    still be theirs. What is scored is kept in `output`: the same command goes on where it was killed.
    """

    model: ModelConfig
    transcripts: str  # a jsonl file
    output: str  # a directory; the same command goes on there
    block: OwnFunction | str = "paper"
    block_format: str = "outcome_first"  # as `distill.block_format` of training
    correct_above: float = 0.0  # as `distill.correct_above` of training
    beta: float = 0.5
    temperature: float = 1.0
    num_resamples: int = 2000
    seed: int = 0  # of the bootstrap
    only_mixed: bool = False  # score questions with both outcomes alone, where credit has something to tell
    batch_tokens: int = 8192
    # how much likelier each search's result makes the gold answer, too (Toolformer): three more forwards a search
    usefulness: bool = False
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def main(argv: Sequence[str]) -> None:
    """The command line of `credit`."""
    config, world = parse(CreditConfig, argv, "sd-search credit"), world_of_program()
    table = credit(config, world)
    if world.is_first:
        print(
            "\n".join(
                [
                    *table.lines(),
                    f"written to {config.output}; `sd-search report {config.output}` shows each token",
                ]
            )
        )


def credit(config: CreditConfig, world: World | None = None) -> CreditTable:
    """Score everything, on all ranks of `world` (None: this process), and write it down. Raises DataError
    for transcripts that do not fit the model, ConfigError for a block, and when `output` holds another
    scoring."""
    check_ranges(config)
    for name, table in (("block", BLOCKS.keys() - BY_TURN), ("block_format", RENDERERS)):
        value = getattr(config, name)
        if not isinstance(value, OwnFunction) and value not in table:
            raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(sorted(table))}")
    _builder(config.block)  # one of the user's own fails before a model is loaded
    world, protocol = world or lone_world(), build_protocol(config.protocol)
    environment = Environment(load_codec(config.model.path, protocol.chat), protocol, RolloutConfig())
    source = Path(config.transcripts)
    groups = [
        group if _is_scored(group) else score([group], config.reward)[0]
        for group in read_groups(source, environment)
    ]
    with hold_together(world, Path(config.output)):
        store = Scored(Path(config.output), rank=world.rank)
        together(world, lambda: _begin(config, groups, store) if world.is_first else None)
        wanted = _wanted(config, groups)
        _score_missing(config, groups, wanted, store, environment, world)
        together(world, lambda: None)  # until every rank has written what it scored
        by_group = store.read()
        credits = [query for number in sorted(wanted) for query in by_group[number]]
        if not credits:
            raise DataError(
                f"{source}: no query of {len(groups)} groups can be judged by a block, expected rollouts that"
                " search"
            )
        result = credit_table(credits, num_resamples=config.num_resamples, seed=config.seed)
        if world.is_first:
            records = [
                with_log_ratios(
                    group_record(group, _blocks(groups, n, config), environment.codec.decode),
                    by_group.get(n, []),
                    environment,
                )
                for n, group in enumerate(groups)
            ]
            _write(Path(config.output), source.stem, config, result, credits, records)
    return result


def _wanted(config: CreditConfig, groups: Sequence[RolloutGroup]) -> set[int]:
    """The numbers of the groups to score."""
    if not config.only_mixed:
        return set(range(len(groups)))
    mixed = {n for n, group in enumerate(groups) if group_kind(group, config.correct_above) == "mixed"}
    if not mixed:
        raise DataError(
            f"{config.transcripts}: only_mixed found none of {len(groups)} questions with rollouts above and"
            f" below correct_above ({config.correct_above:g}), expected some; set only_mixed false"
        )
    return mixed


def _begin(config: CreditConfig, groups: Sequence[RolloutGroup], store: Scored) -> None:
    """Make the output this scoring's, or go on with it."""
    names = (
        "block",
        "block_format",
        "correct_above",
        "beta",
        "temperature",
        "seed",
        "usefulness",
        "only_mixed",
    )
    identity = {
        "credit": {name: getattr(config, name) for name in names},
        "transcripts_version": file_entry(Path(config.transcripts)).xxh3_128,
        "num_groups": len(groups),
        "model": config.model.path,
        "model_version": model_version(config.model.path),
        "dtype": config.model.dtype,
        "protocol": dataclasses.asdict(config.protocol),
        "reward": dataclasses.asdict(config.reward),
        **own_code(config),
    }
    claim(Path(config.output), identity)
    store.mend()


def _score_missing(
    config: CreditConfig,
    groups: Sequence[RolloutGroup],
    wanted: set[int],
    store: Scored,
    environment: Environment,
    world: World,
) -> None:
    """This rank's share of the wanted groups, by number, that nobody has scored yet."""
    # one list for all ranks, made before any of them writes
    done = together(world, lambda: set(store.read()))[0]
    missing = sorted(wanted - done)
    if not missing:
        return
    check_head(load_config(config.model.path), config.model.path)
    model = load_model(
        config.model.path, dtype=getattr(torch, config.model.dtype), device=world.device
    ).eval()
    options = ScoreOptions(
        beta=config.beta,
        temperature=config.temperature,
        correct_above=config.correct_above,
        batch_tokens=config.batch_tokens,
    )
    mine = share(world, missing)
    with Work(sys.stderr if world.is_first else None).on("credit", len(mine), "groups") as task:
        for number in mine:
            group = groups[number]
            credits = score_group(model, environment, group, _blocks(groups, number, config), options=options)
            if config.usefulness:
                useful = usefulness_of_group(model, environment, group, config.batch_tokens)
                credits = [
                    dataclasses.replace(own, usefulness=useful.get((own.rollout, own.number)))
                    for own in credits
                ]
            store.keep(number, credits)
            task.add(done=1, tokens=sum(rollout.num_tokens for rollout in group.rollouts))


def with_log_ratios(
    record: dict[str, Any], credits: Sequence[QueryCredit], environment: Environment
) -> dict[str, Any]:
    """A transcript's record, each judged query with its tokens' texts and log-ratios: query_tokens and
    query_log_ratios."""
    found = {(query.rollout, query.number): query for query in credits}
    for rollout in record["rollouts"]:
        searches = [turn for turn in rollout["turns"] if turn["query"] is not None]
        for number, turn in enumerate(searches):
            query = found.get((rollout["index"], number))
            if query is not None:
                start, stop = turn["query_span"]
                turn["query_tokens"] = [
                    environment.codec.decode([token]) for token in turn["completion_ids"][start:stop]
                ]
                turn["query_log_ratios"] = [round(ratio, 4) for ratio in query.log_ratios]
    return record


def _is_scored(group: RolloutGroup) -> bool:
    return all(
        rollout.scores is not None or rollout.stop_reason.is_infrastructure for rollout in group.rollouts
    )


@functools.cache
def _builder(name: str) -> BlockBuilder:
    return dataclasses.replace(BLOCK_SEAM, key="block").choose(name)


def _blocks(groups: Sequence[RolloutGroup], number: int, config: CreditConfig) -> list[str]:
    shared = {
        "correct_above": config.correct_above,
        "seed": config.seed,
        "render": RENDERERS[config.block_format],
    }
    build = _builder(config.block)
    size = len(groups[number].rollouts)
    return [build(BlockContext(groups=groups, group=number, focal=focal, **shared)) for focal in range(size)]


def _write(
    output: Path,
    name: str,
    config: CreditConfig,
    table: CreditTable,
    credits: Sequence[QueryCredit],
    records: Sequence[Any],
) -> None:
    (output / TRANSCRIPTS_NAME).mkdir(parents=True, exist_ok=True)
    summary = {"config": dataclasses.asdict(config), **rounded(dataclasses.asdict(table))}
    (output / "credit.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = [{**dataclasses.asdict(query), "log_ratio": query.log_ratio} for query in credits]
    for path, lines in (
        (output / "queries.jsonl", rows),
        (output / TRANSCRIPTS_NAME / f"{name}.jsonl", records),
    ):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    end_process(exit_code_of(lambda: main(sys.argv[1:]) or 0))
