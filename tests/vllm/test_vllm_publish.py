"""Publishing from DeepSpeed ranks into vLLM workers: every architecture and tensor-parallel size, from one
and two ranks."""

import json
import os
import subprocess

import pytest

from tests.launched import rank_command
from tests.vllm.servers import CLOSE, KINDS

PROGRAM = "tests.rank_programs.publish_to_vllm"


@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_log_probabilities_after_publishing_equal_the_trained_policys(every_kind, num_ranks, tmp_path):
    scenes = [
        {
            "model": str(served.directory),
            "url": served.process.url,
            "tp_size": int(kind[-1]),
            "publish": publish,
        }
        for kind, served in every_kind.items()
        for publish in ("shards", "gather")
        if publish == "shards" or kind == KINDS[num_ranks]
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = rank_command(PROGRAM, num_ranks, str(tmp_path / "found.json"), json.dumps(scenes))
    finished = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(scenes)
    for scene, ranks in zip(scenes, found, strict=True):
        assert len(ranks) == num_ranks
        for rank in ranks:
            assert rank["sharded"] == (scene["publish"] == "shards")
            assert max(rank["fresh"]) < CLOSE, (scene, rank)
            assert min(rank["stale"]) > 1, "the check would not notice old weights"
            assert rank["versions"] == [[8], [9]]
