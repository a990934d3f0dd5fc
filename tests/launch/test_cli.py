"""The one command: what a typo prints, and that every entry exists."""

import pytest

from launch.cli import COMMANDS, find, main
from megatron_sd.errors import ConfigError


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_entry_function(name):
    assert callable(COMMANDS[name].load())


def test_two_word_commands_win_and_keep_their_arguments():
    command, rest = find(["data", "index", "--passages", "p"])
    assert command is COMMANDS["data index"]
    assert rest == ["--passages", "p"]


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("data indx", "data index")])
def test_a_typo_names_the_nearest_command(typed, meant, capsys):
    assert main(typed.split()) == 2
    assert f"did you mean `sd-search {meant}`?" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_configuration_errors_print_one_line_and_exit_2(capsys):
    assert main(["train", "--modle.path=x"]) == 2
    error = capsys.readouterr().err
    assert "modle.path: unknown key; did you mean model.path?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("typed", "expected"), [("data", "data import, data chunk"), ("--verson", "unknown command '--verson'")]
)
def test_half_a_command_names_the_choices_in_one_line(typed, expected, capsys):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "error", [NotADirectoryError(20, "Not a directory", "runs/x"), OSError(28, "No space left", "runs/x")]
)
def test_errors_of_the_file_system_are_one_line(error, capsys, monkeypatch):
    def fail(_argv):
        raise error

    monkeypatch.setattr("launch.local.main", fail)
    assert main(["train"]) == 1
    printed = capsys.readouterr().err
    assert "'runs/x'" in printed
    assert printed.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(_argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.main", interrupt)
    assert main(["train"]) == 130
    assert "from its last checkpoint with the same command" in capsys.readouterr().err


def test_a_world_is_not_written_over(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    assert main(["world", f"--output={tmp_path}"]) == 1
    assert f"remove {tmp_path}, or choose another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_the_demo_empties_no_directory_but_its_own(tmp_path, capsys):
    (tmp_path / "world").mkdir()
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", f"--output={tmp_path}"]) == 2
    assert "holds 'thesis.tex'" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert main(["demo", f"--output={tmp_path / 'thesis.tex'}"]) == 2
    assert main(["demo", "--num_ranks=0", f"--output={tmp_path / 'new'}"]) == 2


def test_a_run_directory_that_is_a_file_is_refused_before_the_model_is_read(tmp_path):
    import torch

    from megatron_sd.building.trainer import build_trainer
    from megatron_sd.distributed.world import World
    from tests.training.fakes import make_config

    (tmp_path / "run").write_text("")
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="run_dir: found a file at .*run, expected a directory"):
        build_trainer(make_config(tmp_path / "model"), alone)
