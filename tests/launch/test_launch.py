"""How ranks are started."""

import signal
import subprocess
import sys

import pytest

from launch.local import command_line, free_port, split_num_ranks
from megatron_sd.errors import ConfigError


def test_one_rank_needs_no_launcher():
    assert command_line(1, 1234, ["--config=x"]) == [sys.executable, "-m", "megatron_sd.train", "--config=x"]


def test_several_ranks_go_through_deepspeeds_launcher():
    command = command_line(2, 1234, ["--config=x"])
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[command.index("--master_port") + 1] == "1234"
    assert command[-3:] == ["--module", "megatron_sd.train", "--config=x"]


def test_a_free_port_can_be_bound():
    assert 1024 < free_port() < 65536


@pytest.mark.parametrize("found", ["0", "-1", "x", "1.5", ""])
def test_a_number_of_ranks_that_is_none_is_named(found):
    with pytest.raises(
        ConfigError, match=f"--num-ranks: found '{found or 'nothing'}', expected the number of ranks"
    ):
        split_num_ranks([f"--num-ranks={found}", "--seed=1"])


def test_the_number_of_ranks_is_ours_and_the_rest_is_training():
    assert split_num_ranks(["--num-ranks", "2", "--num_steps=3"]) == (2, ["--num_steps=3"])
    assert split_num_ranks(["--num_ranks=2", "--num_steps=3"]) == (2, ["--num_steps=3"]), (
        "as keys are written"
    )
    assert split_num_ranks(["--num_steps=3"]) == (1, ["--num_steps=3"])
    with pytest.raises(ConfigError, match="found 'nothing'"):
        split_num_ranks(["--num_steps=3", "--num-ranks"])


TEARDOWN_ABORTS = """
import os, sys
class Thread:
    def __del__(self, abort=os.abort):
        abort()
kept = Thread()
from megatron_sd.distributed.world import end_process
print("done")
(end_process if sys.argv[1] == "ours" else sys.exit)(3)
"""


@pytest.mark.parametrize(("exit_by", "code"), [("ours", 3), ("python", -signal.SIGABRT)])
def test_a_finished_run_is_not_undone_by_what_aborts_while_the_interpreter_is_torn_down(exit_by, code):
    found = subprocess.run(
        [sys.executable, "-c", TEARDOWN_ABORTS, exit_by], capture_output=True, text=True, check=False
    )
    assert found.returncode == code
    assert exit_by == "python" or found.stdout == "done\n", "what was printed is flushed"
