"""`sd-search launch` and `plan` of a warm-up: what is written, what is refused, what a plan leaves out."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main as command_line
from launch.cluster.attempt import read_launch
from launch.cluster.hostfile import Host
from launch.cluster.start import check_launch, main, read_launch_options
from launch.cluster.topology import assign
from launch.planner import this_machine
from launch.planner.estimate import PlanConfig, planned_job
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.sft_config import SftConfig
from tests.launch.test_launch import free_port
from tests.whole_runs.runs import parameters, run, without_clocks
from tests.whole_runs.sft_runs import SFT, arguments, looking, make_episodes

LOOKING = (
    "--eval.questions=q.jsonl",
    "--retriever.corpus=c",
    "--protocol.preset=few_shot",
    "--rollout.max_turn_tokens=128",
)


@pytest.fixture
def asked(tmp_path):
    """Options of a run on 40 episodes, of which only the number is read before it begins."""
    episodes = tmp_path / "episodes"
    episodes.mkdir()
    (episodes / "episodes.json").write_text("{}")
    (episodes / "train.jsonl").write_text("{}\n" * 40)
    paths = [f"--run_dir={tmp_path / 'run'}", f"--episodes={episodes}", "--model.path=models/Qwen2.5-7B"]
    return ["--program=sft", *paths, "--model.gradient_checkpointing=true"]


CLUSTERS = {
    "local": (),
    "hosts": ("--cluster=hosts", "--nodes=2", "--hostfile=HOSTS"),
    "slurm": ("--cluster=slurm", "--nodes=2", "--account=me"),
}


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("looks", [(), LOOKING])
def test_scripts_start_the_warm_up_with_a_configuration_of_its_own(asked, tmp_path, capsys, cluster, looks):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    layout = [word.replace("HOSTS", str(tmp_path / "hosts")) for word in CLUSTERS[cluster]]
    main([*asked, *layout, *looks, "--num_epochs=4", "--dry-run"])
    printed = capsys.readouterr().out
    launch_dir = tmp_path / "run" / "launch"
    assert "--module megatron_sd.sft --config=" in (launch_dir / "node.sh").read_text()
    assert f"WORLD_SIZE={8 if cluster == 'local' else 16}" in printed and "num_steps: 5" in printed
    assert ("#SBATCH --account=me" in printed) == (cluster == "slurm")
    own = parse(SftConfig, [word for word in (*asked[1:], *looks, "--num_epochs=4")], "sd-search sft")
    saved = parse(SftConfig, [f"--config={launch_dir / 'config.yaml'}"], "sd-search sft")
    dtype = {"model": dataclasses.replace(own.model, dtype="bfloat16")}  # the nodes', not this machine's
    assert saved == dataclasses.replace(own, num_steps=5, **dtype), "40 episodes, 32 a step, four times"
    layout, text = read_launch(launch_dir)
    assert layout.program == "sft" and "num_steps: 5" in text
    assert not (tmp_path / "run" / "attempts").exists()
    scripts = [str(path) for path in launch_dir.iterdir() if path.suffix in (".sh", ".sbatch")]
    command = [Path(sys.executable).with_name("shellcheck"), "-e", "SC1090,SC1091,SC2154", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recipe=paper-7b",), "--recipe: found one with program sft, expected none"),
        (("--program=stf",), "program: found 'stf', expected one of train, sft; did you mean sft?"),
        (
            ("--cluster=slurm", "--rollout_nodes=1", *LOOKING),
            "rollout_nodes: found 1 with program sft, expected 0: its evalua",
        ),
        (
            ("--cluster=slurm", "--retriever_nodes=1"),
            "retriever_nodes: found 1 with program sft and no eval, expected 0, since nob",
        ),
        (
            ("--cluster=slurm", "--nodes=8"),
            "episodes_per_step: found 32 for 64 ranks, expected at least one episode a rank",
        ),
        (("--update.sequence_parallel_size=3",), "update.sequence_parallel_size: found 3 for a model of 28"),
        (("--gpu=rtx4090",), "memory: found "),
        (
            (*LOOKING, "--rollout.max_rollout_tokens=40000"),
            "rollout.max_rollout_tokens: found 40000, expected at most 32768",
        ),
        (
            (*LOOKING, "--rollout.engine=vllm"),
            "ranks_per_node: found 8 ranks and 1 GPUs for vLLM on nodes of 8",
        ),
        (("--eval.questions=q",), "eval: found it without retriever, protocol, rollout"),
        (("--num_stepss=3",), "num_stepss: unknown key; did you mean num_steps?"),
    ],
)
def test_what_cannot_work_is_refused_in_the_words_of_the_warm_up(asked, more, said):
    more = [*more, *(["--ranks_per_node=8"] if "--rollout.engine=vllm" in more else [])]
    with pytest.raises(ConfigError) as error:
        layout, job = read_launch_options([*asked, *more])
        check_launch(layout, job)
    assert str(error.value).startswith(said)


def test_rollouts_that_nobody_samples_are_no_reason_to_refuse(asked):
    """The limits of rollouts, and servers that would hold them, belong to an evaluation."""
    more = [
        "--rollout.max_rollout_tokens=40000",
        "--rollout.engine=vllm",
        "--rollout.vllm.tensor_parallel_size=3",
    ]
    assert check_launch(*read_launch_options([*asked, *more])) == ()


def test_episodes_must_be_there(asked, tmp_path):
    (tmp_path / "episodes" / "episodes.json").unlink()
    with pytest.raises(
        DataError, match="holds no episodes.json, expected a directory that `sd-search select` finished"
    ):
        main([*asked, "--dry-run"])


def test_what_the_nodes_say_of_each_other_is_understood(asked):
    """Beside its configuration file a warm-up gets where it meets, and who serves the corpus of its
    evaluation."""
    layout, job = read_launch_options(
        [*asked, *LOOKING, "--cluster=slurm", "--nodes=2", "--retriever_nodes=1"]
    )
    check_launch(layout, job)
    hosts = [Host(name=f"n{number}", num_slots=8) for number in range(3)]
    own = parse(SftConfig, [*asked[1:], *LOOKING], "sd-search sft")
    found = assign(
        hosts, {f"n{n}": f"10.0.0.{n}" for n in range(3)}, layout, dataclasses.asdict(own), attempt=1
    )
    told = parse(SftConfig, [*asked[1:], *LOOKING, *found.arguments], "sd-search sft")
    assert told.publish.host == "10.0.0.1" and told.retriever.corpus is None
    assert told.retriever.endpoints == ("http://10.0.0.0:8741",) and told.rollout.max_turn_tokens == 128


@pytest.mark.slow
@pytest.mark.ranks
def test_two_machines_warm_up_as_one_does(tmp_path, monkeypatch):
    """Two of DeepSpeed's launchers, one rank each, with an evaluation, against two forked ranks: the same
    bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    episodes = make_episodes(tmp_path / "sft")
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/bash\nexec bash -c "$2"\n')  # in the place of ssh: HOST COMMAND
    shell.chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    two = (
        "--cluster=hosts",
        "--nodes=2",
        "--ranks_per_node=1",
        f"--hostfile={tmp_path / 'hosts'}",
        f"--remote_shell={shell}",
    )
    run(2, arguments(episodes, tmp_path / "one", "--num_steps=2"), SFT)
    own = arguments(episodes, tmp_path / "two", "--num_steps=2", f"--master_port={free_port()}")
    main(["--program=sft", "--gpus_per_node=0", "--doctor=false", *own, *two, *looking(episodes)])
    expected, found = (parameters(tmp_path / name, "step_00000002") for name in ("one", "two"))
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    attempt = tmp_path / "two" / "attempts" / "0001"
    assert json.loads((attempt / "end.json").read_text())["decision"] == "done"
    assert json.loads((attempt / "topology.json").read_text())["world_size"] == 2
    steps = without_clocks(tmp_path / "two")
    assert [step for step in steps if "eval/reward/em" in steps[step]] == [0, 2]


