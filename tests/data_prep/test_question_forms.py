"""Questions as public files hold them: ids over sets, labels, golds as text, unanswerable ones, hops of
another dump, BEIR."""

import json

import pytest

from data_prep.sources.golds import read_golds
from data_prep.sources.jsonl import RowError
from data_prep.sources.questions import ImportConfig, import_file
from data_prep.sources.titles import Titles
from megatron_sd.errors import DataError
from megatron_sd.records import Passage
from megatron_sd.search.questions import load_questions

MUSIQUE = {
    "id": "m",
    "question": "q?",
    "question_decomposition": [],
    "paragraphs": [],
    "answer": "x",
    "answerable": True,
}


def _import(tmp_path, rows, **options):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "kind": "questions",
        "input": str(tmp_path / "in.jsonl"),
        "output": str(tmp_path / "out.jsonl"),
    } | options
    report = import_file(ImportConfig(**config))
    return report, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def _family(id_, source, **more):
    return {"id": id_, "data_source": source, "question": f"{source}?", "golden_answers": ["x"]} | more


def test_ids_that_repeat_over_sets_get_their_sets_name_in_any_order(tmp_path):
    rows = [
        _family("train_0", "nq"),
        _family("train_1", "nq"),
        _family("train_0", "hotpotqa"),
        _family("train_0", "nq"),
    ]
    report, found = _import(tmp_path, rows, max_reject_share=0.5)
    assert [row["id"] for row in found] == ["nq/train_0", "nq/train_1", "hotpotqa/train_0"]
    assert (report.num_rejected, list(report.noted.values())) == (1, [3])
    _, turned = _import(tmp_path, rows[::-1], max_reject_share=0.5)
    assert {row["id"] for row in turned} == {row["id"] for row in found}


def test_ids_that_do_not_repeat_stay(tmp_path):
    report, found = _import(tmp_path, [_family("train_0", "nq"), _family("a/1", "hotpotqa")])
    assert ([row["id"] for row in found], report.noted) == (["train_0", "a/1"], {})


@pytest.mark.parametrize(
    ("row", "source", "label"),
    [
        ({"data_source": "hotpotqa"}, "musique", "hotpotqa"),
        ({"dataset": "a"}, "", "a"),
        ({}, "musique", "musique"),
        ({}, "", "nq"),
        ({"data_source": "searchR1_popqa"}, "", "popqa"),
    ],
)
def test_the_label_is_the_rows_then_the_commands_then_the_formats(tmp_path, row, source, label):
    _, (found,) = _import(
        tmp_path,
        [{"id": "1", "question": "q", "answer": "x", "split": "dev"} | row],
        source=source,
        split="test",
    )
    assert (found["source"], found["split"]) == (label, "dev")


def test_verls_rows_and_rows_of_prompt_and_golds_alone(tmp_path):
    golds = {"style": "rule", "ground_truth": {"target": ["L", "M"]}}
    prompt = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Answer. Question: who made it?\n"},
    ]
    row = {"data_source": "searchR1_nq", "prompt": prompt, "reward_model": golds}
    _, found = _import(
        tmp_path, [row, row | {"extra_info": {"question": "which?", "split": "train", "index": 0}}]
    )
    assert [
        (own["id"], own["text"], own["golden_answers"], own["source"], own["split"]) for own in found
    ] == [
        ("in-1", "who made it?", ["L", "M"], "nq", ""),
        ("in-2", "which?", ["L", "M"], "nq", "train"),
    ]


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        (["['a', \"b'c\"]", "d"], ["a", "b'c", "d"]),
        ("[sic]", ["[sic]"]),
        ({"text": ["a"]}, ["a"]),
        (["<unk>", "a"], ["a"]),
    ],
)
def test_golds_that_are_a_list_as_text_are_several(value, golds):
    assert read_golds(value) == golds


@pytest.mark.parametrize("value", ["[1]", "[]", "['a'", [], None, ["a", 3], "['a' 'b']", "['a', ]x]"])
def test_golds_that_cannot_be_read_are_no_answer(value):
    if value == "['a'":
        assert read_golds(value) == [value]
        return
    with pytest.raises(RowError):
        read_golds(value)


