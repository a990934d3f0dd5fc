"""The synthetic multi-hop world: a fictional universe in which every query is known to hit or to miss.

Entities have a two-word name and a type ("scholar Kalo Baren"); some share their name with an entity of
another type. Every entity has every relation, each fact is one short passage, and a chain of facts makes a
question of one to four hops. What makes search hard is a hidden convention: the corpus writes relation r of
an entity of type t with one of four keywords, `table[r, t]`, while a question always uses the relation's
first name. A query with another keyword finds something else about the entity, visibly not what was asked.
The type of the next entity stands only in the passage just found: no hop can be guessed ahead.

One half is for learning, one for measuring: train and eval entities have different names, made of the same
words, and no fact joins the two. The same configuration gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sd.errors import ConfigError
from megatron_sd.records import Passage, Question

ENTITY_TYPES = ("scholar", "merchant", "sailor", "painter")

# relation (as questions name it) -> the keywords a corpus may use for it; the first is the relation itself
KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "mentor": ("mentor", "teacher", "tutor", "coach"),
    "rival": ("rival", "opponent", "challenger", "foe"),
    "patron": ("patron", "sponsor", "backer", "donor"),
    "partner": ("partner", "associate", "colleague", "ally"),
    "heir": ("heir", "successor", "inheritor", "legatee"),
    "guardian": ("guardian", "protector", "keeper", "warden"),
    "pupil": ("pupil", "student", "apprentice", "disciple"),
    "envoy": ("envoy", "courier", "messenger", "herald"),
}
RELATIONS = tuple(KEYWORDS)
RELATION_OF = {keyword: relation for relation, keywords in KEYWORDS.items() for keyword in keywords}

_ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "V")
FIRST_WORDS = tuple(onset + rest for onset in _ONSETS for rest in ("alo", "ira", "eno", "uvi"))
LAST_WORDS = tuple(onset + rest for onset in _ONSETS for rest in ("aren", "isul", "otam", "uker"))

# draws in a row that gave no new question, after which there are none left worth waiting for
_MAX_FAILURES = 2000

Table = Mapping[tuple[str, str], str]  # (relation, entity type) -> the keyword the corpus uses


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """`sd-search world`: sizes and difficulty. hop_shares: share of questions with 1, 2, 3, 4 hops."""

    output: str = "runs/world"  # passages.jsonl, questions.jsonl and corpus/ go there
    seed: int = 0  # the same seed, the same bytes
    num_train_entities: int = 400  # whom training questions are about
    num_eval_entities: int = 200  # others, for held-out questions
    homonym_share: float = 0.1  # of the entities, share their name with an entity of another type
    num_train_questions: int = 4000  # of split train
    num_eval_questions: int = 600  # of split eval
    hop_shares: tuple[float, float, float, float] = (0.2, 0.8, 0.0, 0.0)


@dataclass(frozen=True)
class Entity:
    """A named thing of the universe; two entities may share the name but not name and type."""

    name: str
    type: str

    @property
    def label(self) -> str:
        """How texts and good queries call it: type and name."""
        return f"{self.type} {self.name}"


@dataclass(frozen=True, kw_only=True)
class Half:
    """The entities of one split and their facts: objects[subject, relation]; `met` gives each entity's
    distractor passage."""

    split: str
    entities: tuple[Entity, ...]
    objects: Mapping[tuple[Entity, str], Entity]
    met: Mapping[Entity, Entity]


@dataclass(frozen=True, kw_only=True)
class SyntheticWorld:
    """A whole universe. Passages are in id order; questions are train first, then eval."""

    table: Table
    halves: tuple[Half, Half]
    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


def names(split: str) -> list[str]:
    """Every name of a split. A quarter of all word pairs is kept for eval, the same quarter in every
    world."""
    return [
        f"{first} {last}"
        for i, first in enumerate(FIRST_WORDS)
        for j, last in enumerate(LAST_WORDS)
        if ((i + j) % 4 == 0) == (split == "eval")
    ]


def draw_table(rng: random.Random) -> dict[tuple[str, str], str]:
    """A hidden table: for every relation and entity type one of the relation's keywords, all equally
    likely."""
    return {
        (relation, type_): rng.choice(KEYWORDS[relation]) for relation in RELATIONS for type_ in ENTITY_TYPES
    }


def question_text(subject: Entity, relations: Sequence[str]) -> str:
    """The question that follows `relations` in order from `subject`."""
    return (
        "Who is " + "".join(f"the {relation} of " for relation in reversed(relations)) + subject.label + "?"
    )


def query_text(subject: Entity, keyword: str) -> str:
    """The query that finds the fact, provided the keyword is the one the corpus uses."""
    return f"{subject.label} {keyword}"


def fact_text(subject: Entity, keyword: str, value: Entity) -> str:
    """The passage of one fact."""
    return f"The {keyword} of {subject.label} is {value.label}."


def met_text(subject: Entity, other: Entity) -> str:
    """The distractor every entity has. It is short and its title names the entity twice: BM25 prefers it to
    the entity's facts when the keyword matches none of them."""
    return f"{subject.label} met {other.label}."


