"""Every variant of the method through the composition root: real engine, retriever, start policy and
DeepSpeed, two steps."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import pytest

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from megatron_sd.algorithm.advantages.states import STATES
from megatron_sd.algorithm.advantages.table import ADVANTAGES
from megatron_sd.algorithm.blocks import BLOCKS
from megatron_sd.algorithm.distill_aggregation import DISTILL_AGGREGATIONS
from megatron_sd.algorithm.hindsight import RENDERERS
from megatron_sd.algorithm.policy_loss import KL_LOSSES, POLICY_LOSSES
from megatron_sd.algorithm.refinements import MODULATIONS
from megatron_sd.algorithm.samples import GATES, SCOPES
from megatron_sd.building.trainer import build_trainer
from megatron_sd.config import AdvantageConfig, DistillConfig, PolicyLossConfig, RewardConfig, RolloutConfig
from megatron_sd.config.command_line import literals
from megatron_sd.config.load import load
from megatron_sd.distributed.world import join_world
from megatron_sd.ops.divergence import DIVERGENCES, SUPPORTS
from megatron_sd.rollout.collecting import KEEPERS
from megatron_sd.search.rewards.answers import ANSWER_SCORES
from megatron_sd.search.rewards.shapes import REWARD_SHAPES

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"
VOCABULARY = json.loads((START_POLICY / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize(
    ("section", "key", "table"),
    [
        (DistillConfig, "block", [*BLOCKS, "none"]),
        (DistillConfig, "scope", SCOPES),
        (DistillConfig, "gate", GATES),
        (DistillConfig, "divergence", DIVERGENCES),
        (DistillConfig, "aggregation", DISTILL_AGGREGATIONS),
        (DistillConfig, "support", SUPPORTS),
        (DistillConfig, "block_format", RENDERERS),
        (AdvantageConfig, "estimator", ADVANTAGES),
        (AdvantageConfig, "state", STATES),
        (PolicyLossConfig, "objective", POLICY_LOSSES),
        (PolicyLossConfig, "kl", KL_LOSSES),
        (RewardConfig, "shape", REWARD_SHAPES),
        (RolloutConfig, "keep_groups", KEEPERS),
        (AdvantageConfig, "modulation", {"none", *MODULATIONS}),
        (RewardConfig, "answer", {"judge", *ANSWER_SCORES}),
    ],
)
def test_every_choice_of_the_configuration_exists(section, key, table):
    assert set(literals(get_type_hints(section)[key])) == set(table)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=40, num_eval_questions=10))
    return output


def metrics_of(world: Path, run_dir: Path, **distill: str) -> list[dict[str, float]]:
    """Of two steps; the second one's rollouts come from the updated policy."""
    config = load([
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        f"--run_dir={run_dir}",
        f"--model.path={START_POLICY}",
        f"--data.train={world / 'questions.jsonl'}",
        f"--retriever.corpus={world / 'corpus'}",
        "--num_steps=2",
        "--rollout.questions_per_step=3",
        "--distill.gate=none",
        "--distill.alpha.mode=fixed",
        "--distill.alpha.warmup_steps=0",
        "--distill.measure_every=0",
        "--log.transcripts_every=0",
        *(f"--distill.{key}={value}" for key, value in distill.items()),
    ])  # fmt: skip
    trainer = build_trainer(config, join_world())
    trainer.resume()
    for _ in range(2):
        trainer.take_step()
    trainer.recorder.close()
    return [
        json.loads(line)["metrics"]
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        if "metrics" in line
    ]


@pytest.fixture(scope="module")
def paper(world, tmp_path_factory):
    return metrics_of(world, tmp_path_factory.mktemp("paper"))


BLOCKS = (
    "leave_one_out",
    "settled",
    "single",
    "inverted",
    "flat_pool",
    "dummy",
    "turn_causal",
    "with_documents",
    "only_correct_shuffled",
    "solution",
    "reference",
)
VARIANTS = [
    *({"block": name} for name in BLOCKS),
    {"scope": "all"},
    {"scope": "first_query"},
    {"scope": "last_query"},
    {"queries": "evidence"},
    {"target": "uniform"},
    {"target": "shuffled_vocabulary"},
    {"divergence": "mse"},
    {"gate": "reward_spread"},
    {"aggregation": "token"},
    {"top_k": "20", "support": "student"},
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda own: "-".join(own.values()))
def test_a_variant_changes_the_distillation_and_nothing_else(variant, world, paper, tmp_path):
    """The first step's rollouts and policy loss are the paper's, its divergence is not; both steps are
    finite."""
    first, second = metrics_of(world, tmp_path, **variant)
    assert first["reward/mean"] == paper[0]["reward/mean"]
    assert first["loss/policy"] == pytest.approx(paper[0]["loss/policy"], abs=1e-7)
    assert first["loss/distill"] > 0 and first["loss/distill"] != pytest.approx(
        paper[0]["loss/distill"], rel=1e-4
    )
    assert all(math.isfinite(value) for value in second.values())
    if variant == {"target": "uniform"}:
        assert first["distill/teacher_entropy_nats"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    if variant == {"target": "shuffled_vocabulary"}:
        assert first["distill/teacher_entropy_nats"] == pytest.approx(
            paper[0]["distill/teacher_entropy_nats"], rel=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_another_teachers_weights_begin_as_the_students(teacher, world, paper, tmp_path):
    first, second = metrics_of(world, tmp_path, teacher=teacher)
    assert first["loss/distill"] == pytest.approx(paper[0]["loss/distill"], rel=1e-3)
    assert second["loss/distill"] != pytest.approx(paper[1]["loss/distill"], rel=1e-4)
