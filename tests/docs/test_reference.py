"""The reference has every key of every program, with its default and what it is."""

import dataclasses
import re

import pytest

from docs.making.reference import (
    EXTRA,
    PROGRAMS_PAGE,
    RUN_PAGE,
    comments_of,
    keys_of,
    pages,
    record_of,
    run_sections,
)
from launch.cli import COMMANDS
from launch.shell.completion import OPTIONS
from megatron_sd.config import Config
from megatron_sd.config.command_line import choices_of

RECORDS = sorted({own for options in OPTIONS.values() for own in options if not own.startswith("--")})


@dataclasses.dataclass(frozen=True)
class _Base:
    """An example. told: by the docstring, of both."""

    # above
    # in two lines
    first: int = 1  # and beside
    told: str = "x"


@dataclasses.dataclass(frozen=True)
class _Extended(_Base):
    """Another. none, told: by its own docstring."""

    none: int | None = None


@pytest.fixture(scope="module")
def written():
    return pages()


def everything(record):
    """The record and the records of its sections."""
    yield record
    for key in keys_of(record):
        if key.section is not None:
            yield from everything(key.section)


def test_every_key_of_a_run_stands_there_with_its_default(written):
    page = written[RUN_PAGE]
    for name in choices_of(Config):
        assert f'<code id="{name}">' in page, name
    row = {
        match[1]: match[2]
        for match in re.finditer(r'^\| <code id="(.+?)">.+?</code> \|.+?\| (.*?) \|', page, re.M)
    }
    assert row["rollout.group_size"] == "`5`" and row["model.path"] == "must be given"
    assert row["distill.alpha.value"] == "`0.001`" and row["retriever.corpus"] == "`null`"
    assert row["advantage.terms"] == "`{reward: 1.0}`" and row["optimizer.betas"] == "`[0.9, 0.95]`"


def test_every_command_stands_there(written):
    page = written[PROGRAMS_PAGE]
    assert [name for name in COMMANDS if f"\n## {name} {{" not in page] == []
    assert '<code id="gate.limit">limit</code> | int | `400` |' in page
    assert (
        "| `optimizer` | [section](run.md#optimizer) | `{learning_rate: 1.0e-05, warmup_steps: 10}` |" in page
    )


@pytest.mark.parametrize("entry", RECORDS)
def test_every_key_says_what_it_is(entry):
    silent = [
        f"{record.__name__}.{key.name}"
        for record in everything(record_of(entry))
        for key in keys_of(record)
        if not key.meaning and key.section is None
    ]
    assert silent == [], "put a comment beside each"


def test_every_option_that_is_in_no_record_is_explained():
    assert {own for options in OPTIONS.values() for own in options if own.startswith("--")} == set(EXTRA)


def test_comments_and_docstrings_of_a_record():
    assert comments_of(_Base) == {"first": "above in two lines and beside", "told": ""}
    assert {key.name: key.meaning for key in keys_of(_Extended)} == {
        "first": "above in two lines and beside",
        "told": "by its own docstring",
        "none": "by its own docstring",
    }


def test_sections_of_a_run_have_one_name_each():
    found = run_sections()
    assert len(set(found.values())) == len(found) and "" in found.values()


def test_tables_have_four_columns(written):
    for page in written.values():
        rows = [line for line in page.splitlines() if line.startswith("| ") and "option" not in line[:9]]
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert widths <= {3, 5}, page
