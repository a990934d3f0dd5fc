"""The configuration door: overrides, round trip, and errors that name the key, what was found and what was
expected."""

from pathlib import Path

import pytest

from megatron_sd.algorithm.blocks import BLOCKS
from megatron_sd.config import Config
from megatron_sd.config.checks import OF_SIBLINGS
from megatron_sd.config.load import dump, load
from megatron_sd.errors import ConfigError

REQUIRED = ["--run_dir=r", "--model.path=m", "--data.train=q.jsonl", "--retriever.corpus=c"]


def write_yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_defaults_are_the_papers():
    config = load(REQUIRED)
    assert config.distill.alpha.value == 1e-3
    assert config.distill.alpha.warmup_steps == 50
    assert (config.rollout.questions_per_step, config.rollout.group_size) == (256, 5)
    assert (config.policy_loss.clip, config.policy_loss.kl_weight) == (0.2, 1e-3)
    assert config.distill.top_k is None


def test_command_line_overrides_yaml(tmp_path):
    file = write_yaml(
        tmp_path,
        "run_dir: r\nmodel: {path: m}\ndata: {train: q}\nretriever: {corpus: c, top_k: 5}\nnum_steps: 7\n",
    )
    config = load([file, "--num_steps=9", "--distill.alpha.mode=grad_ratio"])
    assert (config.num_steps, config.retriever.top_k, config.distill.alpha.mode) == (9, 5, "grad_ratio")


def test_resolved_yaml_reads_back_equal(tmp_path):
    config = load(
        [
            *REQUIRED,
            "--protocol.search_tags=[<tool>, </tool>]",
            "--optimizer.betas=[0.8, 0.98]",
            "--data.eval=null",
        ]
    )
    again = load([write_yaml(tmp_path, dump(config))])
    assert isinstance(again, Config)
    assert again == config
    assert again.protocol.search_tags == ("<tool>", "</tool>")


@pytest.mark.parametrize(
    ("argument", "fragments"),
    [
        ("--model.pth=x", ["model.pth", "unknown", "model.path"]),
        ("--rollout.group_size=five", ["rollout.group_size", "int", "five"]),
        ("--distill.block=papers", ["distill.block", "papers", "paper"]),
        ("--distill.beta=1.0", ["distill.beta", "1.0", "divergence jsd", "between 0 and 1"]),
        ("--num_steps=1.5", ["num_steps", "int", "1.5"]),
        ("--config=nowhere.yaml", ["nowhere.yaml"]),
        ("--policy_loss.dual_clip=0.9", ["policy_loss.dual_clip", "0.9", "more than 1"]),
        ("--advantage.discount=1.2", ["advantage.discount", "1.2", "between 0 and 1"]),
        ("--advantage.estimator=gigp0", ["advantage.estimator", "gigp0", "did you mean gigpo"]),
    ],
)
def test_bad_argument_names_key_found_expected(argument, fragments):
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, argument])
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("key", ["clip_high", "dual_clip"])
def test_a_cap_and_a_clip_are_refused_together(key):
    both = [f"--policy_loss.{key}=3", "--policy_loss.importance_cap=5"]
    with pytest.raises(
        ConfigError, match=rf"policy_loss.{key}: found 3.0 with policy_loss.importance_cap 5.0"
    ):
        load([*REQUIRED, *both])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mse"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_is_checked_where_it_counts(divergence, beta):
    config = load([*REQUIRED, f"--distill.divergence={divergence}", f"--distill.beta={beta}"])
    assert (config.distill.divergence, config.distill.beta) == (divergence, beta)


def test_typo_in_yaml_names_the_nearest_key(tmp_path):
    with pytest.raises(ConfigError, match="model.dtpe.*model.dtype"):
        load(
            [
                write_yaml(
                    tmp_path,
                    "run_dir: r\nmodel: {path: m, dtpe: float32}\ndata: {train: q}\nretriever: {corpus: c}\n",
                )
            ]
        )


def test_missing_section_is_named():
    with pytest.raises(ConfigError, match=r"retriever\.corpus"):
        load(REQUIRED[:-1])


def test_grad_ratio_needs_its_measurement():
    with pytest.raises(ConfigError, match="measure_every"):
        load([*REQUIRED, "--distill.alpha.mode=grad_ratio", "--distill.measure_every=0"])


