"""Native formats of public data sets, each a row as it is published, and the files they come in."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.passages.table import PassageTable
from data_prep.sources.jsonl import RowError
from data_prep.sources.questions import ImportConfig, import_file
from data_prep.sources.rows import read_rows
from megatron_sd.errors import DataError
from megatron_sd.records import Question
from megatron_sd.search.questions import load_questions

HOTPOT = {
    "_id": "5a8b57f2",
    "answer": "yes",
    "question": "Were Ed Wood and Scott Derrickson of one nationality?",
    "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0], ["Ed Wood", 1]],
    "context": [["Ed Wood", ["Edward was", " an American."]]],
    "type": "comparison",
    "level": "hard",
}
HOTPOT_HUB = HOTPOT | {
    "id": "5a8b57f2",
    "supporting_facts": {"title": ["Scott Derrickson", "Ed Wood"], "sent_id": [0, 0]},
}
HOTPOT_HUB.pop("_id")
TWO_WIKI = HOTPOT | {"_id": "61a46987", "evidences": [["A", "born in", "B"]]}
MUSIQUE = {
    "id": "2hop__482757_12019",
    "paragraphs": [
        {"idx": 0, "title": "Lancet", "paragraph_text": "x", "is_supporting": False},
        {"idx": 5, "title": "Ed Wood", "paragraph_text": "y", "is_supporting": True},
        {"idx": 9, "title": "Scott Derrickson", "paragraph_text": "z", "is_supporting": True},
    ],
    "question": "When was the one born?",
    "question_decomposition": [
        {"id": 1, "question": "a >> b", "answer": "c", "paragraph_support_idx": 9},
        {"id": 2, "question": "#1 >> d", "answer": "e", "paragraph_support_idx": 5},
    ],
    "answer": "1986",
    "answer_aliases": ["in 1986"],
    "answerable": True,
}
NQ = {"question": "who got the first nobel prize", "answer": ["Wilhelm Conrad Röntgen", "Röntgen"]}
TRIVIA = {
    "QuestionId": "tc_2",
    "Question": "Who?",
    "Answer": {"Value": "David", "Aliases": ["Dave"], "Type": "X"},
}
TRIVIA_HUB = {
    "question_id": "tc_2",
    "question": "Who?",
    "answer": {"value": "David", "aliases": ["Dave"], "type": "X"},
}
POPQA = {
    "id": 4222362,
    "subj": "G",
    "prop": "occupation",
    "question": "What is G?",
    "possible_answers": '["politician", "pol"]',
}
BAMBOOGLE = {"Question": "Who was president then?", "Answer": "Harding"}
FLASHRAG = {"id": "test_0", "question": "who?", "golden_answers": ["a b"], "metadata": {"type": "x"}}
SEARCH_R1 = {
    "id": "t1",
    "question": "who?",
    "golden_answers": ["a b"],
    "data_source": "nq",
    "prompt": [{"role": "user"}],
}
SUPPORT = (("s",), ("e1", "e2"))

EXPECTED = {
    "hotpotqa": (HOTPOT, "5a8b57f2", "hotpotqa", ("yes",), SUPPORT),
    "hotpotqa of the hub": (HOTPOT_HUB, "5a8b57f2", "hotpotqa", ("yes",), SUPPORT),
    "2wiki": (TWO_WIKI, "61a46987", "2wikimultihopqa", ("yes",), SUPPORT),
    "musique": (MUSIQUE, "2hop__482757_12019", "musique", ("1986", "in 1986"), SUPPORT),
    "nq": (NQ, "in-1", "nq", ("Wilhelm Conrad Röntgen", "Röntgen"), ()),
    "triviaqa": (TRIVIA, "tc_2", "triviaqa", ("David", "Dave"), ()),
    "triviaqa of the hub": (TRIVIA_HUB, "tc_2", "triviaqa", ("David", "Dave"), ()),
    "popqa": (POPQA, "4222362", "popqa", ("politician", "pol"), ()),
    "bamboogle": (BAMBOOGLE, "in-1", "bamboogle", ("Harding",), ()),
    "flashrag": (FLASHRAG, "test_0", "", ("a b",), ()),
    "search-r1": (SEARCH_R1, "t1", "nq", ("a b",), ()),
}


def _passages(tmp_path):
    titles = {"e1": "Ed Wood", "e2": "Ed Wood", "s": "Scott Derrickson", "x": "Lancet"}
    rows = [json.dumps({"id": id_, "title": title, "text": "t"}) for id_, title in titles.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    return str(tmp_path / "p.jsonl")


def _import(tmp_path, name, **options):
    config = {
        "kind": "questions",
        "input": str(tmp_path / name),
        "output": str(tmp_path / "out.jsonl"),
        "split": "dev",
    }
    report = import_file(ImportConfig(**(config | options)))
    return report, load_questions(tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", EXPECTED)
def test_every_native_format(tmp_path, name):
    row, id_, source, golds, supporting = EXPECTED[name]
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    _, (found,) = _import(tmp_path, "in.jsonl", passages=_passages(tmp_path), license="CC-BY-SA-4.0")
    text = row.get("question", row.get("Question"))
    assert found == Question(
        id=id_, text=text, golden_answers=golds, source=source, split="dev", supporting=supporting
    )
    assert json.loads((tmp_path / "out.jsonl").read_text())["license"] == "CC-BY-SA-4.0"
    _, (found,) = _import(tmp_path, "in.jsonl")  # without passages, titles say nothing
    assert found.supporting == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 1, "query": "x"}, "no known format has the fields ['id', 'query']"),
        (MUSIQUE | {"paragraphs": []}, "not of the form its fields promise (KeyError"),
        (HOTPOT | {"supporting_facts": 5}, "not of the form its fields promise (TypeError"),
        (POPQA | {"possible_answers": "politician"}, "not of the form its fields promise (JSONDecodeError"),
        (TRIVIA | {"Answer": "David"}, "not of the form its fields promise (AttributeError"),
        (NQ | {"answer": []}, "'golden_answers' is []"),
    ],
)
def test_a_row_of_no_known_form_is_rejected_with_its_line(tmp_path, row, reason):
    (tmp_path / "in.jsonl").write_text(json.dumps(FLASHRAG) + "\n" + json.dumps(row))
    report, _ = _import(tmp_path, "in.jsonl", max_reject_share=0.5)
    (reject,) = (json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (report.num_rejected, reject["line"], reason in reject["reason"]) == (1, 2, True), reject


def test_the_files_rows_come_in(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([HOTPOT, TWO_WIKI]))
    (tmp_path / "wrapped.json.gz").write_bytes(
        gzip.compress(json.dumps({"Data": [TRIVIA], "Version": 1}).encode())
    )
    pq.write_table(pa.Table.from_pylist([SEARCH_R1]), tmp_path / "q.parquet")
    (tmp_path / "popqa.tsv").write_text(
        'id\tquestion\tpossible_answers\n7\tWhat "is"?\t' + '"[""a b"", ""c d""]"' + "\n"
    )
    (tmp_path / "bamboogle.csv").write_text('Question,Answer\n"Who, then?",Harding\n')
    ids = {}
    for name in ("list.json", "wrapped.json.gz", "q.parquet", "popqa.tsv", "bamboogle.csv"):
        _, questions = _import(tmp_path, name)
        ids[name] = [(question.id, question.text, question.golden_answers[0]) for question in questions]
    text = HOTPOT["question"]
    assert ids == {
        "list.json": [("5a8b57f2", text, "yes"), ("61a46987", text, "yes")],
        "wrapped.json.gz": [("tc_2", "Who?", "David")],
        "q.parquet": [("t1", "who?", "a b")],
        "popqa.tsv": [("7", 'What "is"?', "a b")],
        "bamboogle.csv": [("bamboogle-2", "Who, then?", "Harding")],
    }


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("[{")
    (tmp_path / "number.json").write_text("5")
    (tmp_path / "bad.parquet").write_text("PAR1")
    (tmp_path / "bad.tsv").write_bytes(b"a\tb\n\xff\t1\n")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("bad.json", "bad.json is no JSON"),
        ("number.json", "holds no list of rows"),
        ("bad.parquet", "cannot read .*bad.parquet"),
        ("rows.xml", "a file of type '.xml', expected one of .jsonl"),
        ("none.jsonl", "cannot read .*none.jsonl"),
        ("folder", "found neither, expected a folder of .parquet files or of .txt and .md"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))
    (found,) = list(read_rows(tmp_path / "bad.tsv"))
    assert (found[0].number, "not valid UTF-8" in str(found[1])) == (2, True)
    (tmp_path / "short.tsv").write_text("a\tb\n1\n2\t3\n")
    assert [isinstance(row, RowError) for _, row in read_rows(tmp_path / "short.tsv")] == [True, False]


def test_folders_of_texts_and_of_parquet_become_passages(tmp_path):
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    (texts / "deep/Ed_Wood.txt").write_text("Ed Wood is a film.\nIndeed.")
    (texts / "b.md").write_text("# B")
    (texts / "ignored.png").write_bytes(b"\x89")
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, rows in enumerate([[{"id": 2, "contents": '"T"\ntwo'}], [{"id": 1, "contents": '"S"\none'}]]):
        pq.write_table(pa.Table.from_pylist(rows), parts / f"{number}.parquet")
    for folder, expected in [
        (texts, [("b.md", "b", "# B"), ("deep/Ed_Wood.txt", "Ed Wood", "Ed Wood is a film.\nIndeed.")]),
        (parts, [("1", "S", "one"), ("2", "T", "two")]),
    ]:
        output = tmp_path / f"{folder.name}.passages"
        import_file(ImportConfig(kind="passages", input=str(folder), output=str(output)))
        assert [(passage.id, passage.title, passage.text) for passage in PassageTable(output)] == expected


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.zst", "q.json", "q.csv", "q.parquet", "parts", "texts"])
@pytest.mark.parametrize("num_done", [0, 1, 4, 5, 12, 13, 40])
def test_rows_that_are_done_are_passed_over(name, num_done, tmp_path):
    rows = [{"id": f"{n}", "text": f"kalo {n}"} for n in range(13)]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    path = tmp_path / name
    if name in ("parts", "texts"):
        path.mkdir()
        for number, row in enumerate(rows):
            if name == "texts":
                (path / f"{number:02d}.txt").write_text(row["text"])
            elif number % 5 == 0:
                pq.write_table(
                    pa.Table.from_pylist(rows[number : number + 5]),
                    path / f"{number:02d}.parquet",
                    row_group_size=2,
                )
    elif name == "q.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        content = {".jsonl": lines, ".zst": zstandard.compress(lines), ".json": json.dumps(rows).encode()}
        content[".csv"] = "\n".join(["id,text", *(f"{row['id']},{row['text']}" for row in rows)]).encode()
        path.write_bytes(content[path.suffix])
    every = list(read_rows(path))
    assert [row["text"] for _, row in every] == [row["text"] for row in rows]
    assert list(read_rows(path, num_done)) == every[num_done:]


def test_a_text_that_is_done_is_not_read(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("kalo")
    (tmp_path / "0.txt").write_bytes(b"\xff")
    assert [row["id"] for _, row in read_rows(tmp_path, 1)] == ["1.txt", "2.txt"]