def make_world(config: WorldConfig) -> SyntheticWorld:
    """Draw the universe of a configuration. Raises ConfigError for sizes that cannot be met."""
    _check(config)
    rng = random.Random(f"world/{config.seed}")
    table = draw_table(rng)
    sizes = {"train": config.num_train_entities, "eval": config.num_eval_entities}
    halves = tuple(_draw_half(split, size, config.homonym_share, rng) for split, size in sizes.items())
    passages = sorted((p for half in halves for p in _passages(half, table)), key=lambda passage: passage.id)
    counts = (config.num_train_questions, config.num_eval_questions)
    questions = [
        q
        for half, n in zip(halves, counts, strict=True)
        for q in _draw_questions(half, n, config.hop_shares, rng)
    ]
    return SyntheticWorld(table=table, halves=halves, passages=tuple(passages), questions=tuple(questions))


def build_world(config: WorldConfig) -> SyntheticWorld:
    """Write passages.jsonl, questions.jsonl and world.json (configuration and hidden table) into
    `config.output`.

    The passages are meant for a BM25 index without stop words and stemmer: there the distractors, being
    shorter, win ties.
    """
    world = make_world(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    _write_lines(output / "passages.jsonl", world.passages)
    _write_lines(output / "questions.jsonl", world.questions)
    table = {
        relation: {type_: world.table[relation, type_] for type_ in ENTITY_TYPES} for relation in RELATIONS
    }
    parameters = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    (output / "world.json").write_text(
        json.dumps({"config": parameters, "table": table}, indent=1) + "\n", encoding="utf-8"
    )
    return world


def _check(config: WorldConfig) -> None:
    if not 0 <= config.homonym_share <= 0.5:
        raise ConfigError(
            f"homonym_share is {config.homonym_share}, expected 0 to 0.5: each homonym needs a partner"
        )
    if len(config.hop_shares) != 4 or min(config.hop_shares) < 0 or sum(config.hop_shares) <= 0:
        raise ConfigError(
            f"hop_shares is {config.hop_shares}, expected four shares >= 0 (1 to 4 hops), not all zero"
        )
    for split, size in (("train", config.num_train_entities), ("eval", config.num_eval_entities)):
        longest = max(hops for hops, share in enumerate(config.hop_shares, start=1) if share > 0)
        if not 2 * (longest + 1) <= size <= len(names(split)):
            raise ConfigError(
                f"num_{split}_entities is {size}, expected {2 * (longest + 1)} (for {longest} hops) "
                f"to {len(names(split))} (all names)"
            )


def _draw_half(split: str, size: int, homonym_share: float, rng: random.Random) -> Half:
    num_homonyms = round(size * homonym_share)
    chosen = rng.sample(names(split), size - num_homonyms)
    entities = [Entity(name, rng.choice(ENTITY_TYPES)) for name in chosen]
    for entity in entities[:num_homonyms]:
        entities.append(Entity(entity.name, rng.choice([t for t in ENTITY_TYPES if t != entity.type])))
    rng.shuffle(entities)
    objects = {
        (entity, relation): _other(entity, entities, rng) for entity in entities for relation in RELATIONS
    }
    met = {entity: _other(entity, entities, rng) for entity in entities}
    return Half(split=split, entities=tuple(entities), objects=objects, met=met)


def _other(entity: Entity, entities: Sequence[Entity], rng: random.Random) -> Entity:
    while True:
        other = rng.choice(entities)
        # or a fact could look like one of its homonym's
        if set(other.name.split()).isdisjoint(entity.name.split()):
            return other


def _fact_id(half: Half, subject: Entity, relation: str) -> str:
    return f"{half.split}-{subject.label}-{relation}".replace(" ", "-").lower()


def _passages(half: Half, table: Table) -> Iterator[Passage]:
    for (subject, relation), value in half.objects.items():
        text = fact_text(subject, table[relation, subject.type], value)
        yield Passage(id=_fact_id(half, subject, relation), title=subject.label, text=text)
    for subject, other in half.met.items():
        title = f"{subject.label} ({subject.label})"
        yield Passage(id=_fact_id(half, subject, "met"), title=title, text=met_text(subject, other))


def _draw_questions(
    half: Half, num_questions: int, hop_shares: Sequence[float], rng: random.Random
) -> Iterator[Question]:
    seen: set[str] = set()
    num_failures = 0
    while len(seen) < num_questions:
        if num_failures > _MAX_FAILURES:
            raise ConfigError(
                f"num_{half.split}_questions is {num_questions}, but {len(half.entities)} entities gave only"
                f" {len(seen)} different questions: lower it, or raise the number of entities or hops"
            )
        num_hops = rng.choices((1, 2, 3, 4), weights=hop_shares)[0]
        chain = [rng.choice(half.entities)]
        relations = [rng.choice(RELATIONS) for _ in range(num_hops)]
        for relation in relations:
            chain.append(half.objects[chain[-1], relation])
        text = question_text(chain[0], relations)
        if text in seen or len({entity.name for entity in chain}) < len(chain):
            num_failures += 1
            continue
        num_failures = 0
        seen.add(text)
        yield Question(
            id=f"{half.split}-{len(seen):05d}",
            text=text,
            golden_answers=(chain[-1].name,),
            source=f"world/{num_hops}-hop",
            split=half.split,
            supporting=tuple(
                (_fact_id(half, subject, relation),) for subject, relation in zip(chain, relations)
            ),
        )


def _write_lines(path: Path, records: Sequence[Passage | Question]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
