"""A model directory is loaded whole or refused in one line: a tensor that is missing is never a random
one."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sd.errors import DataError
from megatron_sd.pretrained.loading import load_causal_lm

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"
LAYER = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(START_POLICY, tmp_path / "model")


def configure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save(directory, weights):
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory, message):
    with pytest.raises(DataError, match=message):
        load_causal_lm(str(directory), dtype=torch.float32)


def test_a_whole_model_has_the_weights_of_its_file(directory):
    model, weights = (
        load_causal_lm(str(directory), dtype=torch.float32),
        load_file(directory / "model.safetensors"),
    )
    assert torch.equal(model.state_dict()[LAYER], weights[LAYER].float())


def test_a_missing_tensor_is_named(directory):
    weights = load_file(directory / "model.safetensors")
    del weights[LAYER]
    save(directory, weights)
    refused(
        directory, f"its weights lack {LAYER}, which would be random numbers; the model was saved in part"
    )


@pytest.mark.parametrize(
    ("prefix", "cause"), [("module.", "as a wrapper"), ("base_model.model.", "as peft saves it")]
)
def test_a_prefix_of_all_names_is_told(directory, prefix, cause):
    save(
        directory,
        {prefix + name: value for name, value in load_file(directory / "model.safetensors").items()},
    )
    refused(directory, f"every name begins with '{prefix}', {cause}")


def test_layers_that_the_configuration_does_not_have_are_named(directory):
    configure(directory, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(
        directory,
        r"its weights hold model.layers.3.input_layernorm.weight.*config.json describes a smaller model",
    )


def test_an_untied_model_without_a_head_is_named(directory):
    configure(directory, tie_word_embeddings=False)
    refused(directory, "lack lm_head.weight.*set tie_word_embeddings to true")


def test_another_vocabulary_says_both_sizes(directory):
    configure(directory, vocab_size=700)
    refused(
        directory, r"model.embed_tokens.weight is \(623, 128\) in the weights and \(700, 128\) by config.json"
    )


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors"])
def test_quantised_weights_are_refused_at_once(directory, method):
    configure(directory, quantization_config={"quant_method": method})
    refused(directory, f"holds quantised weights \\({method}, .*give the unquantised directory")


def test_files_that_are_not_whole_are_named(directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(directory, f"model.safetensors is cut short: {len(content) // 2} of {len(content)} bytes")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(directory, "is a Git LFS pointer, not the weights: run `git lfs pull`")


def test_an_index_that_does_not_fit_is_named(directory):
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, half = list(weights), len(weights) // 2
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for part, own in zip(parts, (names[:half], names[half:])):
        save_file({name: weights[name] for name in own}, directory / part, metadata={"format": "pt"})
    refused(
        directory, "holds model-00001-of-00002.safetensors and 1 more, but no model.safetensors.index.json"
    )
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names[:half], parts[0])}))
    refused(directory, "does not name .* of model-00002-of-00002.safetensors")
    places = {name: parts[number >= half] for number, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    load_causal_lm(str(directory), dtype=torch.float32)
    index.write_text(json.dumps({"weight_map": places}))
    refused(
        directory,
        'model.safetensors.index.json has no "metadata", which transformers needs: .* add "metadata": {}',
    )
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / parts[1]).unlink()
    refused(directory, "lacks model-00002-of-00002.safetensors")


def test_what_is_no_model_directory_says_what_it_is(directory, tmp_path):
    refused(tmp_path / "nowhere", "found no directory")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "BASE"}))
    refused(directory, "holds a model and beside it an adapter .*of BASE")
    (directory / "config.json").unlink()
    refused(directory, "holds a LoRA adapter alone.*merge it into its base BASE first")
    (directory / "adapter_config.json").unlink()
    (directory / "model-q8_0.gguf").write_bytes(b"GGUF")
    refused(directory, r"holds a GGUF file \(model-q8_0.gguf\)")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("t5", "T5ForConditionalGeneration"), ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")],
)
def test_other_kinds_of_models_are_named_in_one_line(directory, kind, name):
    (directory / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [name]}))
    refused(directory, f"holds a {name}, expected a text-only causal language model")
