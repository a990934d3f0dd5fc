"""The functions of docs/extending.md in a run, from the page itself, and one that fails in the middle of
one."""

import asyncio
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.observability.metrics_log import read_metrics
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.loading import load
from megatron_sd.retrieval.own import OwnRetriever
from tests.whole_runs.runs import on_the_world, parameters, run, start, without_clocks

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 20


def files_of_the_page():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for source in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        yield re.match(r"# (\w+\.py)\n", source)[1], source


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A directory with the page's files and nothing else."""
    directory = tmp_path_factory.mktemp("mine")
    for name, source in files_of_the_page():
        (directory / name).write_text(source, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=40, num_eval_questions=10))
    return output


def arguments(world, run_dir, *options):
    small = (
        "--num_steps=2",
        "--rollout.questions_per_step=4",
        "--distill.alpha.warmup_steps=0",
        "--log.eval_every=0",
    )
    return on_the_world(world, run_dir, *small, *options)


def function_of(page, name, num_arguments=2):
    return load(OwnFunction(f"{page}/{name}"), "key", "form", num_arguments)


def test_every_file_of_the_page_is_short():
    sources = dict(files_of_the_page())
    assert len(sources) == 8
    assert all(len(source.strip().splitlines()) <= MOST_LINES for source in sources.values())


def test_the_pages_functions_do_what_it_says(page):
    group = example_groups()[0]
    assert function_of(page, "numeric.py:numbers", 1)("about 1,200 or -3.5") == [1200.0, -3.5]
    assert function_of(page, "habits.py:thrift")(group.rollouts[0], group.question) == 0.5
    assert function_of(page, "credit.py:halved_before")([group], None) == [[[0.25, 0.5], [-0.25, -0.5]]]
    days = function_of(page, "days.py:days")
    assert days("1912-04-10, 1912-04-15", None) == "5" and "two dates" in days("soon", None).message
    protocol = function_of(page, "brackets.py:brackets", 0)()
    assert protocol.information_tags == ("<results>", "</results>")


def test_the_pages_retriever_finds_what_it_knows(page):
    retriever = OwnRetriever(OwnFunction(f"{page}/lookup.py:search"), deadline_s=5.0)
    found = asyncio.run(retriever.search(["who is Kalo Miren", "nobody"], 3))
    assert [[hit.passage.id for hit in hits] for hits in found] == [["Kalo Miren"], []]
    assert retriever.corpus_version.startswith("own-")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_on_the_pages_functions_goes_on_with_them_alone(page, world, tmp_path):
    own = (
        f"--reward.own={{thrift: {page}/habits.py:thrift, repeats: {page}/habits.py:repeats}}",
        "--advantage.terms={reward: 1.0, thrift: 0.1}",
        f"--distill.block={page}/blocks.py:query_hits",
        f"--distill.gate={page}/hard.py:hard",
        f"--advantage.estimator={page}/credit.py:halved_before",
    )
    run(2, arguments(world, tmp_path / "run", "--log.transcripts_every=1", *own))
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < metrics["reward/thrift"] < 1 for metrics in steps.values())
    assert " NOTHING NEW" in (tmp_path / "run" / "transcripts" / "step_00000001.txt").read_text()
    habits = page / "habits.py"
    habits.write_text(habits.read_text().replace("1 / (1 +", "2 / (1 +"))
    ranks = start(1, arguments(world, tmp_path / "run", "--num_steps=3", *own))
    assert ranks.wait() == [1]
    assert "the content of reward.own.thrift" in ranks.output()


@pytest.mark.slow
def test_what_was_trained_is_saved_when_a_function_fails(world, tmp_path):
    late = tmp_path / "late.py"
    late.write_text(
        "calls = []\n"
        "def late(rollout, question):\n"
        "    calls.append(1)\n"
        "    return 1.0 if len(calls) <= 30 else 1 / 0\n"
    )
    ranks = start(1, arguments(world, tmp_path / "run", f"--reward.own={{late: {late}:late}}"))
    assert ranks.wait() == [1]
    assert f"OwnCodeError: reward.own.late: {late}:late raised ZeroDivisionError" in ranks.output()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000001"]


@pytest.mark.slow
def test_a_run_killed_within_a_tools_call_resumes_bit_for_bit(world, tmp_path):
    """The start policy's searches are made a tool's calls; the tool ends the process in the second step."""
    (tmp_path / "tool.py").write_text(
        "import os, pathlib, signal\n"
        "calls = []\n"
        "def answers(text, call):\n"
        "    calls.append(text)\n"
        f"    kill = pathlib.Path('{tmp_path}/kill')\n"
        "    if len(calls) == 30 and kill.exists():\n"
        "        kill.unlink()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return f'{text} is {len(text)} letters long'\n"
    )
    tool = f'{{name: lookup, function: "{tmp_path}/tool.py:answers", tags: [<search>, </search>]}}'
    own = ("--protocol.search_tags=[<find>, </find>]", f"--protocol.tools=[{tool}]", "--checkpoint.every=1")
    run(1, arguments(world, tmp_path / "straight", *own))
    (tmp_path / "kill").touch()
    argv = arguments(world, tmp_path / "killed", *own)
    assert start(1, argv).wait() == [-signal.SIGKILL]
    assert list(read_metrics(tmp_path / "killed" / "metrics.jsonl")) == [1]
    assert "resumed from" in run(1, argv)
    expected, found = (parameters(tmp_path / side, "step_00000002") for side in ("straight", "killed"))
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    metrics = without_clocks(tmp_path / "straight")
    assert metrics == without_clocks(tmp_path / "killed")
    assert all(
        step["rollout/calls_lookup"] > 0 and step["rollout/searches"] == 0 for step in metrics.values()
    )
