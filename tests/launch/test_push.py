"""`sd-search push`: what reaches a (fake) Hub, what the card says, and what is refused unsent."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eval.identity import model_version
from launch.cli import main as command
from launch.push.card import own_name
from launch.push.facts import commit_of
from megatron_sd.config.load import load
from megatron_sd.durable import directories
from megatron_sd.observability.metrics_log import MetricsLog
from tests.launch.fake_hub import TOKEN, served

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data_prep/coldstart_model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint at step 7, an evaluation of it, and one of another model."""
    run_dir = tmp_path / "runs/seven"
    arguments = ["--run_dir=/secret/runs/seven", "--model.path=models/Qwen2.5-3B", "--num_steps=9"]
    config = load([*arguments, "--data.train=/secret/q.jsonl", "--retriever.corpus=/secret/corpus"])
    staging = run_dir / "checkpoints/step_00000007.tmp"
    shutil.copytree(MODEL, staging / "model")
    state = {
        "step": 7,
        "config": dataclasses.asdict(config),
        "contents": {"model": "a1", "data.train": "b2"},
        "corpus_version": "c3" * 32,
        "world_size": 2,
        "changes": [{"step": 4, "key": "optimizer.learning_rate", "was": 1e-6, "now": 5e-7}],
    }
    (staging / "state.json").write_text(json.dumps(state))
    directories.commit(
        staging, directories.directory_of(run_dir / "checkpoints", 7), directories.seal(staging)
    )
    log = MetricsLog(run_dir / "metrics.jsonl", first_step=1)
    log.record(7, {"reward/em": 0.25, "time/step_s": 9.0})
    log.close()
    (run_dir / "attempts/0002").mkdir(parents=True)
    (run_dir / "attempts/0002/git.txt").write_text(f"{COMMIT}\n## main\n M setup.py\n")
    own = model_version(str(MODEL))
    for name, version in (("eval", own), ("eval_old", "another")):
        em = {"value": 0.5, "low": 0.4, "high": 0.6}
        figures = {"num_questions": 20, "em": em, "f1": {"value": 0.55, "low": None, "high": None}}
        (run_dir / name).mkdir()
        report = {"model_version": version, "strategy": "agent", "sets": {"world": figures}}
        (run_dir / name / "report.json").write_text(json.dumps(report))
    return run_dir


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    monkeypatch.setattr("launch.push.command.get_token", lambda: None)


