"""Every command of ours in a fenced block of a page parses: its name, its options, their values."""

import re
import shlex
from pathlib import Path

import pytest

from docs.making.links import ROOT
from docs.making.reference import record_of
from launch.cli import COMMANDS, find
from launch.local import split_num_ranks
from launch.options import split_options
from launch.presets import expand
from launch.recipe import read_recipe
from launch.shell.completion import OPTIONS
from megatron_sd.config.command_line import name_positionals, parse
from megatron_sd.errors import ConfigError
from megatron_sd.sft_config import SftConfig

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
POSITIONAL = {
    "compare": ("first", "second"),
    "report": ("run_dir",),
    "watch": ("run_dir",),
    "push": ("model",),
}
# a page may leave keys to the reader, or to a file of the reader's
LEFT_OUT = "missing from the configuration"


def commands_of(page: Path) -> list[str]:
    """The commands of sd-search in a page's fenced blocks, each on one line."""
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*sd-search ", line)]


def refusal(command: str) -> str | None:
    """What is wrong with a command; None where it parses."""
    plain = re.sub(r"\[(--[^\]]*(?:\[[^\]]*\])?[^\]]*)\]", r"\1", command)  # [--option that may be given]
    plain = plain.replace("--num-ranks N", "--num-ranks 2")
    words = [word for word in shlex.split(plain, comments=True) if word != "..."][1:]
    try:
        if words[0] not in ("--help", "--version", "COMMAND"):
            check(words)
    except (ConfigError, KeyError) as error:
        return None if LEFT_OUT in str(error) else str(error)
    return None


def check(words: list[str]) -> None:
    """Raise ConfigError for a command that its program would refuse, whatever files there are."""
    command, rest = find(words)
    name = next(key for key, value in COMMANDS.items() if value is command)
    rest = [word.replace("launch/configs", f"{ROOT}/launch/configs") for word in without_files(rest)]
    if name == "recipe":
        read_recipe([*rest, *([] if any("output" in word for word in rest) else ["--output=x"])])
        return
    if name in POSITIONAL:
        rest = name_positionals(rest, POSITIONAL[name])
    _, rest = split_num_ranks(rest)
    rest, _ = expand(rest)
    rest = without_own(rest, {own for own in OPTIONS[name] if own.startswith("--")})
    records = [record_of(own) for own in OPTIONS[name] if not own.startswith("--")]
    for record in records[:-1]:  # the last takes what is left
        own, rest = split_options(rest, record)
        parse(record, own, name)
    if records:
        parse(SftConfig if name in ("launch", "plan") and "sft" in words else records[-1], rest, name)


def without_files(words: list[str]) -> list[str]:
    """Without `--config FILE` of files that a reader writes: only ours can be read."""
    kept: list[str] = []
    pairs = zip(words, [*words[1:], ""], strict=True)
    for word, value in pairs:
        if word == "--config" and not (ROOT / value).is_file():
            next(pairs, None)
        else:
            kept.append(word if word.startswith("-") or not word.startswith("results/") else f"{ROOT}/{word}")
    return kept


def without_own(words: list[str], own: set[str]) -> list[str]:
    """Without options that are in no record, and their values."""
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word.partition("=")[0] not in own:
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return kept


COMMANDS_OF_PAGES = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, command in enumerate(commands_of(page))
]


def test_pages_have_commands():
    assert len(COMMANDS_OF_PAGES) > 80


@pytest.mark.parametrize("command", COMMANDS_OF_PAGES)
def test_the_command_parses(command):
    assert refusal(command) is None, command


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("sd-search trian --config x.yaml", "did you mean `sd-search train`?"),
        ("sd-search train --config x.yaml --distill.blok none", "did you mean distill.block?"),
        ("sd-search eval --model.path M [--strategy rga]", "did you mean rag?"),
        ("sd-search recipe real-0.5b --sft.epochs 3", "epochs"),
        ("sd-search plan --model m --gpus many", "gpus: found 'many'"),
        ("sd-search train --as gigop", "did you mean gigpo?"),
    ],
)
def test_a_mistake_is_told(command, told):
    assert told in refusal(command)
