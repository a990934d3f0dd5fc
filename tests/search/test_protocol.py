import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.config import ProtocolConfig, RolloutConfig
from megatron_sd.errors import ConfigError
from megatron_sd.records import SEARCH, Action, Hit, Passage
from megatron_sd.search.environment import Environment
from megatron_sd.search.parsing import ParsedCompletion, parse_completion
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.rewards.form import completion_is_well_formed
from megatron_sd.search.tokens import TextCodec, fill
from tests.rollout.fakes import byte_level_tokenizer, codec

PROTOCOL = build_protocol(ProtocolConfig(preset="search_r1"))


def ids_of(*pieces: str) -> list[int]:
    """One token per piece: pieces must be single tokens of the straddling vocabulary."""
    vocabulary = {raw: n for n, raw in enumerate(straddling().token_bytes)}
    return [vocabulary[piece.encode()] for piece in pieces]


@cache
def straddling() -> TextCodec:
    """A tokenizer without word boundaries: tags melt into their neighbours, as `h>m`, `</s` or `r
    </search>`."""
    texts = [
        "<search>mayor of Lyon</search>",
        "x<search> mayor </search>y",
        "<answer>so</answer>",
        "é漢 </search>",
    ]
    return TextCodec(byte_level_tokenizer(texts, vocab_size=400, use_regex=False))


def parse(text: str, own: TextCodec | None = None) -> Action:
    own = own or codec()
    return parse_completion(own.encode(text), PROTOCOL, own)


def test_search_answer_and_neither():
    found = parse("<think>hm</think> <search> mayor of Lyon </search>")
    assert (found.action.tool, found.action.text, found.answer) == (SEARCH, " mayor of Lyon ", None)
    assert parse("<answer> Lyon </answer>") == ParsedCompletion(answer=" Lyon ")
    for text in ("", "nothing", "<search> open", "</search>", "</search><search>", "<answer></search>"):
        assert parse(text) == ParsedCompletion()


def test_first_complete_action_counts():
    assert parse("<answer>a</answer><search>q</search>") == ParsedCompletion(answer="a")
    assert parse("<search>q</search><answer>a</answer>").action.text == "q"
    assert parse("<search> never closed <answer>a</answer>") == ParsedCompletion(answer="a")
    assert parse("I will write <search> once: <search>q</search>").action.text == "q"


def test_query_span_is_the_tokens_strictly_between_the_tags():
    completion = ids_of(
        "<", "s", "e", "a", "r", "c", "h", ">", "m", "a", "y", "<", "/", "s", "e", "a", "r", "c", "h", ">"
    )
    assert parse_completion(completion, PROTOCOL, straddling()).action.span == (8, 11)


def test_a_token_that_straddles_a_tag_boundary_is_outside():
    own = straddling()
    whole = own.encode("x<search> mayor </search>y")
    action = parse_completion(whole, PROTOCOL, own).action
    start, stop = action.span
    inside = own.bytes_of(whole[start:stop])
    # one token or more was cut off
    assert action.text == " mayor " and inside in b" mayor " and inside != b" mayor "


def test_a_single_token_over_both_boundaries_leaves_an_empty_span():
    texts = ["<search>q</search>"]
    own = TextCodec(byte_level_tokenizer(texts * 3, vocab_size=300, use_regex=False))
    ids = own.encode(texts[0])
    assert len(ids) == 1  # the whole action is one token
    assert parse_completion(ids, PROTOCOL, own).action == Action(tool=SEARCH, text="q", span=(1, 1))


def test_invalid_utf8_reads_as_replacement():
    tokens = {raw: n for n, raw in enumerate(codec().token_bytes)}
    ids = [*codec().encode("<search>a"), tokens[b"\xe6"], *codec().encode("b</search>")]
    assert parse_completion(ids, PROTOCOL, codec()).action.text == "a�b"


def test_a_character_may_straddle_tokens():
    tokens = {raw: n for n, raw in enumerate(codec().token_bytes)}
    ids = [*codec().encode("<search>"), tokens[b"\xc3"], tokens[b"\xa9"], *codec().encode("</search>")]
    action = parse_completion(ids, PROTOCOL, codec()).action
    assert action.text == "é" and codec().bytes_of(ids[slice(*action.span)]) == "é".encode()


PIECES = st.sampled_from(
    [
        "<search>",
        "</search>",
        "<answer>",
        "</answer>",
        "<think>",
        " mayor of Lyon ",
        "so",
        "x",
        "é漢",
        "<",
        "/",
        ">",
        " ",
    ]
)


