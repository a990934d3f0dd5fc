"""Services beside TensorBoard: what is sent to them, how a run goes on there, and that none ends it."""

import json
import logging
import threading
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from megatron_sd.config import LogConfig
from megatron_sd.door import STOPPED_EXIT_CODE
from megatron_sd.errors import ConfigError, StopRequested
from megatron_sd.observability.metrics_log import MetricsLog, newest_steps, read_metrics
from megatron_sd.observability.recorder import Recorder
from megatron_sd.observability.sinks.background import Background
from megatron_sd.observability.sinks.packages import check_packages
from megatron_sd.observability.sinks.table import SINKS
from tests.config.test_config import REQUIRED
from tests.observability.fake_services import fake_mlflow, fake_trackio, fake_wandb

CONFIG = "seed: 3\nmodel:\n  path: m\n"


def _record(run_dir, values, *, sinks, step=0, **settings):
    """One start of a run: a record for each {step: scalars}."""
    recorder = Recorder(
        run_dir,
        enabled=True,
        num_steps=9,
        config_text=CONFIG,
        decode=str,
        log=LogConfig(sinks=sinks, project="p", **settings),
    )
    recorder.begin(step)
    for at, scalars in values.items():
        recorder.record(at, scalars)
    recorder.close()


def test_the_table_and_the_configuration_name_the_same_sinks():
    names, _ = get_args(get_type_hints(LogConfig)["sinks"])
    assert set(get_args(names)) == set(SINKS)
    assert LogConfig().sinks == ("tensorboard",)


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (
            "[tensorboard, wandbb]",
            ["log.sinks: found 'wandbb'", "tensorboard, wandb, trackio, mlflow", "[wandb]?"],
        ),
        ("wandb", ["log.sinks: found 'wandb'", "did you mean [wandb]?"]),
        ("[wandb, wandb]", ["log.sinks: found wandb more than once"]),
    ],
)
def test_a_wrong_list_of_sinks_is_refused(given, fragments):
    from megatron_sd.config.load import load

    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, f"--log.sinks={given}"])
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"log\.sinks: found mlflow, .*pip install 'megatron-sd\[mlflow\]'"):
        check_packages(("tensorboard", "mlflow"))
    check_packages(("tensorboard",))


def test_a_run_says_so_before_its_model_is_read(monkeypatch, capsys):
    from launch.cli import main as command
    from megatron_sd.building.trainer import check_run_dir
    from megatron_sd.config.load import load

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="log.sinks: found wandb"):
        check_run_dir(load([*REQUIRED, "--log.sinks=[wandb]"]))
    assert command(["train", *REQUIRED, "--log.sinks=[trackio]"]) == 2
    assert "log.sinks: found trackio, but its package trackio is not installed" in capsys.readouterr().err


def test_no_sink_writes_no_event_files(tmp_path):
    _record(tmp_path, {1: {"reward/mean": 0.5}}, sinks=())
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "services.json").exists()
    assert read_metrics(tmp_path / "metrics.jsonl") == {1: {"reward/mean": 0.5}}


def test_wandb_gets_rows_by_our_step_and_the_same_run_again(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    run_dir = tmp_path / "seven"
    _record(run_dir, {1: {"a": 1.0}, 2: {"a": 2.0}}, sinks=("wandb",), wandb_mode="offline")
    ((_, given),) = calls.named("init")
    assert (given["project"], given["name"], given["mode"]) == ("p", "seven", "offline")
    assert given["config"] == {"seed": 3, "model": {"path": "m"}}
    assert (given["resume"], given["dir"]) == ("allow", str(run_dir))
    assert json.loads((run_dir / "services.json").read_text()) == {"wandb": given["id"]}
    # resumed from step 1: what it has is not sent again, and what it lacks of step 2 is
    _record(run_dir, {2: {"a": 2.0, "b": 0.5}, 3: {"a": 3.0}}, sinks=("wandb",), step=1, run_name="eight")
    (_, (_, again)) = calls.named("init")
    assert (again["id"], again["name"], again["mode"]) == (given["id"], "eight", None)
    rows = [args[0] for args, _ in calls.named("log")]
    assert rows == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0},
        {"step": 2, "b": 0.5},
        {"step": 3, "a": 3.0},
    ]
    assert len(calls.named("finish")) == 2


def test_trackio_tells_runs_of_one_name_apart(tmp_path, monkeypatch):
    calls = fake_trackio(monkeypatch)
    for parent in ("x", "y"):
        _record(tmp_path / parent / "seven", {1: {"a": 1.0}}, sinks=("trackio",))
    _record(tmp_path / "x/seven", {2: {"a": 2.0}}, sinks=("trackio",), step=1)
    names = [keywords["name"] for _, keywords in calls.named("init")]
    assert names[0] != names[1] and names[2] == names[0]
    assert all(name.startswith("seven-") for name in names)
    assert calls.named("log")[-1] == (({"a": 2.0},), {"step": 2})


