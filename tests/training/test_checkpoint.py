"""Saving and resuming the real policy, a world of one; two ranks are in test_ranks.py."""

import dataclasses
import errno
import json
import logging
import os
import resource
import signal
import subprocess
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.config import AlphaConfig
from megatron_sd.distributed.world import join_world
from megatron_sd.durable import directories
from megatron_sd.errors import CheckpointError
from megatron_sd.training.state import checkpoint, writing
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.state.tensor_file import write_tensors
from tests.rank_programs.update_steps import Order, batch_of, full_parameters, take_steps
from tests.training.fakes import make_config, make_policy, write_model

STATE = {"alpha": {"unit_ratio": None}}


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("checkpoint") / "model")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def policy(world, model_path):
    """After one step, so that the optimiser has a state to save."""
    policy = make_policy(make_config(model_path), world)
    train(policy)
    return policy


def train(policy):
    """One step."""
    batch = batch_of(Order(model=""), policy.world, "token")
    for microbatch in batch:
        policy.accumulate(
            microbatch, batch.totals, TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
        )
    policy.step()


def keeper(root, model_path, world, **changes):
    return Checkpoints(
        root, dataclasses.replace(make_config(model_path), **changes), world, corpus_version="c"
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"distill": {"alpha": AlphaConfig(mode="grad_ratio", warmup_steps=1), "measure_every": 2}},
        {"model": {"dtype": "bfloat16"}},
        {"update": {"zero_stage": 1}, "distill": {"measure_every": 0}},
        {"update": {"zero_stage": 0}, "distill": {"measure_every": 0}, "kl_weight": 0.1},
    ],
)
def test_resumed_is_bit_identical(world, model_path, tmp_path, config):
    """4 steps straight against 2, stop, 2 more: parameters and metrics, with alpha's state, the optimiser's
    and warm-up."""
    config = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 3}} | config
    straight = Order(model=str(model_path), steps=4, config=config)
    parts = [dataclasses.replace(straight, steps=steps, checkpoint=str(tmp_path / "ck")) for steps in (2, 4)]
    expected, first, second = (take_steps(order, world) for order in (straight, *parts))
    assert first["history"] + second["history"] == expected["history"]
    assert second["version"] == 4
    for name, parameter in expected["parameters"].items():
        assert torch.equal(second["parameters"][name], parameter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("file_bytes", [256 << 20, 10_000])
def test_the_model_in_a_checkpoint_is_a_hugging_face_directory(
    world, tmp_path, monkeypatch, tied, file_bytes
):
    monkeypatch.setattr(checkpoint, "LEAST_FILE_BYTES", file_bytes)
    monkeypatch.setattr(checkpoint, "MODEL_FILE_BYTES", file_bytes)
    path = write_model(tmp_path / "model", tied=tied)
    (path / "tokenizer.json").write_text("{}")
    policy = make_policy(make_config(path), world)
    keeper(tmp_path / "ck", path, world).save(policy, step=7, state=STATE)
    saved = tmp_path / "ck" / "step_00000007" / "model"
    names = {file.name for file in saved.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert ("model.safetensors" in names) == (file_bytes > 10_000)
    assert ("model.safetensors.index.json" in names) == (file_bytes == 10_000)
    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = full_parameters(policy)
    assert {name for name, _ in model.named_parameters()} == set(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_keeps_the_newest_and_leaves_a_saved_step_alone(world, model_path, policy, tmp_path):
    checkpoints = keeper(tmp_path, model_path, world)
    for step in (1, 2, 3):
        checkpoints.save(policy, step=step, state=STATE)
    assert [path.name for path in directories.committed(tmp_path)] == ["step_00000003", "step_00000002"]
    stamp = (tmp_path / "step_00000003" / "manifest.json").stat().st_mtime_ns
    checkpoints.save(policy, step=3, state=STATE)
    assert (tmp_path / "step_00000003" / "manifest.json").stat().st_mtime_ns == stamp


def test_no_checkpoint_is_a_fresh_start(world, model_path, policy, tmp_path):
    assert keeper(tmp_path / "none", model_path, world).load(policy) is None


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
    world, model_path, policy, tmp_path, caplog
):
    checkpoints = keeper(tmp_path, model_path, world)
    for step in (1, 2):
        checkpoints.save(policy, step=step, state={"alpha": {"unit_ratio": float(step)}})
    weights = tmp_path / "step_00000002" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.ERROR):
        assert checkpoints.load(policy) == {"alpha": {"unit_ratio": 1.0}, "step": 1}
    assert "step_00000002 does not verify: model/model.safetensors does not match its checksum" in caplog.text
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002.broken"]
    (tmp_path / "step_00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints under .* verifies"):
        checkpoints.load(policy)


def test_another_run_is_refused(world, model_path, policy, tmp_path):
    keeper(tmp_path, model_path, world).save(policy, step=1, state=STATE)
    # longer is the same run
    assert keeper(tmp_path, model_path, world, num_steps=999).load(policy)["step"] == 1
    with pytest.raises(CheckpointError, match="belongs to another run: seed was 0 and is now 5; restore"):
        keeper(tmp_path, model_path, world, seed=5).load(policy)
    changed = dataclasses.replace(make_config(model_path).rollout, group_size=9)
    with pytest.raises(
        CheckpointError, match="run: seed was 0 and is now 5; rollout.group_size was 5 and is now 9; restore"
    ):
        keeper(tmp_path, model_path, world, seed=5, rollout=changed).load(policy)
    with pytest.raises(CheckpointError, match="corpus_version was 'c' and is now 'd'"):
        Checkpoints(tmp_path, make_config(model_path), world, corpus_version="d").load(policy)
    saved = json.loads((tmp_path / "step_00000001" / "state.json").read_text())
    with pytest.raises(CheckpointError, match="has format 1, expected 2"):
        keeper(tmp_path, model_path, world)._check_same_run({**saved, "format": 1}, tmp_path)


def test_another_model_is_refused_with_the_parameters_that_differ(world, policy, tmp_path):
    path = write_model(tmp_path / "model", tied=False, intermediate_size=40)
    other = make_policy(make_config(path), world)
    before = full_parameters(other)
    write_tensors(tmp_path / "rank_00000.safetensors", *policy.trained_state().file())
    with pytest.raises(
        CheckpointError, match="another model's .7 parameters differ.: lm_head.weight: no elements in"
    ) as error:
        other.trained_state().read([tmp_path / "rank_00000.safetensors"])
    assert "model.layers.0.mlp.down_proj.weight: 1536 elements in the checkpoint, 1280 in the model" in str(
        error.value
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in full_parameters(other).items())


def test_a_missing_ranks_file_is_missed(policy, tmp_path):
    write_tensors(tmp_path / "rank_00000.safetensors", *policy.trained_state().file())
    path = tmp_path / "rank_00000.safetensors"
    with pytest.raises(
        CheckpointError, match="files hold .* of the elements .0, .*: a rank's file is missing or there twice"
    ):
        policy.trained_state().read([path, path])
    with pytest.raises(CheckpointError, match="parameters differ"):
        policy.trained_state().read([])
    policy.trained_state().read([path])
    write_tensors(tmp_path / "again", *policy.trained_state().file())
    expected, found = load_file(path), load_file(tmp_path / "again")
    assert len(expected) > 30 and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_latest_names_the_newest_and_a_failed_tidying_up_does_no_harm(
    world, model_path, policy, tmp_path, monkeypatch, caplog
):
    checkpoints = keeper(tmp_path, model_path, world)
    for step in (1, 2, 3):
        checkpoints.save(policy, step=step, state=STATE)
    assert (tmp_path / "latest").read_text() == "step_00000003\n"

    replace = os.replace

    def broken(source, target):
        if target.name == "latest":
            raise OSError(errno.EIO, os.strerror(errno.EIO), "latest")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with caplog.at_level(logging.ERROR):
        checkpoints.save(policy, step=4, state=STATE)
    assert "is committed, but what it replaces could not be tidied up" in caplog.text
    monkeypatch.undo()
    assert checkpoints.load(policy)["step"] == 4
    checkpoints.save(policy, step=5, state=STATE)
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005"]


def test_without_resume_existing_checkpoints_are_not_overwritten(world, model_path, policy, tmp_path):
    config = make_config(model_path)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume=False))
    checkpoints = Checkpoints(tmp_path, config, world, corpus_version="c")
    checkpoints.refuse_when_resume_is_off()
    checkpoints.save(policy, step=1, state=STATE)
    with pytest.raises(CheckpointError, match="holds checkpoints although checkpoint.resume is off"):
        checkpoints.refuse_when_resume_is_off()


