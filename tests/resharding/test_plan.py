"""Plans, simulated with numpy, against direct cuts of the full tensors."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from launch.cli import main
from megatron_sd.errors import ConfigError, ReshardError
from megatron_sd.resharding.balance import balance
from megatron_sd.resharding.layout import (
    Rectangle,
    ShardLayout,
    TensorSpec,
    WorkerId,
    WorkerLayout,
    WorkerTensor,
    check_parameters,
    check_tiling,
    check_worker,
)
from megatron_sd.resharding.names import FAMILIES, UnknownArchitectureError, whole_parameters, worker_layouts
from megatron_sd.resharding.plan import ReshardPlan, incoming, make_plan
from tests.training.fakes import write_model
from tests.training.tensor_parallel_oracle import worker_tensors


@st.composite
def model_configs(draw) -> dict:
    heads = draw(st.sampled_from([1, 2, 4, 6, 8]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.integers(1, 4))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return {
        "architectures": [family],
        "num_hidden_layers": draw(st.integers(0, 2)),
        "hidden_size": heads * head_dim,
        "head_dim": head_dim if family == "Qwen2ForCausalLM" else draw(st.integers(1, 5)),
        "intermediate_size": 8 * draw(st.sampled_from([3, 1, 2])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(1, 150)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


def divides(config: dict, tp_size: int) -> bool:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return heads % tp_size == 0 and max(kv_heads, tp_size) % min(kv_heads, tp_size) == 0


def plan_for(
    config: dict, *, world_size: int, tp_size: int, num_replicas: int = 1, dtype: str = "float32"
) -> ReshardPlan:
    source = ShardLayout(parameters=whole_parameters(config, dtype=dtype), world_size=world_size)
    return make_plan(source, worker_layouts(config, tp_size=tp_size, dtype=dtype), num_replicas=num_replicas)


def numbered(plan: ReshardPlan) -> dict[str, np.ndarray]:
    """Full parameters in which no two elements are equal, and none is 0."""
    full, start = {}, 1
    for spec in plan.source.parameters:
        full[spec.name] = np.arange(start, start + spec.numel).reshape(spec.shape)
        start += spec.numel
    return full


def shards_of(plan: ReshardPlan, full: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    return {
        name: value.reshape(-1)[slice(*plan.source.owned(value.size, rank))] for name, value in full.items()
    }


def places(offset: int, stride: int, part) -> np.ndarray:
    return (offset + stride * np.arange(part.num_runs)[:, None] + np.arange(part.run_length)).reshape(-1)


def simulate(
    plan: ReshardPlan, full: dict[str, np.ndarray], worker: int, bucket_numel: int
) -> dict[str, np.ndarray]:
    """The worker's tensors after the plan; fails when an element is written twice or padding at all, or
    never."""
    layout = plan.layout_of(worker)
    tensors = {t.spec.name: np.zeros(t.spec.numel, dtype=np.int64) for t in layout.tensors}
    shards = [shards_of(plan, full, rank) for rank in range(plan.source.world_size)]
    for rank, bucket in incoming(plan, worker, bucket_numel):
        assert sum(part.numel for part in bucket) <= bucket_numel
        for part in bucket:
            target = places(part.target_offset, part.target_stride, part)
            assert not tensors[part.tensor][target].any(), "written twice"
            source = places(part.source_offset, part.source_stride, part)
            tensors[part.tensor][target] = shards[rank][part.parameter][source]
    return {t.spec.name: tensors[t.spec.name].reshape(t.spec.shape) for t in layout.tensors}


@settings(max_examples=150, deadline=None)
@given(
    config=model_configs(),
    world_size=st.integers(1, 7),
    tp_size=st.sampled_from([1, 2, 4, 8]),
    num_replicas=st.integers(1, 3),
    bucket_numel=st.integers(1, 200),
)
def test_every_element_of_every_worker_arrives_once_and_is_the_right_one(
    config, world_size, tp_size, num_replicas, bucket_numel
):
    if not divides(config, tp_size):
        with pytest.raises(ConfigError, match=f"tensor-parallel size: found {tp_size}"):
            worker_layouts(config, tp_size=tp_size, dtype="float32")
        return
    plan = plan_for(config, world_size=world_size, tp_size=tp_size, num_replicas=num_replicas)
    full = numbered(plan)
    for worker in (*range(tp_size), plan.num_workers - 1):
        expected = worker_tensors(full, config, worker % tp_size, tp_size)
        found = simulate(plan, full, worker, bucket_numel)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        sent = sum(plan.num_bytes(rank, worker) for rank in range(world_size))
        assert (
            sent
            == plan.layout_of(worker).numel * 4
            == sum((value != 0).sum() for value in expected.values()) * 4
        )


@given(world_size=st.integers(1, 12), tp_size=st.sampled_from([1, 2, 4]), num_replicas=st.integers(1, 4))
def test_no_two_ranks_serve_a_worker_in_the_same_round(world_size, tp_size, num_replicas):
    layouts = [WorkerLayout(tp_rank=n, tp_size=tp_size, tensors=()) for n in range(tp_size)]
    source = ShardLayout(parameters=(), world_size=world_size)
    plan = ReshardPlan(source=source, workers=tuple(layouts), num_replicas=num_replicas)
    rounds = list(plan.rounds())
    for meetings in rounds:
        assert len({rank for rank, _ in meetings}) == len({worker for _, worker in meetings}) == len(meetings)
    everybody = {(rank, worker) for rank in range(world_size) for worker in range(plan.num_workers)}
    met = [pair for meetings in rounds for pair in meetings]
    assert set(met) == everybody and len(met) == len(everybody)
    for rank in range(world_size):
        assert plan.workers_of(rank) == [worker for number, worker in met if number == rank]
    for worker in range(plan.num_workers):
        assert plan.ranks_of(worker) == [rank for rank, number in met if number == worker]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_families_have_the_parameters_of_the_real_models(tmp_path, family, tied):
    path = write_model(tmp_path / "model", tied=tied, family=family)
    model = AutoModelForCausalLM.from_pretrained(path)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    described = whole_parameters(AutoConfig.from_pretrained(path).to_dict(), dtype="float32")
    assert {spec.name: spec.shape for spec in described} == found
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(spec.numel for spec in described)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_plan_of_72_billion_parameters_is_small_and_even():
    """The 8192 rows of a down_proj shard are at most three slices from each rank; long links fall into the
    same rounds."""
    plan = plan_for(QWEN_72B, world_size=64, tp_size=8, num_replicas=4, dtype="bfloat16")
    counted = balance(plan)
    assert counted.moved == 4 * 2 * sum(layout.numel for layout in plan.workers)
    assert counted.received[0] == counted.received[1] == 2 * plan.workers[0].numel
    assert counted.sent[1] / counted.sent[0] < 1.001
    assert counted.gathered == 2 * 72_706_203_648 * (63 + 32)
    assert counted.received[1] <= counted.longest_chain < 1.25 * counted.received[1]
    slices = list(plan.slices(17, 3))
    assert max(sum(part.tensor == name for part in slices) for name in {part.tensor for part in slices}) <= 9
    assert len(slices) < 1500


def test_the_command_prints_what_a_publish_would_move(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B))
    assert (
        main(["reshard-plan", f"--model={tmp_path}", "--num_ranks=64", "--tp_size=8", "--num_replicas=4"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "moved                 581.72 GB" in printed and "13814.18 GB, 23.7 times as much" in printed
    assert main(["reshard-plan", f"--model={tmp_path}", "--num_ranks=64", "--tp_size=6"]) == 2
    assert (
        "found 6, expected one that divides the model evenly; 64 attention heads" in capsys.readouterr().err
    )
    assert main(["reshard-plan", f"--model={tmp_path / 'none'}", "--num_ranks=1", "--tp_size=1"]) == 1
    assert "no model configuration at" in capsys.readouterr().err


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1, "hidden_size": 16, "head_dim": 8, "intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 70, "tie_word_embeddings": True,
}  # fmt: skip


def test_an_unknown_family_is_named():
    with pytest.raises(
        UnknownArchitectureError,
        match="GemmaForCausalLM has no shard layout, expected one of Qwen2ForCausalLM",
    ):
        worker_layouts(CONFIG | {"architectures": ["GemmaForCausalLM"]}, tp_size=1, dtype="float32")
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM lacks 'vocab_size'"):
        worker_layouts(
            {key: CONFIG[key] for key in CONFIG if key != "vocab_size"}, tp_size=1, dtype="float32"
        )


@pytest.mark.parametrize(
    ("tp_size", "message"),
    [(3, "4 attention heads, 2 key-value heads, padded vocabulary 128 cannot"), (0, "found 0"), (8, "4 att")],
)
def test_a_size_that_does_not_divide_the_model_is_refused(tp_size, message):
    with pytest.raises(ConfigError, match=message):
        worker_layouts(CONFIG, tp_size=tp_size, dtype="float32")


def test_differences_between_trainer_and_engine_are_named():
    source = ShardLayout(parameters=whole_parameters(CONFIG, dtype="float32"), world_size=2)
    check_parameters(source, whole_parameters(CONFIG, dtype="float32"))
    for other, message in (
        (
            whole_parameters(CONFIG | {"tie_word_embeddings": False}, dtype="float32"),
            r"lm_head.weight: missing, expected float32",
        ),
        (
            whole_parameters(CONFIG, dtype="bfloat16"),
            r"embed_tokens.weight: found float32\[70, 16\], expected bfloat16\[70, 16\]",
        ),
        (
            whole_parameters(CONFIG | {"vocab_size": 71}, dtype="float32"),
            r"1 parameters: .*found float32\[70, 16\], expected .*71",
        ),
        (
            whole_parameters(CONFIG | {"num_hidden_layers": 0}, dtype="float32"),
            r"layers.0.* found, expected no such tensor",
        ),
    ):
        with pytest.raises(ReshardError, match=message):
            check_parameters(source, other)


def test_a_worker_that_is_not_what_its_layout_says_is_named():
    _, layout = worker_layouts(CONFIG, tp_size=2, dtype="float32")
    found = {tensor.spec.name: tensor.spec for tensor in layout.tensors}
    worker = WorkerId(replica=1, tp_rank=1, tp_size=2)
    check_worker(worker, layout, found)
    head = TensorSpec(name="lm_head.weight", shape=(64, 16), dtype="float32")
    with pytest.raises(
        ReshardError, match=r"worker 3 \(replica 1, tensor-parallel rank 1 of 2\).*lm_head.weight: found"
    ):
        check_worker(worker, layout, found | {"lm_head.weight": head})


def test_what_no_worker_takes_and_what_the_trainer_lacks_is_named():
    workers = worker_layouts(CONFIG, tp_size=1, dtype="float32")
    parameters = whole_parameters(CONFIG, dtype="float32")
    stray = TensorSpec(name="v_head.weight", shape=(1, 16), dtype="float32")
    with pytest.raises(ReshardError, match=r"v_head.weight: the trainer has it, no worker takes it"):
        make_plan(ShardLayout(parameters=(*parameters, stray), world_size=1), workers, num_replicas=1)
    with pytest.raises(ReshardError, match=r"norm.weight: a worker needs it, the trainer does not have it"):
        make_plan(ShardLayout(parameters=parameters[:-1], world_size=1), workers, num_replicas=1)
    short = dataclasses.replace(parameters[0], shape=(69, 16))
    with pytest.raises(
        ReshardError, match=r"embed_tokens.weight: found shape \[69, 16\], a worker needs rows \(0, 70\)"
    ):
        make_plan(ShardLayout(parameters=(short, *parameters[1:]), world_size=1), workers, num_replicas=1)
    with pytest.raises(ReshardError, match="types bfloat16, float32, expected one of"):
        make_plan(
            ShardLayout(parameters=parameters, world_size=1),
            worker_layouts(CONFIG, tp_size=1, dtype="bfloat16"),
            num_replicas=1,
        )


def test_a_layout_with_a_gap_or_an_overlap_is_refused():
    spec = TensorSpec(name="w", shape=(4, 2), dtype="float32")
    upper = Rectangle(parameter="w", rows=(0, 2), columns=(0, 2))
    for pieces in (
        [upper],
        [upper, dataclasses.replace(upper, at_row=1)],
        [upper, dataclasses.replace(upper, at_row=3)],
    ):
        tensor = WorkerTensor(spec=spec, pieces=tuple(pieces))
        with pytest.raises(ReshardError, match="expected a tiling of 4 x 2"):
            check_tiling(WorkerLayout(tp_rank=0, tp_size=1, tensors=(tensor,)))
