"""What a run writes about itself, read back with TensorBoard's own reader and our own."""

import dataclasses
import io
import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.report_page.groups import _scores
from megatron_sd.config import LogConfig
from megatron_sd.errors import DataError
from megatron_sd.observability.metrics_log import MetricsLog, read_metrics
from megatron_sd.observability.progress import Progress
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.sinks.tensorboard import LAYOUT
from megatron_sd.observability.timers import Timers, memory_metrics
from megatron_sd.observability.transcripts import group_record, render_group
from megatron_sd.records import RolloutGroup, Scores, StopReason
from tests import builders


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def _recorder(path, step=0, enabled=True, config_text="run_dir: x\nseed: 3\n"):
    recorder = Recorder(
        path,
        enabled=enabled,
        num_steps=9,
        config_text=config_text,
        decode=decode,
        log=LogConfig(transcripts_per_step=1),
    )
    recorder.begin(step)
    return recorder


def _events(path):
    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def _scalars(path, name):
    return [(event.step, event.value) for event in _events(path).Scalars(name)]


def test_scalars_texts_and_layout_reach_tensorboard(tmp_path):
    recorder = _recorder(tmp_path)
    recorder.record(1, {"reward/mean": 0.25, "time/step_s": 2.0})
    recorder.record(2, {"reward/mean": 0.5})
    recorder.close()
    events = _events(tmp_path)
    assert _scalars(tmp_path, "reward/mean") == [(1, 0.25), (2, 0.5)]
    assert set(events.Tags()["scalars"]) == {"reward/mean", "time/step_s"}
    (config,) = events.Tensors("config/text_summary")
    assert config.tensor_proto.string_val[0].decode() == "    run_dir: x\n    seed: 3\n    "
    (layout,) = events.Tensors("custom_scalars__config__")
    for chart in (chart for charts in LAYOUT.values() for chart in charts):
        assert chart.encode() in layout.tensor_proto.string_val[0]
    assert (tmp_path / "config.yaml").read_text() == "run_dir: x\nseed: 3\n"


def test_a_resumed_run_supersedes_what_it_repeats(tmp_path):
    first = _recorder(tmp_path)
    for step in (1, 2, 3, 4):
        first.record(step, {"reward/mean": float(step)})
    first.close()
    second = _recorder(tmp_path, step=2)
    second.record(3, {"reward/mean": 30.0})
    second.close()
    assert _scalars(tmp_path, "reward/mean") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    expected = {1: {"reward/mean": 1.0}, 2: {"reward/mean": 2.0}, 3: {"reward/mean": 30.0}}
    assert read_metrics(tmp_path / "metrics.jsonl") == expected
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 + 4 + 1


def test_a_rank_that_is_not_enabled_touches_nothing(tmp_path):
    recorder = _recorder(tmp_path / "run", enabled=False)
    recorder.record(1, {"reward/mean": 1.0})
    recorder.transcripts(1, [], [])
    recorder.close()
    assert not (tmp_path / "run").exists()


def test_several_records_of_a_step_are_merged_and_values_survive(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", first_step=1)
    log.record(1, {"loss/policy": 0.1})
    log.record(1, {"eval/reward/em": float("nan"), "loss/kl": 1e-300})
    log.close()
    metrics = read_metrics(tmp_path / "m.jsonl")[1]
    assert (metrics["loss/policy"], metrics["loss/kl"]) == (0.1, 1e-300)
    assert metrics["eval/reward/em"] != metrics["eval/reward/em"]


def test_a_torn_line_is_dropped_at_every_length(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, first_step=1)
    log.record(1, {"a": 1.0})
    log.close()
    whole = path.read_bytes()
    log = MetricsLog(path, first_step=2)
    log.record(2, {"a": 2.0})
    log.close()
    content = path.read_bytes()
    for length in range(len(whole), len(content)):
        path.write_bytes(content[:length])
        expected = {1: {"a": 1.0}} | ({2: {"a": 2.0}} if length >= len(content) - 1 else {})
        assert read_metrics(path) == expected
        log = MetricsLog(path, first_step=2)
        log.record(2, {"a": 7.0})
        log.close()
        assert read_metrics(path) == {1: {"a": 1.0}, 2: {"a": 7.0}}


def test_a_broken_line_elsewhere_is_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"start": 1}\n{"step": 1, "metr\n{"step": 2, "metrics": {}}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2 is no metrics line"):
        read_metrics(path)
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def test_timers_charge_phases_and_start_anew():
    timers = Timers()
    assert timers.metrics() == {}
    with timers.phase("rollout"):
        time.sleep(0.02)
    with timers.phase("update"):
        pass
    with timers.phase("rollout"):
        time.sleep(0.02)
    metrics = timers.metrics()
    assert list(metrics) == ["time/rollout_s", "time/update_s", "time/step_s"]
    assert 0.04 <= metrics["time/rollout_s"] < 0.5
    assert metrics["time/step_s"] >= metrics["time/rollout_s"] + metrics["time/update_s"]
    assert timers.metrics() == {}


def test_a_phase_that_raises_is_still_charged():
    timers = Timers()
    with pytest.raises(ValueError, match="x"), timers.phase("update"):
        raise ValueError("x")
    assert "time/update_s" in timers.metrics()


