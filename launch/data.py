"""The command lines of `sd-search data`: parse, run, say what was done. What a command needs is imported
when it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_sd.config.command_line import parse

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which build it takes


def import_(argv: Sequence[str]) -> None:
    """`sd-search data import`."""
    from data_prep.sources.questions import ImportConfig, import_file

    config = parse(ImportConfig, argv, "sd-search data import")
    report = import_file(config)
    print(f"{report.num_kept} {config.kind} -> {config.output}")
    counted = [
        f"{report.num_rejected} rejected",
        *(f"{number} {what}" for what, number in report.noted.items()),
    ]
    if report.num_rejected or report.noted:
        print(", ".join(counted) + (f": see {report.rejects}" if report.rejects else ""))


def chunk(argv: Sequence[str]) -> None:
    """`sd-search data chunk`."""
    from data_prep.passages.chunk import ChunkConfig, chunk_passages

    config = parse(ChunkConfig, argv, "sd-search data chunk")
    print(f"passages version {chunk_passages(config)} -> {config.output}")


def encode(argv: Sequence[str]) -> None:
    """`sd-search data encode`."""
    from data_prep.vectors.encode import EncodeConfig, encode_part, encode_passages

    config = parse(EncodeConfig, argv, "sd-search data encode")
    if config.part is None:
        print(f"vectors version {encode_passages(config)} -> {config.output}")
    else:
        print(f"part {config.part[0]} of {config.part[1]} -> {encode_part(config, config.part)}")


def import_index(argv: Sequence[str]) -> None:
    """`sd-search data import-index`."""
    from data_prep.vectors.import_index import ImportIndexConfig
    from data_prep.vectors.import_index import import_index as take_over

    config = parse(ImportIndexConfig, argv, "sd-search data import-index")
    print(f"vectors version {take_over(config)} -> {config.output}")


def index(argv: Sequence[str]) -> None:
    """`sd-search data index`."""
    from data_prep.passages.index import IndexConfig, build_index

    config = parse(IndexConfig, argv, "sd-search data index")
    print(f"corpus version {build_index(config)} -> {config.output}")


def verify(argv: Sequence[str]) -> None:
    """`sd-search data verify`."""
    from data_prep.passages.inspect import InfoConfig, verify_directory

    verify_directory(parse(InfoConfig, argv, "sd-search data verify"), print)


def info(argv: Sequence[str]) -> None:
    """`sd-search data info`."""
    from data_prep.passages.inspect import InfoConfig, corpus_info

    print(corpus_info(parse(InfoConfig, argv, "sd-search data info")))


def recall(argv: Sequence[str]) -> None:
    """`sd-search data recall`."""
    from eval import retrieval

    retrieval.main(parse(retrieval.RetrievalConfig, argv, "sd-search data recall"))


def build(argv: Sequence[str]) -> None:
    """`sd-search data build`."""
    from data_prep.passages import build as parts
    from launch import retriever

    config = parse(parts.BuildConfig, argv, "sd-search data build")
    corpus = parts.build(config, print)
    if corpus is None:
        return
    if config.serve:
        retriever.main([f"--corpus={corpus}", f"--port={config.port}"])
    else:
        print(f"corpus {corpus}; `sd-search retriever serve --corpus {corpus}` serves it")


def plan(argv: Sequence[str]) -> None:
    """`sd-search data plan`."""
    from data_prep.passages.index_sizes import IndexSizesConfig, estimates, render_plan

    config = parse(IndexSizesConfig, argv, "sd-search data plan")
    print(render_plan(config, estimates(config)))


def upload(argv: Sequence[str]) -> None:
    """`sd-search data upload`."""
    from data_prep.upload.command import upload as fill
    from data_prep.upload.source import UploadConfig

    print(fill(parse(UploadConfig, argv, "sd-search data upload")))
