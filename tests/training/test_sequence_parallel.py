"""Sequences that ranks share: four real ranks in groups of two and of four take the steps of one. One
launch."""

from functools import partial

import numpy as np
import pytest
import torch

from megatron_sd.algorithm.packing.microbatches import build_microbatch, row_share, row_weight
from megatron_sd.config.load import load
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError
from megatron_sd.training.parallel.sequence import mask_in_group_order
from tests.launched import assert_same_figures, outcomes_on
from tests.rank_programs.update_steps import Order, take_steps
from tests.training.fakes import make_config, make_policy, make_samples, write_model
from tests.training.same_steps import assert_same_steps

NUM_RANKS = 4
# Name -> configuration of the steps, ranks that share a sequence, and what else is ordered. The models have
# two key-value heads.
CASES = {
    "pairs": ({"kl_weight": 0.05}, 2, {}),
    "all": ({"kl_weight": 0.05, "distill": {"measure_every": 0}}, 4, {}),
    "other_family": ({"distill": {"measure_every": 0}}, 4, {"model": "llama"}),
    "checkpointing": ({"distill": {"measure_every": 0}, "model": {"gradient_checkpointing": True}}, 2, {}),
    "stage_2": ({"distill": {"measure_every": 0}, "update": {"zero_stage": 2}}, 2, {}),
    "ema_teacher": ({"distill": {"measure_every": 0, "teacher": "ema", "ema_decay": 0.5}}, 2, {}),
    "adapters": ({"distill": {"measure_every": 0}, "model": {"lora": {"rank": 4, "alpha": 8.0}}}, 2, {}),
    "one_sample": ({"distill": {"measure_every": 0}}, 2, {"num_samples": 1}),
}
COMPARED = {name: case for name, case in CASES.items() if name != "checkpointing"}


def order_of(directory, name: str, *, sharers: int | None = None) -> dict:
    config, size, rest = CASES[name]
    update = config.get("update", {}) | {"sequence_parallel_size": sharers or size}
    fields = {"steps": 2, "num_samples": 8} | rest
    return fields | {
        "model": str(directory / rest.get("model", "qwen2")),
        "config": config | {"update": update},
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """name -> what each of the four ranks made of it."""
    directory = tmp_path_factory.mktemp("sequences")
    write_model(directory / "qwen2")
    write_model(directory / "llama", family="llama", tied=False, seed=1)
    orders = {name: order_of(directory, name) for name in CASES}
    saved = orders["pairs"] | {"checkpoint": str(directory / "ck")}
    orders |= {"first_half": saved | {"steps": 1}, "second_half": saved | {"steps": 2}}
    return outcomes_on(NUM_RANKS, orders, directory) | {"directory": directory}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted(COMPARED))
def test_ranks_that_share_sequences_take_the_step_of_one(outcomes, name):
    """Losses, gradient norms, the KL term and the gradient ratio; teachers, checkpointing and adapters
    alike."""
    first, *others = outcomes[name]
    alone = take_steps(Order(**order_of(outcomes["directory"], name, sharers=1)), join_world())
    assert first["errors"] == [] and first["version"] == 2
    assert_same_figures(first, alone)
    assert_same_steps(outcomes[name], [alone])
    for key, parameter in first["parameters"].items():
        assert all(torch.equal(parameter, other["parameters"][key]) for other in others)


@pytest.mark.slow
@pytest.mark.ranks
def test_checkpointed_activations_change_no_bit(outcomes):
    """They repeat the all-to-alls of the forward; measured against the same ranks without."""
    plain, found = outcomes["stage_2"][0], outcomes["checkpointing"][0]
    assert found["errors"] == []
    for one, other in zip(plain["history"], found["history"], strict=True):
        assert other == pytest.approx(one, rel=4e-6, abs=2e-6)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rank_reads_its_slice_only(outcomes):
    """Four ranks that share all sequences read a quarter each, and padding to a multiple of four."""
    alone = take_steps(Order(**order_of(outcomes["directory"], "all", sharers=1)), join_world())[
        "tokens_read"
    ]
    for outcome in outcomes["all"]:
        assert alone / NUM_RANKS <= outcome["tokens_read"] < 1.15 * alone / NUM_RANKS


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_that_share_sequences_resume_bit_for_bit(outcomes):
    for straight, first, second in zip(outcomes["pairs"], outcomes["first_half"], outcomes["second_half"]):
        assert first["history"] + second["history"] == straight["history"]
        assert all(
            torch.equal(second["parameters"][name], tensor) for name, tensor in straight["parameters"].items()
        )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_mask_shows_each_query_what_came_before_it(size):
    """Against positions: three cached prompts of 5, 3 and 0 tokens in 5 columns, then 6 new tokens."""
    lengths, width, num_new = [5, 3, 0], 5, 6
    is_token = torch.tensor(
        [[column < length for column in range(width)] + [True] * num_new for length in lengths]
    )
    found = mask_in_group_order(is_token, num_new, size)
    cached_width, new_width = -(-width // size), -(-num_new // size)
    keys = [  # (is new, column), as ranks hold them
        (is_new, rank * share + column)
        for rank in range(size)
        for is_new, share in ((False, cached_width), (True, new_width))
        for column in range(share)
    ]
    assert found.shape == (3, 1, size * new_width, len(keys))
    for row, length in enumerate(lengths):
        for query in range(num_new):
            expected = [column <= query if is_new else column < length for is_new, column in keys]
            assert found[row, 0, query].tolist() == expected


def test_shares_of_rows_are_the_rows():
    """Each row and query row once; a teacher's row stays with the row it belongs to."""
    whole = build_microbatch(make_samples(6), partial(row_weight, aggregation="rollout"))
    shares = [row_share(whole, rank, 3) for rank in range(3)]
    for name in (
        "row_index",
        "targets",
        "advantages",
        "row_weights",
        "rollout_logprobs",
        "rollouts",
        "turns",
    ):
        merged = np.concatenate([getattr(share, name) for share in shares])
        assert sorted(merged) == sorted(getattr(whole, name))
    pairs = [
        pair
        for share in shares
        for pair in zip(share.row_index[share.query_rows], share.teacher_rows, share.query_weights)
    ]
    assert sorted(pairs) == sorted(
        zip(whole.row_index[whole.query_rows], whole.teacher_rows, whole.query_weights)
    )
    assert all((np.diff(share.query_rows) > 0).all() and len(share.query_rows) > 0 for share in shares)
    alone = row_share(whole, 0, 1)
    assert all(np.array_equal(getattr(alone, name), getattr(whole, name)) for name in vars(whole))


def test_what_sequence_parallelism_cannot_do_is_refused(tmp_path):
    required = [
        "--run_dir=r",
        "--model.path=m",
        "--data.train=q",
        "--retriever.corpus=c",
        "--update.sequence_parallel_size=2",
    ]
    with pytest.raises(
        ConfigError,
        match="model.attention: found flash_attention_2 with update.sequence_parallel_size above 1",
    ):
        load([*required, "--model.attention=flash_attention_2"])
    config = make_config(write_model(tmp_path / "model"), update={"sequence_parallel_size": 2})
    with pytest.raises(
        ConfigError, match="update.sequence_parallel_size: found 2 for 1 ranks, expected a divisor of their"
    ):
        make_policy(config, join_world())
