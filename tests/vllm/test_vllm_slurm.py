"""Under a real SLURM: one node samples with vLLM for the one that trains."""

import json

import pytest

from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics
from tests.slurm.conftest import cluster  # noqa: F401, a fixture
from tests.slurm.jobs import Job
from tests.slurm.test_real_training import MODULE, arguments  # noqa: F401, a fixture

NUM_STEPS = 3
SERVERS = ("--rollout.engine=vllm", "--rollout.vllm.placement=server", "--rollout.vllm.kv_cache_gib=0.25")


@pytest.mark.slow
@pytest.mark.ranks
def test_one_node_samples_for_the_one_that_trains(cluster, arguments, tmp_path):  # noqa: F811
    own = [*arguments, *SERVERS, f"--num_steps={NUM_STEPS}"]
    job = Job(tmp_path / "run", cluster, own, module=MODULE, nodes=1, rollout_nodes=1)
    job.wait_for(lambda: job.state() == "COMPLETED", "end of the run")
    steps = read_metrics(job.run_dir / METRICS_NAME)
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    assert all(metrics["rollout/logprob_gap_nats"] < 1e-4 for metrics in steps.values()), (
        "every publish reached the other node"
    )
    assert all(metrics["rollout/stop_engine_failed"] == 0 for metrics in steps.values())
    (attempt,) = job.attempts()
    topology = json.loads((attempt / "topology.json").read_text())
    assert [[host["name"] for host in topology[role]] for role in ("trainers", "rollouts")] == [
        ["node2"],
        ["node1"],
    ]
