"""Which changes a run that goes on may have: knobs freely, its plan when asked for, its identity never."""

import dataclasses
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from megatron_sd.config import RerankConfig, RewardJudgeConfig, WebSearchConfig
from megatron_sd.config.load import load
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import DataError
from megatron_sd.training.state import identity
from megatron_sd.training.state.identity import (
    KNOBS,
    PLAN,
    check_same_model,
    contents_of,
    differences,
    kind_of,
    model_digest,
    run_identity,
    why_refused,
)

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    # 32 MiB, of which samples are read
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(256)) * (1 << 17))
    (tmp_path / "questions.jsonl").write_text('{"id": "1"}\n')
    return tmp_path


def configured(paths, *overrides):
    required = [
        f"--run_dir={paths}/run",
        f"--model.path={paths}/model",
        f"--data.train={paths}/questions.jsonl",
    ]
    return load([*required, "--retriever.corpus=c", *overrides])


def saved(config, **changes):
    state = {
        "step": 7,
        "config": dataclasses.asdict(config),
        "corpus_version": "v",
        "contents": contents_of(config),
    }
    return json.loads(json.dumps(state)) | changes


def found(state, config, corpus_version="v"):
    return differences(state, config, corpus_version, contents_of(config))


@pytest.mark.parametrize(
    "override",
    [
        "--update.max_microbatch_tokens=99", "--rollout.max_concurrent_sequences=3", "--model.gradient_checkpointing=true",
        "--update.offload_optimizer=cpu", "--num_steps=999", "--log.eval_every=3", "--model.attention=eager",
    ],
)  # fmt: skip
def test_a_knob_may_always_be_another(paths, override):
    assert not found(saved(configured(paths)), configured(paths, override))


def test_a_key_that_was_renamed_is_read_under_its_name_of_today(paths):
    state = saved(configured(paths))
    del state["config"]["advantage"]
    state["config"]["policy_loss"]["advantage"] = "group"
    assert not found(state, configured(paths))
    change = found(state, configured(paths, "--advantage.estimator=rloo"))
    assert [str(c) for c in change.plan] == ["advantage.estimator was 'grpo' and is now 'rloo'"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--optimizer.learning_rate=2e-6", "optimizer.learning_rate was 1e-06 and is now 2e-06"),
        ("--rollout.questions_per_step=8", "rollout.questions_per_step was 256 and is now 8"),
        ("--policy_loss.kl_weight=0", "policy_loss.kl_weight was 0.001 and is now 0.0"),
        ("--distill.alpha.value=0.1", "distill.alpha.value was 0.001 and is now 0.1"),
        ("--optimizer.schedule=cosine", "optimizer.schedule was 'constant' and is now 'cosine'"),
    ],
)
def test_the_plan_may_be_changed_on_purpose_and_each_change_is_recorded(paths, override, line):
    change = found(saved(configured(paths)), configured(paths, override))
    assert change.identity == () and [str(c) for c in change.plan] == [line] and change.plan[0].step == 7
    assert f"has another plan: {line}; restore it, or go on" in why_refused(change, allow_changes=False)
    assert why_refused(change, allow_changes=True) is None


@pytest.mark.parametrize(
    ("then", "now"), [("cosine", "cosine"), ("constant", "cosine"), ("linear", "constant")]
)
def test_the_number_of_steps_is_of_the_plan_where_the_learning_rate_decays_towards_the_last(paths, then, now):
    state = saved(configured(paths, f"--optimizer.schedule={then}", "--num_steps=100"))
    change = found(state, configured(paths, f"--optimizer.schedule={now}", "--num_steps=120"))
    assert "num_steps was 100 and is now 120" in map(str, change.plan) and change.identity == ()
    assert "num_steps was 100 and is now 120" in why_refused(change, allow_changes=False)
    assert why_refused(change, allow_changes=True) is None
    assert not found(state, configured(paths, f"--optimizer.schedule={then}", "--num_steps=100"))


def test_rollouts_banked_under_other_rates_are_of_another_plan(paths):
    """The bank's digest is of run_identity."""
    ways = [(schedule, steps) for schedule in ("constant", "cosine") for steps in (100, 120)]
    configs = [configured(paths, f"--optimizer.schedule={s}", f"--num_steps={n}") for s, n in ways]
    found = [run_identity(config, "v") for config in configs]
    assert found[0] == found[1] != found[2] != found[3] != found[1]


@pytest.mark.parametrize(
    "override", ["--seed=5", "--reward.answer=em", "--protocol.preset=compact", "--data.train_split=x"]
)
def test_identity_is_refused_whatever_is_allowed(paths, override):
    change = found(saved(configured(paths)), configured(paths, override))
    assert "belongs to another run" in why_refused(change, allow_changes=True)


def test_another_corpus_is_another_run(paths):
    assert (
        "corpus_version was 'v' and is now 'w'"
        in found(saved(configured(paths)), configured(paths), "w").identity[0]
    )


