"""What `sd-search watch` reads of a run directory, and what it makes of it."""

import dataclasses
import random

import pytest

from eval.report_page.curves import thinned
from eval.watch.following import Column, MetricsFollower, TranscriptsFollower
from eval.watch.phases import newest_times, render_phases
from eval.watch.ranks import render_pulses
from eval.watch.standing import LifeSigns, Signs, age_words, standing, watchdog_words
from megatron_sd.distributed.pulses import Pulses, RankPulse
from megatron_sd.durable.run_lock import LOCK_NAME, Holder, hold, read_holder
from megatron_sd.observability.metrics_log import MetricsLog, read_metrics

HOLDER = Holder(token="a", host="far", machine="another", pid=7, born=1, since="noon")


def append(path, content):
    with path.open("ab") as file:
        file.write(content)


def by_step(follower):
    """As `read_metrics` has it."""
    steps = {}
    for name, column in follower.columns.items():
        for step, value in zip(column.steps, column.values):
            steps.setdefault(step, {})[name] = value
    return dict(sorted(steps.items()))


def test_columns_keep_order_exchange_and_forget():
    column = Column()
    for step, value in ((1, 1.0), (5, 5.0), (3, 3.0), (5, 6.0)):
        column.put(step, value)
    assert list(column.steps) == [1, 3, 5] and list(column.values) == [1.0, 3.0, 6.0]
    column.cut(3)
    assert list(column.steps) == [1] and column.at(1) == 1.0 and column.at(3) is None


def test_metrics_that_are_followed_are_those_that_are_read_whole(tmp_path):
    """Starts, kills that tear lines, several lines a step; read in pieces of any size."""
    path, draw = tmp_path / "metrics.jsonl", random.Random(0)
    whole = tmp_path / "whole.jsonl"
    for first in (1, 5, 4):
        log = MetricsLog(whole, first_step=first)
        for step in range(first, first + 6):
            log.record(step, {"a": step + first / 10, "b": -step})
            log.record(step, {"eval/a": 1.0} if step % 2 else {"a": 9.0})
        log.close()
        append(whole, b'{"step": 99, "metr')
    content = whole.read_bytes()
    follower, place = MetricsFollower(path), 0
    while place < len(content):
        size = draw.randrange(1, 60)
        append(path, content[place : place + size])
        place += size
        follower.look()
    assert by_step(follower) == read_metrics(whole)
    assert follower.unreadable == 0 and follower.newest_step == 9
    assert follower.bytes_read == content.rfind(b"\n") + 1


def test_a_line_that_no_kill_explains_is_counted_and_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    append(path, b'{"start": 1}\nnonsense\n{"step": 1, "metrics": {"a": 2}}\n')
    append(path, b'{"step": 2, "metrics": {"a": "much"}}\n{"step": 2, "metrics": 3}\n')
    follower.look()
    assert by_step(follower) == {1: {"a": 2.0}} and follower.unreadable == 3
    revision = follower.revision
    follower.look()
    assert follower.revision == revision, "nothing new"


def test_ten_thousand_steps_are_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, first_step=1)
    for step in range(1, 10_001):
        log.record(step, {f"m{n}": step / (n + 1) for n in range(10)})
    log.close()
    follower = MetricsFollower(path)
    follower.look()
    size = path.stat().st_size
    assert follower.bytes_read == size and follower.newest_step == 10_000
    append(path, b'{"step": 10001, "metrics": {"m0": 1.0}}\n')
    follower.look()
    assert follower.bytes_read == path.stat().st_size and follower.newest_step == 10_001
    assert len(thinned(follower.columns["m0"].steps, follower.columns["m0"].values)) <= 160


def test_thinned_points_are_means_with_their_range_and_stay_where_they_are():
    steps, values = list(range(1, 9)), [float(n) for n in range(8)]
    assert thinned(steps, values, most=10) == [(n + 1, n, n, n) for n in range(8)]
    assert thinned(steps, values, most=6) == [
        (2, 0.0, 0.5, 1.0),
        (4, 2.0, 2.5, 3.0),
        (6, 4.0, 4.5, 5.0),
        (7, 6.0, 6.0, 6.0),
        (8, 7.0, 7.0, 7.0),
    ]
    longer = thinned([*steps, 9], [*values, 8.0], most=7)
    assert longer[:3] == thinned(steps, values, most=6)[:3]
    assert thinned([1, 2, 3], [1.0, float("nan"), float("inf")]) == [(1, 1.0, 1.0, 1.0)]
    assert thinned([], []) == []
    many = thinned(range(10_000), [0.0] * 10_000)
    assert len(many) <= 160 and many[-1][0] == 9_999