def test_unanswerable_questions_are_left_out_and_counted(tmp_path):
    twin = MUSIQUE | {"answerable": False}
    unknown = {"question": "q", "question_id": "t", "answer": {"value": "<unk>", "aliases": []}}
    for rows in ([twin, MUSIQUE, unknown], [MUSIQUE, twin, unknown]):
        report, found = _import(tmp_path, rows)
        assert ([row["id"] for row in found], report.num_rejected) == (["m"], 2)
        assert report.noted == {"of them unanswerable": 2}
    with pytest.raises(DataError, match="none of 1 rows is a question with an answer.*answerable is false"):
        _import(tmp_path, [twin])


def test_titles_of_another_dump_are_found_and_an_exact_one_wins():
    titles = ["Simon & Schuster", "Beyonc\u00e9", "Ed Wood", "AC/DC", "Ac/Dc"]
    known = Titles(Passage(id=str(number), title=title, text="x") for number, title in enumerate(titles))
    asked = ["Simon &amp; Schuster", "Beyonce\u0301", " ed_Wood", "AC/DC", "ac/dc", "Nowhere"]
    assert [known.find(title) for title in asked] == [("0",), ("1",), ("2",), ("3",), (), ()]


def test_an_unknown_hop_keeps_the_question_and_the_others(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "1", "title": "A", "text": "x"}\n{')
    facts = json.dumps([["A", 0], ["Gone", 1]])
    options = {"passages": str(tmp_path / "p.jsonl"), "max_reject_share": 0.5}
    rows = [
        {"id": "1", "question": "q", "answer": "x", "supporting_facts": facts},
        _family("2", "s", metadata={"supporting_facts": facts}),
    ]
    report, found = _import(tmp_path, rows, **options)
    assert [(row["supporting"], row["unknown_hops"]) for row in found] == [([["1"]], ["Gone"])] * 2
    assert (report.num_notes, report.noted) == (2, {"with an unknown hop": 2})
    with pytest.raises(DataError, match="1 of 2 rows are broken"):
        _import(tmp_path, rows, passages=options["passages"])


def test_a_beir_folder(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": ""}\n')
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "not judged"}\n'
    )
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t2\nq1\td3\t0\n"
    )
    report, (row,) = _import(tmp_path, [], input=str(folder), max_reject_share=0.5)
    assert (row["id"], row["split"], row["supporting"], report.num_rejected) == (
        "q1",
        "test",
        [["d1"], ["d2"]],
        1,
    )
    assert load_questions(tmp_path / "out.jsonl", needs_answers=False)[0].supporting == (("d1",), ("d2",))
    with pytest.raises(DataError, match="no golden answers"):
        load_questions(tmp_path / "out.jsonl")
    assert (
        import_file(ImportConfig(kind="passages", input=str(folder), output=str(tmp_path / "p"))).num_kept
        == 1
    )


def test_kilt_fid_and_dpr_questions(tmp_path):
    kilt = {
        "id": "k",
        "input": "who?",
        "output": [{"answer": "L", "provenance": [{"title": "A"}]}, {"provenance": []}],
    }
    (tmp_path / "p.jsonl").write_text('{"id": "1", "title": "A", "text": "x"}')
    dpr = {"dataset": "nq_dev", "question": "w?", "answers": ["W"], "positive_ctxs": []}
    _, found = _import(tmp_path, [kilt, dpr], passages=str(tmp_path / "p.jsonl"))
    assert [(row["source"], row["golden_answers"], row["supporting"]) for row in found] == [
        ("kilt", ["L"], [["1"]]),
        ("nq_dev", ["W"], []),
    ]


def test_rows_without_id_in_a_folder_of_shards_do_not_meet(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in "ab":
        (tmp_path / "shards" / f"{name}.jsonl").write_text('{"question": "q", "answer": "x"}\n')
    _, found = _import(tmp_path, [], input=str(tmp_path / "shards"))
    assert [row["id"] for row in found] == ["shards-a.jsonl-1", "shards-b.jsonl-1"]
