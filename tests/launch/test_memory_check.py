"""What README tells people to start fits its card by the planner, or is refused with what would fit; so do
servers."""

import re
import shlex
from pathlib import Path

import pytest

from launch.cluster.job import training_job
from launch.cluster.layout import LayoutConfig
from launch.cluster.start import read_launch_options
from launch.local import split_num_ranks
from launch.planner.estimate import check_memory, check_servers, render_plan
from launch.planner.gpus import find_gpu
from launch.planner.memory_check import remarks_on_memory
from launch.planner.models import model_config
from megatron_sd.config import Config
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.rollout.vllm.memory import GIB, memory_share, worker_memory
from megatron_sd.rollout.vllm.options import server_arguments

ROOT = Path(__file__).resolve().parents[2]
H100 = int(find_gpu("h100").memory_gib * GIB)
HOTPOTQA = ("--config", str(ROOT / "launch/configs/hotpotqa.yaml"))


def readme_commands() -> list[tuple[int, tuple[str, ...]]]:
    """(ranks, options) of every `train` of README and docs/vllm.md with the real questions; the others
    train the tiny world."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/vllm.md")]
    text = "\n".join(pages).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if match := re.match(
            r"(?:sd-search train|deepspeed --num_gpus (\d+) --module megatron_sd.train) (.*hotpotqa.*)", line
        ):
            num_ranks, rest = split_num_ranks(shlex.split(match[2], comments=True))
            found.append(
                (
                    int(match[1] or num_ranks),
                    tuple(word.replace("launch/", f"{ROOT}/launch/") for word in rest),
                )
            )
    return found


def test_readme_names_several_commands_for_gpus():
    assert sorted(ranks for ranks, _ in readme_commands()) == [1, 1, 1, 8, 8]


@pytest.mark.parametrize(("num_ranks", "options"), readme_commands())
def test_every_gpu_command_of_readme_fits_an_h100(num_ranks, options):
    config = load([BFLOAT16, *options])
    assert remarks_on_memory(config, num_ranks=num_ranks, device_bytes=H100, on_cpu=False) == ()
    check_servers(config, model_config(config.model.path), find_gpu("h100"))


@pytest.mark.parametrize("recipe", ["paper-3b", "paper-7b", "14b", "72b-64gpu", "smoke-1gpu"])
def test_every_recipe_fits_its_card_with_what_its_servers_stage(recipe):
    layout, job = read_launch_options([f"--recipe={recipe}"])
    check_memory(layout, job, model_config(job.config.model.path))
    assert "DOES NOT FIT" not in render_plan(layout, job, model_config(job.config.model.path))


BFLOAT16 = "--model.dtype=bfloat16"  # what auto is on a GPU; these tests run where there is none


def remarks(
    *options: str, num_ranks: int = 8, on_cpu: bool = False, device_bytes: int = H100
) -> tuple[str, ...]:
    config = load([*HOTPOTQA, BFLOAT16, *options])
    return remarks_on_memory(config, num_ranks=num_ranks, device_bytes=device_bytes, on_cpu=on_cpu)


def test_a_rank_that_does_not_fit_is_told_what_would():
    found, help_ = remarks("--model.gradient_checkpointing=false")
    assert (
        found == "memory: planned 83.3 GiB for a rank at the worst moment (head), found 75.1 GiB of its GPU"
    )
    changes = "model.gradient_checkpointing true (35.6 GiB); update.max_microbatch_tokens 8192 (47.6 GiB)"
    assert help_ == f"each of these alone would fit: {changes}"
    _, help_ = remarks(num_ranks=1)
    for change in (
        "update.offload_optimizer cpu (59.1",
        "model.lora.rank 16 (53.2",
        "ranks: 2 instead of 1 (70.6",
    ):
        assert change in help_
    assert (
        "update.offload_optimizer"
        not in remarks("--update.zero_stage=0", "--distill.measure_every=0", num_ranks=1)[1]
    )
    assert "no single change fits" in remarks("--model.path=models/Qwen2.5-72B")[1]


def test_on_cpus_all_ranks_share_the_hosts_memory():
    """Twice the ranks hold the engine and its keys and values twice; float32 weights count four bytes."""
    options = ("--model.path=models/Qwen2.5-0.5B", "--model.dtype=float32", "--rollout.engine=vllm", *SERVER)
    assert remarks(*options, num_ranks=2, on_cpu=True, device_bytes=256 * GIB) == ()
    (found, _) = remarks(*options, num_ranks=2, on_cpu=True, device_bytes=8 * GIB)
    one = remarks(*options, "--policy_loss.kl_weight=0", num_ranks=2, on_cpu=True, device_bytes=8 * GIB)[0]
    total = [float(re.search(r"planned ([\d.]+) GiB for 2 ranks together", text)[1]) for text in (found, one)]
    assert total[0] - total[1] == pytest.approx(4 * 0.494e9 / GIB, abs=0.06), (
        "the start policy: once over both ranks"
    )


SERVER = ("--rollout.vllm.placement=server", '--rollout.vllm.urls=["http://a:1"]')


def served(name: str, *options: str) -> tuple[dict, Config]:
    path = f"--model.path=models/{name}"
    return model_config(name), load([*HOTPOTQA, BFLOAT16, path, "--rollout.engine=vllm", *SERVER, *options])


@pytest.mark.parametrize(
    ("name", "size", "staged"), [("Qwen2.5-3B", 1, 5.75), ("Qwen2.5-7B", 1, 14.19), ("Qwen2.5-72B", 8, 16.93)]
)
def test_the_staged_copy_is_taken_from_vllms_share(name, size, staged):
    model, config = served(name, f"--rollout.vllm.tensor_parallel_size={size}")
    memory = worker_memory(model, config.model, config.rollout)
    assert memory.staged / GIB == pytest.approx(staged, abs=0.01)
    share = memory_share(memory, config.rollout, device_bytes=H100)
    assert share == pytest.approx(0.85 - memory.staged / H100, abs=1e-4)
    arguments = server_arguments(config.model, config.rollout, host="h", port=1, on_cpu=False, share=share)
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == str(share)


def test_a_server_that_cannot_stage_the_next_weights_is_refused_before_it_starts():
    """27.5 GiB of weights and 27.5 staged fit in 85 % of 79.1, and not in 60 % with a forward pass."""
    model, config = served("Qwen2.5-14B")
    check_servers(config, model, find_gpu("h100"))
    model, config = served("Qwen2.5-14B", "--rollout.vllm.gpu_memory_share=0.6")
    with pytest.raises(
        ConfigError,
        match=r"gpu_memory_share: found 0.6 of 79.1 GiB, of which a publish stages 27.5 and 19.9 are",
    ):
        check_servers(config, model, find_gpu("h100"))
    model, config = served(
        "Qwen2.5-14B", "--rollout.vllm.gpu_memory_share=0.6", "--rollout.vllm.publish=gather"
    )
    assert check_servers(config, model, find_gpu("h100")).staged == 0
    with pytest.raises(ConfigError, match="expected .* or more for weights"):
        model, config = served("Qwen2.5-7B", "--model.lora.rank=4")
        layout = LayoutConfig(cluster="slurm", gpu="rtx4090", rollout_nodes=1)
        check_memory(layout, training_job(config), model)


def test_a_plan_says_what_checkpoints_take_on_disk():
    """72.7 G parameters: 872 GB of masters and moments and 145 GB of weights, three times."""
    layout, job = read_launch_options(["--recipe=72b-64gpu"])
    printed = render_plan(layout, job, model_config(job.config.model.path))
    assert "checkpoint        1018 GB each with its model, 3054 GB for the 2 kept" in printed
