"""A checkpoint of a much older commit, from before many keys, rooms and names, goes on as it would have
there."""

import json
import shutil
from pathlib import Path

import pytest

from tests.whole_runs.runs import run

OLD = Path(__file__).parents[1] / "fixtures/run_055d05d"
# of step 2, at that commit
GRAD_NORM, ENTROPY_NATS, KL = 0.00014224056512636814, 5.627499050564236, 2.124781772749884e-08


@pytest.mark.ranks
def test_a_run_of_long_ago_goes_on(tmp_path):
    config = (OLD / "config.yaml").read_text().replace("START", str(OLD / "start"))
    (tmp_path / "config.yaml").write_text(config)
    shutil.copytree(OLD / "step_00000001", tmp_path / "run/checkpoints/step_00000001")
    (tmp_path / "run/checkpoints/latest").write_text("step_00000001\n")
    options = [f"--config={tmp_path / 'config.yaml'}", f"--run_dir={tmp_path / 'run'}", "--num_steps=2"]
    run(1, options)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["metrics"] for line in lines if "metrics" in line}
    assert list(steps) == [2]
    assert steps[2]["optim/grad_norm"] == pytest.approx(GRAD_NORM, rel=1e-3)
    assert steps[2]["rollout/entropy_nats"] == pytest.approx(ENTROPY_NATS, abs=1e-6)
    assert steps[2]["loss/kl"] == pytest.approx(KL, rel=1e-3)