PPO = ("--advantage.estimator=gae", "--rollout.group_size=1", "--distill.block=none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--update.minibatches=300"],
            "update.minibatches: found 300 with rollout.questions_per_step 256, expected",
        ),
        (
            ["--distill.queries=evidence", "--distill.block=none"],
            "distill.block: found none with distill.queries evidence, which asks the engine",
        ),
        (
            ["--distill.queries=evidence", "--distill.scope=all"],
            "distill.scope: found all with distill.queries evidence, which asks the engine",
        ),
        (
            ["--distill.queries=evidence", "--distill.teacher=frozen"],
            "distill.teacher: found frozen with distill.queries evidence, which asks the engine",
        ),
        (
            ["--distill.queries=evidence", "--rollout.max_lag=1"],
            "rollout.max_lag: found 1 with distill.queries evidence, which asks the engine",
        ),
        (
            ["--advantage.modulation=turnsight", "--distill.block=none"],
            "advantage.modulation: found turnsight with",
        ),
        (
            ["--advantage.modulation=hca"],
            "distill.block: found paper with advantage.modulation hca, expected single",
        ),
        (
            ["--update.epochs=2", "--update.sequence_parallel_size=2"],
            "update.minibatches times update.epochs: found 2 with update.sequence_parallel_size above 1",
        ),
        (
            ["--policy_loss.ratio=rollout", "--update.sequence_parallel_size=2"],
            "policy_loss.ratio: found rollout with update.sequence_parallel_size above 1",
        ),
        (
            ["--advantage.terms.f2=1"],
            "advantage.terms: found f2, which nobody scores, expected weights of some of",
        ),
        (
            ["--rollout.attempts=3"],
            "rollout.max_rollout_tokens: found 4096 with rollout.attempts 3, expected at least 15180",
        ),
        (
            ["--rollout.keep_groups=with_spread", "--rollout.group_size=1", "--distill.block=none"],
            "rollout.keep_groups: found with_spread with rollout.group_size 1, expected all, or a larger group",
        ),
        (
            ["--policy_loss.top_entropy_share=0"],
            "policy_loss.top_entropy_share: found 0.0, expected more than 0",
        ),
        (
            ["--policy_loss.top_entropy_share=1.5"],
            "policy_loss.top_entropy_share: found 1.5, expected between 0 and 1",
        ),
    ],
)
def test_choices_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, *options])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--advantage.estimator=gae", "--rollout.group_size=1"),
            "distill.block: found paper with rollout.group_size 1, expected none, or a block that no other",
        ),
        (
            (*PPO, "--update.sequence_parallel_size=2"),
            "advantage.estimator: found gae with update.sequence_parallel_size above 1, expected one of the two",
        ),
        (
            (*PPO, "--update.tensor_parallel_size=2", "--distill.measure_every=0"),
            "advantage.estimator: found gae with update.tensor_parallel_size above 1, expected one without a",
        ),
        (
            ("--policy_loss.kl=k1_reward",),
            "policy_loss.kl: found k1_reward with advantage.estimator grpo, expected estimator gae",
        ),
        (
            ("--advantage.turn_rewards=stepsearch",),
            "advantage.turn_rewards: found stepsearch with advantage.estimator grpo, expected none, or estimator",
        ),
        (
            ("--advantage.estimator=gae", "--advantage.modulation=turnsight"),
            "advantage.modulation: found turnsight with advantage.estimator gae, expected none",
        ),
        (("--critic.lam=1.1",), "critic.lam: found 1.1, expected between 0 and 1"),
        (("--critic.learning_rate=0",), "critic.learning_rate: found 0.0, expected more than 0"),
    ],
)
def test_what_ppo_goes_with(options, message):
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, *options])
    assert str(caught.value).startswith(message)


def test_a_critic_has_an_optimiser_of_its_own():
    assert load([*REQUIRED, *PPO]).critic.path is None
    own = load([*REQUIRED, *PPO, "--critic.learning_rate=2e-5"]).critic.optimizer
    assert (own.learning_rate, own.warmup_steps, own.betas) == (2e-5, 15, (0.9, 0.999))
    assert (own.weight_decay, own.max_grad_norm, own.schedule) == (0.01, 1.0, "constant")
    assert load([*REQUIRED, "--advantage.estimator=gae", "--distill.block=single"]).rollout.group_size == 5


def test_blocks_of_siblings_are_blocks():
    """And the others need no sibling: a new block belongs to one of the two."""
    alone = {"single", "wrong_question", "settled_wrong_question", "dummy", "reference", "plain", "none"}
    assert set(OF_SIBLINGS) | alone == set(BLOCKS) and not set(OF_SIBLINGS) & alone