def test_peak_memory_is_in_gib():
    before = memory_metrics()["mem/peak_gib"]
    block = bytearray(300 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    after = memory_metrics()["mem/peak_gib"]
    assert 0.05 < before <= after < 64
    assert after > 300 / 1024


def _group():
    searched = builders.rollout(0, ["Kalo guide", "Dava home"], reward=0.5, answer="sul")
    first, *rest = searched.turns
    first = dataclasses.replace(
        first, hits=(builders.hit("p17", title="Kalo Miren", score=12.312), builders.hit("p4"))
    )
    searched = dataclasses.replace(searched, turns=(first, *rest))
    failed = builders.rollout(1, [], stop_reason=StopReason.ENGINE_FAILED)
    return RolloutGroup(
        question=builders.question(7, ["Sul", "the Sul"], [["p17", "p18"]]), rollouts=(searched, failed)
    )


def test_transcript_shows_segments_by_writer_hits_scores_and_block():
    text = render_group(_group(), ['Attempt 1: "Kalo guide" => INCORRECT\n', ""], decode)
    assert text.splitlines() == [
        "question q7: Question 7?",
        "gold     Sul | the Sul",
        "hop 1    any of p17, p18",
        "prompt   | <1><3><4>",
        "",
        "--- rollout 0 · stopped: answered · answer: 'sul' · reward 0.5 · em 0 · f1 0.5 · format_valid 1",
        'block    | Attempt 1: "Kalo guide" => INCORRECT',
        "policy   | <5><10><6>",
        "hits     | 1. p17 Kalo Miren (12.31), hop 1",
        "hits     | 2. p4 Title (1.00)",
        "observed | <7><8>",
        "policy   | <5><11><6>",
        "hits     | none",
        "observed | <7><8>",
        "policy   | <9><2>",
        "",
        "--- rollout 1 · stopped: engine_failed · answer: None",
        "policy   | <9><2>",
    ]


def test_transcript_does_not_repeat_a_block():
    text = render_group(_group(), ["same\n", "same\n"], decode)
    assert text.count("block    | same") == 1
    assert text.count("block    | (as above)") == 1


def test_transcript_cannot_steer_a_terminal():
    text = render_group(_group(), ["", ""], lambda ids: "a\x1b[2Jb\r\nc")
    assert "\x1b" not in text
    assert "policy   | a\ufffd[2Jb\ufffd\npolicy   | c\n" in text


def test_transcript_record_holds_ids_and_texts():
    record = json.loads(json.dumps(group_record(_group(), ["b", ""], decode)))
    turn = record["rollouts"][0]["turns"][0]
    assert (turn["completion_ids"], turn["completion_text"], turn["observation_text"]) == (
        [5, 10, 6],
        "<5><10><6>",
        "<7><8>",
    )
    assert turn["hits"][0]["passage"]["id"] == "p17"
    assert turn["query_parts"] == ["<5>", "<10>", "<6>"]
    assert "query_parts" not in record["rollouts"][0]["turns"][-1]
    assert record["rollouts"][0]["hindsight"] == "b"
    assert record["rollouts"][0]["stop_reason"] == "answered"


def test_recorder_writes_the_first_groups_as_transcripts(tmp_path):
    recorder = _recorder(tmp_path)
    recorder.transcripts(4, [_group(), _group()], [["b", ""], ["c", ""]])
    recorder.close()
    text = (tmp_path / "transcripts/step_00000004.txt").read_text()
    assert text == render_group(_group(), ["b", ""], decode)
    assert len((tmp_path / "transcripts/step_00000004.jsonl").read_text().splitlines()) == 1
    (shown,) = _events(tmp_path).Tensors("transcripts/0/text_summary")
    assert shown.step == 4
    assert b"hits     | 1. p17 Kalo Miren" in shown.tensor_proto.string_val[0]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_one_line_a_step_off_a_terminal():
    stream = io.StringIO()
    progress = Progress(9, 0, stream)
    progress.show(3, {"reward/mean": 0.5, "rollout/searches": 1.25, "time/step_s": 2.0, "loss/kl": 1.0})
    progress.close()
    assert stream.getvalue() == "step 3/9  reward 0.500  searches 1.250  2.00 s\n"


def test_progress_draws_a_bar_on_a_terminal():
    stream = _Terminal()
    progress = Progress(9, 2, stream)
    progress.show(3, {"reward/mean": 0.5})
    progress.close()
    assert "3/9" in stream.getvalue()
    assert "reward 0.500" in stream.getvalue()


def test_scores_are_shown_by_name_and_attempts_apart():
    """The headline of a transcript and the page's list."""
    one = Scores(reward=0.5, em=0.0, f1=0.5, format_valid=1.0)
    assert one.figures == {"reward": 0.5, "em": 0.0, "f1": 0.5, "format_valid": 1.0}
    two = dataclasses.replace(one, em_by_attempt=(1.0, 0.0), hop_hit_rate=0.5, own={"thrift": 0.25})
    assert list(two.figures)[-4:] == ["hop_hit_rate", "em_attempt_1", "em_attempt_2", "thrift"]
    shown = render_group(
        dataclasses.replace(
            builders.group([]), rollouts=(dataclasses.replace(builders.rollout(0, ["q"]), scores=two),)
        ),
        [""],
        decode,
    )
    assert "em_attempt_1 1 · em_attempt_2 0 · thrift 0.25" in shown
    page = _scores(json.loads(json.dumps(dataclasses.asdict(two))))
    assert "<dt>em attempt 2</dt><dd>0</dd>" in page and "by attempt" not in page
    assert "<dt>thrift</dt><dd>0.25</dd>" in page and "<dt>own</dt>" not in page
    assert "attempt" not in _scores(json.loads(json.dumps(dataclasses.asdict(one))))