def test_the_newest_transcripts_of_this_start_are_shown(tmp_path):
    follower = TranscriptsFollower(tmp_path / "transcripts")
    assert follower.look(10) is None
    (tmp_path / "transcripts").mkdir()
    for step in (4, 8, 12):
        (tmp_path / "transcripts" / f"step_{step:08}.jsonl").write_text(f'{{"of": {step}}}\n')
    (tmp_path / "transcripts" / "step_x.jsonl").write_text("{}\n")
    found = follower.look(10)
    assert found.step == 8 and found.groups == ({"of": 8},), "step 12 is of a start that was superseded"
    assert follower.look(10) is found, "it is not read again"
    (tmp_path / "transcripts" / "step_00000008.jsonl").write_text('{"of": 88}\n[]\nnone\n{"of": 8')
    found = follower.look(11)
    assert found.groups == ({"of": 88},) and found.unreadable == 2, "half a line is no error"
    assert follower.look(12).step == 12
    assert follower.look(None) is None


def test_seconds_of_phases():
    columns = {}
    for step in range(1, 21):
        known = {
            "time/step_s": 10.0,
            "time/update_s": 3.0,
            "time/rollout_s": 5.0,
            "time/own_s": 0.5,
            "x": 1.0,
        }
        for name, value in known.items():
            columns.setdefault(name, Column()).put(step, value)
    columns["time/own_s"].cut(20)
    newest, second, *_ = found = newest_times(columns)
    assert [own.step for own in found] == list(range(20, 8, -1))
    assert list(newest.phases.items()) == [("rollout", 5.0), ("update", 3.0), ("rest", 2.0)]
    assert second.phases == {"rollout": 5.0, "update": 3.0, "own": 0.5, "rest": 1.5}
    html = render_phases(found)
    assert "rollout 5 s</span>" in html and html.count("<svg") == 12
    assert '<rect x="50.00" y="0" width="30.00" height="5" class="phase1"><title>update 3 s</title>' in html
    assert "No step has been timed yet" in render_phases(newest_times({}))


def signs(**known):
    return Signs(**{"step": 5, "num_steps": 9, "holder": None, "lives": False} | known)


@pytest.mark.parametrize(
    ("known", "kind", "words"),
    [
        ({"holder": HOLDER, "lives": True}, "training", "process 7 on far, since noon"),
        ({"holder": HOLDER, "lives": None}, "unknown", "held by process 7 on far"),
        ({"holder": HOLDER}, "stopped", "is gone and did not end by itself; the same command goes on"),
        ({"holder": HOLDER, "stuck": "watchdog: stuck"}, "stopped", "by itself (watchdog: stuck)"),
        ({}, "stopped", "before the last step of the plan; the same command goes on"),
        ({"step": 9}, "finished", "every step"),
        ({"step": None}, "waiting", "no step has been recorded"),
        ({"num_steps": None}, "unknown", "nothing runs in this directory"),
    ],
)
def test_how_a_run_stands(known, kind, words):
    found = standing(signs(**known))
    assert found.kind == kind and words in found.words


def test_a_holder_here_lives_by_its_process_and_one_elsewhere_by_its_beats(tmp_path):
    with hold(tmp_path):
        here = read_holder(tmp_path / LOCK_NAME)
        assert LifeSigns().lives(here) is True
    assert LifeSigns().lives(dataclasses.replace(here, born=here.born + 1)) is False
    now = 0.0
    life = LifeSigns(clock=lambda: now)
    assert life.lives(None) is False
    assert life.lives(HOLDER) is None, "seen once: it may be dead"
    now = 30.0
    assert life.lives(HOLDER) is None
    assert life.lives(dataclasses.replace(HOLDER, beats=1)) is True
    now = 89.0
    assert life.lives(dataclasses.replace(HOLDER, beats=1)) is True
    now = 91.0
    assert life.lives(dataclasses.replace(HOLDER, beats=1)) is False
    assert life.lives(dataclasses.replace(HOLDER, token="b")) is None, "another start"


def test_why_a_watchdog_ended_the_run(tmp_path):
    path = tmp_path / "rank_0.txt"
    assert watchdog_words(path) == ""
    path.write_text("watchdog: rank 1 is stuck; its stacks:\nThread 1\n")
    assert watchdog_words(path) == "watchdog: rank 1 is stuck; its stacks:"
    path.write_text("Thread 1\n")
    assert watchdog_words(path) == ""


def test_ages_are_said_as_people_do():
    assert [age_words(s) for s in (-3, 12.4, 90, 7500, 200000)] == [
        "0 s",
        "12 s",
        "1 min 30 s",
        "2 h 5 min",
        "2 days",
    ]


def test_pulses_age_while_the_run_trains():
    ranks = (
        RankPulse(phase="rollout", waits=False, moved_s=1.0, heard_s=1.0),
        RankPulse(phase="<i>", waits=True, moved_s=48.0, heard_s=48.0),
    )
    pulses = Pulses(written=1000.0, timeout_s=100.0, ranks=ranks)
    html = render_pulses(pulses, now=1004.0, is_over=False)
    assert '<li class="moves"><b>rank 0</b> rollout, moved 5 s ago</li>' in html
    assert (
        '<li class="late"><b>rank 1</b> &lt;i&gt;, waits for others, moved 52 s ago, not heard of for 52 s</li>'
        in html
    )
    over = render_pulses(pulses, now=1300.0, is_over=True)
    assert "how its ranks were 5 min 0 s ago" in over and '<li class="waits"><b>rank 1</b>' in over
    assert "No pulses" in render_pulses(None, now=0.0, is_over=False)
