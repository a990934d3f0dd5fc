"""Encoders whose vectors are no mean of hidden states alone: Dense layers behind the pooling, and DPR's two
halves."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, write_table
from data_prep.vectors.encode import EncodeConfig, encode_passages, encoder_settings
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.corpus.encoder import Encoder
from megatron_sd.retrieval.corpus.manifest import read_manifest
from tests.retrieval.fakes_encoder import tiny_encoder

CPU = torch.device("cpu")
TEXTS = ["kalo dava", "miren", "sul sul tovi rask lunet"]


def settings(path, **given):
    return encoder_settings(
        EncodeConfig(passages="", encoder=str(path), output="", **({"max_tokens": 16} | given))
    )


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dense_encoder(path, *layers, normalize=True, pickled=False):
    """An encoder with layers (in, out, bias, activation) behind its mean, laid out as sentence-transformers
    does."""
    tiny_encoder(path)
    kinds = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *(("Dense", f"{n}_Dense") for n in range(2, 2 + len(layers))),
    ]
    kinds += [("Normalize", f"{2 + len(layers)}_Normalize")] if normalize else []
    write_json(
        path / "modules.json",
        [{"type": f"sentence_transformers.models.{kind}", "path": name} for kind, name in kinds],
    )
    write_json(path / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    torch.manual_seed(1)
    for number, (num_in, num_out, bias, activation) in enumerate(layers, start=2):
        config = {"in_features": num_in, "out_features": num_out, "bias": bias}
        config["activation_function"] = f"torch.nn.modules.activation.{activation}"
        write_json(path / f"{number}_Dense/config.json", config)
        weights = {"linear.weight": torch.randn(num_out, num_in)} | (
            {"linear.bias": torch.randn(num_out)} if bias else {}
        )
        if pickled:
            torch.save(weights, path / f"{number}_Dense/pytorch_model.bin")
        else:
            save_file(weights, path / f"{number}_Dense/model.safetensors")
    return path


def mean_of(path, text):
    """The mean over the tokens, through plain transformers."""
    inputs = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(path)(**inputs).last_hidden_state[0].double().mean(0).numpy()


def weights_of(path, pickled):
    return (
        torch.load(path / "pytorch_model.bin", weights_only=True)
        if pickled
        else load_file(path / "model.safetensors")
    )


@pytest.mark.parametrize("pickled", [False, True])
def test_a_dense_layer_is_a_map_a_function_and_then_the_length(tmp_path, pickled):
    path = dense_encoder(tmp_path / "e", (32, 6, True, "Tanh"), pickled=pickled)
    weights = {name: value.double().numpy() for name, value in weights_of(path / "2_Dense", pickled).items()}
    encoder = Encoder(path, settings(path), CPU)
    found = encoder.encode(TEXTS)
    assert (encoder.dim, found.shape) == (6, (3, 6))
    for own, text in zip(found, TEXTS, strict=True):
        expected = np.tanh(weights["linear.weight"] @ mean_of(path, text) + weights["linear.bias"])
        np.testing.assert_allclose(own, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5)


def test_two_layers_follow_each_other_without_a_length(tmp_path):
    """EmbeddingGemma's form: out to more numbers and back, no function; GELU here in the second to tell
    them apart."""
    path = dense_encoder(tmp_path / "e", (32, 64, False, "Identity"), (64, 5, False, "GELU"), normalize=False)
    first, second = (
        load_file(path / f"{n}_Dense/model.safetensors")["linear.weight"].double().numpy() for n in (2, 3)
    )
    for own, text in zip(Encoder(path, settings(path), CPU).encode(TEXTS), TEXTS, strict=True):
        raw = second @ (first @ mean_of(path, text))
        gelu = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in raw]
        np.testing.assert_allclose(own, gelu, rtol=1e-4, atol=1e-5)


def _break_activation(path):
    config = json.loads((path / "2_Dense/config.json").read_text())
    write_json(path / "2_Dense/config.json", config | {"activation_function": "my.own.Snake"})


def _break_shape(path):
    save_file({"linear.weight": torch.zeros(6, 31)}, path / "2_Dense/model.safetensors")


def _break_chain(path):
    write_json(path / "2_Dense/config.json", {"in_features": 31, "out_features": 6, "bias": False})
    save_file({"linear.weight": torch.zeros(6, 31)}, path / "2_Dense/model.safetensors")


def _run_code(path):
    (path / "2_Dense/model.safetensors").unlink()
    torch.save({"linear.weight": Encoder}, path / "2_Dense/pytorch_model.bin")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (
            _break_activation,
            "config.json: found the activation_function 'Snake', expected one of Identity, Tanh, ",
        ),
        (
            _break_shape,
            r"model.safetensors holds \{'linear.weight': \(6, 31\)\}, expected \{'linear.weight': \(6, 32\)",
        ),
        (_break_chain, "2_Dense reads 31 numbers, expected 32, as come before it"),
        (
            lambda path: (path / "2_Dense/model.safetensors").unlink(),
            "2_Dense holds no model.safetensors and no pytorch_model",
        ),
        (
            lambda path: (path / "2_Dense/model.safetensors").write_bytes(b"half"),
            "model.safetensors cannot be read",
        ),
        (lambda path: (path / "2_Dense/config.json").unlink(), "2_Dense/config.json cannot be read"),
        (_run_code, "pytorch_model.bin cannot be read .*expected tensors alone"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(tmp_path, breaks, message):
    path = dense_encoder(tmp_path / "e", (32, 6, False, "Tanh"))
    breaks(path)
    with pytest.raises(DataError, match=message):
        Encoder(path, settings(path), CPU)


def passages_in(path):
    write_table(
        path, [SourcedPassage(id=f"{n}", title="", text=text) for n, text in enumerate(TEXTS)], Origin()
    )
    return str(path)


@pytest.mark.parametrize("pickled", [False, True])
def test_the_layer_goes_with_its_vectors_to_the_corpus_and_no_pickle_does(tmp_path, pickled):
    path = dense_encoder(tmp_path / "e", (32, 6, True, "ReLU"), pickled=pickled)
    passages, vectors, corpus = passages_in(tmp_path / "p"), str(tmp_path / "v"), str(tmp_path / "c")
    options = {"passage_format": "{text}", "max_tokens": 16}
    encode_passages(EncodeConfig(passages=passages, encoder=str(path), output=vectors, **options))
    build_index(IndexConfig(passages=passages, vectors=vectors, output=corpus, bm25=False))
    files = read_manifest(tmp_path / "c")[0].files
    assert {"dense/encoder/2_Dense/config.json", "dense/encoder/2_Dense/model.safetensors"} < files.keys()
    assert not [name for name in files if name.endswith(".bin")]
    shutil.rmtree(path)
    retriever = CorpusRetriever(tmp_path / "c", SearchConfig(method="dense"))
    for number, text in enumerate(TEXTS):
        (hit,) = retriever.find([text], 1)[0]
        assert hit.passage.id == f"{number}"
        assert hit.score == pytest.approx(1.0, abs=2e-3)


def dpr(path, kind, projection=0, seed=0):
    """Half of a DPR model with its tokenizer."""
    tiny_encoder(path)
    (path / "model.safetensors").unlink()
    size = len(AutoTokenizer.from_pretrained(path))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = kind(
        DPRConfig(vocab_size=size, max_position_embeddings=64, projection_dim=projection, **shape)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings.word" in name:
                parameter.mul_(30)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    inner = next(iter(weights)).split(".")[0]
    weights[f"{inner}.bert_model.pooler.dense.weight"] = torch.zeros(32, 32)  # the published files have it
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return model, str(path)


@pytest.mark.parametrize("projection", [0, 5])
@pytest.mark.parametrize("kind", [DPRQuestionEncoder, DPRContextEncoder])
def test_dpr_gives_its_first_token_projected_and_not_normalised(tmp_path, kind, projection):
    model, path = dpr(tmp_path / "e", kind, projection)
    assert (settings(path).pooling, settings(path).normalize) == ("cls", False)
    encoder = Encoder(path, settings(path), CPU)
    found = encoder.encode(TEXTS)
    assert encoder.dim == found.shape[1] == (projection or 32)
    inner = model.question_encoder if kind is DPRQuestionEncoder else model.ctx_encoder
    tokenizer = AutoTokenizer.from_pretrained(path)
    for own, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            first = inner.bert_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
            expected = inner.encode_proj.weight @ first + inner.encode_proj.bias if projection else first
        np.testing.assert_allclose(own, expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="pooling: found 'mean' with a DPR encoder"):
        Encoder(path, settings(path, pooling="mean"), CPU)


def test_passages_and_queries_of_dpr_have_an_encoder_each(tmp_path):
    of_passages, context = dpr(tmp_path / "ctx", DPRContextEncoder, seed=1)
    of_queries, question = dpr(tmp_path / "question", DPRQuestionEncoder, seed=2)
    passages, vectors, corpus = passages_in(tmp_path / "p"), tmp_path / "v", tmp_path / "c"
    options = {"passages": passages, "passage_format": "{text}", "max_tokens": 16}
    encode_passages(EncodeConfig(**options, encoder=context, query_encoder=question, output=str(vectors)))
    build_index(IndexConfig(passages=passages, vectors=str(vectors), output=str(corpus), bm25=False))
    tokenizer = AutoTokenizer.from_pretrained(context)
    inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        keys = torch.cat([of_passages(**own).pooler_output for own in inputs])
        query = of_queries(**inputs[0]).pooler_output[0]
    np.testing.assert_allclose(VectorShards(vectors).take(np.arange(3)), keys.numpy(), atol=2e-3)
    hits = CorpusRetriever(corpus, SearchConfig(method="dense")).find([TEXTS[0]], 3)[0]
    scores = (keys @ query).tolist()
    assert [hit.passage.id for hit in hits] == [f"{n}" for n in sorted(range(3), key=lambda n: -scores[n])]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=0.05)


def test_a_half_of_dpr_in_the_others_place_is_refused(tmp_path):
    _, context = dpr(tmp_path / "ctx", DPRContextEncoder)
    _, question = dpr(tmp_path / "question", DPRQuestionEncoder)
    _, narrow = dpr(tmp_path / "narrow", DPRQuestionEncoder, projection=5)
    passages = passages_in(tmp_path / "p")
    cases = [
        (
            {"encoder": context},
            ConfigError,
            "query_encoder: found nothing, expected the DPRQuestionEncoder that was trai",
        ),
        (
            {"encoder": context, "query_encoder": context},
            ConfigError,
            "query_encoder: found a DPRContextEncoder at",
        ),
        (
            {"encoder": question},
            ConfigError,
            "encoder: found a DPRQuestionEncoder at .*, expected one of passages",
        ),
        (
            {"encoder": context, "query_encoder": narrow},
            DataError,
            "makes vectors of 5 numbers, expected 32, as",
        ),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            encode_passages(EncodeConfig(passages=passages, output=str(tmp_path / "v"), **options))
    config = json.loads((tmp_path / "ctx/config.json").read_text())
    write_json(tmp_path / "ctx/config.json", config | {"architectures": ["DPRReader"]})
    with pytest.raises(
        DataError, match="holds a DPRReader, expected DPRQuestionEncoder or DPRContextEncoder"
    ):
        settings(context)
