"""The services' own packages, where they are installed, with what they keep on this machine: written by a
run that is left at step 3 and goes on from step 2, and read back. wandb has no reader of its files."""

import math
import struct

import pytest

from tests.observability.test_sinks import _record

FIRST = {1: {"reward/mean": 0.25}, 2: {"reward/mean": 0.5}, 3: {"reward/mean": 0.75, "loss/kl": math.nan}}
SECOND = {3: {"reward/mean": 0.75, "eval/reward/em": 0.1}, 4: {"reward/mean": 1.0}}
MEANS = [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


def _two_starts(run_dir, **options):
    _record(run_dir, FIRST, **options)
    _record(run_dir, SECOND, step=2, **options)


def _records(content):
    """Of a .wandb file shorter than a block of 32 KiB: seven bytes of head, then checksum, length, kind and
    bytes of each."""
    assert content.startswith(b":W&B") and len(content) < 1 << 15
    place = 7
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1  # a record in one piece
        yield content[place + 7 : place + 7 + length]
        place += 7 + length


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as records

    _two_starts(tmp_path / "run", sinks=("wandb",), wandb_mode="offline")
    ids, rows, config = set(), [], {}
    for path in sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            record = records.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: item.value_json for item in record.run.config.update}
            if record.HasField("history"):
                rows.append(
                    {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                )
    assert len(ids) == 1 and config["seed"] == "3"
    assert [(int(r["step"]), float(r["reward/mean"])) for r in rows if "reward/mean" in r] == MEANS
    assert [(int(r["step"]), float(r["eval/reward/em"])) for r in rows if "eval/reward/em" in r] == [(3, 0.1)]


def test_mlflow_in_a_local_database(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    _two_starts(tmp_path / "run", sinks=("mlflow",), mlflow_uri=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((metric.step, metric.value) for metric in history) == MEANS
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"seed": "3", "model.path": "m"}
    assert run.data.metrics["eval/reward/em"] == 0.1 and math.isnan(run.data.metrics["loss/kl"])


def test_trackio_in_a_local_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    _two_starts(tmp_path / "run", sinks=("trackio",))
    (name,) = SQLiteStorage.get_runs("p")
    rows = SQLiteStorage.get_logs("p", name)
    assert name.startswith("run-")
    assert [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row] == MEANS