@pytest.fixture
def limit_file_size():
    """The operating system refuses to let any file of this process grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("num_bytes", "file"), [(100_000, "rank_00000.safetensors"), (1_000, "rank_00000.safetensors")]
)
def test_a_write_that_fails_leaves_the_last_checkpoint(
    world, model_path, policy, tmp_path, limit_file_size, num_bytes, file
):
    checkpoints = keeper(tmp_path, model_path, world)
    checkpoints.save(policy, step=1, state=STATE)
    limit_file_size(num_bytes)
    with pytest.raises(
        CheckpointError, match=f"could not write .*step_00000002.tmp .*{file}.* MiB are free on its disk"
    ):
        checkpoints.save(policy, step=2, state=STATE)
    limit_file_size(resource.RLIM_INFINITY)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert checkpoints.load(policy)["step"] == 1
    checkpoints.save(policy, step=2, state=STATE)
    assert directories.find_damage(tmp_path / "step_00000002") is None


@pytest.fixture
def slow_disk(monkeypatch):
    """Files are written when the event is set."""
    may_write, write = threading.Event(), writing.write_tensors

    def written_later(path, tensors, metadata):
        assert may_write.wait(60)
        return write(path, tensors, metadata)

    monkeypatch.setattr(writing, "write_tensors", written_later)
    yield may_write
    may_write.set()


def in_background(root, model_path, world):
    config = make_config(model_path)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, background=True))
    return Checkpoints(root, config, world, corpus_version="c")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_the_background_holds_what_was_saved(world, model_path, tmp_path, slow_disk, dtype):
    """Not what the next steps made of it while it was written; and it is there when it is whole."""
    policy = make_policy(make_config(model_path, model={"dtype": dtype}), world)
    checkpoints = in_background(tmp_path, model_path, world)
    train(policy)
    saved, moments = full_parameters(policy), policy.trained_state().file(copy=True).tensors
    checkpoints.save(policy, step=1, state=STATE, wait=False)
    train(policy)
    assert any(not torch.equal(saved[name], tensor) for name, tensor in full_parameters(policy).items())
    checkpoints.settle(wait=False)
    assert names(tmp_path) == ["step_00000001.tmp"]
    slow_disk.set()
    checkpoints.settle()
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert directories.find_damage(tmp_path / "step_00000001") is None
    assert checkpoints.load(policy)["step"] == 1
    for name, tensor in full_parameters(policy).items():
        assert torch.equal(tensor, saved[name]), name
    for name, tensor in policy.trained_state().file().tensors.items():
        assert torch.equal(tensor, moments[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step_00000001" / "model", dtype=dtype)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.named_parameters())


def test_the_next_save_and_a_look_wait_for_the_one_before(world, model_path, policy, tmp_path, slow_disk):
    checkpoints = in_background(tmp_path, model_path, world)
    checkpoints.save(policy, step=1, state=STATE, wait=False)
    threading.Timer(0.5, slow_disk.set).start()
    checkpoints.save(policy, step=2, state=STATE, wait=False)
    assert checkpoints.newest_step() == 2
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]
    checkpoints.save(policy, step=3, state=STATE)  # the end of a run
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_a_rank_that_ends_otherwise_leaves_nothing_half_written(
    world, model_path, policy, tmp_path, slow_disk
):
    checkpoints = in_background(tmp_path, model_path, world)
    checkpoints.save(policy, step=1, state=STATE, wait=False)
    assert names(tmp_path) == ["step_00000001.tmp"]
    slow_disk.set()
    checkpoints.abandon()
    assert names(tmp_path) == []
    checkpoints.abandon()
    checkpoints.save(policy, step=1, state=STATE)
    checkpoints.abandon()
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_what_fails_in_the_background_is_raised_at_the_next_step(
    world, model_path, policy, tmp_path, limit_file_size
):
    checkpoints = in_background(tmp_path, model_path, world)
    checkpoints.save(policy, step=1, state=STATE)
    limit_file_size(2_000)  # enough for what the first rank writes at once
    checkpoints.save(policy, step=2, state={}, wait=False)
    with pytest.raises(CheckpointError, match="could not write .*step_00000002.tmp .*rank_00000.safetensors"):
        checkpoints.settle()
    limit_file_size(resource.RLIM_INFINITY)
    assert names(tmp_path) == ["latest", "step_00000001"]
    checkpoints.settle()  # nothing is left of it
    assert checkpoints.load(policy)["step"] == 1


WRITES = ["_prepare", "_save_model", "_save_state"]


@pytest.mark.parametrize("where", [*WRITES, "write_tensors", "copyfile", "fsync", "rename"])
def test_disk_full_at_any_write(world, model_path, policy, tmp_path, monkeypatch, where):
    checkpoints = keeper(tmp_path, model_path, world)
    checkpoints.save(policy, step=1, state=STATE)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    owners = {
        "write_tensors": writing,
        "copyfile": checkpoint.shutil,
        "fsync": directories.os,
        "rename": directories.os,
    }
    monkeypatch.setattr(owners.get(where, checkpoints), where, full)
    with pytest.raises(CheckpointError, match="No space left on device.*some/file.*make room and resume"):
        checkpoints.save(policy, step=2, state=STATE)
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert checkpoints.load(policy)["step"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(world, model_path, policy, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode()}")
    try:
        checkpoints = keeper(tmp_path, model_path, world)
        checkpoints.save(policy, step=1, state=STATE)
        with pytest.raises(CheckpointError, match="MiB are free on its disk: make room and resume"):
            checkpoints.save(policy, step=2, state=STATE)
        assert names(tmp_path) == ["latest", "step_00000001"]
        assert checkpoints.load(policy)["step"] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
