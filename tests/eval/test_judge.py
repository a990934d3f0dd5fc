"""A judge over HTTP: what it is asked, what is kept, and what its failures are."""

import dataclasses
import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from eval.judge import JUDGEMENTS_NAME, EvalJudgeConfig, judge
from eval.run import EvalConfig
from eval.samples import QuestionResult, Sample
from megatron_sd.config import RewardConfig, RewardJudgeConfig
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError, DataError, RetrievalError, RolloutError
from megatron_sd.observability.progress import SILENT
from megatron_sd.records import RolloutGroup, StopReason
from megatron_sd.search.rewards.judge import AnswerJudge, GivenAnswer, verdict_of
from megatron_sd.search.rewards.reward import score
from tests.builders import question, rollout


class FakeJudge(http.server.ThreadingHTTPServer):
    """Says what `answers` has for the given answer: a text, a status, or a list of these, one a request."""

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), _Chat)
        self.answers, self.asked, self.keys, self.cut = answers, [], [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Chat(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/chat/completions" and body["temperature"] == 0
        self.server.keys.append(self.headers.get("authorization"))
        given = body["messages"][0]["content"].split("Given answer: ")[1].split("\n")[0]
        self.server.asked.append(given)
        answer = self.server.answers[given]
        answer = answer.pop(0) if isinstance(answer, list) else answer
        status, reply = (answer, "busy") if isinstance(answer, int) else (200, answer)
        why = "length" if given in self.server.cut else "stop"
        choice = {"message": {"content": reply}, "finish_reason": why}
        content = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def start():
    servers = []

    def started(answers):
        servers.append(FakeJudge(answers))
        return servers[-1]

    yield started
    for server in servers:
        server.shutdown()


def result(name, *answers, stop=StopReason.ANSWERED):
    samples = tuple(
        Sample(answer=answer, stop_reason=stop, queries=(), retrieved=(), figures={"em": 0.0})
        for answer in answers
    )
    return QuestionResult(
        question_id=name, source="s", question=f"{name}?", golden_answers=("gold", "aurum"), samples=samples
    )


def judged(results, server, output, **options):
    config = EvalJudgeConfig(url=server.url, model="m", **options)
    with SILENT.on("judge", 1, "answers") as task:
        found = judge(results, config, output, task)
    return [[dict(sample.figures) for sample in one.samples] for one in found]


YES, NO = ({"em": 0.0, "judge": value, "judge_failed": 0.0} for value in (1.0, 0.0))


def test_answers_are_judged_once_and_kept(start, tmp_path):
    server = start({"or": "Yes.", "lead": "<think>yes or no?</think> no", "tin": "no"})
    results = [
        result("a", "or", "lead", None),
        result("b", "tin"),
        result("c", "x", stop=StopReason.ENGINE_FAILED),
    ]
    expected = [[YES, NO, NO], [NO], [{"em": 0.0}]]
    assert judged(results, server, tmp_path) == expected
    assert sorted(server.asked) == ["lead", "or", "tin"]
    assert judged(results, server, tmp_path) == expected and len(server.asked) == 3
    assert judged(results, server, tmp_path, max_tokens=9) == expected and len(server.asked) == 6, (
        "another question"
    )
    lines = [json.loads(line) for line in (tmp_path / JUDGEMENTS_NAME).read_text().splitlines()]
    assert {line["reply"] for line in lines} == {"Yes.", "<think>yes or no?</think> no", "no"}


def test_a_busy_server_is_asked_again_and_a_key_is_sent(start, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sd.search.rewards.judge.asyncio.sleep", lambda _: _soon())
    (tmp_path / "key").write_text("secret\n")
    server = start({"or": [503, 429, "yes"]})
    assert judged([result("a", "or")], server, tmp_path, key_file=str(tmp_path / "key")) == [[YES]]
    assert server.keys == ["Bearer secret"] * 3


async def _soon():
    return None


def test_what_could_not_be_judged_has_no_figure_and_is_asked_again(start, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sd.search.rewards.judge.asyncio.sleep", lambda _: _soon())
    server = start({"or": "yes", "lead": ["perhaps", "perhaps", "no"], "tin": [500, 500, 500, "no"]})
    results = [result("a", "or", "lead", "tin")]
    failed = {"em": 0.0, "judge_failed": 1.0}
    assert judged(results, server, tmp_path, max_failed_share=0.7) == [[YES, failed, failed]]
    assert judged(results, server, tmp_path) == [[YES, NO, NO]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("perhaps", "judge: replied 'perhaps', expected yes or no"),
        (500, "gave no answer in 2 tries; the last one: 500"),
    ],
)
def test_too_many_failures_end_the_evaluation_and_keep_the_rest(start, tmp_path, monkeypatch, answer, words):
    monkeypatch.setattr("megatron_sd.search.rewards.judge.asyncio.sleep", lambda _: _soon())
    server = start({"or": "yes", "lead": answer})
    with pytest.raises(
        RetrievalError, match=f"1 of 2 answers could not be judged, expected at most 5%.*{words}"
    ):
        judged([result("a", "or", "lead")], server, tmp_path, tries=2)
    assert len((tmp_path / JUDGEMENTS_NAME).read_text().splitlines()) == 1


def test_a_server_that_refuses_is_told_at_once(start, tmp_path):
    server = start({"or": 404})
    with pytest.raises(ConfigError, match="answered 404 .*see judge.url and .model"):
        judged([result("a", "or")], server, tmp_path)
    assert len(server.asked) == 1


def test_a_damaged_line_is_named_and_half_a_line_is_cut(start, tmp_path):
    server = start({"or": "yes"})
    (tmp_path / JUDGEMENTS_NAME).write_text('{"key": "x", "judge": 1.0}\n{"key": "y", "ju')
    assert judged([result("a", "or")], server, tmp_path) == [[YES]]
    (tmp_path / JUDGEMENTS_NAME).write_text("{}\n")
    with pytest.raises(
        DataError, match=f"{JUDGEMENTS_NAME}: found the line .* which is no judgement .KeyError"
    ):
        judged([result("a", "or")], server, tmp_path)


def test_a_prompt_holds_what_the_answer_holds_as_it_is(start, tmp_path):
    server = start({"{question}": "no"})
    assert judged([result("a", "{question}")], server, tmp_path) == [[NO]]
    with pytest.raises(ConfigError, match="judge.prompt: found none of {answer}, expected {question}"):
        EvalJudgeConfig(url="u", model="m", prompt="{question} {golden_answers}")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("YES", 1.0), ("No, it is not.", 0.0), ("**yes**", 1.0), ("<think>no</think> It is: yes.", 1.0)],
)
def test_a_reply_is_one_of_two_words(reply, verdict):
    assert verdict_of(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "yes and no",
        "maybe",
        "<think>yes</think>",
        "<think> There is no contradiction so far, but",
        "There is no doubt that they mean the same.",
        "I cannot answer yes here; the answers differ.",
    ],
)
def test_any_other_reply_is_none(reply):
    with pytest.raises(RetrievalError, match="expected yes or no"):
        verdict_of(reply)


