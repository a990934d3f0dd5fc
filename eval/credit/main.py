"""`sd-search credit`: what hindsight says of the queries of stored rollouts, and whether it is right (the method's claim B).

For every query: teacher minus student log-probability, divergence, leak and copy flags; then how well they tell queries that hit
from those that did not. Writes credit.json, queries.jsonl and, for `sd-search report`, transcripts with each token's log-ratio.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.credit.auc import CreditTable, credit_table
from eval.credit.queries import QueryCredit
from eval.credit.scorer import score_group
from eval.credit.transcripts import read_groups
from eval.lift import rounded
from megatron_sd.algorithm.blocks import BLOCKS, BY_TURN
from megatron_sd.algorithm.hindsight import RENDERERS, BlockContext
from megatron_sd.config import ModelConfig, ProtocolConfig, RewardConfig, RolloutConfig, parse
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.observability.recorder import TRANSCRIPTS_NAME
from megatron_sd.observability.transcripts import group_record
from megatron_sd.records import RolloutGroup
from megatron_sd.rollout.torch_engine import load_model
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol import build_protocol
from megatron_sd.search.reward import score
from megatron_sd.search.tokens import load_codec


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Score `transcripts` (jsonl of training, of `sd-search eval`, or of Search-R1's kind) with `model` as teacher and student.

    block: a key of BLOCKS that is the same for every turn. beta, temperature: of the divergence. num_resamples: of the bootstrap
    over questions.
    """

    model: ModelConfig
    transcripts: str
    output: str
    block: str = "paper"
    block_format: str = "outcome_first"
    correct_above: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0
    num_resamples: int = 2000
    seed: int = 0
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def main(argv: Sequence[str]) -> None:
    """The command line of `credit`."""
    config = parse(CreditConfig, argv, "sd-search credit")
    table = credit(config)
    print("\n".join([*table.lines(), f"written to {config.output}; `sd-search report {config.output}` shows each token"]))


def credit(config: CreditConfig) -> CreditTable:
    """Score everything and write it down. Raises DataError for transcripts that do not fit the model, ConfigError for a block."""
    for name, table in (("block", BLOCKS.keys() - BY_TURN), ("block_format", RENDERERS)):
        if getattr(config, name) not in table:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected one of {', '.join(sorted(table))}")
    own = config.protocol
    codec = load_codec(config.model.path, chat_template=own.chat_template, template_arguments=own.template_arguments)
    environment = Environment(codec, build_protocol(config.protocol), RolloutConfig())
    model = load_model(config.model.path, dtype=getattr(torch, config.model.dtype), device=lone_world().device).eval()
    source = Path(config.transcripts)
    groups = [group if _is_scored(group) else score([group], config.reward)[0] for group in read_groups(source, environment)]
    credits: list[QueryCredit] = []
    records: list[dict[str, Any]] = []
    for number, group in enumerate(tqdm(groups, unit="group", disable=None)):
        blocks = _blocks(groups, number, config)
        options = {"beta": config.beta, "temperature": config.temperature, "correct_above": config.correct_above}
        own = score_group(model, environment, group, blocks, **options)
        credits += own
        records.append(with_log_ratios(group_record(group, blocks, codec.decode), own, environment))
    if not credits:
        raise DataError(f"{source}: no query of {len(groups)} groups can be judged by a block, expected rollouts that search")
    result = credit_table(credits, num_resamples=config.num_resamples, seed=config.seed)
    _write(Path(config.output), source.stem, config, result, credits, records)
    return result


def with_log_ratios(record: dict[str, Any], credits: Sequence[QueryCredit], environment: Environment) -> dict[str, Any]:
    """A transcript's record, each judged query with its tokens' texts and log-ratios: query_tokens and query_log_ratios."""
    found = {(query.rollout, query.number): query for query in credits}
    for rollout in record["rollouts"]:
        searches = [turn for turn in rollout["turns"] if turn["query"] is not None]
        for number, turn in enumerate(searches):
            query = found.get((rollout["index"], number))
            if query is not None:
                start, stop = turn["query_span"]
                turn["query_tokens"] = [environment.codec.decode([token]) for token in turn["completion_ids"][start:stop]]
                turn["query_log_ratios"] = [round(ratio, 4) for ratio in query.log_ratios]
    return record


def _is_scored(group: RolloutGroup) -> bool:
    return all(rollout.scores is not None or rollout.stop_reason.is_infrastructure for rollout in group.rollouts)


def _blocks(groups: Sequence[RolloutGroup], number: int, config: CreditConfig) -> list[str]:
    shared = {"correct_above": config.correct_above, "seed": config.seed, "render": RENDERERS[config.block_format]}
    build = BLOCKS[config.block]
    size = len(groups[number].rollouts)
    return [build(BlockContext(groups=groups, group=number, focal=focal, **shared)) for focal in range(size)]


def _write(
    output: Path, name: str, config: CreditConfig, table: CreditTable, credits: Sequence[QueryCredit], records: Sequence[Any]
) -> None:
    (output / TRANSCRIPTS_NAME).mkdir(parents=True, exist_ok=True)
    summary = {"config": dataclasses.asdict(config), **rounded(dataclasses.asdict(table))}
    (output / "credit.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = [{**dataclasses.asdict(query), "log_ratio": query.log_ratio} for query in credits]
    for path, lines in ((output / "queries.jsonl", rows), (output / TRANSCRIPTS_NAME / f"{name}.jsonl", records)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8", errors="replace")