ABSENT = ("engine", "start policy", "keys and values", "publish", "rollout", "vLLM", "teacher")


def test_the_plan_of_a_warm_up_has_no_rollouts(capsys):
    assert command_line(["plan", "--program=sft", "--model=qwen2.5-7b", "--gpus=8"]) == 0
    printed = capsys.readouterr().out
    assert (
        "7.62 G parameters, bfloat16, ZeRO-3, 8 training ranks on 1 nodes, h100; episodes: nobody samples"
        in printed
    )
    assert not [word for word in ABSENT if word in printed], printed
    for fragment in (
        "AdamW's moments",
        "fits in 79.1",
        "checkpoint        107 GB each",
        "loading           15.2 GB read a node",
    ):
        assert fragment in printed, printed
    # 2 x 7.616e9 x 4 passes x 16384 tokens a rank, at 40 % of 989 TFLOP/s
    seconds = float(re.search(r"update: products +([\d.]+)", printed)[1])
    assert "0.13 M tokens of episodes" in printed and seconds == pytest.approx(2.5, abs=0.06)


def test_the_plan_of_a_warm_up_with_an_evaluation_has_its_engine(capsys):
    assert (
        command_line(["plan", "--program=sft", "--model=qwen2.5-7b", "--gpus=8", *LOOKING, "--eval.limit=80"])
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "episodes, and an evaluation by torch" in printed and "keys and values   0.055 MiB a token" in printed
    )
    held = float(re.search(r"embedded engine: keys and values +([\d.]+)", printed)[1])
    assert held == pytest.approx(10 * 4096 * 2 * 28 * 4 * 128 * 2 / 2**30, abs=0.01), (
        "ten questions a rank, 4096 tokens each"
    )
    assert "start policy" not in printed and "publish" not in printed


def test_this_machine_knows_warm_ups(capsys):
    assert (
        command_line(
            ["plan", "--program=sft", "--model=qwen2.5-0.5b", "--this-machine", "--episodes_per_step=8"]
        )
        == 0
    )
    assert "planned GiB at the worst moment of a step of 8 episodes, with" in capsys.readouterr().out
    plan = PlanConfig(model="qwen2.5-0.5b", program="sft")
    assert not planned_job(plan, ["--episodes=nowhere"], this_machine.BLANKS).samples, (
        "no episode is looked for"
    )


def test_a_plan_reads_the_configuration_of_a_warm_up(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text("run_dir: r\nepisodes: nowhere\nmodel: {path: m, dtype: bfloat16, lora: {rank: 8}}\n")
    assert (
        command_line(["plan", "--program=sft", "--model=qwen2.5-7b", "--gpus=1", "--config", str(path)]) == 0
    )
    assert "checkpoint        15 GB each" in capsys.readouterr().out, "adapters beside the merged model"
    assert command_line(["plan", "--model=qwen2.5-7b", "--gpus=1", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert "episodes: found with program train, expected --program sft for a warm-up" in said
    path.write_text("run_dir: r\nnum_steps: 1.5\nmodel: {path: m}\n")
    assert command_line(["plan", "--model=qwen2.5-7b", "--gpus=1", "--config", str(path)]) == 2
    assert "num_steps: found '1.5', expected int" in capsys.readouterr().err
