"""An encoder is used as its own files say, with all of its weights, or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5Model

from data_prep.vectors.encode import EncodeConfig, encoder_settings
from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.encoder import Encoder
from tests.retrieval.fakes_encoder import tiny_encoder

CPU = torch.device("cpu")


@pytest.fixture
def encoder_path(tmp_path):
    return tiny_encoder(tmp_path)


def settings(path, **given):
    return encoder_settings(EncodeConfig(passages="", encoder=str(path), output="", **given))


def says(path, name, value):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(value))


def module(kind, path=""):
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({}, "mean"),
    ],
)
def test_pooling_is_the_encoders_own(encoder_path, pooling, expected):
    says(encoder_path, "1_Pooling/config.json", pooling)
    assert settings(encoder_path).pooling == expected
    assert settings(encoder_path, pooling="last").pooling == "last", "what is asked for wins"


def test_normalisation_prefix_and_length_are_the_encoders_own(encoder_path):
    assert (settings(encoder_path).normalize, settings(encoder_path).max_tokens) == (True, 64), (
        "all its positions"
    )
    says(encoder_path, "modules.json", [module("Transformer"), module("Pooling", "1_Pooling")])
    says(encoder_path, "sentence_bert_config.json", {"max_seq_length": 48})
    says(encoder_path, "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    found = settings(encoder_path)
    assert (found.normalize, found.max_tokens, found.query_prefix) == (False, 48, "query: ")
    says(
        encoder_path,
        "modules.json",
        [module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize")],
    )
    assert settings(encoder_path).normalize is True


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "modules.json",
            [module("Transformer"), module("CNN", "2_CNN")],
            "has a module CNN, expected Transformer, Pooling",
        ),
        (
            "modules.json",
            [module("Dense", "2"), module("Pooling")],
            "has the modules Dense, Pooling, expected them in the order",
        ),
        ("modules.json", [module("Dense", "../2")], "names the folder '../2', expected one within it"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "pools by pooling_mode_max_tokens, expected one of",
        ),
    ],
)
def test_vectors_made_in_a_way_we_do_not_are_refused(encoder_path, name, value, message):
    says(encoder_path, name, value)
    with pytest.raises(DataError, match=message):
        settings(encoder_path)


@pytest.mark.parametrize(
    ("prefix", "message"), [("lm_q.", "every name begins with 'lm_q.'"), (None, "its weights lack ")]
)
def test_an_encoder_without_its_weights_is_no_encoder(encoder_path, tmp_path, prefix, message):
    """Random ones in their place would be others at every opening."""
    broken = tmp_path / "broken"
    shutil.copytree(encoder_path, broken)
    weights = load_file(broken / "model.safetensors")
    kept = (
        {prefix + name: value for name, value in weights.items()}
        if prefix
        else dict(sorted(weights.items())[1:])
    )
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=message):
        Encoder(broken, settings(encoder_path, max_tokens=8), CPU)


def test_of_t5_the_encoder_alone_reads(encoder_path, tmp_path):
    """GTR and sentence-T5; a whole T5 has a decoder, too."""
    path = tmp_path / "t5"
    shutil.copytree(encoder_path, path)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5Model(T5Config(vocab_size=200, decoder_start_token_id=0, **sizes))
    model.save_pretrained(path)
    encoder = Encoder(path, settings(path, max_tokens=8, normalize=False), CPU)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)("kalo dava").input_ids])
    with torch.no_grad():
        expected = model.eval().encoder(input_ids=ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(
        torch.from_numpy(encoder.encode(["kalo dava"])[0]), expected, rtol=1e-5, atol=1e-6
    )


def test_a_length_beyond_the_positions_is_named(encoder_path):
    encoder = Encoder(encoder_path, settings(encoder_path, max_tokens=9999), CPU)
    with pytest.raises(
        DataError, match=r"max_tokens: found 9999 and a text of \d+ tokens, expected at most 64"
    ):
        encoder.encode(["kalo " * 999])
