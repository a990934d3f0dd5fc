"""Numbers that lie in an array and behave like a tuple."""

import copy
import json
import pickle

import numpy as np
import pytest
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
        np.asarray(held)[0] = 5
    with pytest.raises(TypeError):
        held[0] = 5
    with pytest.raises(OverflowError):
        compact_ids((2**31,))
    assert held[-1] == 2 and held != (1, 3) and held != 1


def test_a_group_takes_a_few_bytes_a_token_on_its_way_and_is_json_as_before():
    group = make_group([1.0])
    (rollout,) = group.rollouts
    fields = json.loads(json.dumps(as_fields(group)))
    assert fields["rollouts"][0]["prompt_ids"] == list(rollout.prompt_ids)
    many = compact_ids(range(100_000, 110_000))
    assert len(pickle.dumps(many)) < 4.1 * len(many)
