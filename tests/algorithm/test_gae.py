"""PPO's advantages, whitening and value loss. Cases by hand: tokens a, b | an observation o | c, with values
(.2, .4, 9, .5) and a reward of 1 on c."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_sd.algorithm.advantages.gae import gae, generalized, token_rewards
from megatron_sd.algorithm.advantages.table import gradient_test
from megatron_sd.algorithm.packing.microbatches import build_microbatch
from megatron_sd.algorithm.policy_loss import KnownRows, policy_rows
from megatron_sd.algorithm.refinements import Read, Reading, refinements, with_old_logprobs, with_values
from megatron_sd.algorithm.value_loss import explained_variance, value_moments, value_rows
from megatron_sd.config import AdvantageConfig, CriticConfig, PolicyLossConfig, UpdateConfig
from megatron_sd.records import TrainingSample, Turn
from tests.algorithm.test_advantages import turn
from tests.builders import question
from tests.fakes_groups import make_group, make_rollout

VALUES = np.array([0.2, 0.4, 0.5])  # of the sampled tokens
REWARDS = np.array([0.0, 0.0, 1.0])


def alone(own):
    return [own]


def near(*values):
    return [pytest.approx(value, abs=1e-4) for value in values]


def two_turns(reward=1.0):
    """a b | o | c, behind a prompt of two tokens, as gae's estimator hands it on."""
    mask = np.array([False, False, True, True, False, True])
    return TrainingSample(
        ids=np.arange(6),
        prompt_length=2,
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        query_positions=np.zeros(0, np.int64),
        advantages=np.array([0, 0, 0, 0, 0, reward], np.float32),
        turns=np.array([0, 0, 0, 0, 0, 1]),
        group=0,
        group_has_spread=True,
    )


def reading(values, logprobs=None, reference=()):
    zeros = np.zeros(len(values))
    columns = (zeros if logprobs is None else logprobs, zeros, (), values, reference)
    return Reading(*(np.array(column, np.float32) for column in columns))


def refined(reads, everywhere=alone, kl_weight=0.0, **settings):
    return with_values(reads, everywhere, config=CriticConfig(**settings), kl_weight=kl_weight)


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages", "returns"),
    [
        (1.0, 1.0, (0.8, 0.6, 0.5), (1.0, 1.0, 1.0)),
        (1.0, 0.95, (0.74625, 0.575, 0.5), (0.94625, 0.975, 1.0)),
        (0.99, 0.95, (0.727618, 0.56525, 0.5), (0.927618, 0.96525, 1.0)),
    ],
)
def test_advantages_run_over_sampled_tokens_alone(gamma, lam, advantages, returns):
    """With the observation among them they would begin (1.127437, .97625, ...) at lam .95."""
    found = generalized(REWARDS, VALUES, gamma=gamma, lam=lam)
    assert found.tolist() == near(*advantages) and (found + VALUES).tolist() == near(*returns)
    (m,) = refined([Read(build_microbatch([two_turns()]), reading(VALUES))], gamma=gamma, lam=lam)
    assert m.returns.tolist() == near(*returns) and m.old_values.tolist() == near(*VALUES)
    assert m.advantages.tolist() == near(*((found - found.mean()) / found.std(ddof=1)))


def test_the_form_that_must_not_come_out():
    """Search-R1's own, over the observation with its value of 9."""
    over_all = generalized(np.array([0.0, 0, 0, 1]), np.array([0.2, 0.4, 9.0, 0.5]), gamma=1.0, lam=0.95)
    assert over_all.tolist() == near(1.127437, 0.97625, -8.025, 0.5)
    (m,) = refined([Read(build_microbatch([two_turns()]), reading(VALUES))], lam=0.95)
    assert m.returns.tolist() == near(0.94625, 0.975, 1.0)
    assert len(m.returns) == 3  # and no row of an observation


def test_advantages_are_whitened_over_the_steps_tokens():
    """(.8, .6, .5) -> (1.0911, -.2182, -.8729), with the unbiased variance; on two ranks as on one."""
    made = build_microbatch([two_turns()])
    (m,) = refined([Read(made, reading(VALUES))])
    assert m.advantages.tolist() == near(1.0911, -0.2182, -0.8729)

    read, other = [Read(made, reading(VALUES))], [Read(made, reading([0.1, 0.9, 0.3]))]
    (first, second) = refined([*read, *other])
    heard = []
    refined(other, lambda own: heard.append(own) or [own])  # what the other rank says of its own alone
    count_and_sum = heard[0]
    mean = (count_and_sum[1] + 1.9) / 6  # .8 + .6 + .5
    squares = float(((np.array([0.9, 0.1, 0.7]) - mean) ** 2).sum())
    answers = iter([count_and_sum, squares])
    (apart,) = refined(read, lambda own: [own, next(answers)])
    assert apart.advantages.tolist() == near(*first.advantages)
    together = np.concatenate([first.advantages, second.advantages])
    assert together.mean() == pytest.approx(0.0, abs=1e-6) and together.std(ddof=1) == pytest.approx(1.0)


def test_equal_advantages_are_no_noise():
    (m,) = refined([Read(build_microbatch([two_turns(0.0)]), reading([0.0, 0.0, 1e-7]))])
    assert np.abs(m.advantages).max() < 1e-2
    (empty,) = refined([Read(build_microbatch([]), reading([]))])
    assert len(empty.advantages) == 0


