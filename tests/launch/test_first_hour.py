"""The plan of the first hour on GPUs, for 1, 2 and 8 of them; nothing of it runs here."""

import sys

import pytest

from launch.doctor.first_hour import FirstHourConfig, Step, main, plan, run
from launch.local import split_num_ranks
from launch.planner.estimate import check_servers
from launch.planner.gpus import find_gpu
from launch.planner.memory_check import remarks_on_memory
from launch.planner.models import model_config
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError

ALONE = ["gpu-check", "gpu-check-train", "smoke-1gpu"]
PAIR = [*ALONE, "checksums", "colocated", "killed-worker"]
ALL = [*ALONE, "checksums", "tensor-parallel", "colocated", "killed-worker"]


@pytest.mark.parametrize(("num_gpus", "names"), [(1, ALONE), (2, PAIR), (8, ALL)])
def test_the_steps_that_so_many_gpus_can_run(num_gpus, names, capsys):
    main([f"--gpus={num_gpus}", "--dry_run=true"])
    printed = capsys.readouterr().out
    assert [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == names
    assert printed.count("   expected: ") == printed.count("   if it fails, send: ") == len(names)
    assert ("kill -9" in printed) == ("killed-worker" in names)


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_every_step_is_a_run_that_loads_and_fits_an_h100(num_gpus):
    gpu = find_gpu("h100")
    for step in plan(num_gpus, "runs/x"):
        if step.command[0] == "make":
            continue
        num_ranks, rest = split_num_ranks(step.command[4:])
        config = load(rest)
        devices = config.rollout.vllm.devices
        assert num_ranks + len(devices) <= num_gpus and not set(devices) & set(range(num_ranks))
        fits = remarks_on_memory(
            config, num_ranks=num_ranks, device_bytes=int(gpu.memory_gib * 2**30), on_cpu=False
        )
        assert fits == (), (step.name, fits)
        check_servers(config, model_config(config.model.path), gpu)


def test_a_step_that_fails_or_hangs_is_noticed(tmp_path):
    def step(code: str) -> Step:
        return Step(name="s", command=(sys.executable, "-c", code), expected="", send="")

    assert run(step("pass"), tmp_path, limit_s=60)
    assert not run(step("raise SystemExit(3)"), tmp_path, limit_s=60)
    assert not run(step("import time; time.sleep(60)"), tmp_path, limit_s=0.5)


def test_a_machine_without_gpus_is_refused():
    assert FirstHourConfig().gpus is None
    with pytest.raises(ConfigError, match="gpus: found 0, expected 1 or more"):
        main(["--gpus=0"])
