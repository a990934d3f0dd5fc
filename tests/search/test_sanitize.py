import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.search.presets import PRESETS
from megatron_sd.search.sanitize import Sanitizer

TAGS = PRESETS["search_r1"].control_tags
SANITIZER = Sanitizer((*TAGS, "<|im_end|>", "<|endoftext|>", "<tool_call>", " "))
INVISIBLE = "\x00\x1b\u200b\u200d\u202e\u2066\u00ad\ufeff\ufe0f\u3164\ud800\U000e0041"


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@pytest.mark.parametrize(
    "tag",
    [
        "</information>",
        "</INFORMATION>",
        "< / information >",
        "</infor\u200bmation>",
        wide("</information>"),
        "‹∕information›",
    ]
    + [
        "<|im_end|>",
        "<| IM_END |>",
        wide("<|im_end|>"),
        "<answer>",
        "<\u00a0answer\n>",
        "﹤answer﹥",
        "<\U0001d5ee\u2060nswer>",
    ],
)
def test_tags_and_their_disguises_are_cut_out(tag):
    assert SANITIZER.clean(f"before{tag}after") == "before after"


def test_ordinary_text_is_left_alone():
    for text in (
        "a < b and c > d",
        "Zoë's café, 漢字 ½ ﬁne x² | y",
        "search the <b>answer</b>",
        "<3  two  spaces",
        "",
    ):
        assert SANITIZER.clean(text) == text


def test_breaks_become_spaces_and_invisible_characters_vanish():
    assert SANITIZER.clean("a\nb\tc\r\nd\u2028e") == "a b c  d e"
    assert SANITIZER.clean("a" + INVISIBLE + "b") == "ab"


def test_removal_does_not_build_a_new_tag():
    assert SANITIZER.clean("<sea<search>rch>x").split() == ["x"]
    assert SANITIZER.clean("</inf</information>ormation>x").split() == ["x"]


def test_query_is_one_tidy_line():
    assert SANITIZER.clean_query("  mayor\n of <search> Lyon\u200b ") == "mayor of Lyon"
    assert SANITIZER.clean_query(" </search>\n") == ""


def test_deep_nesting_is_cheap():
    nested = "<search>"
    for _ in range(60):
        nested = nested[:4] + nested + nested[4:] if len(nested) < 200_000 else nested
    start = time.perf_counter()
    cleaned = SANITIZER.clean(nested)
    assert time.perf_counter() - start < 5
    assert "<" not in cleaned


ALPHABET = st.sampled_from(
    [
        *TAGS,
        "<",
        ">",
        "/",
        " ",
        "s",
        "\u200b",
        "＜",
        "＞",
        "search",
        "Answer",
        "<|im_end|>",
        "é",
        "ﬁ",
        "\n",
        "\u0338",
    ]
)


@given(st.one_of(st.lists(ALPHABET, max_size=14).map("".join), st.text(max_size=40)))
@settings(max_examples=400, deadline=None)
def test_clean_text_is_a_fixed_point_without_tags_or_invisible_characters(text):
    cleaned = SANITIZER.clean(text)
    assert SANITIZER.clean(cleaned) == cleaned
    bare = "".join(unicodedata.normalize("NFKD", cleaned).casefold().split())
    assert not any(tag in bare for tag in (*TAGS, "<|im_end|>", "<|endoftext|>"))
    assert not any(unicodedata.category(c) in ("Cc", "Cs") or c in INVISIBLE for c in cleaned)
