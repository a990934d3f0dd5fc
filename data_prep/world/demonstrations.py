"""Demonstrations for the cold start: rollouts of a deliberately mediocre demonstrator, with and without
hindsight blocks.

Every episode happens in a universe of its own: its hidden table and its facts are drawn anew. A model that
learns from them cannot learn the table of any one world; a hindsight block can help it only by being read.
Had the episodes shared a table, the word CORRECT would come to mean "use the right keyword", whatever the
block says. Names are any pair of name words: had the eval split's pairs been left out, the model would have
learnt that they do not exist, and could not copy them from a passage.

The demonstrator guesses keywords. After a miss it tries another keyword, or, too often, takes what it found
for what it asked. Given a block it weighs each keyword by what the attempts say about it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.world.world import (
    ENTITY_TYPES,
    KEYWORDS,
    RELATION_OF,
    RELATIONS,
    Entity,
    draw_table,
    fact_text,
    met_text,
    names,
    query_text,
    question_text,
)
from megatron_sd.algorithm.hindsight import AttemptLine, render_outcome_first
from megatron_sd.search.protocol import Protocol

BlockKind = Literal[
    "none", "only_correct", "pair", "mixed", "natural", "natural_correct", "wrong_question", "no_labels"
]
Writer = Literal["prompt", "completion", "observation"]

_NAMES = (*names("train"), *names("eval"))
FOUND, MISSED = " found", " missed"  # the thought after a passage: go on with what it names, or ask again
_CERTAIN = 200.0  # weight of a keyword that a CORRECT attempt settled on, against 1 for one nobody tried
_RULED_OUT = 0.01  # weight of a keyword after which an attempt tried another one for the same entity


@dataclass(frozen=True, kw_only=True)
class DemonstratorConfig:
    """How mediocre. hop_shares: questions of 1 to 4 hops; retry: chance to try another keyword after a miss
    (otherwise the passage found is taken for an answer); max_searches: as in the rollouts to come;
    attempts_per_block: the group size to come; skilled_share: share of natural blocks whose attempts know
    some of the hidden table, as those of a trained policy do."""

    hop_shares: tuple[float, float, float, float] = (0.2, 0.8, 0.0, 0.0)
    retry: float = 0.75
    max_searches: int = 4
    attempts_per_block: int = 5
    skilled_share: float = 0.35


@dataclass(frozen=True)
class QueryResult:
    """What a query returned: the passage, the entity it names, and whether it is the fact that was
    asked for."""

    text: str
    value: Entity
    is_hit: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One attempt: its searches in order, its answer, and whether the answer is right."""

    searches: tuple[tuple[Entity, str, QueryResult], ...]
    answer: str
    correct: bool

    @property
    def attempt(self) -> AttemptLine:
        """The attempt as a hindsight block shows it."""
        queries = tuple(query_text(entity, keyword) for entity, keyword, _ in self.searches)
        return AttemptLine(queries=queries, correct=self.correct)


