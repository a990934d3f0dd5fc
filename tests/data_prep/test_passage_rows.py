"""Public forms of passages: which field is the id, what is the title, and that no word is lost."""

import pytest

from data_prep.sources.passage_rows import parse_passage

SENTENCE = "Three years later the expedition left for the south."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "0", "contents": SENTENCE}, ("0", "", SENTENCE)),
        ({"id": 0, "contents": f"{SENTENCE}\nIt came back."}, ("0", "", f"{SENTENCE}\nIt came back.")),
        ({"id": 0, "contents": "Apple Inc.\nA firm."}, ("0", "Apple Inc.", "A firm.")),
        ({"id": 0, "contents": '"T"\r\nx'}, ("0", "T", "x")),
        ({"id": 0, "contents": '"only title"'}, ("0", "only title", "only title")),
        ({"id": 0, "contents": '"She" was a "maker"'}, ("0", "", '"She" was a "maker"')),
        ({"id": 0, "title": "Lena Hart", "contents": "She\nlived."}, ("0", "Lena Hart", "She\nlived.")),
        (
            {"id": 0, "title": "Lena Hart", "contents": '"Lena Hart"\nShe lived.'},
            ("0", "Lena Hart", "She lived."),
        ),
        ({"_id": "d1", "title": "Only a title", "text": ""}, ("d1", "Only a title", "Only a title")),
        (
            {"_id": "9", "wikipedia_id": "9", "wikipedia_title": "L", "text": ["L\n", "One.\n", "Two.\n"]},
            ("9", "L", "One.\nTwo."),
        ),
        ({"docno": "MED-1", "text": "x"}, ("MED-1", "", "x")),
        ({"passage_id": 7.0, "text": "x"}, ("7", "", "x")),
        ({"ID": "7", "Title": "T", "Text": "x"}, ("7", "T", "x")),
    ],
)
def test_a_passage_of_a_public_form(row, expected):
    passage = parse_passage(row)
    assert (passage.id, passage.title, passage.text) == expected
