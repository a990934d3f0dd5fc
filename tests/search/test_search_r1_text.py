"""The preset search_r1 shows a policy what Search-R1's loop shows it, byte for byte: its checkpoints know
no other text."""

import pytest

from megatron_sd.config import ProtocolConfig
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.passages import join_contents
from tests.builders import hit
from tests.rollout.fakes import codec, environment

OWN = environment(ProtocolConfig(preset="search_r1"), max_observation_tokens=2000)

PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you"
    " get new information. After reasoning, if you find you lack some knowledge, you can call a search engine"
    " by <search> query </search> and it will return the top searched results between <information> and"
    " </information>. You can search as many times as your want. If you find no further external knowledge"
    " needed, you can directly provide the answer inside <answer> and </answer>, without detailed"
    " illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)


def shown(hits):
    return codec().decode(OWN.observation_ids(hits))


@pytest.mark.parametrize(
    ("question", "asked"), [("who wrote Kalo", "who wrote Kalo?"), (" who? ", "who?"), ("who??", "who??")]
)
def test_the_prompt_and_its_question_mark(question, asked):
    assert codec().decode(OWN.prompt_ids(question)) == PROMPT.format(question=asked)
    assert OWN.prompt_ids(question) == codec().encode(PROMPT.format(question=asked))


def test_passages_with_quoted_titles_line_breaks_and_nothing_around_them():
    hits = [
        hit("1", "She was born.\nShe wrote. ", "Lena Hart (artist)"),
        hit("2", " Kalo, a town. \n", "Kalo"),
    ]
    assert (
        shown(hits) == '\n\n<information>Doc 1(Title: "Lena Hart (artist)") She was born.\nShe wrote. \n'
        'Doc 2(Title: "Kalo")  Kalo, a town.</information>\n\n'
    )
    assert OWN.observation_ids(hits) == codec().encode(shown(hits)), "encoded as one text, as theirs is"


def test_it_is_what_their_rule_makes_of_the_contents_that_a_server_sends():
    """Their rule: the first line of `contents` is the title, the rest the text; strip the whole."""
    passages = [
        Passage(id="1", title="A b", text="x\n\ny\n"),
        Passage(id="2", title='say "hi"', text="z: (1) <b>"),
    ]
    theirs = ""
    for number, passage in enumerate(passages, start=1):
        title, _, text = join_contents(passage).partition("\n")
        theirs += f"Doc {number}(Title: {title}) {text}\n"
    assert (
        shown([hit(own.id, own.text, own.title) for own in passages])
        == f"\n\n<information>{theirs.strip()}</information>\n\n"
    )


def test_no_passage_and_no_action():
    assert shown([]) == "\n\n<information></information>\n\n"
    verdict = OWN.judge(codec().encode("I think so."), turn=0, truncated=False)
    assert (
        codec().decode(verdict.observation_ids)
        == "\nMy previous action is invalid. If I want to search, I should put the query between <search> and"
        " </search>. If I want to give the final answer, I should put the answer between <answer> and"
        " </answer>. Let me try again.\n"
    )


def test_a_long_observation_keeps_its_closing_tag():
    own = environment(ProtocolConfig(preset="search_r1"), max_observation_tokens=40)
    ids = own.observation_ids([hit("1", "word " * 300, "t")])
    text = codec().decode(ids)
    assert len(ids) <= 40
    assert text.startswith('\n\n<information>Doc 1(Title: "t") word') and text.endswith("</information>\n\n")
