"""`update.max_microbatch_tokens auto` becomes a number before any rank starts, and stays that number."""

import re

import pytest
import yaml

from launch import local
from launch.cli import main as command_line
from launch.cluster.job import training_job
from launch.cluster.start import main as launch
from launch.cluster.start import read_launch_options
from launch.planner.memory import GIB
from launch.planner.memory_check import needed_bytes, with_microbatch
from launch.planner.microbatch import USED_SHARE, largest_microbatch, settle_auto
from launch.planner.models import MODELS
from launch.planner.this_machine import BLANKS, render
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import model_shape
from megatron_sd.sft_config import load as load_sft
from megatron_sd.sft_config import planned_config
from megatron_sd.train import main as rank

SHAPE = model_shape(MODELS["qwen2.5-0.5b"])
AUTO = "--update.max_microbatch_tokens=auto"
OWN = (
    "--model.path=models/Qwen2.5-0.5B",
    "--model.dtype=float32",
    "--data.train=none",
    "--retriever.corpus=none",
    "--rollout.questions_per_step=4",
)


def config_in(run_dir, *options):
    return load([*OWN, f"--run_dir={run_dir}", *options])


def tokens_of(words):
    (word,) = words
    return int(word.removeprefix("--update.max_microbatch_tokens="))


@pytest.mark.parametrize(("num_ranks", "gib"), [(1, 16), (1, 24), (2, 32), (2, 64)])
def test_it_is_the_largest_that_the_planner_says_fits_with_room_for_its_error(tmp_path, num_ranks, gib):
    config = config_in(tmp_path, AUTO)
    tokens = tokens_of(settle_auto(config, num_ranks=num_ranks, device_bytes=gib * GIB, on_cpu=True))
    sizes = [
        needed_bytes(SHAPE, with_microbatch(config, n), num_ranks, on_cpu=True)[0]
        for n in (tokens, 2 * tokens)
    ]
    assert sizes[0] <= USED_SHARE * gib * GIB < sizes[1]


def test_more_memory_has_larger_microbatches(tmp_path):
    config = config_in(tmp_path, AUTO)
    found = [
        tokens_of(settle_auto(config, num_ranks=1, device_bytes=gib * GIB, on_cpu=True))
        for gib in (16, 32, 64)
    ]
    assert found == sorted(set(found)) and found[0] >= 512


def test_a_number_is_kept_and_too_little_memory_is_an_error(tmp_path):
    assert local.settle(config_in(tmp_path), num_ranks=1) == []
    with pytest.raises(ConfigError, match="found auto, but no microbatch fits 85% of 4.0 GiB"):
        settle_auto(config_in(tmp_path, AUTO), num_ranks=1, device_bytes=4 * GIB, on_cpu=True)


def test_a_run_with_a_checkpoint_keeps_its_number_for_its_sums_are_cut_there(tmp_path):
    options = {"num_ranks": 1, "device_bytes": 64 * GIB, "on_cpu": True}
    config = config_in(tmp_path, AUTO)
    anew = tokens_of(settle_auto(config, **options))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"update": {"max_microbatch_tokens": 4096}}))
    assert tokens_of(settle_auto(config, **options)) == anew != 4096, "it ended before its first checkpoint"
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert tokens_of(settle_auto(config, **options)) == 4096
    for damaged in ("", "update: {}", "update: {max_microbatch_tokens: auto}", "update: [", "3"):
        (tmp_path / "config.yaml").write_text(damaged)
        with pytest.raises(ConfigError, match=r"auto goes on with .* and .*config.yaml does not say it"):
            settle_auto(config, **options)


def test_train_gives_the_ranks_a_number_and_a_rank_refuses_auto(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(local, "free_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(local, "start_ranks", lambda num_ranks, argv, remarks: given.append((argv, remarks)))
    local.main([*OWN, f"--run_dir={tmp_path / 'run'}", AUTO])
    ((argv, remarks),) = given
    tokens = load(argv).update.max_microbatch_tokens
    assert tokens == tokens_of(
        settle_auto(config_in(tmp_path, AUTO), num_ranks=1, device_bytes=24 * GIB, on_cpu=True)
    )
    assert remarks == (), "what was chosen fits"
    assert f"auto: --update.max_microbatch_tokens={tokens}" in capsys.readouterr().out
    assert rank([*OWN, f"--run_dir={tmp_path / 'run'}", AUTO]) == 2
    assert "found auto, expected a number in a rank" in capsys.readouterr().err


def test_a_launch_settles_it_by_its_gpus_and_not_where_nobody_knows(tmp_path, capsys):
    layout, job = read_launch_options(["--recipe=paper-7b", AUTO])
    launch(["--recipe=paper-7b", AUTO, "--dry-run", f"--run_dir={tmp_path / 'run'}"])
    written = yaml.safe_load((tmp_path / "run" / "launch" / "config.yaml").read_text(encoding="utf-8"))
    tokens = job.config.update.max_microbatch_tokens
    assert written["update"]["max_microbatch_tokens"] == tokens >= 4096 and layout.gpu
    with pytest.raises(ConfigError, match="found auto for nodes without GPUs, expected a number"):
        read_launch_options(["--recipe=smoke-cpu", AUTO])


def test_a_warm_up_is_settled_by_what_it_holds_itself(tmp_path, monkeypatch):
    """Without an evaluation nobody samples: no engine takes memory."""
    episodes = tmp_path / "episodes"
    episodes.mkdir()
    (episodes / "episodes.json").write_text("{}")
    (episodes / "train.jsonl").write_text("{}\n" * 40)
    given = []
    monkeypatch.setattr(local, "free_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(local, "start_ranks", lambda *words, program: given.append((words, program)))
    options = [f"--run_dir={tmp_path / 'run'}", f"--episodes={episodes}", *OWN[:2], AUTO]
    with pytest.raises(IndexError):  # the model that these ranks leave
        local.sft([*options, "--num-ranks=2"])
    (((num_ranks, argv, _), program),) = given
    assert (num_ranks, program) == (2, "megatron_sd.sft")
    own, config = load_sft(argv)
    needed = planned_config(own, config)
    tokens = largest_microbatch(SHAPE, needed, 2, free=USED_SHARE * 24 * GIB, on_cpu=True)
    assert own.update.max_microbatch_tokens == config.update.max_microbatch_tokens == tokens


def test_plans_say_what_auto_takes(capsys):
    assert command_line(["plan", "--model=qwen2.5-7b", "--gpus=8", AUTO]) == 0
    found = re.search(r"max_microbatch_tokens ([\d,]+); .* fits: ([\d,]+)", capsys.readouterr().out)
    own, largest = (int(number.replace(",", "")) for number in found.groups())
    assert 512 <= own <= largest
    blanks = load([f"{name}={value}" for name, value in BLANKS["train"].items()] + [*OWN[:2], AUTO])
    text = render(training_job(blanks), SHAPE, free=64 * GIB, on_cpu=True, num_places=1)
    tokens = largest_microbatch(SHAPE, blanks, 1, free=USED_SHARE * 64 * GIB, on_cpu=True)
    size = needed_bytes(SHAPE, with_microbatch(blanks, tokens), 1, on_cpu=True)[0]
    assert "with the microbatches that auto takes" in text and f"{size / GIB:.1f} fits" in text