def test_everything_may_move_and_be_spelled_otherwise(paths, monkeypatch):
    state = saved(configured(paths))
    moved = paths.parent / "moved"
    paths.rename(moved)
    monkeypatch.chdir(moved)
    spelled = [
        "--run_dir=run",
        "--model.path=./model",
        "--data.train=questions.jsonl",
        "--retriever.corpus=elsewhere",
    ]
    assert not found(state, load(spelled))


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "questions.jsonl"])
def test_other_content_under_the_same_path_is_another_run(paths, name):
    """Of weights, where they differ everywhere, as trained ones do."""
    state = saved(configured(paths))
    path = paths / name
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    (line,) = found(state, configured(paths)).identity
    assert "the content of " + ("model" if "model" in name else "data.train") in line


def test_one_changed_line_in_a_large_questions_file_is_another_run(paths):
    path = paths / "questions.jsonl"
    path.write_text('{"id": "1"}\n' * 2_000_000)  # 24 MB
    state = saved(configured(paths))
    content = bytearray(path.read_bytes())
    content[9_000_007] ^= 1
    path.write_bytes(content)
    assert "the content of data.train" in found(state, configured(paths)).identity[0]


def test_a_key_that_did_not_exist_when_the_run_began_counts_as_its_default(paths):
    state = saved(configured(paths))
    del (
        state["contents"],
        state["config"]["rollout"]["max_query_bytes"],
        state["config"]["update"]["tensor_parallel_size"],
    )
    del state["config"]["optimizer"]["schedule"], state["config"]["optimizer"]["final_ratio"]
    assert not found(state, configured(paths))
    (change,) = found(state, configured(paths, "--rollout.max_query_bytes=5")).plan
    assert str(change) == "rollout.max_query_bytes was 4096 and is now 5"


def test_a_critic_is_part_of_the_plan_and_the_model_it_starts_from_of_the_identity(paths):
    gae = "--advantage.estimator=gae"
    (change,) = found(saved(configured(paths, gae)), configured(paths, gae, "--critic.lam=0.9")).plan
    assert str(change) == "critic.lam was 1.0 and is now 0.9"
    state = saved(configured(paths))
    del state["config"]["critic"], state["config"]["advantage"]["turn_rewards"]
    assert not found(state, configured(paths))

    own, other = shutil.copytree(paths / "model", paths / "own"), paths / "other"
    start = (gae, f"--critic.path={own}")
    shutil.copytree(own, other)
    assert not found(saved(configured(paths, *start)), configured(paths, gae, f"--critic.path={other}"))
    (other / "config.json").write_text("{ }")
    (line,) = found(
        saved(configured(paths, *start)), configured(paths, gae, f"--critic.path={other}")
    ).identity
    assert line.startswith("the content of critic is another")
    assert "critic" not in contents_of(configured(paths, f"--critic.path={own}"))  # nobody reads it


def test_every_prefix_names_a_key(paths):
    keys = [*run_identity(configured(paths), "v"), *_all_keys(dataclasses.asdict(configured(paths)))]
    judge = RewardJudgeConfig(url="u", model="m", store="s")
    web, rerank = WebSearchConfig(engine="serper", store="s"), RerankConfig(model="m")
    keys += [f"reward.judge.{field.name}" for field in dataclasses.fields(judge)]
    keys += [f"retriever.web.{field.name}" for field in dataclasses.fields(web)]
    keys += [f"retriever.search.rerank.{field.name}" for field in dataclasses.fields(rerank)]
    for prefix in (*KNOBS, *PLAN):
        assert any(key.startswith(prefix) for key in keys), prefix
    assert kind_of("data.train") == "knob" and kind_of("data.train_split") == "identity"


def _all_keys(tree, prefix=""):
    for key, value in tree.items():
        yield from _all_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def test_nodes_with_other_weights_under_one_path_are_refused(tmp_path, monkeypatch):
    """Each rank reads its own part of the files: together they would be no model."""
    model = shutil.copytree(START_POLICY, tmp_path / "model")
    other = shutil.copytree(START_POLICY, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    digests = [model_digest(directory) for directory in (model, model, other)]
    assert digests[0] == digests[1] != digests[2]
    world = lone_world()
    check_same_model(str(model), world, "model.path")
    monkeypatch.setattr(identity, "gather_objects", lambda _world, own: [own, *digests[1:]])
    with pytest.raises(
        DataError, match=r"model.path: .*model holds other files on rank 2 than on rank 0 \(1 of"
    ):
        check_same_model(str(model), world, "model.path")


def test_another_teacher_is_another_run_wherever_it_lies(paths):
    """Its path is a knob, its content is not; without one a run has no such content."""
    own = configured(paths)
    assert set(contents_of(own)) == {"model", "data.train"}
    (paths / "teacher").mkdir()
    (paths / "teacher/config.json").write_text("{}")
    options = ("--distill.teacher=other", f"--distill.teacher_path={paths}/teacher")
    state = saved(configured(paths, *options))
    shutil.copytree(paths / "teacher", paths / "moved")
    moved = configured(paths, options[0], f"--distill.teacher_path={paths}/moved")
    assert not found(state, moved)
    (paths / "moved/config.json").write_text('{"another": 1}')
    (line,) = found(state, moved).identity
    assert line.startswith("the content of teacher is another")
    assert "distill.teacher was 'other' and is now 'live'" in found(state, own).identity
