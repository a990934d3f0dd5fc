"""`sd-search report`: what the page shows, that nothing in it can act, and how large it gets."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.report import ReportConfig, make_report, read_groups
from eval.report_page.curves import render_curves
from eval.report_page.groups import outcome
from eval.report_page.text import plain
from launch.cli import main as command
from megatron_sd.config import LogConfig
from megatron_sd.errors import DataError
from megatron_sd.observability.metrics_log import MetricsLog
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.transcripts import group_record
from megatron_sd.records import RolloutGroup, StopReason
from tests import builders

INJECTIONS = [
    "<script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</style><link rel=stylesheet href=//evil>",
    "<!-- --><iframe src='javascript:alert(1)'></iframe>",
    "&lt;b&gt; &#60;b&#62; <answer>gold</answer> ]]>",
    "\x00\x1b[2J\u202egnp.exe <\u200bscript>",
]
OWN_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "h3",
    "p",
    "br",
    "div",
    "details",
    "summary",
    "figure",
}
OWN_TAGS |= {
    "figcaption",
    "b",
    "small",
    "svg",
    "polygon",
    "polyline",
    "input",
    "label",
    "span",
    "i",
    "pre",
    "mark",
    "article",
}
OWN_TAGS |= {"dl", "dt", "dd", "ol", "li", "code", "em", "table", "tr", "th", "td"}
OWN_ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "class", "type", "name", "id", "checked", "for"}
OWN_ATTRIBUTES |= {"viewbox", "role", "points"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that is left open, or closed out of turn, fails."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), set(), [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def group(number=0, rewards=(1.0, 0.0), supporting=(("p1",),), **texts):
    rollouts = []
    for index, reward in enumerate(rewards):
        rollout = builders.rollout(
            index, ["who"], reward=reward, answer=texts.get("answer", f"answer {index}"), number=number
        )
        hits = (builders.hit("p1", title=texts.get("title", "Title"), score=7.25), builders.hit("p2"))
        turns = (dataclasses.replace(rollout.turns[0], hits=hits), *rollout.turns[1:])
        rollouts.append(dataclasses.replace(rollout, turns=turns))
    question = builders.question(number, ["gold", "<b>"], supporting)
    return RolloutGroup(question=question, rollouts=tuple(rollouts))


def write(run_dir, groups, name="step_00000004", block="Attempt 1", text=decode, blocks=()):
    path = run_dir / "transcripts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [group_record(own, blocks or [block] * len(own.rollouts), text) for own in groups]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def page_of(run_dir, **options):
    return make_report(ReportConfig(run_dir=str(run_dir), **options)).read_text()


def test_the_page_shows_what_a_rollout_read_wrote_and_earned(tmp_path):
    write(tmp_path, [group()])
    page = page_of(tmp_path)
    assert '<pre class="segment policy trained">&lt;5&gt;<mark>&lt;10&gt;</mark>&lt;6&gt;</pre>' in page
    assert '<pre class="segment observed">&lt;7&gt;&lt;8&gt;</pre>' in page
    assert '<li><code>p1</code> Title <span class="score">7.25</span> <em>hop 1</em></li>' in page
    assert page.count('<pre class="segment block">Attempt 1</pre>') == 1, (
        "both rollouts have it: it stands above them"
    )
    assert "answered · 5 tokens sampled, in the loss; 5 read" in page
    assert "<dt>reward</dt><dd>1</dd>" in page
    assert '<details class="group mixed">' in page
    assert "step 4" in page


def test_without_a_block_none_is_shown(tmp_path):
    write(tmp_path, [group()], block="")
    assert "segment block" not in page_of(tmp_path)


def test_blocks_that_differ_stand_with_their_rollouts(tmp_path):
    write(tmp_path, [group()], blocks=["first", "second"])
    before, *articles = page_of(tmp_path).split("<article")
    assert '<pre class="segment block">' not in before
    assert ["first</pre>" in article for article in articles] == [True, False]
    assert ["second</pre>" in article for article in articles] == [False, True]


def test_groups_are_filtered_by_outcome():
    def labelled(*rewards, failed=()):
        record = group_record(group(rewards=rewards), [""] * len(rewards), decode)
        for place in failed:
            record["rollouts"][place]["stop_reason"] = StopReason.ENGINE_FAILED
        return outcome(record)

    assert (labelled(1.0, 1.0), labelled(0.5, 0.0), labelled(1.0, 0.0)) == ("right", "wrong", "mixed")
    assert (labelled(1.0, 0.0, failed=[1]), labelled(1.0, failed=[0])) == ("right", "failed")


def test_a_failed_rollout_is_not_in_the_loss(tmp_path):
    own = group(rewards=(0.0,))
    failed = dataclasses.replace(own.rollouts[0], stop_reason=StopReason.RETRIEVAL_FAILED)
    write(tmp_path, [dataclasses.replace(own, rollouts=(failed,))])
    page = page_of(tmp_path)
    assert "5 tokens sampled, not in the loss; 5 read" in page
    assert '<pre class="segment policy">' in page
    assert '<pre class="segment policy trained">' not in page


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_becomes_markup(text, tmp_path):
    own = group(title=text, answer=text)
    own = dataclasses.replace(
        own, question=dataclasses.replace(own.question, id=text, text=text, golden_answers=(text,))
    )
    write(tmp_path, [own], name="evaluation", block=text, text=lambda ids: text)
    log = MetricsLog(tmp_path / "metrics.jsonl", first_step=1)
    log.record(1, {text: 1.0})
    log.close()
    (tmp_path / "report.md").write_text(f"- model: {text}\n| set |\n|---|\n| {text} |\n".replace("\x00", ""))
    raw = page_of(tmp_path)
    page = Page(raw)
    assert page.tags <= OWN_TAGS
    assert page.attributes <= OWN_ATTRIBUTES
    assert "http:" not in raw and "//" not in raw.replace("//evil", "")
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"" in raw
    assert plain(text) in raw
    assert not any(c in raw for c in "\x00\x1b\u202e\u200b")


def test_two_hundred_rollouts_stay_below_five_megabytes(tmp_path):
    words = "Lyon is a city on the Rhône; its mayor was born in Vienne. "
    texts = {2: words * 45, 3: words * 5}  # observations as long as 512 tokens, completions of 60
    groups = []
    for number in range(40):
        own = group(number, rewards=(1.0, 0.0, 0.0, 1.0, 0.0))
        rollouts = tuple(dataclasses.replace(r, turns=r.turns[:1] * 4 + r.turns[1:]) for r in own.rollouts)
        groups.append(dataclasses.replace(own, rollouts=rollouts))
    write(tmp_path, groups, text=lambda ids: texts.get(len(ids), "word"))
    path = make_report(ReportConfig(run_dir=str(tmp_path)))
    assert path.read_text().count("<article") == 200
    assert path.stat().st_size < 5_000_000


def test_the_newest_rollouts_are_kept_and_an_evaluation_keeps_its_last_attempt(tmp_path):
    write(tmp_path, [group(1), group(2)], name="step_00000004")
    write(tmp_path, [group(3)], name="step_00000008")
    page = page_of(tmp_path, max_rollouts=4)
    assert [f"Question {n}?" in page for n in (1, 2, 3)] == [False, True, True]
    write(tmp_path / "run", [group(1, rewards=(0.0,)), group(2), group(1, rewards=(1.0,))], name="evaluation")
    found = read_groups(tmp_path / "run")
    assert [(shown.place, outcome(shown.group)) for shown in found] == [("q1", "right"), ("q2", "mixed")]
    assert "not in the loss" in page_of(tmp_path / "run"), "nothing trains on an evaluation"


def test_curves_of_several_seeds_have_a_band():
    first, _ = render_curves([{1: {"reward/mean": 0.0}, 3: {"reward/mean": 1.0}}, {1: {"reward/mean": 1.0}}])
    assert '<polyline points="0.0,36.0 240.0,0.0"/>' in first
    assert '<polygon points="0.0,0.0 240.0,0.0 240.0,0.0 0.0,72.0"/>' in first
    assert "0 to 1 · steps 1 to 3" in first
    constant, _ = render_curves([{5: {"reward/em": 0.5}, 6: {"reward/em": float("nan")}}])
    assert '<polyline points="0.0,36.0 0.0,36.0" class="alone"/>' in constant, "a dot"
    long, _ = render_curves([{step: {"reward/mean": float(step)} for step in range(1, 1001)}])
    assert long.count(",") < 1000
    assert "steps 6 to 1000" in long, "the last step is always there"


def test_a_change_of_the_plan_is_marked_and_told(tmp_path):
    """Changed on resume at step 2: a line through each chart, words under the heading, a text in
    TensorBoard."""
    told = "from step 2 on optimizer.learning_rate was 1e-06 and is now 5e-07"
    recorder = Recorder(
        tmp_path, enabled=True, num_steps=4, config_text="", decode=str, log=LogConfig(transcripts_per_step=1)
    )
    recorder.begin(0)
    for step in (1, 2):
        recorder.record(step, {"reward/mean": 0.5})
    recorder.begin(2, [(2, told)])
    for step in (3, 5):
        recorder.record(step, {"reward/mean": 0.6})
    recorder.close()
    page = make_report(ReportConfig(run_dir=str(tmp_path))).read_text()
    assert f"<li>{told}</li>" in page and page.count(f"<title>{told}</title>") == 1
    assert f'<line x1="{240 / 4:.1f}"' in page
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("plan changes/text_summary")
    assert told in text.tensor_proto.string_val[0].decode()


def test_the_command_writes_the_page_and_refuses_a_directory_with_nothing_to_show(tmp_path, capsys):
    write(tmp_path / "run", [group()])
    assert command(["report", str(tmp_path / "run"), f"--output={tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    (tmp_path / "empty").mkdir()
    assert command(["report", str(tmp_path / "empty")]) == 1
    assert "expected the run_dir of a training run" in capsys.readouterr().err
    path = write(tmp_path / "run", [group()])
    path.write_text(path.read_text() + '{"question": {"id": "a"}}\n')
    with pytest.raises(DataError, match=r"step_00000004\.jsonl:2 is no transcript"):
        read_groups(tmp_path / "run")
    path.write_text('{"question": {"id": "a"}, "rollouts": []}\n')
    with pytest.raises(DataError, match=r"the transcript of step 4 lacks 'golden_answers'"):
        make_report(ReportConfig(run_dir=str(tmp_path / "run")))
