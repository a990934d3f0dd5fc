"""Which server a rollout goes to."""

from collections import Counter

import numpy as np
import pytest

from megatron_sd.rollout.homes import Homes, dealt_to

ALL = [True] * 3


def prompt(number, length=100):
    return (number,) * length


@pytest.mark.parametrize(
    ("num_ranks", "questions", "num_servers"),
    [(64, 256, 64), (64, 512, 32), (48, 288, 16), (16, 256, 4), (8, 256, 3), (3, 9, 2)],
)
def test_prompts_are_dealt_evenly_to_servers(num_ranks, questions, num_servers):
    """Each rank dealing from server 0 on left 60 of 64, 24 of 32 and 10 of 16 servers idle."""
    each = questions // num_ranks
    load = Counter(
        dealt_to(n, sharer=rank, num_sharers=num_ranks, num_servers=num_servers)
        for rank in range(num_ranks)
        for n in range(each)
    )
    assert len(load) == num_servers and max(load.values()) - min(load.values()) <= 1


def test_groups_stay_together_and_rollouts_where_they_began():
    homes = Homes(num_servers=3)
    assert [homes.place(f"a{n}", prompt(n), ALL) for n in range(4)] == [0, 1, 2, 0]
    assert [homes.place(f"b{n}", prompt(n), ALL) for n in range(4)] == [0, 1, 2, 0]
    assert homes.place("a1", prompt(1, 900), ALL) == 1
    assert homes.loads() == [400, 1000, 200]
    homes.forget()
    assert homes.loads() == [0, 0, 0] and homes.place("a1", prompt(7), ALL) == 0


def test_a_new_prompt_goes_by_where_fewest_tokens_are_under_way():
    """Server 0 has one long rollout, server 1 a group of short ones; the third prompt's turn is server 0's."""
    homes = Homes(num_servers=2)
    homes.place("long", prompt(0, 4000), ALL)
    for n in range(3):
        homes.place(f"short{n}", prompt(1), ALL)
    assert homes.loads() == [4000, 300]
    assert homes.place("new", prompt(2), ALL) == 1
    homes.end("long")
    assert homes.loads() == [0, 400]
    assert homes.place("next", prompt(3), ALL) == 0  # whose turn is server 1's
    homes.end("never heard of")


def test_what_is_nearly_even_is_dealt_in_turn_so_that_ranks_stay_apart():
    """Within a prompt's tokens the turn decides: ranks know their own rollouts alone."""
    homes = Homes(num_servers=8, sharer=1, num_sharers=4)
    places = [homes.place(f"s{n}", prompt(n, 100 + n), [True] * 8) for n in range(4)]
    assert places == [dealt_to(n, sharer=1, num_sharers=4, num_servers=8) for n in range(4)] == [1, 5, 1, 5]
    assert homes.place("s4", prompt(4, 150), [True] * 8) == 2  # 202 tokens more than an idle one


def test_a_lost_server_gets_nothing_new_and_its_share_is_spread():
    homes = Homes(num_servers=3)
    living = [False, True, True]
    found = Counter(homes.place(f"s{n}", prompt(n), living) for n in range(8))
    assert set(found) == {1, 2} and abs(found[1] - found[2]) <= 2


def test_rollouts_of_a_lost_server_are_spread_and_counted_where_they_go_on():
    """Four groups of five on two servers, of which the first is lost; then their next turns, longer by 100."""
    homes = Homes(num_servers=4)
    sessions = [(f"q{n}r{i}", n) for n in range(8) for i in range(5)]
    for session, n in sessions:
        homes.place(session, prompt(n), [True] * 4)
    assert homes.loads() == [1000] * 4
    living = [False, True, True, True]
    places = {s: homes.place(s, prompt(n) + (0,) * 100, living) for s, n in sessions}
    assert homes.loads()[0] == 0 and sum(homes.loads()) == 200 * 40
    assert max(homes.loads()) - min(homes.loads()[1:]) <= 200 * 5
    assert homes.place("late sibling", prompt(0), living) != 0
    assert {s: homes.place(s, prompt(n) + (0,) * 150, [True] * 4) for s, n in sessions} == places


def test_long_tails_leave_less_waiting():
    """Questions one after another as rollouts end, 8 at a time on 4 servers, lengths of a heavy tail: what the
    fullest server has under way beyond the mean, against dealing in turn."""
    rng = np.random.default_rng(0)
    lengths = (100 * rng.pareto(1.2, 400) + 50).astype(int)
    excess = {}
    for way in ("turn", "tokens"):
        homes, running, seen = Homes(num_servers=4), [], []
        for number, length in enumerate(lengths):
            if len(running) == 8:
                ended = min(running, key=lambda one: one[0])
                running.remove(ended)
                homes.end(ended[1])
            if way == "turn":
                homes._of_prompt[prompt(number, 50)] = number % 4
            homes.place(f"s{number}", prompt(number, 50), [True] * 4)
            homes.place(f"s{number}", prompt(number, 50) + (0,) * int(length), [True] * 4)
            running.append((number + length / 50, f"s{number}"))
            seen.append(max(homes.loads()) - np.mean(homes.loads()))
        excess[way] = float(np.mean(seen))
    assert excess["tokens"] < 0.9 * excess["turn"], excess