@dataclass(frozen=True, kw_only=True)
class WorldQuestion:
    """A question: follow `relations` in order from `subject`."""

    subject: Entity
    relations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One training episode: text segments by writer (the first is the prompt, which starts with `block`),
    and what made it."""

    segments: tuple[tuple[Writer, str], ...]
    block: str
    trace: Trace
    block_traces: tuple[Trace, ...]
    table: Mapping[tuple[str, str], str]


class Universe:
    """A universe drawn as it is asked: a hidden table, facts, and a search that behaves like BM25 over a
    written world."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.table = draw_table(rng)
        self._names: set[str] = set()
        self._values: dict[tuple[Entity, str], Entity] = {}
        self._misses: dict[tuple[Entity, str], QueryResult] = {}

    def entity(self, *, unlike: Entity | None = None) -> Entity:
        """A random entity with a name not seen before in this universe, which shares no word with that of
        `unlike`."""
        while True:
            name = self._rng.choice(_NAMES)
            if name not in self._names and (
                unlike is None or set(name.split()).isdisjoint(unlike.name.split())
            ):
                self._names.add(name)
                return Entity(name, self._rng.choice(ENTITY_TYPES))

    def value(self, subject: Entity, relation: str) -> Entity:
        """The object of a fact; relation "met" is the distractor's."""
        if (subject, relation) not in self._values:
            self._values[subject, relation] = self.entity(unlike=subject)
        return self._values[subject, relation]

    def search(self, subject: Entity, keyword: str) -> QueryResult:
        """The best passage for `query_text(subject, keyword)`."""
        relation = RELATION_OF[keyword]
        if self.table[relation, subject.type] == keyword:
            value = self.value(subject, relation)
            return QueryResult(fact_text(subject, keyword, value), value, True)
        if (subject, keyword) not in self._misses:
            self._misses[subject, keyword] = self._miss(subject, keyword)
        return self._misses[subject, keyword]

    def _miss(self, subject: Entity, keyword: str) -> QueryResult:
        """Mostly the distractor; sometimes a homonym, another fact of the subject, or a fact about somebody
        else."""
        kind = self._rng.choices(("met", "homonym", "other_fact", "reverse"), weights=(95, 3, 1, 1))[0]
        other = self.entity(unlike=subject)
        if kind == "homonym":
            homonym = Entity(subject.name, self._rng.choice([t for t in ENTITY_TYPES if t != subject.type]))
            return QueryResult(fact_text(homonym, keyword, other), other, False)
        if kind == "other_fact":
            relation = self._rng.choice([r for r in RELATIONS if r != RELATION_OF[keyword]])
            value = self.value(subject, relation)
            return QueryResult(fact_text(subject, self.table[relation, subject.type], value), value, False)
        if kind == "reverse":
            return QueryResult(fact_text(other, keyword, subject), other, False)
        value = self.value(subject, "met")
        return QueryResult(met_text(subject, value), value, False)


def draw_task(universe: Universe, config: DemonstratorConfig, rng: random.Random) -> WorldQuestion:
    """A question of 1 to 4 hops about a random entity."""
    num_hops = rng.choices((1, 2, 3, 4), weights=config.hop_shares)[0]
    return WorldQuestion(
        subject=universe.entity(), relations=tuple(rng.choice(RELATIONS) for _ in range(num_hops))
    )


def read_block(
    attempts: Sequence[AttemptLine], entity: Entity, relation: str, *, is_last_hop: bool, retry: float
) -> dict[str, float]:
    """Weight of each keyword of `relation` for `entity`, from what the attempts of this question did and
    how they ended.

    An attempt that asked again about the same entity had missed. One that went on to another entity, or
    that was CORRECT in the end, had hit, for certain if it was CORRECT. An INCORRECT attempt that ended
    with a last-hop query had missed.
    """
    weights = dict.fromkeys(KEYWORDS[relation], 1.0)
    for attempt in attempts:
        for i, query in enumerate(attempt.queries):
            label, keyword = query.rsplit(" ", 1)
            if label != entity.label or keyword not in weights:
                continue
            following = attempt.queries[i + 1] if i + 1 < len(attempt.queries) else None
            weights[keyword] *= _evidence(
                attempt.correct, following, label, is_last_hop=is_last_hop, retry=retry
            )
    return weights


