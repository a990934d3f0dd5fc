import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.algorithm.assemble import own_batches
from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import count_totals, pack
from megatron_sd.algorithm.packing.bins import assign_bins, bin_cost, plan_bins
from megatron_sd.algorithm.packing.microbatches import build_microbatch, distilled_part
from megatron_sd.algorithm.packing.outlines import Samples, outlines_of
from megatron_sd.config import UpdateConfig
from tests.training.fakes import make_samples

CASES = st.tuples(st.integers(0, 40), st.integers(1, 400), st.integers(1, 5), st.integers(0, 1000))


def reading(m, row):
    """Everything the teacher has read where its state is taken: its prompt, then the rollout up to the
    token before."""
    b, i = divmod(int(row), m.teacher_ids.shape[1])
    prompt = m.teacher_prompt_of[b]
    return (*m.teacher_prompts[prompt, : m.teacher_prompt_lengths[prompt]], *m.teacher_ids[b, : i + 1])


def bin_cost_of(m):
    """Without the last token of each prompt, which the continuation carries, and without a dummy teacher."""
    return m.input_ids.size + (m.teacher_ids.size + m.teacher_prompts.size if len(m.teacher_rows) else 0)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_every_sample_lies_in_one_bin_and_the_budget_holds(case):
    num, max_tokens, world_size, seed = case
    outlines = outlines_of(make_samples(num, seed=seed))
    bins = plan_bins(outlines, max_tokens, world_size)
    assert sorted(i for b in bins for i in b) == list(range(num))
    assert len(bins) % world_size == 0 and len(bins) > 0
    assert all(len(b) <= 1 or bin_cost(outlines, b) <= max_tokens for b in bins)
    ranks = assign_bins(bins, [bin_cost(outlines, b) for b in bins], world_size)
    assert {len(own) for own in ranks} == {len(bins) // world_size}
    for column in zip(*ranks):  # the costs of a column lie between those of its neighbours
        costs = sorted(bin_cost(outlines, b) for b in column)
        assert costs[0] >= max(
            (bin_cost(outlines, b) for own in ranks for b in own[ranks[0].index(column[0]) + 1 :]), default=0
        )


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_rows_carry_every_completion_token_once_with_its_own_values(case):
    num, max_tokens, world_size, seed = case
    samples = make_samples(num, seed=seed)
    batches = pack(samples, max_tokens=max_tokens, world_size=world_size, aggregation="rollout")
    found, queries, teachers, teacher_reads = [], [], 0, []
    for batch in batches:
        for m in batch:
            flat = m.input_ids.ravel()
            assert (
                m.row_index % m.input_ids.shape[1] + 1 < m.lengths[m.row_index // m.input_ids.shape[1]]
            ).all()
            assert (flat[m.row_index + 1] == m.targets).all()
            assert (np.diff(m.query_rows) > 0).all()
            teacher_reads += [reading(m, row) for row in m.teacher_rows]
            assert bin_cost_of(m) <= max_tokens or len(m.lengths) == 1
            found += list(zip(m.targets, m.rollout_logprobs, m.advantages, m.row_weights))
            queries += list(zip(m.targets[m.query_rows], m.query_weights, m.query_in_spread))
            teachers += len(m.teacher_ids) if len(m.teacher_rows) else 0
    expected, expected_queries, expected_reads = [], [], []
    for s in samples:
        share = np.float32(1 / s.loss_mask.sum())
        for p in np.flatnonzero(s.loss_mask):
            expected.append((s.ids[p], s.rollout_logprobs[p], s.advantages[p], share))
        if s.is_distilled:
            share = np.float32(1 / len(s.query_positions))
            expected_queries += [(s.ids[p], share, s.group_has_spread) for p in s.query_positions]
            expected_reads += [
                (*s.teacher_prompt_ids, *s.ids[s.prompt_length : p]) for p in s.query_positions
            ]
    assert sorted(found) == sorted(expected)
    assert sorted(queries) == sorted(expected_queries)
    assert sorted(teacher_reads) == sorted(expected_reads)
    assert teachers == sum(s.is_distilled for s in samples)


@given(CASES)
@settings(max_examples=20, deadline=None)
def test_teachers_run_on_all_ranks_or_none(case):
    num, max_tokens, world_size, seed = case
    batches = pack(
        make_samples(num, seed=seed), max_tokens=max_tokens, world_size=world_size, aggregation="token"
    )
    for column in zip(*batches):
        assert len({m.has_teacher for m in column}) == 1


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("aggregation", ["rollout", "token"])
def test_a_rank_makes_its_own_samples_alone_and_gets_what_packing_of_all_gives(layout, aggregation):
    """Every sample is made on one rank, and as often as there are optimiser steps that read it: once."""
    whole = make_samples(23, one_prompt_a_group=True)
    config = UpdateConfig(max_microbatch_tokens=90, minibatches=2)
    made: list[int] = []

    def make(number):
        made.append(number)
        return whole[number]

    own = functools.partial(
        own_batches, config=config, aggregation="token", distill_aggregation=aggregation, layout=layout
    )
    for rank in range(3):
        lazy = own(Samples(outlines=outlines_of(whole), make=make), place=(rank, 3))
        for batch, expected in zip(lazy, own(whole, place=(rank, 3)), strict=True):
            assert batch.totals == expected.totals
            for one, other in zip(batch, expected, strict=True):
                assert one.layout == other.layout == layout
                for name, value in vars(other).items():
                    assert np.array_equal(getattr(one, name), value), name
    assert sorted(made) == list(range(23))


def test_totals():
    samples = make_samples(9)
    tokens = sum(int(s.loss_mask.sum()) for s in samples)
    distilled = sum(s.is_distilled for s in samples)
    assert 0 < distilled < 9
    assert count_totals(outlines_of(samples), "token").policy_weight == tokens
    assert count_totals(outlines_of(samples), "rollout").policy_weight == pytest.approx(9)
    assert count_totals(outlines_of(samples), "token").distilled_rollouts == distilled
    batches = pack(samples, max_tokens=60, world_size=2, aggregation="token")
    assert all(batch.totals == count_totals(outlines_of(samples), "token") for batch in batches)


def test_the_largest_microbatch_is_as_small_as_the_number_allows():
    """8 equal samples of 10 tokens on 2 ranks with room for 60: two microbatches of 4, not 6 and 2."""
    batches = pack([plain_sample(10)] * 8, max_tokens=60, world_size=2, aggregation="token")
    assert [[m.input_ids.shape for m in batch] for batch in batches] == [[(4, 10)], [(4, 10)]]


def plain_sample(length):
    zeros = np.zeros(length, np.float32)
    return dataclasses.replace(
        make_samples(1)[0],
        ids=np.zeros(length, np.int64),
        loss_mask=np.arange(length) >= 3,
        rollout_logprobs=zeros,
        advantages=zeros,
        turns=np.zeros(length, np.int64),
        prompt_length=3,
        teacher_prompt_ids=None,
    )


def test_sorting_by_length_wastes_little():
    """A fifth of what batches of 15 in arrival order would pad."""
    lengths = np.random.default_rng(0).integers(20, 400, 120)
    batches = pack([plain_sample(n) for n in lengths], max_tokens=4096, world_size=2, aggregation="token")
    padding = sum(m.num_padding_tokens for batch in batches for m in batch)
    in_order = sum(15 * run.max() - run.sum() for run in lengths.reshape(-1, 15))
    assert padding < 0.2 * in_order


def test_a_sample_above_the_budget_stands_alone():
    batches = pack(
        [plain_sample(n) for n in (100, *[10] * 8)], max_tokens=20, world_size=1, aggregation="token"
    )
    assert [m.input_ids.shape for m in batches[0]] == [(1, 100)] + [(2, 10)] * 4


def test_nothing_to_train_on_gives_empty_microbatches():
    (first,), (second,) = (
        batch.microbatches for batch in pack([], max_tokens=10, world_size=2, aggregation="token")
    )
    for m in (first, second):
        assert m.input_ids.tolist() == [[0]] and m.lengths.tolist() == [1] and not m.has_teacher
        assert len(m.row_index) == len(m.query_rows) == 0


def test_deterministic():
    samples = make_samples(20)
    one, two = (pack(samples, max_tokens=80, world_size=2, aggregation="token") for _ in range(2))
    for a, b in zip(one, two):
        for m, n in zip(a, b):
            assert all(np.array_equal(getattr(m, f.name), getattr(n, f.name)) for f in dataclasses.fields(m))


def test_a_sample_without_query_has_no_teacher_row():
    samples = [s for s in make_samples(12) if len(s.query_positions) == 0]
    assert samples and not build_microbatch(samples).has_teacher


@given(st.integers(0, 1000), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_distilled_part_holds_the_pass_s_query_rows_and_what_precedes_them(seed, spread, no_spread):
    weights = TermWeights(policy=0.0, distill_spread=0.5 * spread, distill_no_spread=0.5 * no_spread)
    microbatch = build_microbatch(make_samples(9, seed=seed))
    part = distilled_part(microbatch, weights)
    kept = np.where(microbatch.query_in_spread, spread, no_spread)
    assert part.has_teacher == microbatch.has_teacher
    assert (part.query_weights == microbatch.query_weights[kept]).all()
    assert (part.targets[part.query_rows] == microbatch.targets[microbatch.query_rows[kept]]).all()
    for a, b in zip(microbatch.row_index[microbatch.query_rows[kept]], part.row_index, strict=True):
        (i, p), (j, q) = divmod(a, microbatch.input_ids.shape[1]), divmod(b, part.input_ids.shape[1])
        assert p == q and (microbatch.input_ids[i, : p + 1] == part.input_ids[j, : q + 1]).all()
    reads = [reading(microbatch, row) for row in microbatch.teacher_rows[kept]]
    assert [reading(part, row) for row in part.teacher_rows] == reads
    assert len(part.teacher_prompts) <= max(len(set(part.teacher_prompt_of)), 1)
    assert (
        part.input_ids.size <= microbatch.input_ids.size and (part.lengths <= part.input_ids.shape[1]).all()
    )


def test_rollouts_of_a_group_share_the_teachers_prompt():
    sample = next(s for s in make_samples(8) if s.is_distilled)
    (batch,) = pack([sample] * 5, max_tokens=10_000, world_size=1, aggregation="token")
    (microbatch,) = batch
    assert microbatch.teacher_prompts.tolist() == [list(sample.teacher_prompt_ids[:-1])]
    assert microbatch.teacher_prompt_of.tolist() == [0] * 5


def test_prompts_that_change_between_turns_are_read_as_sequences_of_their_own():
    """Every query token is predicted after its own turn's prompt and all of the rollout before it, and
    weighs as before."""
    sample = next(s for s in make_samples(30) if s.is_distilled and len(s.query_positions) > 3)
    later = dataclasses.replace(sample, later_prompts=((2, (90, 91, 92)), (3, (80, 81))))
    microbatch = build_microbatch([later, sample])
    prompts = (
        [sample.teacher_prompt_ids] * 2 + [(90, 91, 92)] + [(80, 81)] * (len(sample.query_positions) - 3)
    )
    rollout = sample.ids[sample.prompt_length :]
    expected = [
        (*prompt, *rollout[: p - sample.prompt_length]) for prompt, p in zip(prompts, sample.query_positions)
    ]
    plain = [
        (*sample.teacher_prompt_ids, *rollout[: p - sample.prompt_length]) for p in sample.query_positions
    ]
    assert [reading(microbatch, row) for row in microbatch.teacher_rows] == expected + plain
    assert len(microbatch.teacher_ids) == 4 and len(microbatch.teacher_prompts) == 3
    assert microbatch.query_weights.tolist() == [np.float32(1 / len(sample.query_positions))] * len(plain) * 2
    assert count_totals(outlines_of([later, sample]), "token").distilled_rollouts == 2
    of_later, of_plain = outlines_of([later, sample])
    assert [own[1] for own in of_later.views] == [len(sample.teacher_prompt_ids), 3, 2]
    assert bin_cost([of_later, of_plain], [0, 1]) == bin_cost_of(microbatch) + len(microbatch.teacher_prompts)


@pytest.mark.parametrize(("aggregation", "expected"), [("token", 0.2), ("rollout", 0.5), ("constant", 0.1)])
def test_aggregations_by_hand(aggregation, expected):
    """Two rollouts of 2 and 8 sampled tokens, whose losses are 1 and 0; no rollout may sample above 10."""
    samples = [plain_sample(5), plain_sample(11)]
    (batch,) = pack(samples, max_tokens=100, world_size=1, aggregation=aggregation, most_tokens=10)
    (microbatch,) = batch.microbatches
    losses = (microbatch.rollouts == 1) * 1.0  # the longer one comes first
    total = float((microbatch.row_weights * losses).sum()) / batch.totals.policy_weight
    assert total == pytest.approx(expected)


def test_ratios_are_to_the_engine_until_something_else_is_read():
    """So a log-probability of the engine that is no number reaches the loss, and the step is refused."""
    microbatch = build_microbatch(make_samples(5))
    assert len(microbatch.old_logprobs) and (microbatch.old_logprobs == microbatch.rollout_logprobs).all()


def test_rows_know_their_rollout_and_their_turn():
    """Samples are sorted by length. Numbers go on from one sample to the next."""
    samples = make_samples(5)
    microbatch = build_microbatch(samples)
    counts = [int(s.loss_mask.sum()) for s in samples]
    assert microbatch.rollouts.tolist() == np.repeat(np.arange(5), counts).tolist()
    pairs = [(number, turn) for number, s in enumerate(samples) for turn in s.turns[s.loss_mask]]
    first = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    assert microbatch.turns.tolist() == [first[pair] for pair in pairs]
