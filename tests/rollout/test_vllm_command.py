"""What is decided about a vLLM server before it starts; vLLM is not needed for these."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from launch.serve import server_command
from megatron_sd.config import ModelConfig, RolloutConfig, VllmConfig
from megatron_sd.config.load import load
from megatron_sd.distributed.lockstep import Lockstep, News
from megatron_sd.distributed.world import World, lone_world
from megatron_sd.errors import ConfigError, DataError, RolloutError
from megatron_sd.rollout.vllm.connect import connect_vllm
from megatron_sd.rollout.vllm.options import ServedModel, check_server, server_arguments, server_environment
from megatron_sd.rollout.vllm.server_process import cause_of, require_vllm
from tests.rollout.fakes import codec

SHAPE = ServedModel(
    architecture="Qwen2ForCausalLM",
    vocabulary_size=448,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    tied=True,
)
MODEL = ModelConfig(path="policy", dtype="float32")


def limits(max_rollout_tokens=1024, **own) -> RolloutConfig:
    return RolloutConfig(
        engine="vllm", max_rollout_tokens=max_rollout_tokens, vllm=VllmConfig(**({"kv_cache_gib": 1.0} | own))
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tensor_parallel_sizes_that_divide_the_heads(size):
    check_server(SHAPE, MODEL, limits(tensor_parallel_size=size), on_cpu=True)


@pytest.mark.parametrize(("shape", "size"), [({}, 3), ({}, 16), ({"num_kv_heads": 4, "num_heads": 12}, 6)])
def test_tensor_parallel_sizes_that_do_not(shape, size):
    with pytest.raises(
        ConfigError,
        match=rf"tensor_parallel_size: found {size}, expected a divisor of the \d+ attention heads",
    ):
        check_server(
            dataclasses.replace(SHAPE, **shape), MODEL, limits(tensor_parallel_size=size), on_cpu=True
        )


def test_the_kv_cache_must_hold_one_rollout():
    """2 x 3 layers x 2 heads x 64 x 4 bytes = 3072 bytes a token."""
    check_server(SHAPE, MODEL, limits(kv_cache_gib=3072 * 1024 / 2**30), on_cpu=True)
    with pytest.raises(
        ConfigError, match=r"kv_cache_gib: found 0.002, expected at least 0.00293.*max_rollout_tokens 1024"
    ):
        check_server(SHAPE, MODEL, limits(kv_cache_gib=0.002), on_cpu=True)
    check_server(SHAPE, MODEL, limits(kv_cache_gib=0.002, tensor_parallel_size=2), on_cpu=True)
    with pytest.raises(ConfigError, match="found null, expected a number on a machine without a GPU"):
        check_server(SHAPE, MODEL, limits(kv_cache_gib=None), on_cpu=True)
    check_server(SHAPE, MODEL, limits(kv_cache_gib=None), on_cpu=False)


def test_devices_are_shared_out_among_replicas():
    rollout = limits(num_replicas=2, tensor_parallel_size=2, devices=(4, 5, 6, 7))
    check_server(SHAPE, MODEL, rollout, on_cpu=False)
    given = [server_environment({"PATH": "p"}, rollout, replica=n, on_cpu=False) for n in range(2)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in given] == ["4,5", "6,7"]
    assert all(e["PATH"] == "p" and "OMP_NUM_THREADS" not in e for e in given)
    with pytest.raises(ConfigError, match=r"devices: found 3 GPUs, expected .* = 2 x 2"):
        check_server(
            SHAPE, MODEL, limits(num_replicas=2, tensor_parallel_size=2, devices=(4, 5, 6)), on_cpu=False
        )


@pytest.mark.parametrize("own", [{"devices": (0,)}, {"num_replicas": 2}, {"kv_cache_gib": None}])
def test_ranks_that_are_the_engine_have_no_devices_replicas_or_unknown_memory(own):
    check_server(SHAPE, MODEL, limits(placement="colocated"), on_cpu=False)
    with pytest.raises(
        ConfigError, match=r"rollout.vllm.placement: found colocated with .*expected no devices and 1 replica"
    ):
        check_server(SHAPE, MODEL, limits(placement="colocated", **own), on_cpu=False)


def test_ranks_that_are_one_engine_come_out_even():
    world = World(rank=0, size=3, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="rollout.vllm.tensor_parallel_size: found 2 for 3 ranks, expected a divisor"
    ):
        Lockstep(world, 2, timeout_s=1.0)
    alone = Lockstep(world, 1, timeout_s=1.0)
    assert (alone.number, alone.num_groups) == (0, 3)
    assert alone.exchange(News(requests=(("k", 1),))) == ([News(requests=(("k", 1),))], False)
    assert alone.exchange(News(leaves=True)) == ([News(leaves=True)], True)


def test_a_rank_cannot_train_while_it_samples():
    config = {"run_dir": "r", "model.path": "m", "data.train": "q", "retriever.corpus": "c"}
    config |= {"rollout.engine": "vllm", "rollout.max_lag": "1"}
    with pytest.raises(
        ConfigError, match="rollout.max_lag: found 1 with rollout.vllm.placement colocated, expected 0"
    ):
        load([f"--{key}={value}" for key, value in config.items()] + ["--rollout.vllm.placement=colocated"])


def test_the_server_samples_from_what_it_reports():
    arguments = server_arguments(MODEL, limits(), host="127.0.0.1", port=1, on_cpu=True)
    for pair in (
        ("--logprobs-mode", "processed_logprobs"),
        ("--generation-config", "vllm"),
        ("--max-model-len", "1024"),
    ):
        assert arguments[arguments.index(pair[0]) + 1] == pair[1]


def test_model_shapes(tmp_path):
    known = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 9,
        "num_hidden_layers": 1,
        "hidden_size": 64,
    }
    known |= {"num_attention_heads": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(known | {"head_dim": 32, "num_key_value_heads": 2}))
    shape = ServedModel.read(str(tmp_path))
    assert (shape.head_dim, shape.num_kv_heads, shape.tied) == (32, 2, False)
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert (ServedModel.read(str(tmp_path)).head_dim, ServedModel.read(str(tmp_path)).num_kv_heads) == (16, 4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="expected the directory of a causal language model"):
        ServedModel.read(str(tmp_path))


@pytest.mark.parametrize(
    ("placement", "urls"), [("process", ("http://a:1",)), ("server", ()), ("colocated", ("http://a:1",))]
)
def test_addresses_belong_to_running_servers(tmp_path, placement, urls):
    write_shape(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"rollout\.vllm\.urls: found .* placement '{placement}'"):
        connect_vllm(model, limits(placement=placement, urls=urls), codec(), lone_world(), log_dir=tmp_path)


def test_servers_that_are_not_there_are_waited_for_and_then_named(tmp_path, caplog):
    write_shape(tmp_path)
    rollout = limits(placement="server", urls=("http://127.0.0.1:9",), start_timeout_s=1.5)
    with pytest.raises(
        RolloutError, match=r"127.0.0.1:9 broke .*, nor within 1.5 s \(rollout.vllm.start_timeout_s\): is"
    ):
        connect_vllm(ModelConfig(path=str(tmp_path)), rollout, codec(), lone_world(), log_dir=tmp_path)
    assert caplog.text.count("waiting for the vLLM server at http://127.0.0.1:9") == 1


def write_shape(directory) -> None:
    known = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 448,
        "num_hidden_layers": 1,
        "hidden_size": 64,
    }
    known["model_type"] = "qwen2"
    (directory / "config.json").write_text(json.dumps(known | {"num_attention_heads": 2}))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_message_says_how_to_get_it():
    with pytest.raises(
        ConfigError, match=r"rollout\.engine: found 'vllm'.*pip install .*\[vllm\].*engine torch"
    ):
        require_vllm()


def test_the_cause_is_the_engines_own_error():
    log = "\n".join(
        [
            (
                "(EngineCore pid=7) ERROR 11-22 [core.py:1750] ValueError: No available memory for the cache"
                " blocks."
            ),
            "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.",
            "vllm_server failed: RuntimeError: Engine core initialization failed.",
        ]
    )
    assert cause_of(log) == "ValueError: No available memory for the cache blocks."
    assert cause_of("noise\nvllm_server failed: ValueError: heads of 16") == "ValueError: heads of 16"
    assert cause_of("INFO nothing") == "it names no error"


def test_a_server_elsewhere_is_started_from_the_runs_own_configuration(tmp_path):
    write_shape(tmp_path)
    run = [
        f"--run_dir={tmp_path}",
        f"--model.path={tmp_path}",
        "--data.train=q.jsonl",
        "--retriever.corpus=c",
    ]
    run += [
        "--rollout.max_rollout_tokens=2048",
        "--rollout.vllm.kv_cache_gib=1",
        "--rollout.vllm.tensor_parallel_size=2",
    ]
    command, environment = server_command([*run, "--host=0.0.0.0", "--port=8011", "--cpu"])
    for pair in (
        ("--host", "0.0.0.0"),
        ("--port", "8011"),
        ("--max-model-len", "2048"),
        ("--tensor-parallel-size", "2"),
    ):
        assert command[command.index(pair[0]) + 1] == pair[1]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    with pytest.raises(ConfigError, match="tensor_parallel_size: found 3"):
        server_command([*run, "--rollout.vllm.tensor_parallel_size=3"])


def test_a_conversation_longer_than_the_models_positions_is_refused_before_vllm_starts():
    short = dataclasses.replace(SHAPE, positions=1000)
    check_server(short, MODEL, limits(max_rollout_tokens=1000), on_cpu=True)
    with pytest.raises(ConfigError, match="max_rollout_tokens is 1024, expected at most 1000, the positions"):
        check_server(short, MODEL, limits(max_rollout_tokens=1024), on_cpu=True)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default"}}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, None),
    ],
)
def test_positions_are_those_of_the_configuration_unless_they_are_stretched(rope, positions, tmp_path):
    own = {
        "vocab_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 4,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(own | {"architectures": ["Qwen2ForCausalLM"]} | rope), encoding="utf-8"
    )
    assert ServedModel.read(str(tmp_path)).positions == positions
