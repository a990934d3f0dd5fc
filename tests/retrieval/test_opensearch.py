"""The OpenSearch backend: the official client over real HTTP against a server that is a fake
(fake_opensearch.py)."""

import asyncio
import dataclasses
import math
import socket

import numpy as np
import pytest

from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, PassageTable, write_table
from data_prep.upload.command import upload
from data_prep.upload.source import UploadConfig
from data_prep.vectors.encode import EncodeConfig, encode_passages
from data_prep.vectors.vector_index import exact_search
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import OpenSearchConfig, RetrieverConfig
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.corpus.encoder import Encoder, EncoderSettings, choose_device
from tests.retrieval.fake_opensearch import SHARDS, FakeOpenSearch, refused
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

QUERIES = ["kalo 7", "dava sul", "pergo"]
NUM_ROWS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opensearch")
    rows = [
        SourcedPassage(id=f"{n:02d}", title=WORDS[n % 8], text=f"{WORDS[n * 3 % 8]} {n}")
        for n in range(NUM_ROWS)
    ]
    write_table(folder / "passages", rows, Origin())
    tiny_encoder(folder / "encoder")
    paths = {"passages": f"{folder}/passages", "encoder": f"{folder}/encoder", "output": f"{folder}/vectors"}
    encode_passages(EncodeConfig(**paths, rows_per_shard=16, devices=("cpu",)))
    return folder


