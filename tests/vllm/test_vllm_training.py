"""A whole run through the real door, with vLLM: servers of its own, rollouts one step ahead, two ranks that
are one engine."""

import os
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from data_prep.world.world import WorldConfig
from launch.local import command_line, free_port
from launch.programs import make_world
from megatron_sd.observability.metrics_log import read_metrics


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("placement", "num_ranks", "max_lag"),
    [("process", 2, 0), ("process", 2, 1), ("process", 2, 3), ("colocated", 2, 0)],
)
def test_a_run_on_vllm(placement, num_ranks, max_lag, tmp_path):
    world = tmp_path / "world"
    make_world(WorldConfig(output=str(world), num_train_questions=40, num_eval_questions=10))
    arguments = [
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        f"--run_dir={tmp_path / 'run'}",
        f"--model.path={Path(str(files('data_prep'))) / 'coldstart_model'}",
        f"--data.train={world / 'questions.jsonl'}",
        f"--data.eval={world / 'questions.jsonl'}",
        f"--retriever.corpus={world / 'corpus'}",
        "--num_steps=3",
        "--rollout.questions_per_step=4",
        "--distill.alpha.warmup_steps=1",
        "--distill.measure_every=2",
        "--rollout.engine=vllm",
        "--rollout.vllm.kv_cache_gib=0.25",
        f"--rollout.vllm.placement={placement}",
        f"--rollout.vllm.tensor_parallel_size={2 if placement == 'colocated' else 1}",
        f"--rollout.max_lag={max_lag}",
        f"--policy_loss.importance_cap={2.0 if max_lag else 'null'}",
    ]
    finished = subprocess.run(
        command_line(num_ranks, free_port(), arguments),
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert list(steps) == [1, 2, 3]
    lags = [metrics["rollout/policy_lag_steps"] for metrics in steps.values()]
    if max_lag < 2:
        assert lags == ([0, 1, 1] if max_lag else [0, 0, 0])
    assert all(step - 1 - metrics["rollout/policy_version"] <= max_lag for step, metrics in steps.items())
    gaps = [metrics["rollout/logprob_gap_nats"] for metrics in steps.values()]
    assert gaps[0] < 1e-4
    if max_lag < 2:
        assert all(gap > 1e-4 if max_lag else gap < 1e-4 for gap in gaps[1:])
    assert all(metrics["rollout/stop_engine_failed"] == 0 for metrics in steps.values())
