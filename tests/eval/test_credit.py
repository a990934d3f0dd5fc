"""The credit scorer: flags, areas, foreign transcripts, and teacher against student on a real small model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from eval.credit.auc import auc, credit_table
from eval.credit.main import CreditConfig, credit
from eval.credit.queries import QueryCredit, query_facts
from eval.credit.scorer import RowsToRead, ScoreOptions, hidden_rows, score_group
from eval.credit.transcripts import read_groups
from eval.report import ReportConfig, make_report
from eval.samples import read_lines
from launch import local
from megatron_sd.config import ModelConfig, ProtocolConfig, RewardConfig, RolloutConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.rewards.reward import score
from megatron_sd.search.tokens import load_codec
from tests.builders import group, hit, question, rollout
from tests.nursery import start_forked

MODEL = str(Path(__file__).parents[2] / "data_prep/coldstart_model")
COMPACT = ProtocolConfig(preset="compact")
EXACT = ModelConfig(path=MODEL, dtype="float32")
FIRST = (
    "<think>who</think> <search>Ana guide</search>\n<information>Doc 1(Title: Ana) Ana is guided by Bo.\nDoc"
    " 2(Title: Cy) Cy sails.\n</information>\n<search>Bo city</search>\n<information>Doc 1(Title: Bo) Bo"
    " lives in Riga.\n</information>\n<answer>Riga</answer>"
)
SECOND = (
    "<search>Ana  GUIDE</search>\n<information>Doc 1(Title: Cy) Cy"
    " sails.\n</information>\n<answer>Oslo</answer>"
)


@pytest.fixture(scope="module")
def environment():
    return Environment(load_codec(MODEL), build_protocol(COMPACT), RolloutConfig())


@pytest.fixture
def transcripts(tmp_path):
    shared = {"id": 7, "question": "Where lives Ana's guide?", "golden_answers": ["Riga"]}
    rows = [{**shared, "response": text} for text in (FIRST, SECOND)]
    path = tmp_path / "foreign.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def query(rollout=0, number=0, *, hit, log_ratio=0.0, kind="mixed", correct=False, question_id="a"):
    flags = {"text": "t", "leak": False, "copy": False, "jsd": 0.1}
    place = {"question_id": question_id, "rollout": rollout, "number": number}
    return QueryCredit(
        **place, **flags, group_kind=kind, correct=correct, hit=hit, log_ratios=(log_ratio, log_ratio)
    )


def test_area_is_mann_whitneys():
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    expected = mannwhitneyu(scores[labels], scores[~labels]).statistic / (labels.sum() * (~labels).sum())
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(auc([1.0, 2.0], [True, True]))


def test_position_alone_is_told_from_credit():
    """The teacher prefers early queries, which hit more often: right within rollouts, chance at equal
    places."""
    queries = [
        query(0, 0, hit=True, log_ratio=1.0), query(0, 1, hit=False, log_ratio=0.0),
        query(1, 0, hit=False, log_ratio=1.0), query(1, 1, hit=False, log_ratio=0.0),
    ]  # fmt: skip
    table = credit_table(queries, num_resamples=50, seed=0)
    assert table.within["all"]["log_ratio"].mean == table.within["mixed"]["earlier_is_better"].mean == 1.0
    assert table.matched["all"]["log_ratio"].mean == 0.5
    assert table.within["all_wrong"]["log_ratio"].num_questions == 0 and table.hit_share == 0.25
    other_end = [replace(queries[2], correct=True), queries[0]]
    assert credit_table(other_end, num_resamples=50, seed=0).matched["all"]["log_ratio"].num_questions == 0


def test_what_the_policy_alone_knows_stands_beside():
    """A block that makes every query certain: the log-ratio is what the policy lacked."""
    queries = [
        replace(query(n, 0, hit=hit, log_ratio=-logprob, question_id=asked), student_logprob=logprob)
        for n, (asked, hit, logprob) in enumerate(
            [("a", True, -0.5), ("a", False, -2.0), ("b", True, -1.0), ("b", False, -3.0), ("b", False, -0.5)]
        )
    ]
    matched = credit_table(queries, num_resamples=50, seed=0).matched["all"]
    assert matched["likelier_is_better"].mean == pytest.approx((1.0 + 0.5) / 2)
    assert matched["log_ratio"].mean == pytest.approx((0.0 + 0.5) / 2)
    unknown = [*queries[1:], replace(queries[0], student_logprob=None)]
    assert "likelier_is_better" not in credit_table(unknown, num_resamples=50, seed=0).matched["all"]


def test_flags_of_a_rollout():
    asked = question(supporting=[["p1"], ["p2", "p3"]], answers=["Riga"])
    one = rollout(0, ["guide", "guide again", "Riga port", "city"])
    hits = [(hit("p1"),), (hit("p1"),), (hit("p9", text="In Riga."),), (hit("p3"),)]
    turns = [replace(turn, hits=found) for turn, found in zip(one.turns, [*hits, ()], strict=True)]
    one = replace(one, turns=tuple(turns))
    facts = query_facts(replace(group([one, rollout(1, ["City "])]), question=asked), one)
    assert [fact.hit for fact in facts] == [True, False, False, True]  # a hop served twice is no second hit
    assert [fact.leak for fact in facts] == [False, False, True, False]
    assert [fact.copy for fact in facts] == [False, False, False, True]
    nameless = replace(group([one]), question=replace(asked, supporting=()))
    # by the answer in a passage
    assert [fact.hit for fact in query_facts(nameless, one)] == [False, False, True, False]


def test_foreign_text_becomes_turns_and_hits(transcripts, environment):
    (found,) = read_groups(transcripts, environment)
    first, second = found.rollouts
    assert first.queries == ("Ana guide", "Bo city") and second.answer == "Oslo" and first.answer == "Riga"
    assert [[h.passage.title for h in turn.hits] for turn in first.turns] == [["Ana", "Cy"], ["Bo"], []]
    assert first.turns[0].hits[0].passage.text == "Ana is guided by Bo."
    start, stop = first.turns[0].query_span
    assert environment.codec.decode(first.turns[0].completion_ids[start:stop]).strip() == "Ana guide"
    text = "".join(
        environment.codec.decode(turn.completion_ids + turn.observation_ids) for turn in first.turns
    )
    assert text == FIRST


def test_log_ratios_are_those_of_two_plain_forwards(transcripts, environment, tmp_path):
    table = credit(
        CreditConfig(
            model=EXACT, transcripts=str(transcripts), output=str(tmp_path / "out"), protocol=COMPACT
        )
    )
    assert (table.num_queries, table.num_rollouts, table.copy_share) == (3, 2, pytest.approx(2 / 3))
    rows = [json.loads(line) for line in (tmp_path / "out/queries.jsonl").read_text().splitlines()]
    assert [(row["hit"], row["correct"], row["group_kind"]) for row in rows] == [
        (False, True, "mixed"), (True, True, "mixed"), (False, False, "mixed"),
    ]  # fmt: skip
    (found,) = read_groups(transcripts, environment)
    attempts = 'Attempt 1 (CORRECT): "Ana guide" -> "Bo city"\nAttempt 2 (INCORRECT): "Ana GUIDE"\n'
    block = f"Previous attempts at this question:\n{attempts}"
    turn = found.rollouts[1].turns[0]
    start, stop = turn.query_span
    model = load_model(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    logprobs = []
    for prompt in (
        environment.prompt_ids(found.question.text, block),
        environment.prompt_ids(found.question.text),
    ):
        ids = torch.tensor([[*prompt, *turn.completion_ids]])
        scored = model(ids).logits[0].log_softmax(-1)
        places = range(len(prompt) + start, len(prompt) + stop)
        logprobs.append(torch.stack([scored[place - 1, ids[0, place]] for place in places]))
    np.testing.assert_allclose(rows[2]["log_ratios"], (logprobs[0] - logprobs[1]).detach(), atol=2e-5)
    assert rows[2]["student_logprob"] == pytest.approx(logprobs[1].mean().item(), abs=2e-5)
    page = make_report(ReportConfig(run_dir=str(tmp_path / "out"))).read_text()
    assert page.count('title="teacher ') == sum(len(row["log_ratios"]) for row in rows)


def test_batches_change_nothing(environment, transcripts):
    """Sequences of several lengths in one forward, and each in its own."""
    (found,) = read_groups(transcripts, environment)
    (found,) = score([found], RewardConfig())
    model = load_model(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    blocks = ['Previous attempts at this question:\nAttempt 1 (CORRECT): "Ana guide"\n'] * 2
    alone, together = (
        score_group(model, environment, found, blocks, options=ScoreOptions(batch_tokens=size))
        for size in (1, 8192)
    )
    assert [query.text for query in alone] == [query.text for query in together] and len(alone) == 3
    for one, other in zip(alone, together):
        np.testing.assert_allclose(one.log_ratios, other.log_ratios, atol=1e-5)
        assert one.jsd == pytest.approx(other.jsd, abs=1e-6) and abs(one.log_ratio) > 0.01


@pytest.mark.parametrize("batch_tokens", [1, 25, 1000])
def test_an_opening_that_is_shared_is_read_once(batch_tokens):
    """Sequences of 9 to 30 tokens, of which three begin with the same 8, and one with 8 others."""
    model = load_model(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    opening, other = rng.integers(5, 200, (2, 8))
    bodies = [rng.integers(5, 200, length) for length in (1, 12, 22, 15)]
    beginnings = [opening, opening, opening, other]
    readings = [
        RowsToRead(np.concatenate([first, body]), np.array([8, 7 + len(body)]), opening=8)
        for first, body in zip(beginnings, bodies)
    ]
    read: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = hidden_rows(model, readings, batch_tokens)
    hook.remove()
    for own, reading in zip(found, readings):
        expected = model.get_decoder()(input_ids=torch.from_numpy(reading.ids[None])).last_hidden_state[0]
        torch.testing.assert_close(own, expected[reading.positions], atol=1e-5, rtol=1e-5)
    alone = 8 + 15  # has no one to share with
    assert (
        read
        == {
            1: [8, 22, 12, 1, alone],
            25: [8, 22, 12 * 2, alone],
            1000: [8, 22 * 3, alone],
        }[batch_tokens]
    )


def many_groups(path, count=5):
    rows = [
        {"id": n, "question": f"Where lives guide {n}?", "golden_answers": ["Riga"], "response": text}
        for n in range(count)
        for text in (FIRST, SECOND)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_killed_scoring_goes_on_and_reports_the_same(tmp_path, monkeypatch):
    shared = {"model": EXACT, "transcripts": str(many_groups(tmp_path / "t.jsonl")), "protocol": COMPACT}
    straight = credit(CreditConfig(output=str(tmp_path / "straight"), **shared))
    scored = []

    def dies_at_the_third(model, environment, group, blocks, *, options):
        scored.append(group.question.id)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score_group(model, environment, group, blocks, options=options)

    config = CreditConfig(output=str(tmp_path / "out"), **shared)
    monkeypatch.setattr("eval.credit.main.score_group", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        credit(config)
    kept = tmp_path / "out" / "scored.rank_0.jsonl"
    kept.write_text(kept.read_text() + '{"group": 2, "que')  # half a line
    assert credit(config).lines() == straight.lines()
    assert scored == ["0", "1", "2", "2", "3", "4"]
    for name in ("credit.json", "queries.jsonl"):
        one, other = (
            (tmp_path / run / name).read_text().replace(f'/{run}"', '"') for run in ("straight", "out")
        )
        assert one == other
    with pytest.raises(
        ConfigError, match="holds an evaluation whose credit is .*'paper'.*now it is .*'shuffled'"
    ):
        credit(replace(config, block="shuffled"))


def test_only_questions_with_both_outcomes_are_scored(tmp_path):
    """Each as it is among all of them, where other groups' blocks come from."""
    path = many_groups(tmp_path / "t.jsonl", count=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["response"] = rows[3]["response"]  # question 1: both wrong
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CreditConfig(
        model=EXACT,
        transcripts=str(path),
        output=str(tmp_path / "all"),
        protocol=COMPACT,
        block="wrong_question",
    )
    credit(config)
    table = credit(replace(config, output=str(tmp_path / "mixed"), only_mixed=True))
    every, mixed = (read_lines(tmp_path / name / "queries.jsonl") for name in ("all", "mixed"))
    assert [row["question_id"] for row in mixed] == ["0"] * 3 + ["2"] * 3
    assert mixed == [row for row in every if row["question_id"] != "1"]
    assert table.within["mixed"]["log_ratio"].num_questions == 2 and table.num_queries == 6
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[2:4]))
    with pytest.raises(
        DataError, match=r"only_mixed found none of 1 questions with rollouts above and below"
    ):
        credit(replace(config, output=str(tmp_path / "none"), only_mixed=True))


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_score_what_one_does(tmp_path, monkeypatch):
    path = many_groups(tmp_path / "t.jsonl")
    shared = {"model": EXACT, "transcripts": str(path), "protocol": COMPACT}
    one = credit(CreditConfig(output=str(tmp_path / "one"), **shared))
    options = [
        f"--model.path={MODEL}",
        "--model.dtype=float32",
        f"--transcripts={path}",
        "--protocol.preset=compact",
    ]
    monkeypatch.setattr(local, "start_ranks", start_forked)
    local.credit(["--num-ranks=2", *options, f"--output={tmp_path / 'two'}"])
    shares = [
        len((tmp_path / "two" / f"scored.rank_{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)
    ]
    assert shares == [2, 3]
    assert json.loads((tmp_path / "two/credit.json").read_text())["hit_share"] == pytest.approx(
        one.hit_share, abs=1e-4
    )
    rows = [read_lines(tmp_path / name / "queries.jsonl") for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert (first["question_id"], first["text"]) == (second["question_id"], second["text"])
        np.testing.assert_allclose(first["log_ratios"], second["log_ratios"], atol=1e-5)


def test_what_does_not_fit_is_named(transcripts, environment, tmp_path):
    config = CreditConfig(model=EXACT, transcripts=str(transcripts), output=str(tmp_path), protocol=COMPACT)
    with pytest.raises(ConfigError, match="temperature: found 0.0, expected more than 0"):
        credit(replace(config, temperature=0.0))
    with pytest.raises(ConfigError, match="block is 'turn_causal', expected one of dummy, flat_pool"):
        credit(replace(config, block="turn_causal"))
    transcripts.write_text('{"question": "Q?", "golden_answers": "a", "answerr": 1}\n')
    with pytest.raises(
        DataError,
        match=r"foreign.jsonl:1 has fields \['answerr', 'golden_answers', 'question'\], expected the",
    ):
        credit(config)
    transcripts.write_text(
        json.dumps({"question": "Q?", "golden_answers": "a", "response": "<answer>a</answer>"}) + "\n"
    )
    with pytest.raises(DataError, match="no query of 1 groups can be judged"):
        credit(config)
    own = {"turns": [{"completion_ids": [5, 6], "completion_text": "other words"}]}
    transcripts.write_text(json.dumps({"question": {}, "rollouts": [own]}) + "\n")
    with pytest.raises(
        DataError, match="in the transcript 'other words'; expected the model, or at least the tokenizer"
    ):
        credit(config)
