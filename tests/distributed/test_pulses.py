"""What ranks were last heard doing, as a file."""

import json
import threading

import pytest

from megatron_sd.distributed.pulses import Pulses, RankPulse, keep_written, read_pulses
from megatron_sd.distributed.watchdog import Judge, Report, Watchdog
from megatron_sd.distributed.world import lone_world


def test_a_judge_says_what_each_rank_was_last_heard_doing():
    judge = Judge(2, 10.0, 100.0)
    judge.verdict({0: Report(ticks=1, moves=1, phase="update", waits=True)}, 104.0)
    judge.verdict({0: Report(ticks=2, moves=1, phase="update", waits=True)}, 106.0)
    assert judge.pulses(107.0) == [
        RankPulse(phase="update", waits=True, moved_s=3.0, heard_s=1.0),
        RankPulse(phase="start", waits=False, moved_s=7.0, heard_s=7.0),
    ]


def test_the_file_is_written_at_once_again_and_read_back(tmp_path):
    path, over, looks = tmp_path / "pulses.json", threading.Event(), []

    def pulses():
        looks.append(1)
        if len(looks) == 3:
            over.set()
        return [RankPulse(phase="rollout", waits=False, moved_s=float(len(looks)), heard_s=0.5)]

    keep_written(path, pulses, over, timeout_s=60.0, every_s=0.01)
    found = read_pulses(path)
    assert found == Pulses(
        written=found.written,
        timeout_s=60.0,
        ranks=(RankPulse(phase="rollout", waits=False, moved_s=3.0, heard_s=0.5),),
    )


def test_a_disk_that_refuses_is_told_once(tmp_path, caplog):
    over, looks = threading.Event(), []

    def pulses():
        looks.append(1)
        if len(looks) == 3:
            over.set()
        return []

    keep_written(tmp_path / "missing" / "pulses.json", pulses, over, timeout_s=60.0, every_s=0.01)
    assert len(looks) == 3 and caplog.text.count("nobody can watch the ranks by it") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"ranks": []}', '{"ranks": [1], "written": 0}'])
def test_a_file_that_says_nothing_is_none(tmp_path, content):
    path = tmp_path / "pulses.json"
    assert read_pulses(path) is None
    path.write_text(content)
    assert read_pulses(path) is None


def test_a_watched_run_leaves_the_file(tmp_path):
    world = lone_world()
    watchdog = Watchdog(world, timeout_s=60.0, directory=tmp_path)
    watchdog.start()
    try:
        while not (tmp_path / "pulses.json").exists():
            threading.Event().wait(0.01)
    finally:
        watchdog.stop()
    fields = json.loads((tmp_path / "pulses.json").read_text())
    assert fields["timeout_s"] == 60.0 and [rank["phase"] for rank in fields["ranks"]] == ["start"]
