"""What a shell sees of the command: version, completion, exit codes."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main
from launch.shell import version
from launch.shell.completion import OPTIONS, options_of, script
from megatron_sd import door

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("typed", ["--version", "version"])
def test_version_names_what_is_installed(typed, capsys, monkeypatch):
    monkeypatch.setattr(version, "checkout", lambda: ("a" * 40 + "\n", " M setup.py\n"))
    assert main([typed]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["commit"] == "a" * 40 + " with local changes"
    assert told["torch"] == importlib.metadata.version("torch")
    assert told["deepspeed"] == importlib.metadata.version("deepspeed")
    assert (
        re.match(r"CPU (baseline|avx2|avx512|by torch \()", told["kernels"]) and "; CUDA" in told["kernels"]
    )


def test_version_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr("launch.cluster.provenance.SOURCE", tmp_path)
    assert version.commit() == "not a checkout"
    assert version.installed("no-such-package") == "not installed"
    assert main(["version", "--all"]) == 2


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "sd-search.bash"
    path.write_text(script("bash"))
    return path


def _offered(completion, *words):
    """What bash offers for the last word."""
    typed = " ".join(f"'{word}'" for word in ("sd-search", *words))
    typing = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}"
    ask = f"source {completion}; {typing}; _sd_search; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_every_command():
    assert OPTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["data", "im"], ["import", "import-index"]),
        (["train", "--distill.bl"], ["--distill.block", "--distill.block_format"]),
        (["train", "--rollout.engine", ""], ["torch", "vllm"]),
        (["train", "--rollout.engine", "="], ["torch", "vllm"]),
        (["train", "--rollout.engine", "=", "v"], ["vllm"]),
        (["train", "--data.shuffle", "t"], ["true"]),
        (["train", "--log.wandb_mode", "of"], ["offline"]),
        (["data", "index", "--stem"], ["--stemmer"]),
        (["launch", "--dry"], ["--dry-run", "--dry_run"]),
        (["completion", ""], ["bash", "zsh"]),
        (["eval", "runs/"], []),
    ],
)
def test_bash_offers(completion, words, offered):
    assert sorted(_offered(completion, *words)) == sorted(offered)


def test_bash_offers_every_first_word(completion):
    assert set(_offered(completion, "")) >= {name.split()[0] for name in COMMANDS}


def test_completion_is_printed_for_shells_that_are_known(capsys):
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef sd-search\n") and "bashcompinit" in printed
    assert main(["completion", "fish"]) == 2
    assert "found fish, expected bash or zsh" in capsys.readouterr().err


def test_options_of_a_command_are_those_of_its_records():
    known = options_of("train")
    assert known["--advantage.estimator"][0] == "grpo" and known["--num_steps"] == ()
    assert "--rollout" not in known and "--num-ranks" in known


def test_exit_codes_are_those_of_the_table():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)
    held = {
        name.removesuffix("_EXIT_CODE"): code
        for name, code in vars(door).items()
        if name.endswith("_EXIT_CODE")
    }
    assert {name: int(code) for code, name in rows} == held
    assert [int(code) for code, _ in rows] == sorted(held.values())


def test_job_scripts_know_the_code_of_a_stop():
    assert f"code={door.STOPPED_EXIT_CODE}\n" in (ROOT / "launch/slurm/common.sh").read_text()