def test_a_reply_that_was_cut_is_no_verdict(start, tmp_path):
    server = start({"or": "yes", "tin": ["perhaps", "yes"]})
    server.cut = {"or"}
    own = judged([result("a", "or", "tin")], server, tmp_path, max_failed_share=0.5)
    assert own == [[{"em": 0.0, "judge_failed": 1.0}, YES]] and len(server.asked) == 3


def test_the_command_line_has_it():
    argv = ["--model.path=m", "--retriever.corpus=c", "--questions=q", "--output=o"]
    assert parse(EvalConfig, argv, "eval").judge is None
    own = parse(EvalConfig, [*argv, "--judge.url=http://j", "--judge.model=big"], "eval").judge
    assert own == EvalJudgeConfig(url="http://j", model="big")
    with pytest.raises(ConfigError, match="judge.modle: unknown key; did you mean judge.model?"):
        parse(EvalConfig, [*argv, "--judge.url=http://j", "--judge.modle=big"], "eval")


def groups_of(*answers):
    rollouts = [rollout(n, answer=answer) for n, answer in enumerate(answers)]
    return [RolloutGroup(question=question(answers=("lead",)), rollouts=tuple(rollouts))]


def judged_reward(server, tmp_path, **options):
    own = {"url": server.url, "model": "big", "store": str(tmp_path / "judged.jsonl"), "tries": 1}
    return RewardConfig(answer="judge", judge=RewardJudgeConfig(**(own | options)))


def test_verdicts_are_rewards_and_a_run_that_goes_on_has_the_same(start, tmp_path):
    server = start({"the lead": "yes", "tin": "no"})
    config = judged_reward(server, tmp_path)
    (group,) = score(groups_of("the lead", "tin", None, "the lead"), config)
    assert [own.scores.reward for own in group.rollouts] == [1.0, 0.0, 0.0, 1.0]
    assert [own.scores.own for own in group.rollouts] == [{"judge": value} for value in (1.0, 0.0, 0.0, 1.0)]
    assert sorted(server.asked) == ["the lead", "tin"]
    changed = judged_reward(
        start({}), tmp_path, max_concurrent=2
    )  # another process, a server that knows nothing
    (again,) = score(groups_of("the lead", "tin", None, "the lead"), changed)
    assert [own.scores for own in again.rollouts] == [own.scores for own in group.rollouts]


