"""Weights that are read where they are wanted: the same values as a whole load, and a whole load where
files do not allow it."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sd.config.load import load
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import DataError
from megatron_sd.pretrained.loading import load_causal_lm
from megatron_sd.pretrained.on_demand import stored_in
from megatron_sd.training.deepspeed_config import deepspeed_config
from megatron_sd.training.placement import place
from megatron_sd.training.start_policy import load_for_training

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"
LAYER = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(START_POLICY, tmp_path / "model")


def settings_for(directory, **options):
    own = {
        "run_dir": "none",
        "data.train": "none",
        "retriever.corpus": "none",
        "model.path": directory,
        **options,
    }
    config = load([f"--{name}={value}" for name, value in own.items()])
    return config, deepspeed_config(
        config.update, config.optimizer, dtype=config.model.dtype, world_size=1, device_type="cpu", layer=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_read_from_the_file_are_those_of_the_whole_model(directory, dtype):
    config, settings = settings_for(directory, **{"model.dtype": dtype})
    model = load_for_training(config.model, on_demand=True)
    assert all(stored_in(parameter) is not None for parameter in model.parameters())
    place(model, model, settings, join_world().device)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    parameters = dict(whole.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.ds_tensor.view(parameter.ds_shape), parameters[name]), name
        assert parameter.ds_tensor.dtype == getattr(torch, dtype)
        assert stored_in(parameter) is None, "the file is let go"
    for (name, buffer), (_, expected) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_part_of_a_tensor_is_that_part(directory):
    weights = load_file(directory / "model.safetensors")
    parameter = dict(load_causal_lm(str(directory), dtype=torch.float32, on_demand=True).named_parameters())[
        LAYER
    ]
    target = torch.full((100,), 7.0)
    stored_in(parameter).read(target[10:90], 1003, 1083)
    assert torch.equal(target[10:90], weights[LAYER].float().view(-1)[1003:1083])
    assert (target[:10] == 7).all()
    assert (target[90:] == 7).all()


def test_an_untied_head_is_read_apart(directory):
    path, weights = directory / "config.json", load_file(directory / "model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(str(directory), dtype=torch.float32, on_demand=True)
    head = model.get_output_embeddings().weight
    read = torch.empty(head.numel())
    stored_in(head).read(read, 0, head.numel())
    assert torch.equal(read.view(head.shape), weights["lm_head.weight"].float())


def rename_as_older_files_do(weights):
    return {name.removeprefix("model."): value for name, value in weights.items()}


def store_the_tied_head_too(weights):
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("change", [rename_as_older_files_do, store_the_tied_head_too])
def test_files_that_need_transformers_are_loaded_whole(directory, change):
    weights = load_file(directory / "model.safetensors")
    save_file(change(weights), directory / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(str(directory), dtype=torch.float32, on_demand=True)
    assert all(stored_in(parameter) is None for parameter in model.parameters())
    assert torch.equal(dict(model.named_parameters())[LAYER], weights[LAYER].float())


def test_a_missing_tensor_is_named_all_the_same(directory):
    weights = load_file(directory / "model.safetensors")
    del weights[LAYER]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"its weights lack {LAYER}, which would be random numbers"):
        load_causal_lm(str(directory), dtype=torch.float32, on_demand=True)