@given(st.lists(PIECES, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_spans_over_random_texts_and_random_cuts(pieces, random):
    """Whatever the text and however it is cut into tokens, the span holds exactly the tokens whose bytes
    are query bytes."""
    own = straddling()
    text = "".join(pieces).encode()
    vocabulary = {raw: n for n, raw in enumerate(own.token_bytes)}
    ids, place = [], 0
    while place < len(text):  # a random segmentation, not the one BPE would choose
        choices = [
            size
            for size in range(1, 12)
            if text[place : place + size] in vocabulary and place + size <= len(text)
        ]
        size = random.choice(choices)
        ids.append(vocabulary[text[place : place + size]])
        place += size
    action = parse_completion(ids, PROTOCOL, own).action
    if action is None:
        return
    close = text.index(b"</search>", text.index(b"<search>"))
    open_ = text.rindex(b"<search>", 0, close) + len(b"<search>")
    assert action.text.encode() == text[open_:close]
    offsets = own.offsets(ids)
    expected = [n for n in range(len(ids)) if offsets[n] >= open_ and offsets[n + 1] <= close]
    assert list(range(*action.span)) == expected


def test_prompt_is_filled_in_one_pass():
    assert fill("{a}-{b}-{c}", {"a": "{b}", "b": "2"}) == "{b}-2-{c}"
    prompt = PROTOCOL.render_prompt("Who?", 'Attempt 1: "{question}"\n')
    assert prompt.startswith('Attempt 1: "{question}"\nAnswer the given') and prompt.endswith(
        ". Question: Who?\n"
    )


def test_presets_and_own_tags():
    own = build_protocol(ProtocolConfig(preset="autorefine", search_tags=("[S]", "[/S]")))
    assert own.stop_strings == ("[/S]", "</answer>") and own.information_tags[0] == "<documents>"
    assert "[S] query [/S]" in own.prompt
    with pytest.raises(ConfigError, match="distinct"):
        build_protocol(ProtocolConfig(search_tags=("<a>", "<a>")))
    with pytest.raises(ConfigError, match="question"):
        build_protocol(ProtocolConfig(prompt="{hindsight} only"))


def test_autorefines_note_tags_are_control_tags_and_stand_in_its_prompt():
    protocol = build_protocol(ProtocolConfig(preset="autorefine"))
    assert "between <refine> and </refine>" in protocol.prompt
    assert {"<refine>", "</refine>"} <= set(protocol.control_tags)
    assert PROTOCOL.note_tags is None and len(PROTOCOL.control_tags) == 8


def test_few_shot_shows_actions_and_results_as_the_environment_reads_and_shows_them():
    own = build_protocol(ProtocolConfig(preset="few_shot"))
    example = own.prompt.split("Example\n")[1].split("{hindsight}")[0]
    observation = re.compile(re.escape("<information>") + ".*?" + re.escape("</information>\n\n"), re.S)
    question, *turns = observation.sub("\0", example).split("\n", 1)[1].split("\0")
    texts = [text.strip() for text in (question, *turns)]
    assert [completion_is_well_formed(text, own) for text in texts] == [True, True, True]
    first, second, last = (parse_completion(codec().encode(text), own, codec()) for text in texts)
    queries = [first.action.text, second.action.text]
    assert queries == [" painter of The Harbour Wall birthplace ", " river through Dunmere "]
    assert (last.action, last.answer) == (None, " Asel ")
    environment = Environment(codec(), own, RolloutConfig())
    town = Hit(
        passage=Passage(id="d", title="Dunmere", text="Dunmere is a market town on the river Asel."),
        score=1.0,
    )
    assert codec().decode(environment.observation_ids([town])) in example
    assert own.render_prompt("Who?", "BLOCK\n").endswith("BLOCK\nQuestion: Who?\n")


@pytest.mark.parametrize("wrong", ["< search >", "</Search>", "<sea\u200brch>", "＜answer＞"])
def test_a_prompt_that_shows_a_tag_nobody_reads_is_refused(wrong):
    prompt = f"Example:\n{wrong} x\n{{hindsight}}{{question}}"
    with pytest.raises(
        ConfigError,
        match="written otherwise than the environment reads it; expected exactly <search> </search>",
    ):
        build_protocol(ProtocolConfig(prompt=prompt))
    build_protocol(
        ProtocolConfig(prompt="a\u200db <search> x </search> {search_open}\n{hindsight}{question} <think>")
    )
    own = build_protocol(ProtocolConfig(prompt="<search> {hindsight}{question}", search_tags=("[s]", "[/s]")))
    assert own.prompt.startswith("<search>"), "which is plain text, then"