def test_a_rollout_does_not_see_its_neighbour():
    both = build_microbatch([two_turns(), two_turns(0.0)])
    (m,) = refined([Read(both, reading([*VALUES, 0.1, 0.2, 0.3]))], lam=0.95)
    last = generalized(np.zeros(3), np.array([0.1, 0.2, 0.3]), gamma=1.0, lam=0.95)
    assert m.returns.tolist() == near(0.94625, 0.975, 1.0, *(last + (0.1, 0.2, 0.3)))


def test_the_kl_is_taken_off_every_tokens_reward():
    """Score 0, log pi_old -1.0, log pi_ref -1.2, weight .001: -.0002 a token."""
    read = Read(build_microbatch([two_turns(0.0)]), reading([0.0] * 3, [-1.0] * 3, [-1.2] * 3))
    (m,) = refined([read], kl_weight=1e-3, lam=0.0, gamma=1.0)
    assert m.returns.tolist() == [pytest.approx(-0.0002, abs=1e-8)] * 3
    (m,) = refined([read], kl_weight=1e-3)
    assert m.returns.tolist() == [pytest.approx(-0.0002 * n, abs=1e-8) for n in (3, 2, 1)]
    known = KnownRows(*(torch.full((3,), -1.0),) * 3, reference_logprobs=torch.full((3,), -1.2))
    config = PolicyLossConfig(kl="k1_reward")
    assert policy_rows(torch.full((3,), -0.5), known, config=config).kl.tolist() == [0.0] * 3


def test_rewards_become_advantages_before_anything_else_is_made_of_them():
    loss, update = PolicyLossConfig(kl="k1_reward", engine_cap=2.0), UpdateConfig(minibatches=2)
    first, second = refinements(loss, AdvantageConfig(estimator="gae"), update, CriticConfig())
    assert (first.func, first.keywords["kl_weight"]) == (with_values, 1e-3)
    assert second.func is with_old_logprobs
    (first, _) = refinements(PolicyLossConfig(), AdvantageConfig(estimator="gae"), update, CriticConfig())
    assert first.keywords["kl_weight"] == 0.0


@pytest.mark.parametrize(("value", "old", "loss", "clipped"), [(0.9, 0.1, 0.08, 1.0), (1.2, 0.4, 0.02, 0.0)])
def test_the_value_loss(value, old, loss, clipped):
    """R 1, clip .5."""
    value, old = torch.tensor([value], requires_grad=True), torch.tensor([old])
    rows = value_rows(value, old, torch.ones(1), clip=0.5)
    assert (rows.losses.tolist(), rows.clipped.tolist()) == (near(loss), [clipped])
    rows.losses.sum().backward()
    assert value.grad.tolist() == near(0.0 if clipped else 0.2)


def test_rounding_is_no_clip():
    """A value that has not moved as far as the clip is the bounded one, to the bit."""
    values, old = torch.linspace(-1, 1, 1001), torch.linspace(-1, 1, 1001) + 1e-4
    assert not value_rows(values, old, torch.zeros(1001), clip=0.5).clipped.any()


def test_explained_variance():
    """R (1, 0), V (.8, .2): 1 - .04 / .25."""
    first = value_moments(np.array([1.0], np.float32), np.array([0.8], np.float32))
    second = value_moments(np.array([0.0], np.float32), np.array([0.2], np.float32))
    assert explained_variance(first + second) == pytest.approx(0.84, abs=1e-4)
    assert explained_variance(first) is None and explained_variance(np.zeros(5)) is None


def test_the_reward_stands_in_the_last_turn_that_sampled_something():
    said, silent = (Turn(completion_ids=ids, completion_logprobs=(-1.0,) * len(ids)) for ids in ((4, 5), ()))
    made = (make_rollout(0.5, index=0, turns=(said, said, silent)), make_rollout(1.0, index=1, turns=(said,)))
    group = dataclasses.replace(make_group([0.0]), rollouts=made)
    assert gae([group], AdvantageConfig(estimator="gae")) == [[(0.0, 0.5, 0.0), (1.0,)]]
    assert gae([make_group([1.0, 0.5], failed=(1,))], AdvantageConfig(estimator="gae")) == [[(1.0,), (0.0,)]]
    rewards = token_rewards(np.array([0.3, 0.3, 0.7, 1.0, 1.0]), np.array([0, 0, 1, 2, 2]))
    assert rewards.tolist() == [0.0, 0.3, 0.7, 0.0, 1.0] and token_rewards(np.zeros(0), np.zeros(0)).size == 0


def test_searches_earn_what_stepsearch_gives_them():
    """Two hops: the first turn serves one (.5), the second the other, with one of two passages seen
    before."""
    own = make_rollout(1.0, index=0, turns=(turn("p17", "p3"), turn("p17", "p90"), turn()))
    group = dataclasses.replace(
        make_group([0.0]), rollouts=(own,), question=question(supporting=[["p17"], ["p90"]])
    )
    config = AdvantageConfig(estimator="gae", turn_rewards="stepsearch", step_scale=0.6)
    assert gae([group], config) == [[tuple(near(0.3, 0.0, 1.0))]]


def test_equal_rewards_have_a_gradient_under_a_critic():
    zeros = [(0.0,), (0.0,)]
    assert gradient_test("gae")(zeros) and not gradient_test("grpo")(zeros)