def test_a_judge_beside_another_score_is_a_figure(start, tmp_path):
    config = dataclasses.replace(judged_reward(start({"tin": "yes"}), tmp_path), answer="em")
    (group,) = score(groups_of("tin"), config)
    assert group.rollouts[0].scores.reward == 0.0 and group.rollouts[0].scores.own == {"judge": 1.0}


def test_too_many_answers_without_a_verdict_end_the_run_and_the_others_are_kept(start, tmp_path):
    server = start({"tin": "no", "gold": ["perhaps", "perhaps", "no"]})
    config = judged_reward(server, tmp_path)
    with pytest.raises(
        RolloutError, match="reward.judge: 1 of 2 answers could not be judged, expected at most 5%"
    ):
        score(groups_of("tin", "gold"), config)
    (group,) = score(groups_of("tin", "gold"), config)
    assert [own.scores.reward for own in group.rollouts] == [0.0, 0.0]
    assert sorted(server.asked) == ["gold", "gold", "gold", "tin"]


def test_an_answer_without_a_verdict_is_no_data_and_stays_so(start, tmp_path):
    config = judged_reward(start({"tin": "yes", "gold": "perhaps"}), tmp_path, max_failed_share=0.5)
    (group,) = score(groups_of("tin", "gold", None), config)
    stops = [own.stop_reason for own in group.rollouts]
    assert stops == [StopReason.ANSWERED, StopReason.JUDGE_FAILED, StopReason.ANSWERED]
    assert [own.index for own in group.usable] == [0, 2] and group.rollouts[1].scores.own == {"judge": 0.0}
    recovered = judged_reward(start({"gold": "yes"}), tmp_path, max_failed_share=0.5, max_concurrent=2)
    (again,) = score(groups_of("tin", "gold", None), recovered)
    assert again == group


def test_a_rollout_that_is_no_data_already_keeps_its_reason(start, tmp_path):
    config = judged_reward(start({"gold": "perhaps", "tin": "yes"}), tmp_path, max_failed_share=0.5)
    lost = rollout(1, answer="gold", stop_reason=StopReason.RETRIEVAL_FAILED)
    (first,) = groups_of("tin")
    (group,) = score([dataclasses.replace(first, rollouts=(*first.rollouts, lost))], config)
    assert [own.stop_reason.value for own in group.rollouts] == ["answered", "retrieval_failed"]


def test_what_another_rank_heard_meanwhile_stands(start, tmp_path):
    server = start({"gold": ["perhaps", "perhaps", "yes"]})
    config = judged_reward(server, tmp_path).judge
    first, second = (AnswerJudge(config, tmp_path / "judged.jsonl") for _ in range(2))
    answers = [GivenAnswer(question="who?", golden_answers=("lead",), answer="gold")]
    assert first.verdicts(answers).found == (None,) and second.verdicts(answers).found == (1.0,)
    assert first.settle(answers) == second.settle(answers) == (1.0,)


def test_a_judge_that_answers_nobody_is_not_asked_by_all(start, tmp_path):
    server = start({str(n): 503 for n in range(40)})
    config = judged_reward(server, tmp_path, max_concurrent=4)
    with pytest.raises(RolloutError, match="40 of 40 answers could not be judged"):
        score(groups_of(*map(str, range(40))), config)
    assert 4 <= len(server.asked) < 8


def test_a_judge_as_reward_needs_a_judge():
    with pytest.raises(
        ConfigError, match="reward.answer: found judge without reward.judge, expected its url"
    ):
        RewardConfig(answer="judge")


def test_ranks_ask_once_between_them(start, tmp_path):
    server = start({str(n): "yes" for n in range(8)})
    config = judged_reward(server, tmp_path)
    groups = groups_of(*map(str, range(8)))
    ranks = [AnswerJudge(config.judge, tmp_path / "judged.jsonl") for _ in range(3)]
    answers = [
        GivenAnswer(question="who?", golden_answers=("lead",), answer=own.answer)
        for own in groups[0].rollouts
    ]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda rank: rank.verdicts(answers), ranks))
    assert all(own.found == (1.0,) * 8 for own in found) and len(server.asked) == 8
