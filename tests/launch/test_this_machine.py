"""What fits this machine, by the planner's own count."""

import pytest

from launch.cli import main as command_line
from launch.cluster.job import training_job
from launch.planner.memory import GIB, adapted_elements, adapter_elements, rank_memory
from launch.planner.memory_check import needed_bytes
from launch.planner.models import MODELS
from launch.planner.this_machine import BLANKS, render
from megatron_sd.config import Config
from megatron_sd.config.load import load
from megatron_sd.resharding.names import model_shape

SHAPE = model_shape(MODELS["qwen2.5-0.5b"])
SIZES = {"--rollout.questions_per_step": "4", "--update.max_microbatch_tokens": "2048"}
OWN = BLANKS["train"] | SIZES | {"--model.dtype": "float32"}


def config_with(**options: object) -> Config:
    words = OWN | {f"--{name.replace('__', '.')}": str(value) for name, value in options.items()}
    return load(
        [f"{name}={value}" for name, value in (words | {"--model.path": "models/Qwen2.5-0.5B"}).items()]
    )


def test_ways_down_ranks_across_with_the_largest_microbatch_that_fits():
    text = render(training_job(config_with()), SHAPE, free=12 * GIB, on_cpu=True, num_places=2)
    head, _, _, columns, *rows = text.splitlines()
    assert (
        head
        == "0.49 G parameters in float32; this machine: 2 cores, 12.0 GiB of host memory free for all ranks"
        " together"
    )
    assert columns.split() == ["1", "rank", "2", "ranks"]
    table = {row[:48].strip(): row[48:].split("   ") for row in rows}
    assert list(table) == [
        "full",
        "full, model.gradient_checkpointing",
        "model.lora.rank 16",
        "model.lora.rank 16, model.gradient_checkpointing",
    ]
    needed = needed_bytes(SHAPE, config_with(model__gradient_checkpointing="true"), 1, on_cpu=True)[0] / GIB
    assert f"{needed:.1f} fits" in rows[1]
    assert " no (" in rows[0], "two thirds of it are activations"


def test_on_gpus_each_has_its_own_memory_less_what_is_reserved():
    text = render(training_job(config_with()), SHAPE, free=12 * GIB, on_cpu=False, num_places=8)
    assert "this machine: 8 GPUs, 8.0 GiB free on the fullest" in text
    assert text.splitlines()[3].split() == ["2", "ranks", "4", "ranks", "8", "ranks"]


def parts(config: Config, num_ranks: int) -> dict[str, float]:
    return {
        part.name: part.num_bytes for part in rank_memory(SHAPE, config, world_size=num_ranks, on_gpu=False)
    }


def test_an_engine_beside_the_only_rank_has_no_weights_but_merged_ones():
    total = 494_032_768
    assert parts(config_with(), 1)["embedded engine"] == 0
    assert parts(config_with(), 2)["embedded engine"] == 4 * total
    assert (
        parts(config_with(rollout__max_lag=1, policy_loss__importance_cap=2.0), 1)["embedded engine"]
        == 4 * total
    )
    adapted = config_with(model__lora__rank=8, model__lora__targets="[q_proj, down_proj]")
    assert adapted_elements(SHAPE, adapted) == 24 * (896 * 896 + 4864 * 896)
    assert adapter_elements(SHAPE, adapted) == 8 * 24 * (896 + 896 + 4864 + 896)
    assert parts(adapted, 1)["embedded engine"] == 4 * 24 * (896 * 896 + 4864 * 896)


@pytest.mark.parametrize("arguments", [["--this-machine"], ["--this_machine=true"]])
def test_it_is_a_switch_of_plan(arguments, capsys):
    assert command_line(["plan", "--model=qwen2.5-0.5b", *arguments]) == 0
    assert "0.49 G parameters" in capsys.readouterr().out
    assert command_line(["plan", "--model=qwen2.5-0.5b"]) == 2
    assert "expected 1 or more; or --this-machine" in capsys.readouterr().err
