import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.passages.index import IndexConfig, build_index
from data_prep.world.world import (
    ENTITY_TYPES,
    KEYWORDS,
    RELATION_OF,
    RELATIONS,
    WorldConfig,
    build_world,
    fact_text,
    make_world,
    met_text,
    names,
    query_text,
    question_text,
)
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.search.questions import load_questions

SMALL = WorldConfig(
    num_train_entities=120,
    num_eval_entities=60,
    num_train_questions=200,
    num_eval_questions=80,
    homonym_share=0.25,
    seed=3,
)


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A written world and a search over its BM25 corpus that returns the best passage's id."""
    output = tmp_path_factory.mktemp("world")
    world = build_world(dataclasses.replace(SMALL, output=str(output)))
    paths = {"passages": str(output / "passages.jsonl"), "output": str(output / "corpus")}
    build_index(IndexConfig(**paths, stop_words="none", stemmer="none"))
    retriever = CorpusRetriever(output / "corpus", SearchConfig())

    def best(query: str) -> str:
        return asyncio.run(retriever.search([query], 1))[0][0].passage.id

    return world, output, best


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_another_world(written, tmp_path):
    _, output, _ = written
    build_world(dataclasses.replace(SMALL, output=str(tmp_path / "again")))
    assert digests(tmp_path / "again").items() <= digests(output).items()
    assert set(digests(tmp_path / "again")) == {"passages.jsonl", "questions.jsonl", "world.json"}
    build_world(dataclasses.replace(SMALL, output=str(tmp_path / "other"), seed=4))
    assert digests(tmp_path / "other")["passages.jsonl"] != digests(output)["passages.jsonl"]


def test_train_and_eval_share_no_name_and_no_fact(world):
    train, evaluation = world.halves
    assert not {e.name for e in train.entities} & {e.name for e in evaluation.entities}
    assert not set(names("train")) & set(names("eval"))
    for half in world.halves:
        own = set(half.entities)
        assert all(value in own for value in half.objects.values())
        assert all(value in own for value in half.met.values())
        assert len(half.objects) == len(half.entities) * len(RELATIONS)


def test_the_eval_names_are_made_of_words_that_train_names_hold():
    def words(split):
        return {word for name in names(split) for word in name.split()}

    assert words("eval") == words("train")


def test_sizes_and_homonyms_are_as_configured(world):
    for half, size in zip(world.halves, (120, 60)):
        counts = Counter(e.name for e in half.entities)
        assert len(half.entities) == len(set(half.entities)) == size
        assert sum(count > 1 for count in counts.values()) == round(size * 0.25)
    assert Counter(q.split for q in world.questions) == {"train": 200, "eval": 80}
    assert len({q.id for q in world.questions}) == len({q.text for q in world.questions}) == 280
    assert len({p.id for p in world.passages}) == len(world.passages) == 180 * (len(RELATIONS) + 1)


def test_every_cell_of_the_table_uses_one_keyword_of_its_relation(world):
    assert set(world.table) == {(relation, type_) for relation in RELATIONS for type_ in ENTITY_TYPES}
    assert all(keyword in KEYWORDS[relation] for (relation, _), keyword in world.table.items())
    assert len(RELATION_OF) == sum(len(keywords) for keywords in KEYWORDS.values()), (
        "no keyword serves two relations"
    )


@pytest.mark.parametrize("num_hops", [1, 2, 3, 4])
def test_following_the_facts_gives_the_golden_answer_and_the_supporting_passages(num_hops):
    shares = tuple(float(hops == num_hops) for hops in (1, 2, 3, 4))
    world = make_world(
        dataclasses.replace(SMALL, hop_shares=shares, num_train_questions=20, num_eval_questions=20)
    )
    text_of = {p.id: p.text for p in world.passages}
    for question in world.questions:
        half = world.halves[question.split == "eval"]
        assert len(question.supporting) == num_hops
        words = question.text.removeprefix("Who is ").removesuffix("?").split()
        entity = next(e for e in half.entities if e.label == " ".join(words[-3:]))
        relations = [word for word in reversed(words[:-3]) if word in KEYWORDS]
        assert question_text(entity, relations) == question.text
        for relation, hop in zip(relations, question.supporting, strict=True):
            value = half.objects[entity, relation]
            assert [text_of[id_] for id_ in hop] == [
                fact_text(entity, world.table[relation, entity.type], value)
            ]
            entity = value
        assert question.golden_answers == (entity.name,)


def test_the_right_query_of_every_hop_finds_its_passage(written):
    world, _, best = written
    texts = {p.id: p.text for p in world.passages}
    for half in world.halves:
        for (subject, relation), value in half.objects.items():
            keyword = world.table[relation, subject.type]
            assert texts[best(query_text(subject, keyword))] == fact_text(subject, keyword, value)


def test_a_wrong_keyword_finds_something_else_that_does_not_answer_the_question(written):
    world, _, best = written
    texts = {p.id: p.text for p in world.passages}
    kinds = Counter()
    half = world.halves[0]
    for (subject, relation), value in half.objects.items():
        for keyword in set(KEYWORDS[relation]) - {world.table[relation, subject.type]}:
            found = texts[best(query_text(subject, keyword))]
            kinds["met" if found == met_text(subject, half.met[subject]) else "other"] += 1
            kinds["answered"] += found == fact_text(subject, world.table[relation, subject.type], value)
    total = kinds["met"] + kinds["other"]
    assert kinds["met"] > 0.8 * total
    assert kinds["answered"] == 0


def test_a_lazy_query_without_the_type_can_find_the_homonym(written):
    world, _, best = written
    ids = {p.id: p for p in world.passages}
    names_of = Counter(e.name for half in world.halves for e in half.entities)
    wrong = 0
    for half in world.halves:
        for (subject, relation), _value in half.objects.items():
            if names_of[subject.name] > 1:
                found = ids[best(f"{subject.name} {world.table[relation, subject.type]}")]
                wrong += found.title != subject.label and found.title.endswith(subject.name)
    assert wrong > 10


def test_the_questions_keep_to_the_relations_first_names_and_do_not_show_the_bridge(world):
    others = set(RELATION_OF) - set(KEYWORDS)
    for question in world.questions:
        assert not others & set(question.text.strip("?").split())
        assert question.golden_answers[0] not in question.text


def test_written_questions_load_as_they_were_made(written):
    world, output, _ = written
    loaded = load_questions(str(output / "questions.jsonl"), "eval")
    assert list(loaded) == [q for q in world.questions if q.split == "eval"]
    recorded = json.loads((output / "world.json").read_text(encoding="utf-8"))
    assert recorded["config"]["seed"] == 3
    assert recorded["table"]["mentor"]["scholar"] == world.table["mentor", "scholar"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"homonym_share": 0.7}, "homonym_share"),
        ({"hop_shares": (0.0, 0.0, 0.0, 0.0)}, "hop_shares"),
        ({"num_eval_entities": 2}, "num_eval_entities"),
        ({"num_train_entities": 5000}, "num_train_entities"),
        ({"num_eval_entities": 10, "num_eval_questions": 5000}, "num_eval_questions"),
    ],
)
def test_impossible_sizes_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        make_world(dataclasses.replace(SMALL, **change))
