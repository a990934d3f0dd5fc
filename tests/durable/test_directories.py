"""Directories that exist whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from megatron_sd.durable import directories


def write(root, step, content="weights"):
    directory = directories.directory_of(root, step)
    staging = directories.staging_of(directory)
    (staging / "model").mkdir(parents=True)
    (staging / "model" / "a.bin").write_text(content)
    (staging / "state.json").write_text("{}")
    directories.commit(staging, directory, directories.seal(staging))
    return directory


def test_committed_directories_verify_and_are_found_newest_first(tmp_path):
    written = [write(tmp_path, step) for step in (4, 100, 20)]
    assert directories.committed(tmp_path) == [written[1], written[2], written[0]]
    assert all(directories.find_damage(directory) is None for directory in written)
    manifest = json.loads((written[0] / "manifest.json").read_text())["files"]
    assert manifest["model/a.bin"] == {
        "bytes": 7,
        "sha256": directories.sha256(written[0] / "model" / "a.bin"),
    }
    assert set(manifest) == {"model/a.bin", "state.json"}
    assert directories.committed(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "model" / "a.bin").write_text("weightz"), "model/a.bin does not match its checksum"),
        (lambda d: (d / "model" / "a.bin").write_text("weight"), "model/a.bin has 6 bytes, expected 7"),
        (lambda d: (d / "state.json").unlink(), "state.json is missing"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda d: (d / "manifest.json").write_text('{"files": '), "manifest.json cannot be read"),
        (
            lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text() + " "),
            "does not match its own checksum",
        ),
        (
            lambda d: (d / "manifest.json").write_text('{"files": {}, "sha256": ""}'),
            "manifest.json does not match its own",
        ),
        (lambda d: (d / "model" / "b.bin").touch(), "model/b.bin is not in manifest.json"),
        (
            lambda d: ((d / "state.json").unlink(), (d / "state.json").symlink_to("/etc/hostname")),
            "state.json is missing",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    directory = write(tmp_path, 1)
    damage(directory)
    assert words in directories.find_damage(directory)


def test_files_that_their_writers_sealed_are_not_read_again(tmp_path):
    directory = write(tmp_path, 1)
    sealed = json.loads((directory / "manifest.json").read_text())["files"]
    assert directories.seal(directory, ["model/a.bin"]) == {"state.json": sealed["state.json"]}
    assert directories.seal(directory, sealed) == {}


def test_shares_cover_every_file(tmp_path):
    directory = write(tmp_path, 1)
    (directory / "state.json").write_text("[]")
    assert sorted(directories.find_damage(directory, (rank, 2)) is None for rank in range(2)) == [False, True]


def test_prune_clear_and_set_aside(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step_00000004.tmp" / "model").mkdir(parents=True)
    directories.clear_staging(tmp_path)
    directories.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert directories.set_aside(directories.directory_of(tmp_path, 3)).name == "step_00000003.broken"
    assert [path.name for path in directories.committed(tmp_path)] == ["step_00000002"]


def test_killed_at_any_point_leaves_whole_directories_only(tmp_path):
    """A process that commits checkpoints in a loop is killed at 12 different moments: whatever has its
    final name verifies."""
    program = (
        "import sys, pathlib, tests.durable.test_directories as t\n"
        "root = pathlib.Path(sys.argv[1]); step = 0\n"
        "print('go', flush=True)\n"
        "while True:\n    step += 1; t.write(root, step, 'x' * 200000)\n"
    )
    seen = 0
    for attempt in range(12):
        root = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, env=os.environ
        )
        process.stdout.readline()
        try:
            process.wait(0.01 + 0.006 * attempt)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        whole = directories.committed(root)
        seen += len(whole)
        assert all(directories.find_damage(directory) is None for directory in whole)
    assert seen > 0
