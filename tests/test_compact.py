"""Numbers that lie in an array and behave like a tuple."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.compact import Compact, as_fields, compact_floats, compact_ids
from tests.fakes_groups import make_group

IDS = st.lists(st.integers(0, 2**31 - 1)).map(tuple)
FLOATS = st.lists(st.floats(allow_nan=False)).map(tuple)


@given(IDS, IDS, st.slices(20))
def test_it_does_what_the_tuple_does(ids, others, part):
    held = compact_ids(ids)
    assert held == ids and ids == held and held == compact_ids(ids) and hash(held) == hash(ids)
    assert list(held) == list(ids) and len(held) == len(ids) and bool(held) == bool(ids)
    assert all(type(number) is int for number in held) and repr(held) == repr(ids)
    assert held[part] == ids[part] and isinstance(held[part], Compact)
    assert held + others == ids + others == ids + compact_ids(others) == held + compact_ids(others)
    assert {held: 1}[ids] == 1 and (held == others) == (ids == others)
    assert (*held, 1) == (*ids, 1) and np.asarray(held).tolist() == list(ids)
    assert pickle.loads(pickle.dumps(held)) == copy.deepcopy(held) == ids


@given(FLOATS)
def test_nothing_is_lost_of_a_number(values):
    held = pickle.loads(pickle.dumps(compact_floats(values)))
    assert held == values and all(type(number) is float for number in held)
    assert compact_floats(held) is held


def test_it_cannot_be_written_to_and_refuses_what_is_no_token():
    held = compact_ids((1, 2))
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(compact_floats((0.5, 1.0)))[0] = 5
    with pytest.raises(TypeError):
        held[0] = 5
    assert held[-1] == 2 and held != (1, 3) and held != 1


@pytest.mark.parametrize(
    "ids", [(2**31,), (2**70,), (-1,), (1.7,), ("12",), (None,), (True,), ((1, 2),), np.array([2**32 + 5])]
)
def test_what_is_no_token_id_is_refused(ids):
    with pytest.raises(
        ValueError, match=r"found .* as token ids, expected whole numbers from 0 to 2147483647"
    ):
        compact_ids(ids)


def test_what_is_no_number_is_refused():
    for values in ((None,), ("0.5",), ((0.1,),)):
        with pytest.raises(ValueError, match=r"found .* as log-probabilities, expected numbers"):
            compact_floats(values)
    assert compact_floats((0, -1)) == (0.0, -1.0)


def test_users_arithmetic_is_that_of_the_tuple():
    """Also with arrays, where adding up is by element, and with ids that are multiplied."""
    ids, logprobs = compact_ids((150_000,) * 8), compact_floats((-0.1, -0.25))
    assert (np.array(ids) * 1_000_003).sum() == 8 * 150_000 * 1_000_003
    assert (logprobs + np.ones(2)).tolist() == (np.ones(2) + logprobs).tolist() == [0.9, 0.75]
    assert torch.tensor(ids).dtype == torch.int64
    for other in ((1.5,), logprobs, 5, "a"):
        with pytest.raises((TypeError, ValueError)):
            ids + other
    assert ids < (150_001,) and sorted([(3,), compact_ids((1, 2)), compact_ids((1,))])[0] == (1,)
    assert ids + [1] == (*ids, 1) and [1] + ids == (1, *ids)


def test_a_group_takes_a_few_bytes_a_token_on_its_way_and_is_json_as_before():
    group = make_group([1.0])
    (rollout,) = group.rollouts
    fields = json.loads(json.dumps(as_fields(group)))
    assert fields["rollouts"][0]["prompt_ids"] == list(rollout.prompt_ids)
    many = compact_ids(range(100_000, 110_000))
    assert len(pickle.dumps(many)) < 4.1 * len(many)
