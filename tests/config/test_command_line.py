"""Every mistake in a configuration file or on a command line is one line: the key, what was found, what was
expected."""

import pytest

from megatron_sd.config.command_line import parse
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError

REQUIRED = ["--run_dir=r", "--model.path=m", "--data.train=q.jsonl", "--retriever.corpus=c"]
FILE = "run_dir: r\nmodel: {path: m}\ndata: {train: q}\nretriever: {corpus: c}\n"


def message(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text\n", "found a str, expected a YAML mapping"),
        ("- a\n- b\n", "found a list, expected a YAML mapping"),
        ("", "found nothing, expected a YAML mapping"),
        ("run_dir: r\nmodel: [1\n", "run.yaml:3 is no YAML: "),
        (FILE.replace("retriever", "retreiver"), "retreiver: unknown key; did you mean retriever?"),
        (FILE + "learning_rate: 1\n", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        (
            FILE + "rollout: {nonsense: 1}\n",
            "rollout.nonsense: unknown key; expected one of questions_per_step, group_size",
        ),
        (FILE + "rollout:\n", "rollout: found null, expected a section with questions_per_step, group_size"),
        (
            FILE + "distill: {block: shufled}\n",
            "distill.block: found 'shufled', expected one of paper, leave_one_out, ",
        ),
        (FILE + "distill: {block: leave_one_in}\n", "; did you mean leave_one_out?"),
        (FILE + "distill: {teacher: eta}\n", "expected one of live, ema, frozen, other; did you mean ema?"),
        (FILE + "distill: {ema_decay: 1.5}\n", "distill.ema_decay: found 1.5, expected between 0 and 1"),
        (FILE + "distill: {alpha: 0.5}\n", "distill.alpha: found 0.5, expected a section with mode, value"),
        (FILE + "rollout: {group_size: null}\n", "rollout.group_size: found null, expected int"),
        (FILE + "distill: {top_k: many}\n", "distill.top_k: found 'many', expected int or null"),
    ],
)
def test_a_broken_file(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert expected in message([f"--config={path}"])
    assert expected in message(["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=nowhere.yaml"], "--config: found no file at nowhere.yaml, expected a YAML file"),
        (["--config=."], "--config: found a directory at ., expected a YAML file"),
        (["--config"], "--config: found nothing after it"),
        ([*REQUIRED, "extra"], "found 'extra' on the command line, expected --key=value"),
        ([*REQUIRED, "--nope=1"], "nope: unknown key; expected one of run_dir, model, data"),
        (
            [*REQUIRED, "--model.dtype=fp16"],
            "model.dtype: found 'fp16', expected one of auto, float32, bfloat16",
        ),
        ([*REQUIRED, "--num-steps=3"], "num-steps: unknown key; did you mean num_steps?"),
        ([*REQUIRED, "--num_steps"], "num_steps: found nothing, expected int"),
        ([*REQUIRED, "--rollout=3"], "rollout: found '3', expected a section with"),
        (
            [*REQUIRED, "--protocol.search_tags=<s>"],
            "protocol.search_tags: found '<s>', expected [str, str] or null",
        ),
        ([*REQUIRED, "--rollout.temperature=nan"], "rollout.temperature: found"),
        (
            [*REQUIRED, "--rollout.max_concurrent_sequences=0"],
            "rollout.max_concurrent_sequences: found 0, expected 1 or more",
        ),
        (
            [*REQUIRED, "--optimizer.betas=[0.9, 2.0]"],
            "optimizer.betas: found (0.9, 2.0), expected between 0 and 1",
        ),
        ([*REQUIRED, "--checkpoint.every=-1"], "checkpoint.every: found -1, expected 0 or more"),
    ],
)
def test_a_broken_command_line(arguments, expected):
    assert expected in message(arguments)


QDRANT = "expected a section with url, collection, vectors, deadline_s, device, token_file or null"


@pytest.mark.parametrize(
    ("text", "argument", "expected"),
    [
        ("{colection: c}", "colection=c", "retriever.qdrant.colection: unknown key; did you mean "),
        ("{device: gpu}", "device=gpu", "retriever.qdrant.device: found 'gpu', expected one of auto, cpu"),
        ("{deadline_s: x}", "deadline_s=x", "retriever.qdrant.deadline_s: found 'x', expected float"),
        ("{url: u}", "url=u", "missing from the configuration: retriever.qdrant.collection, retriever."),
        ("3", "=3", f"retriever.qdrant: found 3, {QDRANT}"),
    ],
)
def test_a_mistake_in_an_optional_section(tmp_path, text, argument, expected):
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: r\nmodel: {{path: m}}\ndata: {{train: q}}\nretriever: {{qdrant: {text}}}\n")
    assert message([f"--config={path}"]).startswith(expected)
    option = f"--retriever.qdrant{argument}" if argument.startswith("=") else f"--retriever.qdrant.{argument}"
    assert message([*REQUIRED[:3], option]).replace("'3'", "3").startswith(expected)


def test_a_ratio_that_cannot_be_measured_is_refused_before_the_run():
    """It would otherwise stop the run at the first measurement, after the warm-up."""
    assert "update.zero_stage: found 2, expected 3" in message([*REQUIRED, "--update.zero_stage=2"])
    assert load([*REQUIRED, "--update.zero_stage=2", "--distill.block=none"]).update.zero_stage == 2
    assert load([*REQUIRED, "--update.zero_stage=2", "--distill.measure_every=0"]).update.zero_stage == 2


def test_a_bool_needs_no_value():
    """`sd-search demo --fresh`."""
    for argv in (["--model.gradient_checkpointing"], ["--model.gradient_checkpointing", "--seed=1"]):
        assert load([*REQUIRED, *argv]).model.gradient_checkpointing is True
    for value in ("=false", " false"):
        assert load([*REQUIRED, *f"--checkpoint.resume{value}".split()]).checkpoint.resume is False


def test_no_argument_at_all_gives_the_defaults():
    from launch.demo import DemoConfig

    assert parse(DemoConfig, [], "sd-search demo") == DemoConfig()