def _evidence(
    correct: bool | None, following: str | None, label: str, *, is_last_hop: bool, retry: float
) -> float:
    if following is not None and following.rsplit(" ", 1)[0] == label:
        return _RULED_OUT
    if correct:
        return _CERTAIN
    if following is not None:
        return 1.0 / (1.0 - retry)
    return 0.05 if is_last_hop and correct is not None else 1.0


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What a demonstrator knows beyond the question: a block's attempts, and its chance to know a keyword
    outright."""

    attempts: tuple[AttemptLine, ...] = ()
    skill: float = 0.0


def demonstrate(
    universe: Universe, task: WorldQuestion, insight: Insight, config: DemonstratorConfig
) -> Trace:
    """One attempt at the task."""
    rng = universe._rng
    entity, hop, tried, searches = task.subject, 0, set(), []
    while len(searches) < config.max_searches and hop < len(task.relations):
        relation = task.relations[hop]
        if rng.random() < insight.skill:
            keyword = universe.table[relation, entity.type]
        else:
            is_last_hop = hop == len(task.relations) - 1
            weights = read_block(
                insight.attempts, entity, relation, is_last_hop=is_last_hop, retry=config.retry
            )
            left = [k for k in weights if k not in tried]
            keyword = rng.choices(left, weights=[weights[k] for k in left])[0]
        finding = universe.search(entity, keyword)
        searches.append((entity, keyword, finding))
        tried.add(keyword)
        if finding.is_hit or rng.random() >= config.retry:
            entity, hop, tried = finding.value, hop + 1, set()
    answer = searches[-1][2].value.name
    return Trace(searches=tuple(searches), answer=answer, correct=answer == _truth(universe, task).name)


def _truth(universe: Universe, task: WorldQuestion) -> Entity:
    entity = task.subject
    for relation in task.relations:
        entity = universe.value(entity, relation)
    return entity


def _attempts(
    universe: Universe, task: WorldQuestion, skill: float, config: DemonstratorConfig
) -> list[Trace]:
    return [
        demonstrate(universe, task, Insight(skill=skill), config) for _ in range(config.attempts_per_block)
    ]


def _block_traces(
    kind: BlockKind, universe: Universe, task: WorldQuestion, config: DemonstratorConfig
) -> list[Trace]:
    rng = universe._rng
    if kind == "none":
        return []
    if kind == "only_correct":
        traces = [
            demonstrate(universe, task, Insight(skill=0.7), config)
            for _ in range(4 * config.attempts_per_block)
        ]
        return [trace for trace in traces if trace.correct][: rng.randint(1, 3)]
    if kind == "pair":
        return _pair(universe, task, config)
    if kind == "mixed":
        for _ in range(20):
            traces = _attempts(universe, task, rng.choice((0.1, 0.3, 0.5)), config)
            if len({trace.correct for trace in traces}) == 2:
                break
        return traces
    skill = rng.random() if rng.random() < config.skilled_share else 0.0
    traces = _attempts(universe, task, skill, config)
    return [trace for trace in traces if trace.correct] if kind == "natural_correct" else traces


def _pair(universe: Universe, task: WorldQuestion, config: DemonstratorConfig) -> list[Trace]:
    """A CORRECT and an INCORRECT attempt without second tries, in random order: only the labels tell whom
    to follow."""
    hasty = dataclasses.replace(config, retry=0.0)
    pair = [demonstrate(universe, task, Insight(skill=1.0), hasty)]
    while len(pair) < 2:
        trace = demonstrate(universe, task, Insight(), hasty)
        if not trace.correct:
            pair.append(trace)
    universe._rng.shuffle(pair)
    return pair


def make_demonstration(
    kind: BlockKind, protocol: Protocol, config: DemonstratorConfig, rng: random.Random
) -> Demonstration:
    """One episode in a universe of its own. The block of kind "wrong_question" tells of another universe
    and helps nothing."""
    universe = Universe(rng)
    task = draw_task(universe, config, rng)
    if kind == "wrong_question":
        elsewhere = Universe(rng)
        traces, believed = (
            _block_traces("natural", elsewhere, draw_task(elsewhere, config, rng), config),
            False,
        )
    else:
        traces, believed = _block_traces(kind, universe, task, config), True
    attempts = tuple(
        AttemptLine(queries=t.attempt.queries, correct=None if kind == "no_labels" else t.correct)
        for t in traces
    )
    trace = demonstrate(universe, task, Insight(attempts=attempts if believed else ()), config)
    block = render_outcome_first(attempts)
    return Demonstration(
        segments=_segments(protocol, question_text(task.subject, task.relations), block, trace),
        block=block,
        trace=trace,
        block_traces=tuple(traces),
        table=universe.table,
    )


def observation_texts(protocol: Protocol, passage_text: str) -> tuple[str, str, str]:
    """A search result as the environment shows it: opening tag, one passage, closing tag, each tokenised on
    its own."""
    opening, closing = protocol.information_tags
    return f"\n{opening}", protocol.passage_format.format(rank=1, title="", text=passage_text), f"{closing}\n"


def _segments(protocol: Protocol, question: str, block: str, trace: Trace) -> tuple[tuple[Writer, str], ...]:
    segments: list[tuple[Writer, str]] = [("prompt", protocol.render_prompt(question, block))]
    thought = ""
    for i, (entity, keyword, finding) in enumerate(trace.searches):
        query = f" {query_text(entity, keyword)}".join(protocol.search_tags)
        segments.append(("completion", thought + query))
        segments += [("observation", text) for text in observation_texts(protocol, finding.text)]
        asks_again = i + 1 < len(trace.searches) and trace.searches[i + 1][0] == entity
        thought = (MISSED if asks_again else FOUND).join(protocol.think_tags) + "\n"
    segments.append(("completion", thought + f" {trace.answer}".join(protocol.answer_tags)))
    return tuple(segments)