def test_a_server_that_never_answers_is_asked_once():
    """A deadline is of the search, retries included."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = OpenSearchConfig(
            url=f"http://127.0.0.1:{listening.getsockname()[1]}", index="none", deadline_s=0.3
        )
        with pytest.raises(RetrievalError, match="gave no answer|no answer|Timeout"):
            open_retriever(RetrieverConfig(opensearch=config))
        listening.settimeout(0.2)
        listening.accept()[0].close()
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.fixture
def server():
    with FakeOpenSearch() as server:
        yield server


def _upload_config(folder, server, **changes):
    own = {"url": server.url, "index": "wiki", "device": "cpu"} | changes
    return UploadConfig(passages=f"{folder}/passages", opensearch=OpenSearchConfig(**own), batch_size=7)


def _opened(folder, server, **changes):
    return open_retriever(RetrieverConfig(opensearch=_upload_config(folder, server, **changes).opensearch))


@pytest.fixture
def filled(folder, server):
    config = _upload_config(folder, server, vectors=f"{folder}/vectors")
    assert upload(config) == f"40 passages -> wiki at {server.url}"
    return server


def test_bm25_finds_what_lucenes_formula_ranks_first(folder, filled):
    retriever = _opened(folder, filled)
    passages = {passage.id: passage for passage in PassageTable(folder / "passages")}
    assert retriever.corpus_version == PassageTable(folder / "passages").version
    seven, *_ = asyncio.run(retriever.search(QUERIES, 4))
    # "7" stands in passage 07 alone, "kalo" twice in 5 passages; every passage has 3 words, so length does
    # not count
    idf = {"7": math.log(1 + 39.5 / 1.5), "kalo": math.log(1 + 35.5 / 5.5)}
    assert [hit.passage.id for hit in seven] == ["07", "00", "08", "16"]  # ties by id
    assert seven[0].score == pytest.approx(idf["7"] / 2.5)
    assert seven[0].passage.text == passages["07"].text
    # as title and as text
    assert [hit.score for hit in seven[1:]] == pytest.approx([2 * idf["kalo"] / 3.5] * 3)
    assert retriever.find(["nowhere"], 3) == [()]
    assert retriever.find([], 3) == []


def test_vectors_are_found_as_exact_search_finds_them(folder, filled):
    retriever = _opened(folder, filled, vectors=f"{folder}/vectors", method="knn")
    shards = VectorShards(folder / "vectors")
    assert retriever.corpus_version == shards.version
    settings = EncoderSettings(**shards.manifest.settings["encoder"])
    queries = Encoder(shards.directory / "encoder", settings, choose_device("cpu")).encode_queries(QUERIES)
    passages = list(PassageTable(folder / "passages"))
    vectors = np.concatenate(list(shards.blocks(100)))
    lowest = []
    for hits, rows, query in zip(
        retriever.find(QUERIES, NUM_ROWS), exact_search(shards, queries, NUM_ROWS), queries
    ):
        assert {hit.passage.id for hit in hits[:5]} == {passages[row].id for row in rows[:5]}
        products = (vectors[rows] @ query).tolist()
        assert [hit.score for hit in hits] == pytest.approx(products, abs=1e-4)
        lowest.append(min(products))
    # OpenSearch scores products above 0 in one way and others in another
    assert min(lowest) < 0 < max(lowest)


def test_what_is_created(folder, filled):
    body = filled.indices["wiki"].body
    assert body["settings"]["index"] == {
        "similarity": {"default": {"type": "BM25", "k1": 1.5, "b": 0.75}},
        "knn": True,
    }
    assert body["mappings"]["dynamic"] == "strict"
    assert body["mappings"]["properties"]["title"] == {"type": "text", "index": False, "copy_to": "contents"}
    assert body["mappings"]["properties"]["vector"]["dimension"] == 32
    assert len([request for request in filled.requests if request == ("POST", "/_bulk")]) == 6  # 40 rows by 7


def test_an_upload_may_be_repeated_but_not_mixed(folder, filled, tmp_path):
    config = _upload_config(folder, filled, vectors=f"{folder}/vectors")
    assert upload(config).startswith("40 passages")
    with pytest.raises(DataError, match=r"holds vectors_version \w{64}, expected None: choose another index"):
        upload(_upload_config(folder, filled))
    write_table(tmp_path / "passages", [SourcedPassage(id="1", title="", text="x")], Origin())
    with pytest.raises(
        DataError, match=r"holds passages_version \w{64}, expected \w{64}, .*num_passages 40, expected 1"
    ):
        upload(_upload_config(tmp_path, filled))
    with pytest.raises(DataError, match="holds vectors of other passages"):
        upload(_upload_config(tmp_path, filled, vectors=f"{folder}/vectors"))


def test_an_unfinished_upload_is_not_searched(folder, server):
    def third_fails(method, path):
        is_third = path == "/_bulk" and server.requests.count((method, path)) == 3
        return (
            refused(403, "cluster_block_exception", "index [wiki] blocked by: [FORBIDDEN/12/disk usage]")
            if is_third
            else None
        )

    server.disturb = third_fails
    with pytest.raises(DataError, match="refused the upload: .*disk usage"):
        upload(_upload_config(folder, server))
    server.indices["wiki"].visible = dict(server.indices["wiki"].written)
    with pytest.raises(RetrievalError, match=r"holds 14 of 40 passages: upload them again"):
        _opened(folder, server)
    upload(_upload_config(folder, server))
    assert len(_opened(folder, server).find(["kalo"], 3)[0]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda own: own.pop("text"),
            r"without the text field 'text' \(it has passage_id, passages_version, title\); fill it",
        ),
        (lambda own: own.update(title=5), "without the text field 'title'"),
        (
            lambda own: own.update(passages_version="other"),
            "holds a document of the passages other, expected",
        ),
    ],
)
def test_a_document_of_another_schema_or_version_is_named(change, message, folder, filled):
    retriever = _opened(folder, filled)
    change(filled.indices["wiki"].visible["7"])
    with pytest.raises(RetrievalError, match=message):
        retriever.find(QUERIES, 3)


WHOLE = {"took": 1, "timed_out": False, "_shards": SHARDS, "hits": {"hits": []}, "status": 200}
SOURCE = {"passage_id": "0", "title": "t", "text": "x"}
HIT = {"_index": "wiki", "_id": "0", "_source": SOURCE}
CLAUSES = refused(400, "too_many_clauses", "maxClauseCount is set to 1024")[1]
FORBIDDEN = refused(403, "security_exception", "no permissions for [indices:data/read/msearch]")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {"responses": [CLAUSES]}), "refused a query: too_many_clauses: max"),
        (
            (200, {"responses": [WHOLE | {"_shards": SHARDS | {"failed": 1}}]}),
            "for a part of its shards only",
        ),
        ((200, {"responses": [WHOLE | {"timed_out": True}]}), "for a part of its shards only"),
        ((200, {"responses": [{"took": 1}]}), r"another schema \(no 'timed_out'\): \{'took': 1\}"),
        ((200, {"responses": [WHOLE | {"hits": {"hits": [HIT]}}]}), r"another schema \(no '_score'\)"),
        (
            (200, {"responses": [WHOLE | {"hits": {"hits": [HIT | {"_score": None}]}}]}),
            "gave a hit the score None",
        ),
        ((200, {"responses": [WHOLE | {"hits": None}]}), "another schema"),
        ((200, {"responses": []}), "expected 1 responses"),
        ((200, {"result": []}), r"answered \{'result': \[\]\}, expected 1 responses"),
        ((200, [1]), r"answered \[1\], expected 1 responses"),
        ((200, b"<html>"), "gave no answer: SerializationError|expected 1 responses"),
        ((400, {"error": "plain text", "status": 400}), "gave no answer: RequestError: .*plain text"),
        (FORBIDDEN, "status 403: security_exception: no perm"),
        ((401, b"Unauthorized"), "gave no answer: AuthenticationException"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_named(reply, message, folder, filled):
    retriever = _opened(folder, filled)
    SOURCE["passages_version"] = retriever.corpus_version
    filled.disturb = lambda method, path: reply if path == "/_msearch" else None
    with pytest.raises(RetrievalError, match=message):
        retriever.find(["kalo"], 3)


def test_a_busy_server_is_asked_again(folder, filled):
    retriever = _opened(folder, filled)
    busy = refused(429, "rejected_execution_exception", "rejected execution of search")
    filled.disturb = lambda method, path: (
        busy if filled.requests.count(("POST", "/_msearch")) in (1, 2) else None
    )
    assert len(retriever.find(["kalo"], 3)[0]) == 3
    filled.disturb = lambda method, path: busy
    with pytest.raises(
        RetrievalError, match="status 429: rejected_execution_exception: rejected execution of search"
    ):
        retriever.find(["kalo"], 3)


def test_no_index_another_index_other_vectors_and_no_server(folder, filled, tmp_path):
    for changes, message in [
        ({"index": "other"}, f"OpenSearch index 'other' at {filled.url} does not exist; fill it"),
        ({"index": "foreign"}, "was not made by `sd-search data upload`"),
        ({"url": "http://127.0.0.1:9"}, "gave no answer: ConnectionError"),
    ]:
        filled._create("foreign", {"mappings": {"properties": {}}})
        with pytest.raises(RetrievalError, match=message):
            _opened(folder, filled, **changes)
    with pytest.raises(ConfigError, match="opensearch.vectors: found nothing"):
        _opened(folder, filled, method="knn")
    paths = {
        "passages": f"{folder}/passages",
        "encoder": f"{folder}/encoder",
        "output": f"{tmp_path}/vectors",
    }
    encode_passages(EncodeConfig(**paths, query_prefix="q: ", devices=("cpu",)))
    with pytest.raises(
        RetrievalError, match=r"holds the vectors \w{16}, expected \w{16}, those of .*vectors"
    ):
        _opened(folder, filled, method="knn", vectors=f"{tmp_path}/vectors")


def test_a_login_is_sent_and_must_be_one(folder, filled, tmp_path):
    (tmp_path / "login").write_text("reader:secret\n")
    _opened(folder, filled, login_file=f"{tmp_path}/login")
    assert filled.authorizations == {None, "Basic cmVhZGVyOnNlY3JldA=="}
    (tmp_path / "login").write_text("secret\n")
    for changes, message in [
        ({"login_file": f"{tmp_path}/login"}, r"holds no login; expected one line USER:PASSWORD"),
        ({"login_file": f"{tmp_path}/none"}, "cannot read"),
        ({"url": "127.0.0.1:9200"}, r"opensearch.url: found '127.0.0.1:9200', expected http"),
    ]:
        with pytest.raises(DataError, match=message):
            _opened(folder, filled, **changes)


def test_one_server_is_configured(folder):
    config = _upload_config(folder, FakeAddress())
    with pytest.raises(ConfigError, match="qdrant, opensearch: found neither, expected one"):
        upload(dataclasses.replace(config, opensearch=None))
    holder = dataclasses.make_dataclass("Holder", ["retriever"])
    check_ranges(holder(RetrieverConfig(opensearch=config.opensearch)))
    with pytest.raises(ConfigError, match="found corpus and opensearch, expected one"):
        check_ranges(holder(RetrieverConfig(corpus="c", opensearch=config.opensearch)))


class FakeAddress:
    url = "http://127.0.0.1:9"


def test_a_client_that_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(
        ConfigError,
        match=r"found opensearch, but its package opensearchpy is not installed.*megatron-sd\[opensearch\]",
    ):
        open_retriever(
            RetrieverConfig(opensearch=OpenSearchConfig(url="http://127.0.0.1:9", index="passages"))
        )
