"""What keeps two evaluations apart in one directory."""

import dataclasses
import json

import pytest

from eval.identity import IDENTITY_NAME, claim
from megatron_sd.config import RewardConfig
from megatron_sd.errors import ConfigError


def test_a_key_that_is_newer_than_the_evaluation_counts_as_its_default(tmp_path):
    """An evaluation begun before the key existed can be finished, with the key at its default alone."""
    reward = dataclasses.asdict(RewardConfig())
    claim(tmp_path, {"reward": reward, "seed": 0})
    begun = json.loads((tmp_path / IDENTITY_NAME).read_text())
    del begun["reward"]["shape"]
    (tmp_path / IDENTITY_NAME).write_text(json.dumps(begun))
    claim(tmp_path, {"reward": reward, "seed": 0})
    with pytest.raises(ConfigError, match="holds an evaluation whose reward is .*now it is .*structured"):
        claim(tmp_path, {"reward": reward | {"shape": "structured"}, "seed": 0})
    with pytest.raises(ConfigError, match="holds an evaluation whose seed is 0, now it is 1"):
        claim(tmp_path, {"reward": reward, "seed": 1})
