"""Functions of the user's own: found, tried before a run, watched in it, and part of what a run is."""

import textwrap

import pytest

from megatron_sd.algorithm.advantages.table import ESTIMATOR_SEAM
from megatron_sd.algorithm.blocks import BLOCK_SEAM, paper_block
from megatron_sd.algorithm.samples import GATE_SEAM
from megatron_sd.config import AdvantageConfig, Config, ProtocolConfig, RetrieverConfig, RewardConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.load import dump, load
from megatron_sd.config.own_function import OwnFunction, own_functions
from megatron_sd.errors import ConfigError, OwnCodeError
from megatron_sd.own_code import loading, seam
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.loading import digests
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.rewards import reward
from megatron_sd.search.rewards.reward import own_scores, score_rollout

NEEDED = ["--run_dir=r", "--model.path=m", "--data.train=q", "--retriever.corpus=c"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory, and names a function of it."""
    monkeypatch.chdir(tmp_path)
    reward._own_score.cache_clear()  # of the same names in another directory
    count = iter(range(100))

    def named(source, function="f", file=None):
        name = file or f"own_{next(count)}.py"
        (tmp_path / name).write_text(textwrap.dedent(source))
        return OwnFunction(f"{name}:{function}")

    return named


def scored(name, index=0):
    group = example_groups()[0]
    return score_rollout(group.rollouts[index], group, RewardConfig(own={"mine": name})).own["mine"]


def test_a_name_of_ours_is_ours(write):
    assert BLOCK_SEAM.choose("paper") is paper_block


def test_a_function_is_called_with_the_records_and_its_module_is_shared(write):
    name = write(
        """
        from dataclasses import dataclass
        @dataclass
        class Seen:
            searches: int
        def f(rollout, question):
            return Seen(len(rollout.queries)).searches + len(question.golden_answers) / 4
        def g(rollout, question):
            return float(rollout.answer == "Dava Sul")
        """
    )
    assert scored(name) == 1.25
    other = OwnFunction(f"{name.place}:g")
    assert [scored(other, index) for index in range(2)] == [1.0, 0.0]
    assert loading.load(name, "k", "f", 2).__globals__ is loading.load(other, "k", "g", 2).__globals__


def test_a_module_is_looked_for_in_the_working_directory(write):
    write("def f(context): return len(context.group.usable) > 1", file="own_module_here.py")
    gate = GATE_SEAM.choose(OwnFunction("own_module_here:f"))
    assert gate(*GATE_SEAM.example()) is True


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def g(rollout, question): return 1.0", "own_0.py has no function f; expected one of g$"),
        ("def ff(rollout, question): return 1.0", "did you mean ff?"),
        (
            "def f(rollout): return 1.0",
            r"own_0.py:f\(rollout\) cannot be called so .*, expected score\(rollout",
        ),
        (
            "def f(r, q): return 1 / 0",
            r"own_0.py:f raised ZeroDivisionError: .*own_0.py:1\); it was tried on an example",
        ),
        ("def f(r, q): return float('nan')", "returned nan, expected score"),
        ("def f(r, q): return float('inf')", "returned inf, expected score"),
        ("def f(r, q): return 'much'", r"returned 'much' \(str\), expected score"),
        ("def f(r, q): return True", r"returned True \(bool\), expected score"),
        ("def f(r, q): return None", r"returned None \(NoneType\), expected score"),
        (
            "n = []\ndef f(r, q):\n    n.append(1)\n    return len(n)",
            "returned 1 and then 2 for the same .*pure",
        ),
        ("def f(r, q):\n    while True: print('x' * 1000)", "printed more than 65536 characters in one call"),
        ("def f(r, q):\n    raise SystemExit(0)", "raised SystemExit"),
        ("def f(r, q) return 1", "own_0.py raised SyntaxError: .*expected a module that can be imported"),
        ("import nowhere_at_all", "raised ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_one_that_does_not_fit_is_refused_before_the_run(write, source, words):
    with pytest.raises(ConfigError, match=words) as caught:
        own_scores(RewardConfig(own={"mine": write(source)}))
    assert str(caught.value).startswith("reward.own.mine: own_0.py")


def test_one_that_never_returns_is_named_with_the_line_it_is_at(write, monkeypatch):
    monkeypatch.setattr(seam, "MOST_SECONDS", 0.2)
    name = write("import time\ndef f(r, q):\n    while True:\n        time.sleep(0.01)")
    with pytest.raises(ConfigError, match=r"own_0.py:f has not returned after 0.2 s \(at .*own_0.py:[34]\)"):
        own_scores(RewardConfig(own={"mine": name}))


def test_one_that_fails_later_says_so(write):
    """Not on the example: its answer is another."""
    name = write("def f(r, q):\n    return {}['late'] if r.answer == 'Nira Vo' else 1.0")
    assert scored(name) == 1.0
    with pytest.raises(OwnCodeError, match="reward.own.mine: own_0.py:f raised KeyError: 'late'"):
        scored(name, index=1)


def test_what_is_printed_is_handed_on(write, capsys):
    assert scored(write("def f(r, q):\n    print('looked at', r.index)\n    return 0.5")) == 0.5
    assert capsys.readouterr().out.count("looked at 0\n") == 3  # twice on the example


def test_a_file_that_is_not_there_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match=f"reward.answer: found no file at {tmp_path}/none.py"):
        own_scores(RewardConfig(answer=OwnFunction("none.py:f")))


def test_an_answers_score_is_the_reward(write):
    name = write("def f(rollout, question): return 0.25 * len(rollout.turns)")
    group = example_groups()[0]
    found = score_rollout(group.rollouts[0], group, RewardConfig(answer=name, format_weight=0.1))
    assert (found.reward, found.em, found.figures["reward"]) == (0.6, 1.0, 0.6)


def test_own_scores_are_terms_of_the_advantage(write):
    groups = [example_groups()[0]]
    name = write("def f(rollout, question): return float(rollout.index)")
    own = RewardConfig(own={"late": name})
    rollouts = tuple(
        type(r)(**{**r.__dict__, "scores": score_rollout(r, groups[0], own)}) for r in groups[0].rollouts
    )
    group = type(groups[0])(question=groups[0].question, rollouts=rollouts)
    estimate = ESTIMATOR_SEAM.choose("dr_grpo")
    # rewards 1 + 0.5 * 0 and 0 + 0.5 * 1
    assert estimate([group], AdvantageConfig(terms={"reward": 1.0, "late": 0.5})) == [
        [(0.25, 0.25), (-0.25, -0.25)]
    ]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[[(1.0, 2.0)] * 2] * 2", None),
        ("[[(1.0,)] * 2] * 2", r"numbers for \[\[1, 1\], \[1, 1\]\] turns instead of \[\[2, 2\], \[2, 2\]\]"),
        ("[[(1.0, float('nan'))] * 2] * 2", "returned nan"),
        ("3", r"returned 3 \(int\)"),
        ("__import__('numpy').random.rand(2, 2, 2)", "expected a pure function"),
        ("__import__('numpy').full((2, 2, 2), 1.0)", ...),
        ("[1.0, 2.0]", "a list of other things than lists of numbers"),
    ],
)
def test_an_estimator_gives_every_turn_a_number(write, returned, words):
    name = write(f"def f(groups, config): return {returned}")
    if words in (None, ...):
        own = ESTIMATOR_SEAM.choose(name)
        assert tuple(own(example_groups(), AdvantageConfig())[0][0]) == (
            (1.0, 2.0) if words is None else (1.0, 1.0)
        )
        return
    with pytest.raises(ConfigError, match=words):
        ESTIMATOR_SEAM.choose(name)


def test_blocks_gates_and_protocols_have_their_types(write):
    with pytest.raises(
        ConfigError, match=r"distill.block: own_0.py:f returned None \(NoneType\), expected block"
    ):
        BLOCK_SEAM.choose(write("def f(context): pass"))
    with pytest.raises(ConfigError, match=r"distill.gate: own_1.py:f returned 1 \(int\), expected gate"):
        GATE_SEAM.choose(write("def f(context): return 1"))
    with pytest.raises(
        ConfigError, match=r"protocol.preset: own_2.py:f returned 'x' \(str\), expected protocol"
    ):
        build_protocol(ProtocolConfig(preset=write("def f(): return 'x'")))


def test_the_command_line_takes_one_and_gives_it_back(write, tmp_path):
    config = load(
        [*NEEDED, "--reward.answer=a.py:f", "--reward.own={b: pack.mod:g}", "--distill.block=c.py:h"]
    )
    assert dict(own_functions(config)) == {
        "distill.block": "c.py:h",
        "reward.answer": "a.py:f",
        "reward.own.b": "pack.mod:g",
    }
    (tmp_path / "again.yaml").write_text(dump(config))
    assert parse(Config, [f"--config={tmp_path / 'again.yaml'}"], "sd-search train") == config


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--distill.block=shufled", "did you mean shuffled?"),
        (
            "--distill.block=x",
            "expected one of paper, .* or a function of your own .module:function or file.py:function",
        ),
        ("--distill.block=x.py:", "distill.block: found 'x.py:', expected"),
        ("--reward.own={em: x.py:f}", "reward.own: found the name 'em'"),
        ("--reward.own={a-b: x.py:f}", "reward.own: found the name 'a-b'"),
        ("--reward.own={a: nope}", "reward.own: found 'nope', expected module:function or file.py:function"),
        ("--advantage.terms={mine: 1.0}", "advantage.terms: found mine, which nobody scores"),
        ("--retriever.function=x.py:f", "retriever.corpus, .*: found corpus and function, expected one"),
    ],
)
def test_a_mistake_in_a_name_is_told(option, words):
    with pytest.raises(ConfigError, match=words):
        load([*NEEDED, option])


def test_the_files_content_is_part_of_the_run(write, tmp_path):
    name = write("def f(r, q): return 1.0")
    before = digests(RewardConfig(answer=name))
    assert list(before) == ["answer (own_0.py:f)"]
    (tmp_path / "own_0.py").write_text("def f(r, q): return 2.0")
    assert digests(RewardConfig(answer=name)) != before
    assert digests(RetrieverConfig(corpus="c")) == {}
