"""Sequences one after the other in one row, without padding: none sees another, and every step is that of
padded ones."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import AttentionInterface

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack, padding_share
from megatron_sd.algorithm.packing.bins import TALLIES, bin_cost
from megatron_sd.algorithm.packing.microbatches import build_microbatch, distilled_part
from megatron_sd.algorithm.packing.outlines import outlines_of
from megatron_sd.algorithm.packing.rows import student_row, teacher_row
from megatron_sd.config.load import load
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError
from megatron_sd.training import varlen_attention
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.policy_module import hidden_rows, teacher_hidden_rows
from megatron_sd.training.start_policy import load_for_training
from tests.launched import assert_same_figures, outcomes_on
from tests.rank_programs.update_steps import Order, take_steps
from tests.training.fakes import make_config, make_samples, write_model
from tests.training.same_steps import assert_same_steps

CPU = torch.device("cpu")
PLAIN = {"distill": {"measure_every": 0}}
CASES = {
    "measured": {"kl_weight": 0.05},
    "checkpointing": PLAIN | {"model": {"gradient_checkpointing": True}},
    "ema_teacher": {"distill": {"measure_every": 0, "teacher": "ema", "ema_decay": 0.5}},
}
ATTENTION = {"packed": "sdpa", "shared": "varlen"}


def packed_attention(
    module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **options
):
    """What flash attention computes from the sequences' starts, one sequence at a time; it has no mask."""
    assert (
        attention_mask is None
        and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        and cu_seq_lens_q.dtype == torch.int32
    )
    assert int(cu_seq_lens_q.diff().max()) == max_length_q and int(cu_seq_lens_q[-1]) == query.shape[2]
    key, value = (repeat_kv(part, module.num_key_value_groups) for part in (key, value))
    parts = [
        scaled_dot_product_attention(
            *(part[:, :, start:stop] for part in (query, key, value)), is_causal=True
        )
        for start, stop in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist())
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("packed_oracle", packed_attention)


def eager_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn computes, one sequence at a time; torch has it on CUDA alone. The window is
    counted from the last key: query n of q sees keys up to n + (keys - q)."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert type(max_q) is int is type(max_k)
    assert [int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())] == [max_q, max_k]
    assert [int(cu_seq_q[-1]), int(cu_seq_k[-1])] == [len(query), len(key)]
    parts = []
    for number in range(len(cu_seq_q) - 1):
        own, seen = (slice(*starts[number : number + 2].tolist()) for starts in (cu_seq_q, cu_seq_k))
        more = (seen.stop - seen.start) - (own.stop - own.start)
        mask = torch.ones(own.stop - own.start, seen.stop - seen.start, dtype=torch.bool).tril(more)
        parts.append(
            scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in (query[own], key[seen], value[seen])),
                attn_mask=mask,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("packed") / "model")


def a_microbatch():
    return build_microbatch(make_samples(7, one_prompt_a_group=True))


def num_shared(m) -> int:
    """Tokens of prompts that are read again for the second and every later sample of a group."""
    prompts = [tuple(ids[:length]) for ids, length in zip(m.input_ids, m.prompt_lengths)]
    return sum(map(len, prompts)) - sum(map(len, set(prompts)))


