"""`sd-search sample` and `sd-search select` with the committed small model: whole records, kills, other
settings."""

import dataclasses
import json
import shutil
from importlib.resources import files

import pytest

from data_prep.episodes.select import SelectConfig, check_same_form, select
from data_prep.episodes.selection import Selection
from data_prep.world.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world.world import WorldConfig
from eval.credit.transcripts import read_groups
from eval.sample import SampleConfig, sample
from eval.samples import read_lines
from launch import local
from launch.cli import main as command
from launch.programs import make_world
from megatron_sd.algorithm.samples import rollout_arrays
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.errors import ConfigError, DataError, RolloutError
from megatron_sd.records import StopReason
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.stored import StoredGroups
from megatron_sd.search.environment import Environment
from megatron_sd.search.presets import PRESETS
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import load_codec
from tests.nursery import start_forked

MODEL = str(files("data_prep") / "coldstart_model")
LIMITS = RolloutConfig(
    questions_per_step=3,
    max_search_turns=4,
    max_turn_tokens=24,
    max_observation_tokens=48,
    max_rollout_tokens=640,
)
COMPACT = ProtocolConfig(preset="compact")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("sample") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=30, num_eval_questions=5))
    return output


def config_for(world, output, **changes) -> SampleConfig:
    config = SampleConfig(
        model=ModelConfig(path=MODEL, dtype="float32"),
        retriever=RetrieverConfig(corpus=str(world / "corpus"), top_k=1),
        questions=str(world / "questions.jsonl"),
        split="train",
        limit=12,
        num_samples=4,
        output=str(output),
        protocol=COMPACT,
        rollout=LIMITS,
        reward=RewardConfig(answer="em"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def sampled(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("sampled") / "sample"
    sample(config_for(world, output))
    return output


def test_rollouts_are_whole_and_pass_rates_follow_from_them(sampled):
    groups = list(StoredGroups(sampled / "rollouts.jsonl"))
    assert [len(group.rollouts) for group in groups] == [4] * 12
    assert [rollout.index for rollout in groups[0].rollouts] == [0, 1, 2, 3]
    assert len({tuple(turn.completion_ids for turn in rollout.turns) for rollout in groups[0].rollouts}) > 1
    environment = Environment(load_codec(MODEL), build_protocol(COMPACT), LIMITS)
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.prompt_ids == environment.prompt_ids(group.question.text)
            assert all(len(turn.completion_ids) == len(turn.completion_logprobs) for turn in rollout.turns)
            assert (rollout.stop_reason is StopReason.ANSWERED) == (rollout.answer is not None)
    rates = read_lines(sampled / "pass_rates.jsonl")
    rights = [sum(rollout.scores.em == 1.0 for rollout in group.rollouts) for group in groups]
    assert [(rate["id"], rate["num_right"], rate["num_rollouts"]) for rate in rates] == [
        (group.question.id, right, 4) for group, right in zip(groups, rights)
    ]
    report = json.loads((sampled / "report.json").read_text())
    assert report["pass_rate"] == pytest.approx(sum(rights) / 48, abs=1e-4) and 0 < sum(rights) < 48
    assert report["mixed"] == pytest.approx(sum(0 < right < 4 for right in rights) / 12, abs=1e-4)
    assert report["tokenizer"] == environment.codec.fingerprint and report["strategy"] == "agent"


def test_credit_reads_them_as_they_were_sampled(sampled, tmp_path):
    environment = Environment(load_codec(MODEL), build_protocol(COMPACT), LIMITS)
    assert read_groups(sampled / "rollouts.jsonl", environment) == list(
        StoredGroups(sampled / "rollouts.jsonl")
    )
    other = shutil.copytree(sampled, tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps({**report, "strategy": "ircot"}))
    with pytest.raises(DataError, match="holds rollouts of the strategy ircot, expected those of agent"):
        read_groups(other / "rollouts.jsonl", environment)
    (other / "report.json").write_text(json.dumps({**report, "tokenizer": "another"}))
    with pytest.raises(DataError, match="holds ids of another tokenizer"):
        read_groups(other / "rollouts.jsonl", environment)
    (other / "report.json").unlink()
    with pytest.raises(DataError, match="a directory that `sd-search sample` finished"):
        read_groups(other / "rollouts.jsonl", environment)


def test_killed_and_torn_sampling_goes_on_and_leaves_the_same_bytes(world, sampled, tmp_path, monkeypatch):
    asked, run = [], Rollouter.run

    def dies_at_the_third(self, questions, **options):
        asked.append([question.id for question in questions])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(self, questions, **options)

    monkeypatch.setattr(Rollouter, "run", dies_at_the_third)
    config = config_for(world, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        sample(config)
    path = tmp_path / "out" / "rollouts.jsonl"
    assert len(StoredGroups(path)) == 6
    with path.open("ab") as file:
        file.write(b'{"question": {"id": "torn')
    sample(config)
    assert asked[2] == asked[3] and len(asked) == 5
    for name in ("rollouts.jsonl", "pass_rates.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sampled / name).read_bytes()
    sample(config)
    assert len(asked) == 5, "nothing is left to sample"
    with pytest.raises(ConfigError, match="holds an evaluation whose num_samples is 4, now it is 5"):
        sample(dataclasses.replace(config, num_samples=5))


def test_a_question_without_a_rollout_that_is_data_is_asked_once_more(world, tmp_path, monkeypatch):
    run, broken = Rollouter.run, [True]

    def fails(self, questions, **options):
        groups = run(self, questions, **options)
        if not broken:
            return groups
        failed = [dataclasses.replace(r, stop_reason=StopReason.RETRIEVAL_FAILED) for r in groups[0].rollouts]
        return [dataclasses.replace(groups[0], rollouts=tuple(failed)), *groups[1:]]

    monkeypatch.setattr(Rollouter, "run", fails)
    config = config_for(
        world, tmp_path / "out", limit=2, rollout=dataclasses.replace(LIMITS, max_failed_share=0.5)
    )
    assert sample(config)["num_sampled"] == 1
    config = dataclasses.replace(config, output=str(tmp_path / "none"), limit=1)
    with pytest.raises(RolloutError, match="4 of 4 rollouts failed .*, expected at most 50%"):
        sample(config)
    all_may_fail = dataclasses.replace(config, rollout=dataclasses.replace(LIMITS, max_failed_share=1.0))
    assert sample(all_may_fail)["num_sampled"] == 0
    broken.clear()
    config = config_for(world, tmp_path / "out", limit=2, rollout=config.rollout)
    report = sample(config)
    assert (report["num_sampled"], report["num_rollouts"]) == (2, 8)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_sample_what_one_does(world, tmp_path, sampled, monkeypatch):
    options = {
        "model.path": MODEL, "model.dtype": "float32", "retriever.corpus": world / "corpus", "retriever.top_k": 1,
        "questions": world / "questions.jsonl", "split": "train", "limit": 3, "num_samples": 2, "protocol.preset": "compact",
        "reward.answer": "em", "output": tmp_path, "rollout.questions_per_step": 3, "rollout.max_turn_tokens": 24,
        "rollout.max_observation_tokens": 48, "rollout.max_rollout_tokens": 640,
    }  # fmt: skip
    monkeypatch.setattr(local, "start_ranks", start_forked)
    assert (
        command(["sample", "--num-ranks=2", *(f"--{name}={value}" for name, value in options.items())]) == 0
    )
    ids = [
        [
            [turn.completion_ids for turn in rollout.turns]
            for group in groups
            for rollout in group.rollouts[:2]
        ]
        for groups in (
            StoredGroups(tmp_path / "rollouts.jsonl"),
            list(StoredGroups(sampled / "rollouts.jsonl"))[:3],
        )
    ]
    assert ids[0] == ids[1]


def episodes_of(directory, name="train.jsonl"):
    return [
        (group, line["kind"])
        for group, line in zip(StoredGroups(directory / name), read_lines(directory / name))
    ]


def test_selected_episodes_are_the_rollouts_behind_their_prompts(sampled, tmp_path):
    wanted = Selection(block_format="outcome_first", validation_share=0.3, per_question=3, shuffled_share=0.3)
    tally = select(SelectConfig(rollouts=str(sampled), output=str(tmp_path / "a"), selection=wanted))
    whole = {group.question.id: group for group in StoredGroups(sampled / "rollouts.jsonl")}
    environment = Environment(load_codec(MODEL), build_protocol(COMPACT), LIMITS)
    counted = {}
    for name in ("train", "validation"):
        for group, kind in episodes_of(tmp_path / "a", f"{name}.jsonl"):
            (own,) = group.rollouts
            source = whole[group.question.id].rollouts[own.index]
            assert own.turns == source.turns and own.scores.em == 1.0
            text = environment.codec.decode(own.prompt_ids)
            assert (own.prompt_ids == source.prompt_ids) == (kind == "plain")
            assert ("Previous attempts at this question:\nAttempt 1 (" in text) == (kind != "plain")
            mine = [
                f'"{query}"' in text
                for rollout in whole[group.question.id].rollouts
                for query in rollout.queries
            ]
            assert kind == "plain" or all(mine) == (kind != "wrong_question")
            counted[name, kind] = counted.get((name, kind), 0) + 1
    assert counted == dict(tally.kept) and sum(counted.values()) > 12
    names = ("train.jsonl", "validation.jsonl")
    train, held = ({group.question.id for group, _ in episodes_of(tmp_path / "a", name)} for name in names)
    assert train and held and not train & held, "split by question"
    select(SelectConfig(rollouts=str(sampled), output=str(tmp_path / "b"), selection=wanted))
    for name in ("train.jsonl", "validation.jsonl", "questions.jsonl", "episodes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_loss_mask_of_an_episode_is_what_the_policy_sampled(sampled, tmp_path):
    select(SelectConfig(rollouts=str(sampled), output=str(tmp_path)))
    kinds = set()
    for group, kind in episodes_of(tmp_path):
        (own,) = group.rollouts
        ids, mask, _ = rollout_arrays(own)
        assert ids[mask].tolist() == [index for turn in own.turns for index in turn.completion_ids]
        assert not mask[: len(own.prompt_ids)].any(), "neither prompt nor block"
        others = [index for turn in own.turns for index in turn.observation_ids]
        assert ids[~mask].tolist() == [*own.prompt_ids, *others], "the environment's"
        kinds.add(kind)
    assert "linked" in kinds


def test_wanted_questions_go_to_training_and_held_out_ones_do_not(sampled, tmp_path):
    wanted = Selection(min_pass_rate=0.25, max_pass_rate=0.75, validation_share=0.3)
    select(SelectConfig(rollouts=str(sampled), output=str(tmp_path), selection=wanted))
    rates = {rate["id"]: rate["pass_rate"] for rate in read_lines(sampled / "pass_rates.jsonl")}
    chosen = [line["id"] for line in read_lines(tmp_path / "questions.jsonl")]
    held = {group.question.id for group, _ in episodes_of(tmp_path, "validation.jsonl")}
    assert chosen and all(0.25 <= rates[name] <= 0.75 for name in chosen) and not held & set(chosen)
    assert {group.question.id for group, _ in episodes_of(tmp_path)} <= set(chosen)


def test_episodes_may_have_another_prompt_but_no_other_form(sampled, tmp_path):
    short = dataclasses.replace(COMPACT, prompt="{hindsight}Q {question}\n")
    select(SelectConfig(rollouts=str(sampled), output=str(tmp_path / "short"), protocol=short))
    codec = load_codec(MODEL)
    texts = [
        codec.decode(group.rollouts[0].prompt_ids)
        for group, kind in episodes_of(tmp_path / "short")
        if kind == "plain"
    ]
    assert texts and all(text.startswith("Q Who") for text in texts)
    assert (
        json.loads((tmp_path / "short" / "episodes.json").read_text())["protocol"]["prompt"] == short.prompt
    )
    tagged = dataclasses.replace(COMPACT, search_tags=("<find>", "</find>"))
    with pytest.raises(
        ConfigError, match="protocol.search_tags: found .*<find>.*, but the rollouts were sampled with"
    ):
        select(SelectConfig(rollouts=str(sampled), output=str(tmp_path / "tags"), protocol=tagged))


def test_what_few_shot_sampled_fits_behind_search_r1s_prompt():
    presets = [build_protocol(ProtocolConfig(preset=name)) for name in ("few_shot", "search_r1", "compact")]
    check_same_form(presets[1], presets[0])
    with pytest.raises(
        ConfigError,
        match="protocol.passage_format: found ' {text}.n', but the rollouts were sampled with 'Doc",
    ):
        check_same_form(presets[2], presets[0])


def test_a_prompt_that_has_changed_since_is_found_out(sampled, tmp_path, monkeypatch):
    monkeypatch.setitem(
        PRESETS, "compact", dataclasses.replace(PRESETS["compact"], prompt="{hindsight}Ask {question}\n")
    )
    with pytest.raises(DataError, match="was sampled behind another prompt than its protocol makes now"):
        select(SelectConfig(rollouts=str(sampled), output=str(tmp_path)))


def test_what_cannot_be_selected_is_said_in_one_line(sampled, world, tmp_path, capsys):
    save_tokenizer(train_tokenizer(["another text"], vocab_size=300), tmp_path)
    with pytest.raises(DataError, match="holds ids of another tokenizer"):
        select(SelectConfig(rollouts=str(sampled), output=str(tmp_path / "x"), tokenizer=str(tmp_path)))
    with pytest.raises(DataError, match="gives no episode to train on: kept 0 episodes"):
        select(
            SelectConfig(
                rollouts=str(sampled), output=str(tmp_path / "x"), selection=Selection(min_searches=9)
            )
        )
    assert not (tmp_path / "x" / "episodes.json").exists()
    output = f"--output={tmp_path / 'y'}"
    assert command(["select", f"--rollouts={sampled}", output, "--selection.shuffled_share=1.5"]) == 2
    assert command(["select", f"--rollouts={sampled}", output, "--selection.shuffled_share=0.9"]) == 2
    assert command(["select", f"--rollouts={world}", output]) == 1
    said = capsys.readouterr().err
    assert "selection.shuffled_share: found 1.5, expected between 0 and 1" in said
    assert "found 1.05 together, expected at most 1" in said
    assert "rollouts.jsonl does not exist; expected rollouts that `sd-search sample` or" in said
    (tmp_path / "half").mkdir()
    shutil.copy(sampled / "rollouts.jsonl", tmp_path / "half")
    with pytest.raises(
        DataError, match="half holds no report.json, expected a directory that `sd-search sample` finished"
    ):
        select(SelectConfig(rollouts=str(tmp_path / "half"), output=str(tmp_path / "z")))
    single = sample(config_for(world, tmp_path / "rag", strategy="rag", limit=2, num_samples=2))
    assert single["strategy"] == "rag" and single["num_rollouts"] == 4
    with pytest.raises(DataError, match="rag, expected one that episodes can be selected from: agent;"):
        select(SelectConfig(rollouts=str(tmp_path / "rag"), output=str(tmp_path / "z")))
    assert command(["select", f"--rollouts={sampled}", output, "--selection.validation_share=0.2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("kept ")
