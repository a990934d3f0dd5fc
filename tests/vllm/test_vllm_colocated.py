"""vLLM inside the trainer's ranks: one rank, two ranks with an engine each, two ranks that are one engine."""

import json
import os
import subprocess

import pytest

from tests.launched import rank_command
from tests.vllm.servers import CLOSE, write_policy

PROGRAM = "tests.rank_programs.publish_to_colocated"
SCENES = [  # ranks, tensor-parallel size, family, tied, publish
    (1, 1, "qwen2", True, "shards"),
    (2, 1, "qwen2", False, "shards"),
    (2, 2, "qwen3", True, "shards"),
    (2, 2, "qwen3", False, "gather"),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("num_ranks", "tp_size", "family", "tied", "publish"), SCENES)
def test_ranks_sample_from_what_they_trained(num_ranks, tp_size, family, tied, publish, tmp_path):
    model = write_policy(tmp_path / "policy", family, tied=tied)
    run = rank_command(PROGRAM, num_ranks, str(tmp_path / "found.json"), str(model), str(tp_size), publish)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    finished = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    ranks = json.loads((tmp_path / "found.json").read_text())
    assert [rank["rank"] for rank in ranks] == list(range(num_ranks))
    for rank in ranks:
        assert rank["replicas"] == num_ranks // tp_size
        assert rank["sharded"] == (publish == "shards")
        assert max(rank["fresh"]) < CLOSE
        assert min(rank["stale"]) > 1, "the check would not notice old weights"
        assert rank["versions"] == [[8], [9]]
        assert rank["repeats"], "seeds decide, not what else is sampled"
        assert rank["finishes"][-1] == "stop"
        assert rank["random_numbers_untouched"], "vLLM seeds and draws from the trainer's generator"
        asleep, *outside = rank["refusals"]
        assert "asked for tokens of an engine that sleeps" in asleep
        assert ["outside an update; call begin_update first" in refusal for refusal in outside] == [
            True,
            True,
        ]
        assert rank["failed"] == "ReshardError"
        assert rank["after"] < CLOSE
    assert ranks[0]["aborted"] == "cancelled"
    assert ranks[0]["left"] == 0
    assert len({tuple(rank["greedy"]) for rank in ranks}) == 1