def test_a_shared_row_by_hand():
    """Two rollouts of one prompt, one of another, and one that is its prompt alone after a cut."""
    m = dataclasses.replace(
        build_microbatch([]),
        input_ids=np.array([[1, 2, 3, 4], [7, 8, 0, 0], [1, 2, 5, 0], [1, 2, 0, 0]]),
        lengths=np.array([4, 2, 3, 2]),
        prompt_lengths=np.array([2, 1, 2, 2]),
        row_index=np.array([1, 2, 4, 9, 13]),
        layout="shared",
    )
    row = student_row(m)
    assert row.ids.tolist() == [[1, 2, 3, 4, 5, 7, 8]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.parts == ((2, None), (2, 0), (1, 0), (2, None))
    assert row.rows.tolist() == [1, 2, 5, 1, 1]
    assert row.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert (row.starts.tolist(), row.key_starts.tolist()) == ([0, 2, 4, 5, 7], [0, 2, 6, 9, 11])
    assert (row.longest, row.most_seen) == (2, 4)


def test_rows_hold_the_tokens_that_they_are_asked_for():
    """The student's row n is the token before its target; the teacher's sequence is its prompt and the
    continuation."""
    samples, m = make_samples(7, one_prompt_a_group=True), a_microbatch()
    row = student_row(m)
    assert row.ids[0].tolist() == [token for sample in samples for token in sample.ids]
    assert row.ids[0, row.rows].tolist() == m.input_ids.flatten()[m.row_index].tolist()
    assert row.starts.tolist() == np.cumsum([0, *m.lengths]).tolist() and row.longest == m.lengths.max()
    assert row.positions[0].tolist() == [position for length in m.lengths for position in range(length)]
    views = [view for sample in samples if sample.is_distilled for view in sample.teacher_views]
    row = teacher_row(m)
    assert row.ids[0].tolist() == [
        token for view in views for token in (*view.prompt_ids[:-1], *view.continuation)
    ]
    assert row.ids[0, row.rows].tolist() == m.teacher_ids.flatten()[m.teacher_rows].tolist()


def test_transformers_flash_attention_finds_the_same_sequences():
    """By positions alone, were the starts not handed on."""
    for row in (student_row(a_microbatch()), teacher_row(a_microbatch())):
        (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(torch.from_numpy(row.positions))
        assert starts.tolist() == row.starts.tolist() and int(longest) == row.longest


READINGS = {
    "transformers' mask of positions": ("sdpa", "packed"),
    "starts, as flash attention gets them": ("packed_oracle", "packed"),
    "part by part": ("varlen", "packed"),
    "part by part, shared": ("varlen", "shared"),
    "torch's varlen attention": ("varlen on CUDA", "packed"),
    "torch's varlen attention, shared": ("varlen on CUDA", "shared"),
}


@pytest.mark.parametrize("reading", READINGS)
def test_packed_sequences_have_the_hidden_states_of_padded_ones(model_path, reading, monkeypatch):
    attention, layout = READINGS[reading]
    if attention == "varlen on CUDA":
        attention = "varlen"
        monkeypatch.setattr(varlen_attention, "varlen_attn", eager_varlen)
        monkeypatch.setattr(varlen_attention, "_part_by_part", varlen_attention._flash)
    config = make_config(model_path)
    padded, packed = (
        DeviceMicrobatch.of(dataclasses.replace(a_microbatch(), layout=p), CPU) for p in ("padded", layout)
    )
    model = load_for_training(config.model)
    expected = hidden_rows(model, padded.input_ids, padded.row_index), teacher_hidden_rows(model, padded)
    model.set_attn_implementation(attention)
    found = (
        hidden_rows(model, packed.input_ids, packed.row_index, packed.runs),
        teacher_hidden_rows(model, packed),
    )
    tokens, shared = int(a_microbatch().lengths.sum()), num_shared(a_microbatch())
    assert shared > 0
    assert packed.input_ids.shape == (1, tokens - (shared if layout == "shared" else 0))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("attention", "layout"), [("sdpa", "packed"), ("varlen", "shared")])
def test_a_token_changes_nothing_in_other_sequences(model_path, attention, layout):
    """No contamination: bit for bit, before and after the sequence that changes, the first after its prompt."""
    m = a_microbatch()
    model = load_for_training(make_config(model_path).model).eval()
    model.set_attn_implementation(attention)
    changed, place = m.input_ids.copy(), m.prompt_lengths[3]
    changed[3, place] = (changed[3, place] + 1) % 97
    rows = []
    for ids in (m.input_ids, changed):
        on_device = DeviceMicrobatch.of(dataclasses.replace(m, input_ids=ids, layout=layout), CPU)
        with torch.no_grad():
            rows.append(hidden_rows(model, on_device.input_ids, on_device.row_index, on_device.runs))
    own = (m.row_index // m.input_ids.shape[1] == 3) & (m.row_index % m.input_ids.shape[1] >= place)
    assert torch.equal(rows[0][~own], rows[1][~own])
    assert (rows[0][own] != rows[1][own]).any(1).all()


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_microbatches_are_filled_by_what_is_read(layout):
    """No padding; a teacher's prompt counts for each of its continuations, or once. Passes and empty
    microbatches keep the layout."""
    samples = make_samples(16, one_prompt_a_group=True)
    batches = pack(samples, max_tokens=150, world_size=2, aggregation="token", layout=layout)
    for microbatch in (m for batch in batches for m in batch):
        read = student_row(microbatch).ids.size + (
            teacher_row(microbatch).ids.size if len(microbatch.teacher_rows) else 0
        )
        assert microbatch.layout == layout and read <= 150
        outlines = outlines_of(
            [
                s
                for s in samples
                if any(np.array_equal(s.ids, ids[: len(s.ids)]) for ids in microbatch.input_ids)
            ]
        )
        assert bin_cost(outlines, range(len(outlines)), tally=TALLIES[layout]) == read
    assert padding_share(batches[0]) == 0.0
    assert padding_share(pack(samples, max_tokens=150, world_size=2, aggregation="token")[0]) > 0.0
    nothing = TermWeights(policy=0.0, distill_spread=0.0, distill_no_spread=0.0)
    assert distilled_part(batches[0].microbatches[0], nothing).layout == layout
    (alone,) = pack(samples[:1], max_tokens=150, world_size=2, aggregation="token", layout=layout)[1]
    assert alone.layout == layout and len(alone.row_index) == 0


def test_rollouts_of_a_prompt_are_read_together():
    """Three groups, whose rollouts come in turn, in two microbatches: one prompt alone is read in both."""
    samples = make_samples(16, one_prompt_a_group=True)
    (batch,) = pack(samples, max_tokens=150, world_size=1, aggregation="token", layout="shared")
    prompts = [{tuple(ids[:n]) for ids, n in zip(m.input_ids, m.prompt_lengths)} for m in batch]
    assert [len(own) for own in prompts] == [2, 2] and len(prompts[0] & prompts[1]) == 1


@pytest.fixture(scope="module")
def outcomes(model_path, tmp_path_factory):
    orders = {
        f"{name} {layout}": order_of(model_path, name, layout) for name in CASES for layout in ATTENTION
    }
    return outcomes_on(2, orders, tmp_path_factory.mktemp("outcomes"))


def order_of(model_path, name: str, layout: str) -> dict:
    case = CASES[name]
    config = case | {
        "update": {"pack_sequences": layout != "padded"},
        "model": case.get("model", {}) | {"attention": ATTENTION.get(layout, "sdpa")},
    }
    own = {"num_samples": 8, "one_prompt_a_group": True}
    return {"model": str(model_path), "steps": 2, "config": config, **own}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("layout", ATTENTION)
@pytest.mark.parametrize("name", sorted(CASES))
def test_packed_steps_are_the_steps_of_padded_ones(outcomes, model_path, name, layout):
    """Two ranks without padding against one with it; the gradient ratio's passes, too."""
    first, second = outcomes[f"{name} {layout}"]
    alone = take_steps(Order(**order_of(model_path, name, "padded")), join_world())
    assert first["errors"] == [] and first["version"] == 2
    assert_same_figures(first, alone)
    assert_same_steps(outcomes[f"{name} {layout}"], [alone])
    assert all(torch.equal(tensor, second["parameters"][key]) for key, tensor in first["parameters"].items())


@pytest.mark.parametrize("layout", ATTENTION)
def test_a_policy_of_another_family_is_refused_before_it_is_loaded(model_path, layout, monkeypatch):
    monkeypatch.setattr(varlen_attention, "PACKED_FAMILIES", ("llama",))
    order = Order(**order_of(model_path, "measured", layout))
    with pytest.raises(
        ConfigError, match="update.pack_sequences: found true for a model of the family qwen2"
    ):
        take_steps(order, join_world())


def test_packing_and_sharing_sequences_exclude_each_other():
    required = [
        "--run_dir=r",
        "--model.path=m",
        "--data.train=q",
        "--retriever.corpus=c",
        "--update.sequence_parallel_size=2",
    ]
    with pytest.raises(
        ConfigError, match="update.pack_sequences: found true with update.sequence_parallel_size above 1"
    ):
        load([*required, "--update.pack_sequences=true"])


def test_varlen_attention_has_the_signature_of_torchs():
    """The stand-in takes what torch takes: names, order, and what may be left out."""
    theirs = inspect.signature(varlen_attention.varlen_attn).parameters
    ours = inspect.signature(eager_varlen).parameters
    assert list(ours)[:7] == list(theirs)[:7] and ours.keys() <= theirs.keys()


def test_varlen_attention_is_for_packed_rows():
    required = [
        "--run_dir=r",
        "--model.path=m",
        "--data.train=q",
        "--retriever.corpus=c",
        "--model.attention=varlen",
    ]
    assert load([*required, "--update.pack_sequences=true"]).model.attention == "varlen"
    with pytest.raises(ConfigError, match="model.attention: found varlen without update.pack_sequences"):
        load(required)
    query = torch.zeros(2, 4, 3, 8)
    with pytest.raises(ConfigError, match="found varlen for 2 rows without sequence starts"):
        varlen_attention.packed_attention(None, query, query, query, None)
