"""Advantages: cases worked by hand, and what holds for every estimator."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.algorithm.advantages import mr_search, stepsearch
from megatron_sd.algorithm.advantages.from_rewards import grpo
from megatron_sd.algorithm.advantages.graph_hca import success_chances, turn_credits
from megatron_sd.algorithm.advantages.states import STATES
from megatron_sd.algorithm.advantages.stepsearch import step_rewards
from megatron_sd.algorithm.advantages.table import ADVANTAGES
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import SEARCH, Action, Turn
from tests.builders import hit
from tests.fakes_groups import make_group, make_rollout

rewards = st.lists(st.floats(0, 1), min_size=1, max_size=8)
RELATIVE = sorted(set(ADVANTAGES) - {"one", "gae"})  # those that compare rollouts


def turn(*ids, num_tokens=2):
    """A turn that found these passages; without any, one that answers."""
    own = Turn(completion_ids=(4,) * num_tokens, completion_logprobs=(-1.0,) * num_tokens)
    action = Action(tool=SEARCH, text="q", span=(0, 1)) if ids else None
    return dataclasses.replace(own, action=action, hits=tuple(hit(id_) for id_ in ids))


def group_of(*rollouts):
    """Of (reward, turns)."""
    made = tuple(make_rollout(r, index=i, turns=turns) for i, (r, turns) in enumerate(rollouts))
    return dataclasses.replace(make_group([0.0]), rollouts=made)


def of(name, *groups, **settings):
    return ADVANTAGES[name](groups, config=AdvantageConfig(estimator=name, **settings))  # as building/ asks


def near(*values):
    return [pytest.approx(value, abs=1e-4) for value in values]


def test_known_numbers_of_grpo():
    """mean 1/4, sample standard deviation 1/2."""
    (found,) = of("grpo", make_group([1.0, 0.0, 0.0, 0.0]))
    expected = [0.75 / 0.500001] + [-0.25 / 0.500001] * 3
    assert found == [(pytest.approx(value, abs=1e-12),) for value in expected]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("grpo", 1.0954, -0.7303), ("dr_grpo", 0.6, -0.4), ("rloo", 0.75, -0.5), ("max_rl", 1.5, -1.0)],
)
def test_two_of_five_are_right(name, right, wrong):
    (found,) = of(name, make_group([1.0, 0.0, 0.0, 1.0, 0.0]))
    assert [own for (own,) in found] == near(right, wrong, wrong, right, wrong)


def test_several_scores_summed_first_or_normalised_first():
    """(1, 0, 0) and (0, 10, 0): summed, the large one wins; each normalised, they are worth the same. F1 is
    the second score here."""
    group = make_group([1.0, 0.0, 0.0])
    second = (0.0, 10.0, 0.0)
    scored = tuple(
        dataclasses.replace(r, scores=dataclasses.replace(r.scores, f1=value))
        for r, value in zip(group.rollouts, second, strict=True)
    )
    group = dataclasses.replace(group, rollouts=scored)
    terms = {"reward": 1.0, "f1": 1.0}
    (summed,), (apart,) = of("grpo", group, terms=terms), of("gdpo", group, terms=terms)
    assert [own for (own,) in summed] == near(-0.4842, 1.1500, -0.6658)
    assert [own for (own,) in apart] == near(0.5774, 0.5774, -1.1547)
    (half,) = of("grpo", group, terms={"reward": 0.5})
    assert [own for (own,) in half] == near(1.1547, -0.5774, -0.5774)


def test_attempts_earn_for_those_before_them():
    """EM by attempt (0, 1), (0, 0), (1, 1). A of attempt 1: (-.5, -.5, 1), of attempt 2: (.5, -1, .5)."""
    rewards = [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0)]
    assert mr_search.attempt_credits(rewards, 1.0) == [near(0, 0.5), near(-1.5, -1), near(1.5, 0.5)]
    assert mr_search.attempt_credits(rewards, 0.0) == [near(-0.5, 0.5), near(-0.5, -1), near(1, 0.5)]
    assert mr_search.attempt_credits([(1.0, 1.0), (0.0,)], 1.0) == [near(1, 0), near(-1)]
    assert mr_search.attempt_credits([(1.0, 1.0)], 1.0) == [near(0, 0)]


def test_every_turn_of_an_attempt_gets_its_credit():
    turns = [dataclasses.replace(turn("d"), attempt=0), dataclasses.replace(turn(), attempt=0), turn()]
    turns[2] = dataclasses.replace(turns[2], attempt=1)
    group = group_of((0.0, tuple(turns)), (1.0, tuple(turns)))
    by_attempt = ((0.0, 1.0), (1.0, 1.0))
    rollouts = tuple(
        dataclasses.replace(r, scores=dataclasses.replace(r.scores, em_by_attempt=own))
        for r, own in zip(group.rollouts, by_attempt, strict=True)
    )
    (found,) = of("mr_search", dataclasses.replace(group, rollouts=rollouts), discount=1.0)
    assert found == [(-1.0, -1.0, 0.0), (1.0, 1.0, 0.0)]


def test_whitening_counts_tokens_and_scaling_counts_rollouts():
    """Two groups (1, 0) and (1, 1): r - m is (.5, -.5) and (0, 0); its deviation over one token each is .4082."""
    single = [(r, (turn(num_tokens=1),)) for r in (1.0, 0.0, 1.0, 1.0)]
    groups = group_of(*single[:2]), group_of(*single[2:])
    first, second = of("reinforce_baseline", *groups)
    assert [own for (own,) in first + second] == near(1.2247, -1.2247, 0, 0)
    longer = group_of((1.0, (turn(num_tokens=3),)), (0.0, (turn(num_tokens=1),)))
    (found,) = of("reinforce_baseline", longer)  # mean .25, variance (3 * .0625 + .5625) / 3 = .25
    assert [own for (own,) in found] == near(0.5, -1.5)
    first, second = of("batch_std", *groups)  # deviation of (1, 0, 1, 1): .5
    assert [own for (own,) in first + second] == near(1.0, -1.0, 0, 0)


def three_rollouts():
    """Rewards (1, 0, 1) over 2, 2 and 3 turns; the second turns stand at d1, d1 and d2."""
    return group_of(
        (1.0, (turn("d1"), turn())),
        (0.0, (turn("d1"), turn())),
        (1.0, (turn("d2"), turn("d3"), turn())),
    )


def test_gigpo_adds_what_a_turn_returns_beside_turns_of_the_same_place():
    (found,) = of("gigpo", three_rollouts())
    assert found[0] == tuple(near(0.6658, 0.8333))
    assert found[1] == tuple(near(-1.2842, -1.1667))
    assert found[2] == tuple(near(0.6183, 0.3333, 0.3333))
    (only_rollouts,) = of("gigpo", three_rollouts(), weight=0.0)
    assert [own[0] for own in only_rollouts] == near(0.3333, -0.6667, 0.3333)
    standardised = of("gigpo", three_rollouts(), normalize="mean_std")[0]
    whole = of("gigpo", three_rollouts(), normalize="mean_std", weight=0.0)[0]
    assert [own[0] - base[0] for own, base in zip(standardised, whole)] == near(0.6211, -1.1536, 0.5324)


def test_graph_hca_of_three_rollouts():
    group = group_of((1.0, (turn("s1"), turn())), (0.0, (turn("s1"), turn())), (0.0, (turn("s2"), turn())))
    edges = [("q", "s1"), ("q", "s1"), ("q", "s2"), ("s1", "success"), ("s1", "failure"), ("s2", "failure")]
    chances = success_chances(edges, 0.95)
    assert [chances[place] for place in ("s1", "s2", "q")] == near(0.475, 0.0, 0.3008)
    credits = turn_credits(group.rollouts, AdvantageConfig())
    assert [credits[i, 0] for i in range(3)] == near(0.5774, 0.5774, -1.1547)
    assert [credits[i, 1] for i in range(3)] == near(0.7071, -0.7071, 0.0)
    (base,), (found,) = of("grpo", group), of("graph_hca", group, weight=0.5)
    assert found[2] == tuple(near(base[2][0] - 0.5 * 1.1547, base[2][1]))
    assert of("graph_hca", group, weight=0.0) == of("grpo", group), "bit for bit"


def test_a_search_that_finds_nothing_new_leads_back():
    """phi(s) = .95 (phi(s) + 1) / 2, so .95 / 1.05."""
    assert success_chances([("s", "s"), ("s", "success")], 0.95)["s"] == pytest.approx(0.95 / 1.05)


def two_searches():
    """A question of two hops: one rollout finds both and is right, the other stops after the first."""
    return group_of(
        (1.0, (turn("p17", "p3"), turn("p17", "p90"), turn())), (0.0, (turn("p17", "p3"), turn()))
    )


def test_two_rollouts_through_every_rule():
    (whole,) = of("grpo", two_searches())
    assert [own[0] for own in whole] == near(0.7071, -0.7071)
    (found,) = of("gigpo", two_searches())
    assert found[0] == tuple(near(0.95125, 0.975, 0.5)) and found[1] == tuple(near(-0.95125, -0.975))
    credits = turn_credits(two_searches().rollouts, AdvantageConfig())
    assert [credits[i, 0] for i in (0, 1)] == [0.0, 0.0], "both first searches lead to one place"
    assert [credits[0, 1], credits[1, 1]] == near(0.7071, -0.7071)


def with_hops(group, *supporting):
    return dataclasses.replace(group, question=dataclasses.replace(group.question, supporting=supporting))


def test_stepsearch_pays_for_what_is_new_and_takes_for_what_is_found_again():
    group = with_hops(two_searches(), ("p17",), ("p90", "p91"))
    hops = group.question.supporting
    right, wrong = group.rollouts
    assert step_rewards(right, hops) == [0.5, 0.0, 0.0], "half is new, but so is half of it old"
    assert step_rewards(wrong, hops) == [0.5, 0.0]
    twice = dataclasses.replace(wrong, turns=(turn("p17", "p17"), turn("p91", "p3"), turn()))
    assert step_rewards(twice, hops) == [0.0, 0.5, 0.0]
    assert step_rewards(right, ()) == [0.0, 0.0, 0.0], "hops are unknown"
    (found,) = of("stepsearch", group, step_scale=1.0)  # G: (1.5, 1, 1) and (.5, 0)
    assert found == [tuple(near(1.0, 1.0, 0.0)), tuple(near(-1.0, -1.0))]


def test_stepsearchs_returns(monkeypatch):
    """Step rewards .45 and -.25 (gains .45 and .25, half of the second's passages seen), reward 1, scale 1."""
    monkeypatch.setattr(stepsearch, "step_rewards", lambda rollout, supporting: [0.45, -0.25, 0.0])
    rollout = make_rollout(1.0, turns=(turn("a"), turn("b"), turn()))
    assert stepsearch.returns(rollout, (), AdvantageConfig(step_scale=1.0)) == near(1.2, 0.75, 1.0)
    assert stepsearch.returns(rollout, (), AdvantageConfig()) == near(1.12, 0.85, 1.0)


def test_when_turns_stand_in_the_same_place():
    first, second = two_searches().rollouts
    again = dataclasses.replace(second, turns=(turn("p3", "p17"), turn()))
    seen = STATES["seen"]([first, again])
    assert seen[0] == [frozenset(), {"p17", "p3"}, {"p17", "p3", "p90"}, {"p17", "p3", "p90"}]
    assert seen[1][1] == seen[0][1]
    newest = STATES["observation"]([first, again])
    assert newest[0][:3] == [(), ("p17", "p3"), ("p17", "p90")] and newest[1][1] != newest[0][1]
    assert newest[0][3] != newest[1][2], "turns that found nothing have no place in common"
    many = [f"p{n}" for n in range(10)]
    near_sets = [dataclasses.replace(first, turns=(turn(*ids), turn())) for ids in (many, many[:9], many[:8])]
    places = [own[1] for own in STATES["similar"](near_sets)]
    assert places[0] == places[1] != places[2], "9 of 10 are one place, 8 of 10 another"


@given(rewards)
def test_grpo_sums_to_zero_and_keeps_the_order_of_rewards(values):
    found = [own for (own,) in of("grpo", make_group(values))[0]]
    assert len(found) == len(values)
    assert math.fsum(found) == pytest.approx(0.0, abs=1e-9)
    assert all((a <= b) for r, a in zip(values, found) for s, b in zip(values, found) if r < s)


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("values", [[0.3], [0.1, 0.1, 0.1], [0.0, 0.0], [1.0] * 5])
def test_equal_rewards_give_exactly_zero(name, values):
    assert of(name, make_group(values)) == [[(0.0,)] * len(values)]


@pytest.mark.parametrize("name", RELATIVE)
@given(rewards, st.data())
def test_infrastructure_failures_are_as_if_absent(name, values, data):
    failed = tuple(data.draw(st.sets(st.integers(0, len(values) - 1))))
    (found,) = of(name, make_group(values, failed=failed))
    survivors = [value for index, value in enumerate(values) if index not in failed]
    expected = of(name, make_group(survivors))[0] if survivors else []
    assert [found[i] for i in range(len(values)) if i not in failed] == expected
    assert all(found[i] == (0.0,) for i in failed)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_permuting_rollouts_permutes_what_they_get(name):
    group = three_rollouts()
    order = (2, 0, 1)
    turned = tuple(dataclasses.replace(group.rollouts[old], index=new) for new, old in enumerate(order))
    (found,) = of(name, group)
    (other,) = of(name, dataclasses.replace(group, rollouts=turned))
    assert other == [tuple(near(*found[old])) for old in order]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_rollout_without_a_turn_and_turns_without_a_token_are_legal(name):
    silent = Turn(completion_ids=(), completion_logprobs=())
    (found,) = of(name, group_of((1.0, ()), (0.0, (silent, turn()))))
    assert [len(own) for own in found] == [0, 2] and all(math.isfinite(n) for own in found for n in own)


def test_an_unscored_rollout_is_an_error():
    group = make_group([1.0, 0.0])
    group = dataclasses.replace(
        group, rollouts=(group.rollouts[0], dataclasses.replace(group.rollouts[1], scores=None))
    )
    with pytest.raises(ValueError, match="rollout 1 of question q has no scores"):
        grpo([group], AdvantageConfig())


def test_stored_rollouts_count_the_same_whatever_they_earned():
    assert of("one", make_group([1.0, 0.0, 0.5], failed=(1,))) == [[(1.0,), (0.0,), (1.0,)]]
