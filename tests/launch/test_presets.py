"""Methods by name."""

import pytest

from launch.local import main
from launch.presets import expand, presets
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError


def own(*argv):
    return load(expand(argv)[0])


TAUGHT = {"gkd", "hinton", "on_policy_distillation", "minillm"}  # by another model
KEEPS_POLICY_LOSS = {"sd_search", "igsd", "turnsight", "hca", "minillm"}
DISTILLED = (
    TAUGHT
    | KEEPS_POLICY_LOSS
    | {
        "opsd",
        "sdft",
        "sdft_paper_forward",
        "sdft_paper_reverse",
        "sdpo",
        "sdpo_trl",
    }
)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_method_reads_and_finds_the_usual_places(name):
    teacher = ["--distill.teacher_path=models/t"] if name in TAUGHT else []
    config = own("--as", name, "--model.path", "models/m", *teacher)
    assert (config.run_dir, config.model.path) == (f"runs/{name}", "models/m")
    assert (config.data.train, config.data.train_split) == ("data/questions.jsonl", "train")
    assert (config.distill.block != "none") == (name in DISTILLED)
    replaces = name in DISTILLED - KEEPS_POLICY_LOSS
    assert config.policy_loss.weight == (0.0 if replaces else 1.0)
    assert not replaces or config.distill.scope == "all"
    preset = presets()[name]
    assert preset.about and preset.differs


@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_a_method_that_another_model_teaches_asks_for_it(name):
    with pytest.raises(ConfigError) as caught:
        own("--as", name, "--model.path", "models/m")
    assert str(caught.value) == (
        "distill.teacher_path: found none with distill.teacher other, expected the directory of the model"
        " that teaches, as --distill.teacher_path DIRECTORY"
    )


def test_a_method_stands_above_files_and_below_single_options(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "run_dir: here\nmodel: {path: m}\ndata: {train: q}\nretriever: {corpus: c}\n"
        "advantage: {estimator: rloo}\npolicy_loss: {clip: 0.3}\n"
    )
    argv = ["--as=gigpo", f"--config={tmp_path}/mine.yaml", "--advantage.weight=0.5"]
    config = own(*argv)
    assert (config.run_dir, config.data.train) == ("here", "q")
    assert (config.advantage.estimator, config.advantage.weight) == ("gigpo", 0.5)
    assert config.policy_loss.clip == 0.2
    assert own("--config", f"{tmp_path}/mine.yaml", "--as", "dapo").policy_loss.clip_high == 0.28
    assert own(f"--config={tmp_path}/mine.yaml").advantage.estimator == "rloo"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--as=gigp0"], "--as: found 'gigp0'; did you mean gigpo?"),
        (["--as", "zzz"], "--as: found 'zzz'; expected one of autorefine, cispo, dapo"),
        (["--as", "rloo", "--as=gigpo"], "--as: found rloo and gigpo, expected one method"),
        (["--as"], "--as: found 'nothing'; "),
    ],
)
def test_a_name_that_is_none_is_told(argv, words):
    with pytest.raises(ConfigError) as caught:
        expand(argv)
    assert str(caught.value).startswith(words)


def test_the_methods_are_listed(capsys):
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(presets())
