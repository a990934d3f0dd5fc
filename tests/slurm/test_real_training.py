"""The real trainer under a real SLURM: told to stop and requeued, and with a node that searches for the one
that trains."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics
from tests.slurm.jobs import Job
from tests.whole_runs.runs import run

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
NUM_STEPS = 12
MODULE = "megatron_sd.train"
FIGURES = ("reward/em", "rollout/searches", "optim/grad_norm", "loss/policy")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a short run in a small world."""
    world = tmp_path_factory.mktemp("slurm-world") / "world"
    make_world(WorldConfig(output=str(world), num_train_questions=40, num_eval_questions=10))
    values = {
        "model.path": Path(str(files("data_prep"))) / "coldstart_model",
        "data.train": world / "questions.jsonl",
        "data.eval": "null",
        "retriever.corpus": world / "corpus",
        "num_steps": NUM_STEPS,
        "rollout.questions_per_step": 4,
        "distill.alpha.warmup_steps": 1,
        "log.eval_every": 0,
    }
    return [
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        *(f"--{key}={value}" for key, value in values.items()),
    ]


def figures(run_dir: Path) -> list[list[float]]:
    """Of every step, in order."""
    steps = read_metrics(run_dir / METRICS_NAME)
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    return [[metrics[name] for name in FIGURES if name in metrics] for metrics in steps.values()]


def num_taken(run_dir: Path) -> int:
    path = run_dir / METRICS_NAME
    return len(read_metrics(path)) if path.exists() else 0


def test_a_run_that_was_requeued_ends_as_one_that_was_not(cluster, arguments, tmp_path):
    job = Job(tmp_path / "run", cluster, arguments, module=MODULE)
    job.wait_for(lambda: num_taken(job.run_dir) >= 2, "second step")
    job.tell()
    job.wait_for(lambda: job.state() == "COMPLETED", "end of the run")
    first, last = (json.loads((path / "end.json").read_text()) for path in job.attempts())
    assert (first["exit_code"], first["decision"], last["decision"]) == (85, "requeue", "done")
    assert 2 <= first["last_step"] < last["last_step"] == NUM_STEPS

    straight = [*arguments, f"--run_dir={tmp_path / 'straight'}"]
    run(2, straight)
    assert figures(job.run_dir) == figures(tmp_path / "straight")


def test_one_node_searches_for_the_one_that_trains(cluster, arguments, tmp_path):
    job = Job(tmp_path / "run", cluster, arguments, module=MODULE, nodes=1, retriever_nodes=1)
    job.wait_for(lambda: job.state() == "COMPLETED", "end of the run")
    steps = read_metrics(job.run_dir / METRICS_NAME)
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    assert all(
        metrics["rollout/searches"] > 1 and metrics["rollout/stop_retrieval_failed"] == 0
        for metrics in steps.values()
    )
    (attempt,) = job.attempts()
    topology = json.loads((attempt / "topology.json").read_text())
    assert [[host["name"] for host in topology[role]] for role in ("trainers", "retrievers")] == [
        ["node2"],
        ["node1"],
    ]
    assert "--retriever.endpoints=" in (attempt / "arguments").read_text()
