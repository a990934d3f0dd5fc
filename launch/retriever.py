"""`sd-search retriever serve`: a corpus directory as a service on this machine, for any number of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sd.config import SearchConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.remote.client import read_token
from megatron_sd.retrieval.service.server import serve
from megatron_sd.retrieval.service.state import RetrievalService, ServiceSettings


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """`sd-search retriever serve`: what to serve, where, and how much a request may ask for."""

    corpus: str  # a corpus directory
    host: str = "127.0.0.1"  # any other address needs token_file
    port: int = 8741  # 0: any free one, see port_file
    port_file: str | None = None  # gets the address http://host:port
    token_file: str | None = None  # a file with a secret that every request must carry
    search: SearchConfig = field(default_factory=SearchConfig)
    default_top_k: int = 3  # where a request names none
    max_top_k: int = 100  # that a request may ask for
    max_queries: int = 16384  # of one request: a loop that asks once a turn for a whole batch
    max_query_bytes: int = 4096  # longer queries are cut
    max_body_mib: int = 64  # of a request
    max_queued_queries: int = 65536  # more are answered 503, and the client comes again
    max_batch_queries: int = 64  # that are searched together
    max_connections: int = 4096  # at one time
    idle_timeout_s: int = 60  # until a silent connection is closed
    # refuse blank and long queries, an empty list, a topk out of range; else they are answered
    strict: bool = False


def main(argv: Sequence[str]) -> None:
    """The command line. Raises ConfigError or DataError; ends at SIGINT or SIGTERM."""
    config = parse(ServeConfig, argv, "sd-search retriever serve")
    check_ranges(config)
    service = RetrievalService(
        lambda progress: CorpusRetriever(config.corpus, config.search, progress),
        service_settings(config),
        _say,
    )
    serve(service, None if config.port_file is None else Path(config.port_file), _say)


def service_settings(config: ServeConfig) -> ServiceSettings:
    """The service's part of the configuration, its secret read."""
    return ServiceSettings(
        host=config.host,
        port=config.port,
        token=None if config.token_file is None else read_token(config.token_file),
        max_queries=config.max_queries,
        max_query_bytes=config.max_query_bytes,
        max_top_k=config.max_top_k,
        default_top_k=config.default_top_k,
        max_body_bytes=config.max_body_mib << 20,
        max_queued_queries=config.max_queued_queries,
        max_batch_queries=config.max_batch_queries,
        max_connections=config.max_connections,
        idle_timeout_s=config.idle_timeout_s,
        is_strict=config.strict,
    )


def _say(line: str) -> None:
    print(line, flush=True)