def test_mlflow_gets_parameters_once_and_metrics_in_one_request(tmp_path, monkeypatch):
    calls = fake_mlflow(monkeypatch)
    _record(tmp_path, {1: {"a": 1.0, "b": 2.0}}, sinks=("mlflow",), mlflow_uri="sqlite:///x.db", run_name="n")
    _record(tmp_path, {2: {"a": 3.0}}, sinks=("mlflow",), step=1)
    assert [keywords["tracking_uri"] for _, keywords in calls.named("client")] == ["sqlite:///x.db", None]
    assert calls.named("create_run") == [(("7",), {"run_name": "n"})]
    assert calls.named("update_run") == [(("m1",), {"status": "RUNNING"})]
    sent = [keywords for _, keywords in calls.named("log_batch")]
    assert sent[0] == {"params": [("seed", "3"), ("model.path", "m")]}
    rows = [[(name, value, step) for name, value, _, step in own["metrics"]] for own in sent[1:]]
    assert rows == [[("a", 1.0, 1), ("b", 2.0, 1)], [("a", 3.0, 2)]]
    assert len(calls.named("set_terminated")) == 2


def test_a_service_that_fails_is_warned_of_once_and_counted(tmp_path, monkeypatch, caplog):
    calls = fake_wandb(monkeypatch)
    calls.fails.add("log")
    recorder = Recorder(
        tmp_path, enabled=True, num_steps=9, config_text=CONFIG, decode=str, log=LogConfig(sinks=("wandb",))
    )
    with caplog.at_level(logging.WARNING):
        recorder.begin(0)
        for step in (1, 2):
            recorder.record(step, {"a": 1.0})
            _wait(lambda step=step: len(calls.named("log")) == step)
        _wait(lambda: recorder._sinks[0].lost_metrics() == {"log/lost_wandb": 2.0})
        recorder.record(3, {"a": 1.0})
        recorder.close()
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "ConnectionError: no route" in line and "goes on" in line] == lines[:1]
    assert lines[1:] == ["wandb: did not take 3 records; metrics.jsonl has them"]
    assert read_metrics(tmp_path / "metrics.jsonl")[3] == {"a": 1.0, "log/lost_wandb": 2.0}


def test_a_service_that_cannot_be_opened_refuses_the_first_start_only(tmp_path, monkeypatch, caplog):
    calls = fake_wandb(monkeypatch)
    calls.fails.add("init")
    with pytest.raises(
        ConfigError, match=r"log\.sinks: wandb could not be opened \(ConnectionError: no route"
    ):
        _record(tmp_path, {}, sinks=("wandb",))
    calls.fails.clear()
    _record(tmp_path, {1: {"a": 1.0}}, sinks=("wandb",))
    calls.fails.add("init")
    _record(tmp_path, {2: {"a": 2.0}, 3: {"a": 3.0}}, sinks=("wandb",), step=1)
    assert "training goes on without it" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[3] == {"a": 3.0, "log/lost_wandb": 1.0}


def test_a_service_that_hangs_holds_nothing_up(caplog):
    class FakeHangingSink:
        def __init__(self):
            self.free = threading.Event()

        def write(self, step, scalars):
            self.free.wait(60)

        def close(self):
            pass

    hanging = FakeHangingSink()
    sink = Background("wandb", hanging, {}, close_s=0.05)
    for step in range(1003):  # one is at the service, a thousand wait
        sink.write(step, {"a": 1.0})
    assert sink.lost_metrics()["log/lost_wandb"] in (2.0, 3.0)
    sink.close()
    hanging.free.set()
    assert "still busy after 0.05 s" in caplog.text


def test_newest_steps_count_superseded_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest_steps(path) == {}
    for first, step, metrics in ((1, 7, {"a": 1.0, "b": 1.0}), (3, 3, {"a": 1.0})):
        log = MetricsLog(path, first_step=first)
        log.record(step, metrics)
        log.close()
    assert newest_steps(path) == {"a": 7, "b": 7}


def _wait(condition):
    done = threading.Event()
    for _ in range(500):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("not within 5 s")


def test_a_run_that_is_asked_to_stop_says_so_to_its_services(tmp_path, capsys):
    """A stop leaves the loop by an error, and its process without a clean end of the interpreter."""
    from megatron_sd.config.load import load
    from megatron_sd.distributed.world import lone_world
    from megatron_sd.train import _train_alone

    closed = []

    class FakeTrainer:
        step = 3
        recorder = SimpleNamespace(close=lambda: closed.append(True))
        checkpoints = SimpleNamespace(abandon=lambda: closed.append("abandoned"))

        def train(self):
            raise StopRequested("asked to")

    config = load([*REQUIRED[1:], f"--run_dir={tmp_path}"])
    assert _train_alone(config, lone_world(), lambda _config, _world: FakeTrainer()) == STOPPED_EXIT_CODE
    assert closed == [True, "abandoned"] and "stopped: asked to; saved step 3" in capsys.readouterr().err