def _push(endpoint, *words, token=TOKEN):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_TOKEN": token, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "launch.cli", "push", *map(str, words)]
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_is_pushed_through_the_door(run_dir):
    with served() as (hub, endpoint):
        done = _push(endpoint, run_dir, "--repo", "me/seven", "--private", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{endpoint}/me/seven/commit/c0ffee"
    assert hub.repos == {"me/seven": True}
    sent = hub.files["me/seven"]
    card = sent.pop("README.md").decode()
    assert sent == {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()}
    assert "license: apache-2.0" in card and "## Licence" not in card
    asked = [path for _, path in hub.asked]
    assert len([path for path in asked if path.startswith("/lfs/")]) == 1


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line(run_dir):
    with served() as (hub, endpoint):
        refused = _push(endpoint, run_dir, "--repo", "me/seven", token="hf_wrong")
        hub.repos["me/open"] = False
        is_public = _push(endpoint, run_dir, "--repo", "me/open", "--private")
    assert refused.returncode == 1 and "the Hub refused" in refused.stderr
    assert "expected a token that may write to me/seven" in refused.stderr
    assert is_public.returncode == 2 and "me/open exists and is public; nothing was sent" in is_public.stderr
    assert "Traceback" not in refused.stderr + is_public.stderr
    assert hub.files == {} and hub.objects == {}


def test_a_dry_run_needs_no_token_and_prints_files_sizes_and_card(run_dir, capsys, logged_out):
    assert (
        command(["push", str(run_dir), "--repo=me/seven", "--dry-run", "--base_model=Qwen/Qwen2.5-3B"]) == 0
    )
    printed = capsys.readouterr().out
    files, _, card = printed.partition("README.md: ")
    assert f"{(MODEL / 'model.safetensors').stat().st_size:>15,}  model.safetensors" in files
    assert "left out: eval_old, an evaluation of other weights" in files
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "unknown" and head["base_model"] == "Qwen/Qwen2.5-3B"
    assert head["tags"] == ["megatron_sd", "search-agent", "sd-search"]
    for line in (
        "| base model | Qwen/Qwen2.5-3B (digest a1) |",
        "| method | SD-Search: grpo, distilled from block paper |",
        "| steps | 7 of 9, 256 questions a step, 5 rollouts a question |",
        "| data | q.jsonl (digest b2) |",
        f"| commit | {COMMIT} with local changes |",
        "- from step 4 on optimizer.learning_rate was 1e-06 and is now 5e-07",
        "- reward/em: 0.250",
        "| eval | agent | world | 20 | 0.500 [0.400, 0.600] | 0.550 |",
        "optimizer.learning_rate: 1.0e-06",
        "## Licence",
    ):
        assert line in card
    assert "/secret" not in printed, "paths of this machine are nobody's business"
    assert printed.endswith("nothing was sent: --dry-run\n")


def test_without_a_token_nothing_is_read(tmp_path, capsys, logged_out):
    assert command(["push", str(tmp_path / "nowhere"), "--repo=me/seven"]) == 2
    error = capsys.readouterr().err
    assert "found no token" in error and "HF_TOKEN" in error and error.count("\n") == 1


@pytest.mark.parametrize("repo", ["seven", "me/se ven", "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(repo, capsys):
    assert command(["push", "x", f"--repo={repo}", "--dry-run"]) == 2
    assert f"--repo: found {repo!r}, expected owner/name" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_verify_is_refused(run_dir, capsys):
    weights = run_dir / "checkpoints/step_00000007/model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for given in (run_dir, weights.parent.parent, weights.parent):
        assert command(["push", str(given), "--repo=me/seven", "--dry-run"]) == 1
        error = capsys.readouterr().err
        assert "model/model.safetensors does not match its checksum" in error and "does not verify" in error


def test_any_model_directory_goes_with_the_card_it_has_or_one_that_claims_nothing(tmp_path, capsys):
    shutil.copytree(MODEL, tmp_path / "own")
    assert command(["push", str(tmp_path / "own"), "--repo=me/own", "--dry-run"]) == 0
    assert "No records of its training lie beside this model." in capsys.readouterr().out
    (tmp_path / "own/README.md").write_text("mine")
    assert command(["push", str(tmp_path / "own"), "--repo=me/own", "--dry-run"]) == 0
    assert "README.md: the one in the directory" in capsys.readouterr().out
    for path in (tmp_path / "own").glob("tokenizer*"):
        path.unlink()
    assert command(["push", str(tmp_path / "own"), "--repo=me/own", "--dry-run"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_an_evaluation_that_was_asked_for_must_be_of_these_weights(run_dir, capsys):
    words = ["push", str(run_dir), "--repo=me/seven", "--dry-run"]
    assert command([*words, f"--evaluations=[{run_dir / 'eval_old'}]"]) == 1
    assert "is an evaluation of other weights" in capsys.readouterr().err
    assert command([*words, "--evaluations=[nowhere]"]) == 1
    assert "nowhere/report.json cannot be read" in capsys.readouterr().err


def test_commits_and_names(tmp_path):
    assert commit_of(tmp_path) is None
    (tmp_path / "attempts/0001").mkdir(parents=True)
    (tmp_path / "attempts/0001/git.txt").write_text(f"{COMMIT}\n## main\n")
    assert commit_of(tmp_path) == COMMIT
    (tmp_path / "attempts/0002").mkdir()
    (tmp_path / "attempts/0002/git.txt").write_text("no git on this machine\n")
    assert commit_of(tmp_path) == COMMIT
    assert (
        own_name("/home/me/runs/sft/checkpoints/step_00000062/model") == "sft/checkpoints/step_00000062/model"
    )
